"""What is shipped, what the native library is built from, and what happens where it cannot be."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from loki_attn.kernels.native import place

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "native" / "loki_attn.h"
FOLDER = "loki_attn/kernels/native"
SOURCES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "loki_attn").rglob("*")
    if path.is_file() and path.suffix not in {".pyc", ".so", ".dylib"}
} - {f"{FOLDER}/native_missing.txt"}

# Ways in which no library comes about: environment, options of CMake, words of the reason.
NO_LIBRARY = {
    "no compiler": ({"CXX": "/nowhere/g++"}, (), "no working C++ compiler was found"),
    "broken compiler": ({"CXX": "/bin/false"}, (), "no working C++ compiler was found"),
    "named compiler": ({}, ("-DCMAKE_CXX_COMPILER=/nowhere/g++",), "no working C++ compiler"),
    "turned off": ({}, ("-DLOKI_ATTN_NATIVE=OFF",), "LOKI_ATTN_NATIVE=OFF"),
}

DOCTOR = """
import json
from loki_attn.cli import doctor
from loki_attn.kernels.native import place
found = doctor.examine()
print(json.dumps({
    "backends": found["backends"],
    "native": found["native"],
    "library": str(place.find_library()),
}))
"""


def run(*command, cwd=ROOT, **environment):
    """Run a command with the tools of this environment first on PATH; its output, or failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"PATH": path, **{k: v for k, v in os.environ.items() if k != "PATH"}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def configure(build, *options, source=ROOT, **environment):
    return run("cmake", "-S", source, "-B", build, "-G", "Ninja", *options, **environment)


def build_with(hook, folder, settings=None):
    """Call a hook of the build backend in a process of its own; the file it made."""
    code = (
        "import sys, json, scikit_build_core.build as backend\n"
        f"backend.{hook}(sys.argv[1], json.loads(sys.argv[2]))"
    )
    run(sys.executable, "-c", code, folder, json.dumps(settings or {}))
    (made,) = folder.glob("loki_attn-*")
    return made


def doctor_of(site):
    """What an installation into the folder `site` says of itself."""
    out = run(sys.executable, "-W", "error", "-c", DOCTOR, cwd=site, PYTHONPATH=str(site))
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("case", NO_LIBRARY)
def test_without_a_library_the_reason_is_installed(case, tmp_path):
    environment, options, words = NO_LIBRARY[case]
    configure(tmp_path / "build", *options, **environment)
    run("cmake", "--build", tmp_path / "build")
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "site")
    installed = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert installed == [tmp_path / "site" / FOLDER / "native_missing.txt"]
    reason = installed[0].read_text()
    assert words in reason
    assert "install loki-attn again" in reason


def test_a_compiler_that_comes_later_is_found(tmp_path):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    configure(tmp_path, CXX="/nowhere/g++")
    assert (tmp_path / "native_missing.txt").is_file()
    assert "Native kernels: left out" not in configure(tmp_path)
    assert "FOR_EACH_ISA(X)" in (tmp_path / "generated" / "isas.h").read_text()


def test_an_editable_installation_leaves_no_library_of_an_earlier_one(tmp_path):
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    folder = tmp_path / "src" / FOLDER
    folder.mkdir(parents=True)
    (folder / "libloki_attn.so").write_bytes(b"old")
    configure(
        tmp_path / "build", "-DLOKI_ATTN_IN_SOURCE=ON", "-DLOKI_ATTN_NATIVE=OFF", source=tmp_path
    )
    run("cmake", "--install", tmp_path / "build")
    assert [path.name for path in folder.iterdir()] == ["native_missing.txt"]


def test_a_wheel_without_the_library_works_and_says_why(tmp_path):
    settings = {
        "cmake.define.LOKI_ATTN_NATIVE": "OFF",
        "build-dir": str(tmp_path / "build"),
    }
    wheel = build_with("build_wheel", tmp_path / "wheel", settings)
    assert re.fullmatch(r"loki_attn-[\d.]+-py3-none-(linux|macosx)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == SOURCES | {f"{FOLDER}/native_missing.txt"}

    found = doctor_of(tmp_path / "site")
    assert found["library"] == "None"
    assert found["native"] is None
    assert found["backends"]["chosen"] == "reference"
    (native,) = [b for b in found["backends"]["probed"] if b["name"] == "native"]
    assert not native["accepted"]
    assert "LOKI_ATTN_NATIVE=OFF" in native["reason"]


def test_a_source_distribution_holds_what_is_needed(tmp_path):
    with tarfile.open(build_with("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "native").rglob("*") if p.is_file()}
    tests = {f"tests/{p.relative_to(ROOT / 'tests')}" for p in (ROOT / "tests").rglob("*.py")}
    needed = {"CMakeLists.txt", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"}
    assert needed | native | tests | {f"src/{name}" for name in SOURCES} <= names
    assert [n for n in names if n.endswith((".so", ".dylib", ".pyc", "native_missing.txt"))] == []


@pytest.fixture
def library(request):
    """The installed library, and the tools that look into one."""
    if request.config.getoption("--native-library"):
        pytest.skip("says nothing of the installed library")
    installed = place.find_library()
    if installed is None:
        pytest.skip(place.why_missing())
    if not (sys.platform == "linux" and shutil.which("nm") and shutil.which("readelf")):
        pytest.skip("no tools here to look into a library")
    return installed


def test_the_library_shows_its_interface_and_nothing_else(library):
    shown = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert shown == set(re.findall(r"LOKI_EXPORT [^(]*?(loki_\w+)\(", HEADER.read_text()))


def test_the_library_needs_only_the_c_library(library):
    needed = re.findall(r"NEEDED.*\[(\w+)", run("readelf", "-d", library))
    assert set(needed) <= {"libc", "libm", "libpthread", "ld"}, needed


@pytest.mark.slow
def test_what_instruction_sets_share_runs_on_every_processor(library, tmp_path):
    """Where objects hold the same inline function the linker keeps the first: the plainest one."""
    configure(tmp_path)
    run("cmake", "--build", tmp_path)
    link = re.search(rf"^build {library.name}: (.*)", (tmp_path / "build.ninja").read_text(), re.M)
    linked = re.findall(r"(\w+)\.dir/\S+\.o\b", link[1])
    targets = list(dict.fromkeys(linked))
    assert targets[:2] == ["loki_core", "loki_portable"]
    symbols = {
        name: weak_symbols((tmp_path / "CMakeFiles" / f"{name}.dir").rglob("*.o"))
        for name in targets
    }
    plain = symbols.pop("loki_core") | symbols.pop("loki_portable")
    assert {name: found - plain for name, found in symbols.items() if found - plain} == {}


def weak_symbols(files):
    """Functions and data that the linker merges with those of the same name in other objects."""
    lines = run("nm", "--defined-only", *files).splitlines()
    return {line.split()[2] for line in lines if re.search(r" [VWu] ", line)}


@pytest.mark.slow
@pytest.mark.network
def test_a_source_distribution_installs_with_build_tools_from_the_index(library, tmp_path):
    """pip isolates the build; neither cmake nor ninja is on its PATH."""
    sdist = build_with("build_sdist", tmp_path / "sdist")
    venv.create(tmp_path / "venv", with_pip=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "g++", "as", "ld", "ar", "ranlib", "nm", "strip", "uname"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    python = tmp_path / "venv" / "bin" / "python"
    out = run(python, "-m", "pip", "install", "-v", "--no-deps", sdist, PATH=str(tools))
    assert "cmake" in out
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    found = doctor_of(site)
    assert found["library"] == str(site / FOLDER / place.LIBRARY_NAME)
    assert found["backends"]["chosen"] == "native"

"""The house rules, held: who imports whom, how large things grow, what a method brings along."""

import ast
import importlib
import inspect
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import loki_attn
from loki_attn.named_policies import PRESETS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "src" / "loki_attn"

SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("allocate", "evict", "prefill", "select", "store")
METHODS = sorted(
    path
    for room in ROOMS
    for path in (PACKAGE / room).glob("*.py")
    if path.name not in {"__init__.py", "base.py"}
)
METHOD_FIELDS = (
    "Paper",
    "arXiv",
    "What it does",
    "What we do differently",
    "Bytes read per decode step",
    "State per token",
)
NAMELESS = {"common", "helpers", "misc", "utils"}

# Each breaks one article of the import law: (file, line appended to it, contract that must break).
BREACHES = {
    "upwards": ("cache.py", "import loki_attn.attention", "The house has floors"),
    "sideways": ("report/rows.py", "import loki_attn.integrations", "The house has floors"),
    "homeless": ("stray.py", "import torch", "The house has floors"),
    "methods": ("select/loki.py", "import loki_attn.select.dense", "Methods know their base"),
    "verbs": ("evict/h2o.py", "import loki_attn.select.loki", "Methods know their base"),
    "second door": ("basis.py", "import transformers", "One door to transformers"),
    "lazy": ("key_stats.py", "def f():\n    import rich", "The terminal belongs"),
    "ctypes": ("kernels/reference.py", "import ctypes", "ctypes stays"),
}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def limit_of(path, *, anywhere, in_kernels):
    return in_kernels if name_of(path).startswith("kernels/") else anywhere


def lint_imports(root):
    """Run import-linter on the package under root, whatever is installed."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_law_holds():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("breach", BREACHES)
def test_import_law_notices(breach, tmp_path):
    file, line, contract = BREACHES[breach]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for source in SOURCES:
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    with (tmp_path / "src" / "loki_attn" / file).open("a") as target:
        target.write(f"\n{line}\n")

    done = lint_imports(tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert any(row.startswith(contract) for row in broken), done.stdout


def test_files_stay_small():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    too_long = {
        name_of(path): n
        for path, n in lines.items()
        if n > limit_of(path, anywhere=400, in_kernels=600)
    }
    assert too_long == {}
    assert statistics.median(lines.values()) < 150


def test_functions_stay_small():
    too_long = {}
    for path in SOURCES:
        limit = limit_of(path, anywhere=60, in_kernels=120)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node)
                if lines > limit:
                    too_long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert too_long == {}


def code_lines(function):
    """Lines of a function without its docstring: explaining more is never a fault."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def test_every_file_has_a_meaningful_name():
    nameless = [path for path in SOURCES if NAMELESS & set(name_of(path)[:-3].split("/"))]
    assert nameless == []


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_has_its_test(method):
    assert (TESTS / method.parent.name / f"test_{method.name}").is_file()


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_introduces_itself(method):
    docstring = ast.get_docstring(ast.parse(method.read_text())) or ""
    starts = [line.partition(":")[0] for line in docstring.splitlines()]
    assert [field for field in METHOD_FIELDS if field not in starts] == []


def test_no_two_files_bring_the_same_preset():
    """The later one would win in silence."""
    homes = {}
    for path in [PACKAGE / "named_policies.py", *METHODS]:
        module = importlib.import_module("loki_attn." + name_of(path)[:-3].replace("/", "."))
        for preset in getattr(module, "PRESETS", {}):
            homes.setdefault(preset, []).append(name_of(path))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
    assert len(homes) > len(PRESETS)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_method_names_itself_as_its_file(method):
    module = importlib.import_module("loki_attn." + name_of(method)[:-3].replace("/", "."))
    named = [v for v in vars(module).values() if getattr(v, "method", None) == method.stem]
    assert len(named) == 1
    assert named[0].__module__ == module.__name__


def test_public_api_is_the_pinned_one():
    pinned = (TESTS / "public_api.txt").read_text().split()
    assert sorted(loki_attn.__all__) == sorted(pinned)


def test_every_public_name_is_documented():
    assert [n for n in loki_attn.__all__ if not inspect.getdoc(getattr(loki_attn, n))] == []

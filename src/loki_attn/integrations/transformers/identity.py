"""Who is this model: what a basis remembers and checks."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from loki_attn.artefact import JSON
from loki_attn.models import fingerprint


def identity(model: PreTrainedModel) -> dict[str, JSON]:
    """Return a model's id, weight hash and RoPE settings, as plain JSON.

    The id is the hub id, or the name of a local folder without its path.
    """
    text = model.config.get_text_config()
    return {
        "id": model_name(model),
        "hash": fingerprint(model),
        "rope": _plain(getattr(text, "rope_parameters", None)),
    }


def model_name(model: PreTrainedModel) -> str:
    """The hub id, the name of the local folder, or the class of a model made in memory."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return type(model).__name__
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name


def _plain(value: Any) -> JSON:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)

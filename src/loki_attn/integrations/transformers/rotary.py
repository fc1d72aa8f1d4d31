"""Undo rotary position embeddings, to see keys as they were before."""

from typing import Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.integrations.transformers.attachment import Attachment
from loki_attn.integrations.transformers.function import Observation

Layout = Literal["none", "halves", "pairs"]
"""Which dimensions turn together: none, i and i + half (Llama), or neighbours (GLM, Cohere)."""

_LAYOUTS: Final[tuple[Layout, ...]] = ("none", "halves", "pairs")
_TOKENS: Final = 12
_POSITION: Final = 32
# Wrong layouts change most of a key, the right one by rounding only.
_CLEARLY: Final = 0.1


def undo_rotary(
    key: Tensor, cos: Tensor, sin: Tensor, layout: Layout | None = None
) -> Tensor | None:
    """Return the keys before RoPE, or None where the layout of the angles is not known.

    Dimensions beyond the angles were not rotated.

    Args:
        key: [batch, kv_heads, tokens, head_dim], after RoPE.
        cos: [batch or 1, tokens, rotary_dim] as the model computed it, scale included.
        sin: The same.
        layout: How the layer rotates, see `find_layouts`; None believes the angles, which repeat
            as halves or as pairs. (GLM's repeat as halves, and its layers rotate pairs.)
    """
    if layout == "none":
        return key
    if cos.ndim != 3 or cos.shape[1] != key.shape[2] or cos.shape[2] > key.shape[3]:
        return None
    size, half = cos.shape[2], cos.shape[2] // 2
    if torch.equal(cos[..., :half], cos[..., half:]):
        repeated: Layout = "halves"
        cos, sin = cos[..., :half], sin[..., :half]
    elif torch.equal(cos[..., ::2], cos[..., 1::2]):
        repeated = "pairs"
        cos, sin = cos[..., ::2], sin[..., ::2]
    else:
        return None
    wide = torch.promote_types(key.dtype, torch.float32)
    cos, sin, key = cos.to(wide)[:, None], sin.to(wide)[:, None], key.to(wide)
    rotated, rest = key[..., :size], key[..., size:]
    scale = cos.square() + sin.square()
    if (layout or repeated) == "halves":
        one, other = rotated[..., :half], rotated[..., half:]
        before = (one * cos + other * sin) / scale, (other * cos - one * sin) / scale
        return torch.cat([*before, rest], -1)
    one, other = rotated[..., ::2], rotated[..., 1::2]
    before = (one * cos + other * sin) / scale, (other * cos - one * sin) / scale
    return torch.cat([torch.stack(before, -1).flatten(-2), rest], -1)


def find_layouts(model: PreTrainedModel, attachment: Attachment) -> dict[int, Layout]:
    """Ask a model how each full-attention layer rotates; layers that do not tell are left out.

    A token without a past computes the same at every position, but for the rotation of its keys.
    So the layout under which its keys before RoPE stay when it moves is the layer's.

    Args:
        model: The model, attached densely.
        attachment: Its attachment; its observer is replaced.
    """
    here = _look(model, attachment, position=0)
    if all(seen.rotary is None for seen in here.values()):
        return {}
    moved = _look(model, attachment, position=_POSITION)
    layouts: dict[int, Layout] = {}
    for index, seen in here.items():
        change = {layout: _change(seen, moved[index], layout) for layout in _LAYOUTS}
        best, second = sorted(_LAYOUTS, key=lambda layout: change[layout])[:2]
        if change[best] < _CLEARLY * change[second] < float("inf"):
            layouts[index] = best
    return layouts


def _look(model: PreTrainedModel, attachment: Attachment, position: int) -> dict[int, Observation]:
    """What the layers see of a batch of single tokens at one position."""
    found: dict[int, Observation] = {}
    attachment.observe(lambda seen: found.update({seen.layer_index: seen}))
    last = model.config.get_text_config().vocab_size - 1
    tokens = torch.arange(1, _TOKENS + 1, device=model.device)[:, None].clamp(max=last)
    where = {"position_ids": torch.full_like(tokens, position)} if position else {}
    model.base_model(input_ids=tokens, use_cache=False, **where)
    attachment.observe(None)
    return found


def _change(one: Observation, other: Observation, layout: Layout) -> float:
    """Relative change of the rotated dimensions' keys before RoPE."""
    if one.rotary is None or other.rotary is None:
        return float("inf")
    before = [undo_rotary(seen.key, *seen.rotary, layout) for seen in (one, other) if seen.rotary]
    if before[0] is None or before[1] is None:
        return float("inf")
    size = one.rotary[0].shape[-1]
    first, second = (rows[..., :size].float() for rows in before if rows is not None)
    return float((first - second).norm() / first.norm())

"""Undo rotary position embeddings, to see keys as they were before."""

from typing import Final, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.integrations.transformers.function import Observation, Observer
from loki_attn.rope import Rope

Layout = Literal["none", "halves", "pairs"]
"""Which dimensions turn together: none, i and i + half (Llama), or neighbours (GLM, Cohere)."""

_LAYOUTS: Final[tuple[Layout, ...]] = ("none", "halves", "pairs")
_TOKENS: Final = 12
_POSITION: Final = 32
# Wrong layouts change most of a key, the right one by rounding only.
_CLEARLY: Final = 0.1
# bfloat16 angles are off by up to 2^-9.
_ANGLE_TOLERANCE: Final = 4e-3


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


class Observed(Protocol):
    """An attachment, as far as it is looked at here."""

    def observe(self, observer: Observer | None) -> None:
        """Call an observer with what every layer sees."""


def find_ropes(model: PreTrainedModel, attachment: Observed) -> dict[int, Rope]:
    """Find how each full-attention layer rotates; layers that do not tell are left out.

    Frequencies come from the model's rotary modules, and are believed only where they explain the
    angles that the layer was given. So rotations that change with the length of the text, which
    cannot be undone by a shift, are left out as well as unknown ones.

    Args:
        model: The model, attached densely.
        attachment: Its attachment; its observer is replaced.
    """
    layouts = find_layouts(model, attachment)
    here = _look(model, attachment, position=_POSITION)
    held = [m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    found: dict[int, Rope] = {}
    for index, layout in layouts.items():
        rotary = here[index].rotary
        if layout == "none" or rotary is None or _changes_with_length(model):
            continue
        for frequencies in held:
            if _explains(frequencies, rotary):
                plain = frequencies.detach().float().cpu()
                found[index] = Rope(frequencies=plain, layout=layout)
    return found


def _explains(frequencies: Tensor, rotary: tuple[Tensor, Tensor]) -> bool:
    """Whether angles at `_POSITION` are those of these frequencies, up to a common scale."""
    cos, sin = (part[0, -1].double().cpu() for part in rotary)
    if cos.shape[0] not in (frequencies.shape[0], 2 * frequencies.shape[0]):
        return False
    angle = frequencies.double().cpu() * _POSITION
    for both in (torch.cat([angle, angle]), angle.repeat_interleave(2), angle):
        if both.shape == cos.shape:
            scale = float((cos.square() + sin.square()).mean().sqrt())
            off = torch.stack([cos / scale - both.cos(), sin / scale - both.sin()]).abs().max()
            if float(off) < _ANGLE_TOLERANCE:
                return True
    return False


def _changes_with_length(model: PreTrainedModel) -> bool:
    """Whether the model's rotary frequencies depend on the length of the text."""
    config = model.config.get_text_config(decoder=True)
    told = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    return "dynamic" in told or "longrope" in told


def find_layouts(model: PreTrainedModel, attachment: Observed) -> dict[int, Layout]:
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


def _look(model: PreTrainedModel, attachment: Observed, position: int) -> dict[int, Observation]:
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

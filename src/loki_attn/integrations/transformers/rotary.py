"""Undo rotary position embeddings, to see keys as they were before."""

import torch
from torch import Tensor


def undo_rotary(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Return the keys before RoPE, or None where the layout of the angles is not known.

    Both layouts in use are told apart by the angles: halves (Llama) repeat the first half of
    `cos` in the second, pairs (GLM, Cohere) repeat neighbours. Dimensions beyond the angles were
    not rotated.

    Args:
        key: [batch, kv_heads, tokens, head_dim], after RoPE.
        cos: [batch or 1, tokens, rotary_dim] as the model computed it, scale included.
        sin: The same.
    """
    if cos.ndim != 3 or cos.shape[1] != key.shape[2] or cos.shape[2] > key.shape[3]:
        return None
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    half = cos.shape[-1] // 2
    rotated, rest = key[..., : cos.shape[-1]].float(), key[..., cos.shape[-1] :].float()
    if torch.equal(cos[..., :half], cos[..., half:]):
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
    elif torch.equal(cos[..., ::2], cos[..., 1::2]):
        turned = torch.stack([-rotated[..., 1::2], rotated[..., ::2]], -1).flatten(-2)
    else:
        return None
    return torch.cat([(rotated * cos - turned * sin) / (cos.square() + sin.square()), rest], -1)

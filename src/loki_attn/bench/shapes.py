"""Shapes of attention layers by the name of their model, and amounts as they are typed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

from loki_attn.errors import InputError, unknown_name
from loki_attn.types import LayerShape

_PART: Final = re.compile(r"T/(\d+)")


@final
@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model's attention layers; values are as wide as keys.

    Attributes:
        name: What tables call it.
        num_heads: Query heads.
        num_kv_heads: KV heads; divides `num_heads`.
        head_dim: Size of a key row and of a value row, in elements.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def layer(self) -> LayerShape:
        """The sizes of layer 0."""
        return LayerShape(
            index=0,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
        )


def _named(name: str, num_heads: int, num_kv_heads: int, head_dim: int) -> Shape:
    return Shape(name=name, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            _named("llama-3.1-8b", 32, 8, 128),
            _named("llama-2-7b", 32, 32, 128),
            _named("qwen2.5-coder-1.5b", 12, 2, 128),
            _named("qwen2.5-coder-0.5b", 14, 2, 64),
            _named("smollm2-135m", 9, 3, 64),
        )
    }
)


def shape_named(name: str) -> Shape:
    """Return a shape by the name of its model.

    Raises:
        UnknownNameError: If there is none of this name; the text lists them.
    """
    if name not in SHAPES:
        raise unknown_name("shape", name, SHAPES)
    return SHAPES[name]


def custom_shape(num_heads: int | None, num_kv_heads: int | None, head_dim: int | None) -> Shape:
    """Return a shape of one's own.

    Raises:
        InputError: If a size is missing or below 1, or the KV heads do not divide the heads.
    """
    if num_heads is None or num_kv_heads is None or head_dim is None:
        raise InputError("A custom shape needs all of --heads, --kv-heads and --head-dim.")
    if min(num_heads, num_kv_heads, head_dim) < 1:
        raise InputError(
            f"The sizes of a shape are at least 1, got {num_heads} heads, {num_kv_heads} KV heads "
            f"and head_dim {head_dim}."
        )
    if num_heads % num_kv_heads:
        raise InputError(
            f"{num_kv_heads} KV heads do not divide {num_heads} heads; every KV head serves "
            "equally many of them."
        )
    return _named(f"{num_heads}x{num_kv_heads}x{head_dim}", num_heads, num_kv_heads, head_dim)


def rows_wanted(amount: str, context: int) -> int:
    """Read how many rows a step reads of a context.

    Args:
        amount: A whole number of tokens, or a part of the context such as "T/8".
        context: The context, in tokens.

    Raises:
        InputError: If it is neither, is below 1 or above the context.
    """
    part = _PART.fullmatch(amount.strip())
    if part:
        divisor = int(part[1])
        k = context // divisor if divisor else 0
    elif amount.strip().isdecimal():
        k = int(amount)
    else:
        raise InputError(f"k is a number of tokens or a part such as T/8, got {amount!r}.")
    if not 1 <= k <= context:
        raise InputError(
            f"k={amount.strip()} reads {k} of {context} tokens; choose between 1 and the context."
        )
    return k

"""What evaluation needs of a language model, so that it knows no framework."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor

from loki_attn.basis import Basis
from loki_attn.errors import InputError
from loki_attn.policy import Policy
from loki_attn.profile import Profile
from loki_attn.types import AttentionCall, Mode


class Observation(Protocol):
    """What one attention layer saw in one forward."""

    @property
    def layer_index(self) -> int:
        """The layer."""

    @property
    def query(self) -> Tensor:
        """[batch, heads, q_len, head_dim], after RoPE."""

    @property
    def key(self) -> Tensor:
        """[batch, kv_heads, seq, head_dim], after RoPE, heads not repeated."""

    @property
    def value(self) -> Tensor:
        """[batch, kv_heads, seq, value_dim]."""

    @property
    def call(self) -> AttentionCall:
        """Scaling, soft-cap, sink logits."""


class Traffic(Protocol):
    """What attention read since `using` began."""

    sparse_calls: int
    every_query_calls: int
    read_bytes: int
    dense_bytes: int
    rows_read: int
    rows_held: int
    kept_bytes: int
    evicted_rows: int


class LanguageModel(Protocol):
    """A causal language model under changing policies, dense unless `using` says otherwise."""

    @property
    def identity(self) -> Any:
        """Id, weight hash and RoPE settings, as plain JSON."""

    @property
    def dtype(self) -> str:
        """Dtype that the model computes in, "bfloat16" say."""

    @property
    def context_tokens(self) -> int:
        """Longest context that the model was trained for, in tokens."""

    @property
    def num_layers(self) -> int:
        """Layers of the model, those that stay dense included."""

    @property
    def traffic(self) -> Traffic:
        """What attention read."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""

    def using(
        self,
        policy: Policy | str,
        basis: Basis | None = None,
        mode: Mode = "decode",
        profile: Profile | None = None,
    ) -> AbstractContextManager[None]:
        """Attend by a policy inside the block."""

    def switch(self, mode: Mode) -> None:
        """Change when the policy acts, until the block of `using` ends."""

    def observing(self, observer: Callable[[Any], None]) -> AbstractContextManager[None]:
        """Call `observer` with an `Observation` per layer and forward inside the block."""

    def prefill(self, ids: Tensor, *, record: bool = False) -> Any:
        """Read tokens int64 [1, n] into a new cache; `record` keeps what `compress` needs."""

    def fork(self, cache: Any) -> Any:
        """Copy a cache that was read densely."""

    def compress(self, cache: Any) -> int:
        """Drop from a cache that was read with `record` what the policy drops after a prompt."""

    def held_bytes(self, cache: Any) -> int:
        """Bytes that a cache holds, unused room included."""

    def extend(self, cache: Any, ids: Tensor) -> Iterator[Tensor]:
        """Read tokens int64 [1, n]; yield float32 logits [rows, vocabulary] on the CPU."""


@final
@dataclass(frozen=True, kw_only=True)
class Contender:
    """A policy with what was calibrated for it, under a name, as it enters a comparison."""

    name: str
    policy: Policy
    basis: Basis | None = None
    profile: Profile | None = None


def check_names(contenders: Sequence[Contender]) -> None:
    """Refuse contenders that a result could not tell apart.

    Raises:
        InputError: If two have the same name.
    """
    names = [contender.name for contender in contenders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Contender {twice[0]!r} is given twice; give each a name of its own.")

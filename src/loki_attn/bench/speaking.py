"""What the bench needs of a model that speaks, so that it knows no framework."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Speech(Protocol):
    """Tokens that one call of `generate` made."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new tokens."""

    @property
    def first_s(self) -> float:
        """From the call to the first of them."""

    @property
    def steps_s(self) -> tuple[float, ...]:
        """From each token to the next."""

    @property
    def logits(self) -> Tensor | None:
        """float32 [tokens, vocabulary], where they were asked for."""


class Speaker(Protocol):
    """A model, stock or attached, with the cache of its conversation."""

    @property
    def policy(self) -> str:
        """Name of the attached policy; "stock" without one."""

    @property
    def sparse_calls(self) -> int:
        """Single-token layer calls that selected since `begin`."""

    @property
    def cache_bytes(self) -> int:
        """What the cache holds."""

    @property
    def peak_cache_bytes(self) -> int | None:
        """The most that it held since `begin`, None where nobody weighed it."""

    @property
    def evicts(self) -> bool:
        """Whether the policy drops rows."""

    @property
    def evicted_rows(self) -> int:
        """Rows that were dropped since `begin`."""

    def selects_at(self, context: int) -> bool:
        """Whether steps at this many tokens are expected to select."""

    def begin(self, ids: Tensor, room: int) -> None:
        """Begin a new conversation with int64 [1, n] and room for so many tokens more."""

    def speak(self, count: int, *, keep_logits: bool = False) -> Speech:
        """Go on by `count` tokens."""

    def end(self) -> None:
        """Forget the conversation."""

    def full_budget(self) -> AbstractContextManager[None]:
        """Select everything inside the block."""

"""KeepBudget: how many rows an eviction leaves, which always stay, and when it happens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor

from loki_attn.budget import require_count, require_share
from loki_attn.errors import BudgetError, unknown_name

When = Literal["forward", "prompt", "step"]
"""When rows go: at the end of every forward of several tokens; at the first single-token step
after them, so that chunks of a prompt are judged together; or at the end of every forward."""

_ROUNDING: Final = 1e-9


@final
@dataclass(frozen=True, kw_only=True)
class KeepBudget:
    """How much stays. First and last rows count against the amount.

    At most one of `capacity` and `keep_share` is given; with neither nothing is evicted, but by
    methods that decide by themselves.

    Attributes:
        capacity: Rows kept per KV head, on average over heads and layers, in tokens.
        keep_share: The same as a share of the tokens seen so far, in (0, 1], rounded up.
        keep_first: First tokens that always stay.
        keep_last: Last tokens that always stay.
        burst: Rows above the capacity before a step evicts again (high water); 0 evicts at once.
        when: When rows go; None for the method's own time.
        whole_layers: Layers that keep everything; negative indices count from the end.
    """

    capacity: int | None = None
    keep_share: float | None = None
    keep_first: int = 0
    keep_last: int = 0
    burst: int = 0
    when: When | None = None
    whole_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse budgets that no layer could obey."""
        if self.capacity is not None and self.keep_share is not None:
            raise BudgetError("Rows are kept by capacity or by keep_share, got both; keep one.")
        for name in ("keep_first", "keep_last", "burst"):
            require_count(name, getattr(self, name), at_least=0)
        for index in self.whole_layers:
            if isinstance(index, bool) or not isinstance(index, int):
                raise BudgetError(f"whole_layers takes layer indices, got {index!r}.")
        if self.when is not None and self.when not in get_args(When):
            raise unknown_name("time of eviction", str(self.when), get_args(When))
        if self.keep_share is not None:
            require_share("keep_share", self.keep_share, "capacity")
        if self.capacity is not None:
            require_count("capacity", self.capacity, at_least=1)
            self.require_room(0)

    def require_room(self, window: int) -> None:
        """Refuse a capacity without room for what always stays, a window of last rows included."""
        last = max(self.keep_last, window)
        if self.capacity is not None and self.capacity < self.keep_first + last:
            raise BudgetError(
                f"capacity={self.capacity} is less than the rows that always stay: keep_first = "
                f"{self.keep_first} and the last {last} (keep_last or the method's window); raise "
                f"capacity to at least {self.keep_first + last} or lower them."
            )

    @property
    def keeps_everything(self) -> bool:
        """Whether no amount is given."""
        return self.capacity is None and self.keep_share is None

    def spares(self, index: int, num_layers: int) -> bool:
        """Whether a layer keeps everything.

        Raises:
            BudgetError: If `whole_layers` names a layer that the model has not.
        """
        bad = [i for i in self.whole_layers if not -num_layers <= i < num_layers]
        if bad:
            raise BudgetError(
                f"whole_layers names {bad}, but the model has layers 0 to {num_layers - 1}."
            )
        return index in {i % num_layers for i in self.whole_layers}

    def rows(self, seen: Tensor) -> Tensor:
        """Rows to keep per KV head for each number of tokens seen, int64 like `seen`."""
        if self.capacity is not None:
            return torch.full_like(seen, self.capacity)
        if self.keep_share is not None:
            return torch.ceil(seen.double() * self.keep_share - _ROUNDING).long().clamp(min=1)
        return seen

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, as plain JSON."""
        fields = self.__dataclass_fields__
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((n, getattr(self, n)) for n in fields)
            if value != fields[name].default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "KeepBudget":
        """Rebuild a budget from `to_json`'s result; unknown fields were refused before."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)

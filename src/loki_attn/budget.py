"""Budget: how many rows a query reads, which it always reads, and where attention stays dense."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn.errors import BudgetError
from loki_attn.types import Reading

_ROUNDING: Final = 1e-9


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """Who reads how much. Sinks and recents count against the amount.

    At most one of `top_k`, `fraction` and `mass` is given; with none of them everything is read.

    Attributes:
        top_k: Rows read by a query, in tokens.
        fraction: Share of the visible rows, in (0, 1], rounded up.
        mass: Smallest set whose estimated attention mass reaches this, in (0, 1].
        cap: Largest set for `mass`, in tokens.
        sinks: First visible tokens that are always read.
        recents: Last visible tokens that are always read.
        min_k: Fewest rows that a query reads, where that many are visible.
        dense_layers: Layers that read everything; negative indices count from the end.
        dense_below: Queries that see at most this many tokens read them all.
        per_layer: One amount per layer, in the unit of the amount that is given; replaces it.
    """

    top_k: int | None = None
    fraction: float | None = None
    mass: float | None = None
    cap: int | None = None
    sinks: int = 0
    recents: int = 0
    min_k: int = 1
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 0
    per_layer: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse budgets that no query could obey."""
        given = [n for n in ("top_k", "fraction", "mass") if getattr(self, n) is not None]
        if len(given) > 1:
            raise BudgetError(f"A budget has one amount, got {' and '.join(given)}; keep one.")
        for name in ("sinks", "recents", "dense_below"):
            require_count(name, getattr(self, name), at_least=0)
        require_count("min_k", self.min_k, at_least=1)
        for index in self.dense_layers:
            if isinstance(index, bool) or not isinstance(index, int):
                raise BudgetError(f"dense_layers takes layer indices, got {index!r}.")
        if self.cap is not None:
            if self.mass is None:
                raise BudgetError("cap bounds a mass budget; give mass, or drop cap.")
            self._check_tokens("cap", self.cap)
        if self.per_layer and not given:
            raise BudgetError("per_layer replaces top_k, fraction or mass; give one of them too.")
        for amount in (getattr(self, given[0]), *self.per_layer) if given else ():
            self._check_amount(given[0], amount)

    def _check_amount(self, name: str, amount: float) -> None:
        if name == "top_k":
            self._check_tokens(name, amount)
        else:
            require_share(name, amount)

    def _check_tokens(self, name: str, amount: float) -> None:
        require_count(name, amount, at_least=1)
        forced = self.sinks + self.recents
        if amount < forced:
            raise BudgetError(
                f"{name}={amount} is less than sinks + recents = {self.sinks} + {self.recents}, "
                f"which count against it; raise {name} to at least {forced} or lower recents."
            )
        if amount < self.min_k:
            raise BudgetError(
                f"{name}={amount} is less than min_k={self.min_k}; raise {name} or lower min_k."
            )

    @property
    def reads_everything(self) -> bool:
        """Whether no amount is given: attention stays dense."""
        return self.top_k is None and self.fraction is None and self.mass is None

    def for_layer(self, index: int, num_layers: int) -> "Budget":
        """Return the budget of one layer: tables looked up, dense layers made dense.

        Args:
            index: Layer index, 0-based.
            num_layers: Layers of the model; dense_layers and per_layer must fit it.

        Returns:
            A budget without `per_layer` and `dense_layers`.

        Raises:
            BudgetError: If a dense layer is out of range or the table has another length.
        """
        bad = [i for i in self.dense_layers if not -num_layers <= i < num_layers]
        if bad:
            raise BudgetError(
                f"dense_layers names {bad}, but the model has layers 0 to {num_layers - 1}."
            )
        if self.per_layer and len(self.per_layer) != num_layers:
            raise BudgetError(
                f"per_layer has {len(self.per_layer)} amounts for {num_layers} layers; "
                "give one per layer."
            )
        own = replace(self, dense_layers=(), per_layer=())
        if index in {i % num_layers for i in self.dense_layers}:
            return replace(own, top_k=None, fraction=None, mass=None, cap=None)
        if not self.per_layer:
            return own
        amount = self.per_layer[index]
        if self.top_k is not None:
            return replace(own, top_k=int(amount))
        if self.fraction is not None:
            return replace(own, fraction=amount)
        return replace(own, mass=amount)

    def counts(self, visible: Tensor) -> Tensor:
        """Rows to read for each number of visible rows, for `top_k` and `fraction`.

        Args:
            visible: int64 of any shape: rows that each query may see.

        Returns:
            int64 of the same shape, between 1 and `visible` (0 where nothing is visible).

        Raises:
            BudgetError: If the budget is a mass, whose counts depend on the scores.
        """
        self._require_counts()
        if self.top_k is not None:
            amount = torch.full_like(visible, self.top_k)
        elif self.fraction is not None:
            # Not rounded up for a rounding error: 0.07 of 100 rows are 7.
            amount = torch.ceil(visible.double() * self.fraction - _ROUNDING).long()
        else:
            amount = visible
        return self.clamp(amount, visible)

    def clamp(self, amount: Tensor, visible: Tensor) -> Tensor:
        """Bring counts into the range that sinks, recents, min_k, cap, dense_below allow."""
        if self.cap is not None:
            amount = amount.clamp(max=self.cap)
        amount = amount.clamp(min=self._floor)
        amount = torch.where(visible <= self.dense_below, visible, amount)
        return torch.minimum(amount, visible)

    def count(self, visible: int) -> int:
        """The same as `counts` for one number of visible rows, without torch.

        Raises:
            BudgetError: If the budget is a mass.
        """
        self._require_counts()
        if visible <= self.dense_below:
            return visible
        amount = visible
        if self.top_k is not None:
            amount = self.top_k
        elif self.fraction is not None:
            amount = math.ceil(visible * self.fraction - _ROUNDING)
        return min(max(amount, self._floor), visible)

    def reading(self, seq_len: int, visible: Tensor | None) -> Reading:
        """Resolve the budget for one single-token step.

        Args:
            seq_len: Rows held.
            visible: None where all of them are visible, or bool [batch or 1, 1, 1, seq_len].
        """
        counts: int | Tensor | None = None
        most: int | None = None
        if self.mass is None:
            most = max(self.count(seq_len), min(self.dense_below, seq_len))
            rows = None if visible is None else visible.sum(-1)[:, 0, 0]
            counts = self.count(seq_len) if rows is None else self.counts(rows)
        return Reading(
            counts=counts,
            sinks=self.sinks,
            recents=self.recents,
            mass=self.mass,
            cap=self.cap,
            floor=self._floor,
            dense_below=self.dense_below,
            most=most,
        )

    @property
    def _floor(self) -> int:
        return max(self.min_k, self.sinks + self.recents)

    def _require_counts(self) -> None:
        if self.mass is not None:
            raise BudgetError("A mass budget has no fixed counts; they follow from the scores.")

    def is_dense(self, seq_len: int) -> bool:
        """Whether a context of `seq_len` tokens is read whole whatever the scores are."""
        if self.reads_everything or seq_len <= max(self.dense_below, self.min_k):
            return True
        if self.top_k is not None:
            return seq_len <= self.top_k
        return (self.fraction or self.mass) == 1.0 and self.cap is None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, as plain JSON."""
        fields = self.__dataclass_fields__
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((n, getattr(self, n)) for n in fields)
            if value != fields[name].default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Budget":
        """Rebuild a budget from `to_json`'s result; unknown fields were refused before."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)


def require_count(name: str, value: object, *, at_least: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise BudgetError(f"{name} must be a whole number of tokens >= {at_least}, got {value!r}.")


def require_share(name: str, value: object, tokens: str = "top_k") -> None:
    """Refuse what is no share; `tokens` names the field that takes tokens instead."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"{name} must be a number in (0, 1], got {value!r}.")
    if math.isnan(value) or not 0 < value <= 1:
        raise BudgetError(f"{name} must lie in (0, 1], got {value!r}; use {tokens} for tokens.")

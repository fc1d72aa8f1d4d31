"""The search: the cheapest candidate within a bound, in few measurements.

Candidates are ordered in two ways: by cost, and by exactness, where it is known which of two is
more exact. A candidate found within the bound rules out all that cost as much or more; one found
beyond it rules out all that are less exact. The next to be measured is the one that is expected to
leave the fewest, so that a ladder of budgets is bisected, and many ladders are bisected together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from loki_attn.errors import InputError

Judge = Callable[[int], float]
"""Measures a candidate: how large its error is as a share of the bound; up to 1 is within."""

_WIDTH: Final = 0.5
_LEAST: Final = 1e-6


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        best: The cheapest candidate that was measured within the bound and confirmed, or None.
        measured: Errors as shares of the bound, by candidate, in the order of measuring.
        confirmed: What the confirmation said of the candidates that were asked for it.
        frontier: How many candidates were in question: those that no other beats in both orders.
        open: How many of them were neither measured nor ruled out when the search ended; 0 where
            the answer is final.
    """

    best: int | None
    measured: Mapping[int, float]
    confirmed: Mapping[int, bool]
    frontier: int
    open: int


def search(
    costs: Sequence[float],
    expected: Sequence[float],
    covers: "np.ndarray",
    judge: Judge,
    *,
    confirm: Callable[[int], bool],
    more: Callable[[int], bool],
) -> Found:
    """Search for the cheapest candidate within the bound.

    Args:
        costs: Of each candidate, in any unit.
        expected: A cheap estimate of each candidate's error, above 0 and in any unit; it guides the
            order of the measurements, never the verdict.
        covers: bool [n, n]: at [i, j], whether i is at least as exact as j.
        judge: Measures one candidate.
        confirm: Says whether a candidate that was judged within the bound holds elsewhere as well;
            asked of the cheapest only.
        more: Whether to measure on, given how many were measured.

    Returns:
        What was found. Where errors never grow with exactness and `more` never stops it, `best` is
        the cheapest of all candidates within the bound.

    Raises:
        InputError: If there are no candidates, or the arguments do not have one entry for each.
    """
    size = len(costs)
    if not size or len(expected) != size or covers.shape != (size, size):
        raise InputError(
            f"A search needs candidates with a cost, an estimate and an order each; got {size} "
            f"costs, {len(expected)} estimates and an order of {list(covers.shape)}."
        )
    table = _Table(np.asarray(costs, dtype=float), np.asarray(expected, dtype=float), covers)
    frontier = int(table.open.sum())
    confirmed: dict[int, bool] = {}
    while True:
        while table.open.any() and more(len(table.measured)):
            index = table.next()
            table.enter(index, judge(index))
        best = table.best()
        if best is None or confirmed.get(best):
            break
        confirmed[best] = confirm(best)
        if not confirmed[best]:
            table.withdraw(best)
    return Found(
        best=best,
        measured=table.measured,
        confirmed=confirmed,
        frontier=frontier,
        open=int(table.open.sum()),
    )


class _Table:
    """What is known of every candidate."""

    def __init__(self, costs: "np.ndarray", expected: "np.ndarray", covers: "np.ndarray") -> None:
        self._costs, self._covers = costs, covers
        self._log = np.log(np.maximum(expected, _LEAST))
        self._ruled_out = _beaten(costs, covers)
        self._withdrawn: set[int] = set()
        self.measured: dict[int, float] = {}
        self.open: np.ndarray = ~self._ruled_out

    def next(self) -> int:
        """The open candidate that is expected to leave the fewest; of equals the cheapest."""
        places = np.flatnonzero(self.open)
        dearer = self._costs[None, places] >= self._costs[places, None]
        below = self._covers[np.ix_(places, places)]
        chance = self._chance(places)
        # Squares of what would be left: where nothing is known, a half is better than all or none.
        left = chance * (len(places) - dearer.sum(1)) ** 2
        left += (1 - chance) * (len(places) - below.sum(1)) ** 2
        order = np.lexsort((places, self._costs[places], np.round(left, 9)))
        return int(places[order[0]])

    def enter(self, index: int, error: float) -> None:
        """Note a measurement and what it rules out."""
        self.measured[index] = error
        self._settle()

    def withdraw(self, index: int) -> None:
        """A candidate within the bound did not hold elsewhere: neither will less exact ones."""
        self._withdrawn.add(index)
        self._settle()

    def best(self) -> int | None:
        """The cheapest within the bound."""
        within = [i for i, error in self.measured.items() if self._holds(i, error)]
        return min(within, key=lambda i: (self._costs[i], i), default=None)

    def _holds(self, index: int, error: float) -> bool:
        return error <= 1 and index not in self._withdrawn

    def _settle(self) -> None:
        """Work out anew which candidates are still in question."""
        self.open = ~self._ruled_out
        for index, error in self.measured.items():
            if self._holds(index, error):
                self.open &= self._costs < self._costs[index]
            else:
                self.open &= ~self._covers[index]
            self.open[index] = False

    def _chance(self, places: "np.ndarray") -> "np.ndarray":
        """How likely the candidates are within the bound, as the measured ones suggest."""
        if not self.measured:
            return np.full(len(places), 0.5)
        known = np.fromiter(self.measured, dtype=int)
        errors = np.log(np.maximum(np.fromiter(self.measured.values(), dtype=float), _LEAST))
        # The estimate is off by a factor that changes slowly: nearby measurements tell it.
        near = np.exp(-np.abs(self._log[places, None] - self._log[None, known])) + _LEAST
        offset = (near * (errors - self._log[known])).sum(1) / near.sum(1)
        lies = (self._log[places] + offset) / _WIDTH
        return np.asarray(1 / (1 + np.exp(np.clip(lies, -50, 50))))


def _beaten(costs: "np.ndarray", covers: "np.ndarray") -> "np.ndarray":
    """Candidates that another one covers at no higher cost; of equals the first stays."""
    places = np.arange(len(costs))
    cheaper = costs[:, None] <= costs[None, :]
    better = covers & cheaper
    mutual = better & better.T
    better &= ~mutual | (places[:, None] < places[None, :])
    return np.asarray(better.any(0))

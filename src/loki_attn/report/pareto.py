"""The Pareto front: what nothing else beats in both cost and quality."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One thing to choose: its name, what it costs, how good it is."""

    name: str
    cost: float
    quality: float


def pareto_front(candidates: Iterable[Candidate], *, maximise: bool) -> list[str]:
    """Name the candidates for which no other is at least as cheap and as good, and better in one.

    Candidates that are equal in both do not beat each other: either all of them are on the front,
    or none. One with a number that is not finite can be compared with nothing and is left out.

    Args:
        candidates: What there is to choose from; less cost is better.
        maximise: Whether more quality is better (a score) or less (a divergence).

    Returns:
        The names, cheapest first; equals in order of arrival.
    """
    sign = -1.0 if maximise else 1.0
    finite = [c for c in candidates if abs(c.cost) + abs(c.quality) < float("inf")]
    ordered = sorted(finite, key=lambda c: (c.cost, sign * c.quality))
    front: list[Candidate] = []
    for one in ordered:
        last = front[-1] if front else None
        better = last is None or sign * one.quality < sign * last.quality
        equal = last is not None and (one.cost, one.quality) == (last.cost, last.quality)
        if better or equal:
            front.append(one)
    return [one.name for one in front]

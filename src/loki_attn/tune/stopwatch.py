"""The stopwatch: decode steps of the whole model, in turns, each on a copy of one prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Final, final

from torch import Tensor

from loki_attn.bench.clock import Times
from loki_attn.evaluate.protocol import Contender, LanguageModel

_WARM_UP: Final = 2
_STEPS: Final = 6


@final
@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times decode steps.

    Attributes:
        lm: The model.
        prefix: A cache that was read densely; it is copied, never changed.
        tokens: int64 [1, n]: what follows it, a token per step, at least `steps_per_turn`.
        rounds: Turns of each contender.
    """

    lm: LanguageModel
    prefix: Any
    tokens: Tensor
    rounds: int = 5

    def times(self, contenders: Sequence[Contender]) -> dict[str, Times]:
        """Time the contenders in turns; the first to go changes from round to round.

        Args:
            contenders: Who competes, names all different.

        Returns:
            Median and spread of a step by contender. The first two steps of a turn do not count:
            the cache takes on the policy's planes in them.
        """
        found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for turn in range(self.rounds):
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                found[contender.name] += self._turn(contender)
        return {name: Times.of(samples) for name, samples in found.items()}

    def _turn(self, contender: Contender) -> list[float]:
        cache, samples = self.lm.fork(self.prefix), []
        with self.lm.using(contender.policy, contender.basis):
            for index in range(steps_per_turn()):
                token = self.tokens[:, index : index + 1]
                began = perf_counter_ns()
                next(self.lm.extend(cache, token))
                samples.append(float(perf_counter_ns() - began))
        return samples[_WARM_UP:]


def steps_per_turn() -> int:
    """Tokens that a turn reads."""
    return _WARM_UP + _STEPS

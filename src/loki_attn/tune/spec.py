"""What is asked of a tuning: the bound on quality, the context, stretches of text, limits."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from loki_attn.errors import InputError, unknown_name
from loki_attn.statistics import Interval

Measure = Literal["kl", "ppl"]
Cost = Literal["time", "bytes"]

_COSTS: Final[tuple[Cost, ...]] = ("time", "bytes")
_FEWEST_TOKENS: Final = 32  # two blocks, without which there is no interval


@final
@dataclass(frozen=True)
class Bound:
    """How far a policy may be from dense attention.

    Attributes:
        measure: "kl" for the mean divergence per token in nats, "ppl" for perplexity above dense
            attention's on the same tokens.
        limit: The most that the upper end of the 95 % interval may be, above 0.
    """

    measure: Measure
    limit: float

    def __post_init__(self) -> None:
        """Refuse bounds that no sparse policy could keep."""
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise InputError(
                f"A bound on {self.words} must be a number above 0, got {self.limit}; at 0 only "
                "dense attention is within it."
            )

    @property
    def words(self) -> str:
        """What is bounded, in words."""
        return "KL to dense" if self.measure == "kl" else "perplexity above dense"

    def read(self, metrics: Mapping[str, Any]) -> Interval:
        """What a perplexity row says of it, with its 95 % interval.

        The ends of a difference of perplexities are those of the paired difference of losses, at
        dense attention's perplexity.
        """
        if self.measure == "kl":
            mean, low, high = (metrics[f"kl_to_dense{end}"] for end in ("", "_low", "_high"))
        else:
            dense = metrics["perplexity_dense"]
            mean, low, high = (
                dense * math.expm1(metrics[f"nll_delta{end}"]) for end in ("", "_low", "_high")
            )
        return Interval(mean, low, high, "bootstrap")


@final
@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is asked.

    Attributes:
        bound: On quality.
        context: Tokens that the cache holds when the last scored token is read.
        windows: Stretches of the text that candidates are judged on, each of `context` tokens.
        heldout_windows: Further ones that the choice is confirmed on.
        window_tokens: Scored tokens at the end of each.
        minutes: How long to predict, screen and search; confirming and timing come on top.
        cost: "time" looks for the fastest here, "bytes" for the fewest bytes read, which holds on
            other machines as well.
        seed: Which stretches of the text are taken.
        queries: Queries per layer of the screening pass.
        rounds: Turns of each contender when steps are timed.
        corpus: Name of the text, for the record.
    """

    bound: Bound
    context: int = 4096
    windows: int = 3
    heldout_windows: int = 2
    window_tokens: int = 128
    minutes: float = 10.0
    cost: Cost = "time"
    seed: int = 0
    queries: int = 16
    rounds: int = 5
    corpus: str = "unnamed"

    def __post_init__(self) -> None:
        """Refuse what could not be judged."""
        if self.cost not in _COSTS:
            raise unknown_name("cost", self.cost, _COSTS)
        for name in ("windows", "heldout_windows", "queries", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.window_tokens < _FEWEST_TOKENS or self.context < 2 * self.window_tokens:
            raise InputError(
                f"A window scores {_FEWEST_TOKENS} tokens or more at the end of a context at least "
                f"twice as long; got window_tokens={self.window_tokens}, context={self.context}."
            )
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise InputError(f"minutes must be above 0, got {self.minutes}.")

    def stretches(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Draw the stretches of a text that are judged on, and those that are held out.

        Args:
            ids: Tokens of the text, cut into stretches of `context` tokens from its start.

        Returns:
            The tokens of both, stretch after stretch; no token is in both.

        Raises:
            InputError: If the text is too short.
        """
        need, room = self.windows + self.heldout_windows, len(ids) // self.context
        if room < need:
            raise InputError(
                f"{self.windows} stretches to judge on and {self.heldout_windows} held out, of "
                f"{self.context} tokens each, need {need * self.context} tokens; the text has "
                f"{len(ids)}. Give more text, a shorter context or fewer windows."
            )
        order = random.Random(self.seed).sample(range(room), need)
        cut = [tuple(ids[place * self.context :][: self.context]) for place in order]
        judged, heldout = cut[: self.windows], cut[self.windows :]
        return sum(judged, ()), sum(heldout, ())

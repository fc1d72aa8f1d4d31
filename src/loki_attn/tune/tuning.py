"""Tuning, from the model and the text to the policy: predict, screen, search, confirm, time."""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final, final

import torch

from loki_attn.basis import Basis
from loki_attn.bench.clock import Times
from loki_attn.bench.machine import Reader, last_level_cache_bytes
from loki_attn.errors import InputError
from loki_attn.evaluate.byte_model import ByteModel, Layout, StepBytes, layout_of
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.policy import preset
from loki_attn.tune.judging import Judge, Tell, said
from loki_attn.tune.outcome import Counts, Finalist, NothingFoundError, Tuning
from loki_attn.tune.remembering import remembering
from loki_attn.tune.screening import Screen, coarse, screen
from loki_attn.tune.search import Found, search
from loki_attn.tune.space import (
    PLANES,
    Candidate,
    Plane,
    amounts_for,
    candidates,
    covering,
    dense_sets,
    ranks_for,
)
from loki_attn.tune.spec import Spec
from loki_attn.tune.stopwatch import Stopwatch, steps_per_turn
from loki_attn.tune.time_model import Sample, TimeModel, fit_times

_FINALISTS: Final = 3
_DENSE: Final = "dense"
_MIDDLE: Final[Plane] = "int8"
_MOST_READ_BYTES: Final = 1 << 28
_READS: Final = 5


def tune(
    lm: LanguageModel,
    ids: Sequence[int],
    basis: Basis,
    spec: Spec,
    *,
    journal: Journal | None = None,
    tell: Tell | None = None,
    now: Callable[[], float] = monotonic,
) -> Tuning:
    """Find the cheapest Loki policy within a bound on quality, on one's own text.

    Args:
        lm: The model, dense by itself.
        ids: Tokens of the text.
        basis: The model's basis.
        spec: What is asked.
        journal: Holds the quality measured already, and keeps the rest, so that an interrupted run
            goes on; times are taken anew. None keeps nothing.
        tell: Called with lines of news.
        now: The clock that `spec.minutes` is read on, in seconds.

    Returns:
        The policy, with what was predicted and measured.

    Raises:
        InputError: If the text is too short, the context beyond the model's, or the model has
            nothing that could select.
        NothingFoundError: If no policy cheaper than dense attention was found within the bound.
        LokiAttnError: If model and basis do not fit.
    """
    if spec.context > lm.context_tokens:
        raise InputError(
            f"A context of {spec.context} tokens exceeds the model's context of "
            f"{lm.context_tokens}; give at most that."
        )
    deadline = now() + 60 * spec.minutes
    judged, heldout = spec.stretches(ids)
    run = _Run(lm, basis, spec, judged, heldout, journal or Journal(), tell or _silent)
    return run.tuning(lambda: now() < deadline)


@final
class _Run:
    """One tuning."""

    def __init__(
        self,
        lm: LanguageModel,
        basis: Basis,
        spec: Spec,
        judged: Sequence[int],
        heldout: Sequence[int],
        journal: Journal,
        tell: Tell,
    ) -> None:
        self._bare, self._basis, self._spec, self._tell = lm, basis, spec, tell
        self._lm = remembering(lm, spec.windows + spec.heldout_windows)
        self._text, self._journal = judged, journal
        self._judge = Judge(
            self._lm, basis, spec, judged, heldout, journal=journal, tell=self._count
        )
        self._layout: Layout = layout_of(lm)
        self._bytes = ByteModel(basis, self._layout)
        self._ranks = ranks_for(min(shape.head_dim for shape in self._layout.shapes.values()))
        self._amounts = amounts_for(spec.context)
        self._measured = 0

    def tuning(self, in_time: Callable[[], bool]) -> Tuning:
        """Predict, screen, search, confirm, time."""
        watch = self._stopwatch()
        times = self._time_model(watch)
        seen = self._screen()
        space = self._space(seen)
        costs = [self._cost(times, one) for one in space]
        limit = times.dense_us if self._spec.cost == "time" else self._dense_bytes()
        cheaper = [place for place, cost in enumerate(costs) if cost < limit]
        if not cheaper:
            raise NothingFoundError(self._none_cheaper(min(costs), limit))
        kept = [space[place] for place in cheaper]
        self._tell(
            f"{len(space)} policies predicted, {len(kept)} of them cheaper than dense; "
            f"{seen.screened} screened"
        )
        found = search(
            [costs[place] for place in cheaper],
            [seen.expected(one) for one in kept],
            covering(kept),
            lambda place: self._judge.share(kept[place]),
            confirm=lambda place: self._judge.confirms(kept[place]),
            more=lambda _: in_time(),
        )
        if found.best is None:
            raise NothingFoundError(self._none_within(kept, found))
        finalists = [kept[place] for place in _finalists(found, costs=[costs[p] for p in cheaper])]
        chosen, others, dense = self._race(watch, times, finalists)
        counts = Counts(
            predicted=len(space),
            cheaper=len(kept),
            screened=seen.screened,
            frontier=found.frontier,
            measured=len(found.measured),
            confirmed=sum(self._judge.known(one) is not None for one in kept),
            open=found.open,
        )
        return Tuning(spec=self._spec, chosen=chosen, others=others, dense=dense, counts=counts)

    def _stopwatch(self) -> Stopwatch:
        """On the first stretch, so that the timed steps end where the context does."""
        spec = self._spec
        self._tell(f"reading {spec.context} tokens")
        span = torch.tensor([self._text[: spec.context]])
        # The same tokens as the judge's first prefix, which is then read once for both.
        done, last = spec.context - spec.window_tokens - 1, spec.context - steps_per_turn()
        cache = self._lm.fork(self._lm.prefill(span[:, :done]))
        for _ in self._lm.extend(cache, span[:, done:last]):
            pass
        return Stopwatch(lm=self._lm, prefix=cache, tokens=span[:, last:], rounds=spec.rounds)

    def _time_model(self, watch: Stopwatch) -> TimeModel:
        """Measure dense attention, and policies that differ in one thing each."""
        self._tell("timing a few steps to predict the others")
        rank, most_rank = self._ranks[0], self._ranks[-1]
        top_k, most_top_k = self._amounts[0], self._amounts[-1]
        probes = tuple(
            Candidate(rank=r, plane_dtype=plane, top_k=k)
            for r, plane, k in dict.fromkeys(
                [
                    (rank, _MIDDLE, top_k),
                    (rank, _MIDDLE, most_top_k),
                    *((most_rank, plane, top_k) for plane in PLANES),
                ]
            )
        )
        reader = Reader(min(4 * last_level_cache_bytes(), _MOST_READ_BYTES))
        fastest = max(reader.bytes_per_s() for _ in range(_READS))
        times = watch.times([_dense(), *(self._judge.contender(one) for one in probes)])
        # The quiet steps: what else runs on the machine only ever adds time.
        samples = [
            Sample(
                plane_dtype=one.plane_dtype, step=self._step(one), step_us=times[one.name].p20_us
            )
            for one in probes
        ]
        return fit_times(samples, times[_DENSE].p20_us, 1e6 / fastest)

    def _screen(self) -> Screen:
        self._tell("screening in one dense forward")
        return screen(
            self._bare,
            self._text[: self._spec.context],
            self._basis,
            self._ranks,
            coarse(self._amounts),
            queries=self._spec.queries,
            journal=self._journal,
        )

    def _space(self, seen: Screen) -> tuple[Candidate, ...]:
        dense = dense_sets(tuple(self._layout.shapes), seen.worst())
        return candidates(self._ranks, self._amounts, dense)

    def _step(self, one: Candidate) -> StepBytes:
        return self._bytes.step(one.policy(self._spec.context), self._spec.context)

    def _dense_bytes(self) -> float:
        return float(self._bytes.step(preset("dense"), self._spec.context).dense)

    def _cost(self, times: TimeModel, one: Candidate) -> float:
        step = self._step(one)
        return times.step_us(one.plane_dtype, step) if self._spec.cost == "time" else step.read

    def _share(self, one: Candidate) -> float:
        """Predicted share of dense attention's bytes over the steps that are judged."""
        spec, policy = self._spec, one.policy(self._spec.context)
        lengths = range(spec.context - spec.window_tokens, spec.context)
        steps = [self._bytes.step(policy, length) for length in lengths]
        return sum(step.read for step in steps) / sum(step.dense for step in steps)

    def _race(
        self, watch: Stopwatch, times: TimeModel, finalists: Sequence[Candidate]
    ) -> tuple[Finalist, tuple[Finalist, ...], Times]:
        """Time the finalists; where the fastest is sought, the one that is, if it holds."""
        self._tell(f"timing {len(finalists)} within the bound beside dense attention")
        contenders = {one: self._judge.contender(one) for one in finalists}
        taken = watch.times([_dense(), *contenders.values()])
        order = list(finalists)
        if self._spec.cost == "time":
            order.sort(key=lambda one: taken[one.name].median_us)
        # The first of the finalists was confirmed by the search, so there is always one.
        chosen = next(one for one in order if one is finalists[0] or self._judge.confirms(one))
        order.remove(chosen)
        predicted = {
            one: times.step_us(one.plane_dtype, self._step(one)) for one in (chosen, *order)
        }
        made = [
            Finalist(
                candidate=one,
                contender=contenders[one],
                predicted_read_bytes_share=self._share(one),
                predicted_speedup=times.dense_us / predicted[one],
                predicted_step_us=predicted[one],
                judged=self._judge.row(one),
                heldout=self._judge.known(one),
                times=taken[one.name],
            )
            for one in (chosen, *order)
        ]
        return made[0], tuple(made[1:]), taken[_DENSE]

    def _count(self, news: str) -> None:
        self._measured += 1
        self._tell(f"{self._measured}. {news}")

    def _none_cheaper(self, least: float, limit: float) -> str:
        unit, hint = "bytes", ""
        if self._spec.cost == "time":
            unit = "us"
            hint = " Or search by bytes, for another machine (--cost bytes)."
        return (
            f"No policy is predicted to cost less than dense attention at {self._spec.context} "
            f"tokens: {least:,.0f} against {limit:,.0f} {unit} per step. Attend densely here, or "
            f"tune at a longer context.{hint}"
        )

    def _none_within(self, kept: Sequence[Candidate], found: Found) -> str:
        bound = self._spec.bound
        head = f"No policy was found within {bound.words} <= {bound.limit:g}"
        if not found.measured:
            return f"{head}: the time was over before one was measured. Give more --minutes."
        nearest = kept[min(found.measured, key=lambda place: (found.measured[place], place))]
        row, heldout = self._judge.row(nearest), self._judge.known(nearest)
        also = "" if heldout is None else f", held out {said(self._judge.figure(heldout))}"
        rest = (
            "none is left that could do better"
            if found.open == 0
            else f"{found.open} were still open when the time was over: give more --minutes"
        )
        return (
            f"{head} at {self._spec.context} tokens. The nearest is {nearest.name}: "
            f"{said(self._judge.figure(row))}{also}, reading "
            f"{row.metrics['read_bytes_share']:.1%} of the cache's bytes; {len(found.measured)} "
            f"measured, {rest}. Allow more, or score more text (--windows, --window-tokens)."
        )


def _finalists(found: Found, costs: Sequence[float]) -> list[int]:
    """The best, and the next cheapest that were measured within the bound."""
    within = [
        place
        for place, error in found.measured.items()
        if error <= 1 and found.confirmed.get(place, True) and place != found.best
    ]
    best = [] if found.best is None else [found.best]
    return [*best, *sorted(within, key=lambda place: (costs[place], place))][:_FINALISTS]


def _dense() -> Contender:
    return Contender(name=_DENSE, policy=preset("dense"))


def _silent(_: str) -> None:
    pass

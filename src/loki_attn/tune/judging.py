"""Judging: what a candidate costs in quality, on the text it is chosen by and on text held out."""

from collections.abc import Callable, Sequence
from typing import Final, final

from loki_attn.basis import Basis
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import measure
from loki_attn.evaluate.perplexity import Perplexity
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.results import Row
from loki_attn.statistics import Interval
from loki_attn.tune.space import Candidate
from loki_attn.tune.spec import Spec

_LEAST_SHARE: Final = 1e-6

Tell = Callable[[str], None]
"""Called with lines of news."""


@final
class Judge:
    """Measures candidates by teacher-forced decoding, each once on each of two texts.

    Args:
        lm: The model; the prefixes that it reads are forked, so it may remember them.
        basis: The candidates' basis.
        spec: The bound and the windows.
        judged: Tokens of the stretches that candidates are judged on.
        heldout: Tokens of the stretches held out.
        journal: Holds what is measured already, and keeps the rest.
        tell: Called after every measurement.
    """

    def __init__(
        self,
        lm: LanguageModel,
        basis: Basis,
        spec: Spec,
        judged: Sequence[int],
        heldout: Sequence[int],
        *,
        journal: Journal,
        tell: Tell,
    ) -> None:
        """Make the two tasks."""
        self._lm, self._basis, self._spec = lm, basis, spec
        self._journal, self._tell = journal, tell
        self._judged = self._task(judged, spec.windows)
        self._heldout = self._task(heldout, spec.heldout_windows)
        self._rows: dict[tuple[Candidate, bool], Row] = {}

    def contender(self, candidate: Candidate) -> Contender:
        """The candidate with its basis."""
        policy = candidate.policy(self._spec.context)
        return Contender(name=candidate.name, policy=policy, basis=self._basis)

    def row(self, candidate: Candidate, *, heldout: bool = False) -> Row:
        """Measure a candidate on one of the two texts."""
        if (candidate, heldout) not in self._rows:
            task = self._heldout if heldout else self._judged
            (row,) = measure(task, self._lm, [self.contender(candidate)], journal=self._journal)
            self._rows[candidate, heldout] = row
        return self._rows[candidate, heldout]

    def known(self, candidate: Candidate) -> Row | None:
        """What the text held out said of a candidate, if it was asked."""
        return self._rows.get((candidate, True))

    def share(self, candidate: Candidate) -> float:
        """The upper end of the interval of a candidate's error, as a share of the bound."""
        found = self.figure(self.row(candidate))
        within = "within" if found.high <= self._spec.bound.limit else "beyond"
        self._tell(f"{candidate.name}: {said(found)}, {within}")
        return max(_LEAST_SHARE, found.high / self._spec.bound.limit)

    def confirms(self, candidate: Candidate) -> bool:
        """Whether the mean error on the text held out is within the bound."""
        found = self.figure(self.row(candidate, heldout=True))
        holds = found.mean <= self._spec.bound.limit
        verdict = "holds" if holds else "does not hold"
        self._tell(f"{candidate.name}: {said(found)} on held-out text, {verdict}")
        return holds

    def figure(self, row: Row) -> Interval:
        """What a row says of the bounded figure."""
        return self._spec.bound.read(row.metrics)

    def _task(self, ids: Sequence[int], windows: int) -> Perplexity:
        return Perplexity(
            ids=tuple(ids),
            how="decode",
            windows=windows,
            window_tokens=self._spec.window_tokens,
            prefix_tokens=self._spec.context - self._spec.window_tokens,
            corpus=self._spec.corpus,
        )


def said(found: Interval) -> str:
    """A figure with its interval, in print."""
    return f"{found.mean:.4g} [{found.low:.4g}, {found.high:.4g}]"

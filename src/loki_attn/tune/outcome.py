"""The outcome: the policy that was chosen, what was predicted of it, what was measured; as rows."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from loki_attn.bench.clock import Times
from loki_attn.bench.machine import backend_in_use
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.results import Row, make_row
from loki_attn.tune.space import Candidate
from loki_attn.tune.spec import Spec

TASK: Final = "tune"
PROTOCOL: Final = (
    "cheapest of a space of ranks, plane dtypes, top_k and dense layers whose error, by "
    "teacher-forced decoding, is within the bound: by the upper end of its 95 % interval on the "
    "stretches judged on, and by its mean on stretches held out; steps of the whole model timed in "
    "turns on copies of one prefix"
)
_ERRORS: Final = ("kl_to_dense", "nll_delta")
_ENDS: Final = ("", "_low", "_high")


class NothingFoundError(LokiAttnError):
    """No policy that is cheaper than dense attention was found within the bound."""


@final
@dataclass(frozen=True, kw_only=True)
class Counts:
    """How far the search looked.

    Attributes:
        predicted: Policies whose bytes and time were predicted.
        cheaper: Those of them that are predicted to cost less than dense attention.
        screened: Policies whose loss per layer was looked at in the screening pass.
        frontier: The cheaper ones that no other is expected to beat in cost and exactness.
        measured: Policies measured on the stretches judged on.
        confirmed: Policies measured on the stretches held out.
        open: Policies neither measured nor ruled out when the search ended.
    """

    predicted: int
    cheaper: int
    screened: int
    frontier: int
    measured: int
    confirmed: int
    open: int


@final
@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A policy within the bound.

    Attributes:
        candidate: Its place in the space.
        contender: The policy with its basis.
        predicted_read_bytes_share: Of dense attention's bytes, over the steps it was judged on.
        predicted_speedup: Dense attention's step by the policy's, as the time model has them.
        predicted_step_us: A quiet step of the whole model at the context (the 20th percentile), in
            microseconds.
        judged: The perplexity row on the stretches that it was chosen by.
        heldout: The same on the stretches held out; None where they were not asked.
        times: Measured steps.
    """

    candidate: Candidate
    contender: Contender
    predicted_read_bytes_share: float
    predicted_speedup: float
    predicted_step_us: float
    judged: Row
    heldout: Row | None
    times: Times


@final
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a tuning came to.

    Attributes:
        spec: What was asked.
        chosen: The policy.
        others: Further policies within the bound, by measured time.
        dense: Measured steps with dense attention.
        counts: How far the search looked.
    """

    spec: Spec
    chosen: Finalist
    others: tuple[Finalist, ...]
    dense: Times
    counts: Counts

    @property
    def final(self) -> bool:
        """Whether the search ended by itself, not by its time limit."""
        return self.counts.open == 0

    @property
    def speedup(self) -> float:
        """Dense attention's median step by the chosen policy's."""
        return self.dense.median_us / self.chosen.times.median_us

    def rows(self, lm: LanguageModel) -> list[Row]:
        """The finalists as rows, the chosen one first."""
        return [
            make_row(
                lm,
                finalist.contender,
                task=TASK,
                protocol=PROTOCOL,
                settings=self._settings(chosen=finalist is self.chosen),
                metrics=self._metrics(finalist),
                n=finalist.judged.n,
            )
            for finalist in (self.chosen, *self.others)
        ]

    def _settings(self, *, chosen: bool) -> dict[str, Any]:
        spec = self.spec
        return {
            **{name: value for name, value in asdict(spec).items() if name != "bound"},
            "bound_on": spec.bound.words,
            "bound": spec.bound.limit,
            "chosen": chosen,
            "search_ended": "by itself" if self.final else "by its time limit",
            **{f"policies_{name}": count for name, count in asdict(self.counts).items()},
            "backend": backend_in_use(),
            "threads": torch.get_num_threads(),
        }

    def _metrics(self, finalist: Finalist) -> dict[str, Any]:
        judged = finalist.judged.metrics
        return {
            "predicted_read_bytes_share": finalist.predicted_read_bytes_share,
            "read_bytes_share": judged["read_bytes_share"],
            "predicted_step_us": finalist.predicted_step_us,
            "predicted_speedup": finalist.predicted_speedup,
            **_spelt("", finalist.times),
            **_spelt("dense_", self.dense),
            "speedup": self.dense.median_us / finalist.times.median_us,
            **self._errors("", finalist.judged),
            **({} if finalist.heldout is None else self._errors("heldout_", finalist.heldout)),
            "intervals": judged["intervals"],
        }

    def _errors(self, prefix: str, row: Row) -> dict[str, Any]:
        metrics = row.metrics
        found = {
            f"{prefix}{name}{end}": metrics[f"{name}{end}"] for name in _ERRORS for end in _ENDS
        }
        if self.spec.bound.measure == "ppl":
            above = self.spec.bound.read(metrics)
            ends = (above.mean, above.low, above.high)
            found |= {f"{prefix}perplexity_delta{e}": v for e, v in zip(_ENDS, ends, strict=True)}
        return {**found, f"{prefix}n": row.n} if prefix else found


def write_policy(tuning: Tuning, path: Path) -> None:
    """Write the chosen policy as JSON, whole or not at all.

    Args:
        tuning: What was found.
        path: The file, which must end in .json so that `attach` and `-p` read it back.

    Raises:
        InputError: If the file cannot be written or has another ending.
    """
    check_policy_path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(tuning.chosen.contender.policy.to_json() + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"Cannot write the policy to {str(path)!r}: {error.strerror or error}."
        ) from error


def check_policy_path(path: Path) -> None:
    """Refuse a name that would not be read back as a policy's file.

    Raises:
        InputError: If it does not end in .json.
    """
    if path.suffix != ".json":
        raise InputError(
            f"A policy's file ends in .json, so that it can be told from a preset; got "
            f"{str(path)!r}."
        )


def _spelt(prefix: str, times: Times) -> dict[str, Any]:
    return {
        f"{prefix}median_step_us": times.median_us,
        f"{prefix}p20_step_us": times.p20_us,
        f"{prefix}p80_step_us": times.p80_us,
        f"{prefix}step_samples": times.samples,
    }

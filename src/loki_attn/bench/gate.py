"""The gate: no speed without a right result in the same process, against float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn.bench.contenders import Contender
from loki_attn.bench.layers import Layer, Plan
from loki_attn.select.loki import LEAD, LEAD_SCALE
from loki_attn.testing import plain_attention, plain_reference
from loki_attn.types import Selection

_ORDERS: Final = 3
# Where there are more pairs of batch row and KV head, this many of them stand for all.
_MOST_PAIRS: Final = 32
_FLOAT_EPS: Final = float(torch.finfo(torch.float32).eps)
# The soft-max of the scores: an exponential and a sum of many terms in float32.
_SOFT_MAX_ROUNDING: Final = 1e-4
# Half a step of the query's rounding: of its largest coordinate for codes, of each one for bf16.
_CODE_STEP: Final = 0.5 / 127
_BF16_STEP: Final = 2.0**-9


@final
@dataclass(frozen=True)
class Verdict:
    """Whether a contender may be timed.

    Attributes:
        passed: Whether everything was right.
        largest_error: Of its output against float64; NaN where it was not even compared.
        allowed: How much plain torch in the same dtype explains.
        reason: What was wrong, in words; empty where nothing was.
        pairs: Pairs of batch row and KV head that were compared with float64, and how many there
            are.
    """

    passed: bool
    largest_error: float
    allowed: float
    reason: str = ""
    pairs: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a row states it."""
        found = {
            "verdict": "passed" if self.passed else "failed",
            "largest_error": self.largest_error,
            "allowed_error": self.allowed,
        }
        return found if self.pairs is None else {**found, "pairs": list(self.pairs)}


@final
class Gate:
    """Judges contenders on one layer; what all dense ones are compared with is computed once.

    Args:
        plan: Sizes.
        layer: What the contenders read.
        most_pairs: Pairs of batch row and KV head that are compared with float64; where there are
            more, these are drawn. What costs little is checked of all.
    """

    def __init__(self, plan: Plan, layer: Layer, most_pairs: int = _MOST_PAIRS) -> None:
        """Draw the pairs."""
        self._plan, self._layer = plan, layer
        self._dense: tuple[Tensor, Tensor] | None = None
        every = plan.batch * plan.shape.num_kv_heads
        drawn = torch.randperm(every, generator=torch.Generator().manual_seed(0))[:most_pairs]
        self._pairs = [divmod(pair, plan.shape.num_kv_heads) for pair in sorted(drawn.tolist())]
        self._checked = len(self._pairs), every

    def judge(self, contender: Contender, found: Any = None) -> Verdict:
        """Compare what a contender makes of layer 0.

        Args:
            contender: Who is judged.
            found: What it gave; None to run it.
        """
        found = contender.run(0) if found is None else found
        return replace(self._judge(contender, found), pairs=self._checked)

    def _judge(self, contender: Contender, found: Any) -> Verdict:
        output: Tensor = found if contender.k is None else found[0]
        selection: Selection | None = None if contender.k is None else found[1]
        if output.shape != self._layer.query.shape or not bool(output.isfinite().all()):
            return _refused("its output has another shape, or numbers that are not finite")
        if selection is None:
            if self._dense is None:
                self._dense = self._truth(None)
            return self._compare(output, *self._dense)
        problem = self._problem_of(contender, selection)
        return _refused(problem) if problem else self._compare(output, *self._truth(selection))

    def _truth(self, selection: Selection | None) -> tuple[Tensor, Tensor]:
        """Attention to the rows read in float64, and as plain torch does it in the dtype.

        Both [pairs, group, 1, head_dim], of the pairs that are compared.
        """
        truth, plain = [], []
        call = self._plan.call
        for b, h, heads in self._heads():
            query = self._layer.query[b : b + 1, heads]
            rows = slice(None) if selection is None else _rows_of(selection, b, h)
            key = self._layer.keys[b : b + 1, h : h + 1, rows]
            value = self._layer.values[b : b + 1, h : h + 1, rows]
            wide = query.double(), key.double(), value.double()
            own = plain_attention(*wide, None, call)
            truth.append(own)
            plain.append(plain_reference(query, key, value, None, call, own, _ORDERS))
        return torch.cat(truth), torch.cat(plain)

    def _compare(self, output: Tensor, truth: Tensor, plain: Tensor) -> Verdict:
        """At most twice the error of plain torch, a rounding of the largest result, one float32's.

        The last is of the largest value row: sums in float32 start from values, however small their
        mean becomes, and on one draw their order alone can make more of a difference than plain
        torch's error.
        """
        own = torch.stack([output[b, heads] for b, _, heads in self._heads()])
        error = float((own.double() - truth).abs().max())
        allowed = 2 * float((plain.double() - truth).abs().max())
        allowed += torch.finfo(output.dtype).eps * float(plain.double().abs().max())
        values = self._layer.values
        allowed += _FLOAT_EPS * max(float(values.amax()), -float(values.amin()))
        if error <= allowed:
            return Verdict(passed=True, largest_error=error, allowed=allowed)
        reason = (
            f"its output errs by {error:.2e}, plain torch in {output.dtype} explains {allowed:.2e}"
        )
        return Verdict(passed=False, largest_error=error, allowed=allowed, reason=reason)

    def _problem_of(self, contender: Contender, selection: Selection) -> str:
        """What is wrong with a selection, if anything."""
        context, k, budget = self._plan.context, contender.k, contender.budget
        device = self._layer.query.device
        odd = selection.counts[selection.counts.ne(k or 0)]
        if odd.numel():
            other = int(odd[0])
            return f"a KV head: {other} rows were chosen, expected {k}"
        own = selection.indices[..., :k]
        unordered = bool((own.diff(dim=-1) <= 0).any())
        if unordered or int(own.min()) < 0 or int(own.max()) >= context:
            return f"a KV head: the rows are not unique, ascending and below {context}"
        estimate = self._estimate_of(contender)
        for b, h, heads in self._heads():
            rows = _rows_of(selection, b, h)
            where = f"batch row {b}, KV head {h}"
            chosen = torch.zeros(context, dtype=torch.bool, device=device)
            chosen[rows] = True
            forced = torch.zeros(context, dtype=torch.bool, device=device)
            if budget is not None:
                forced[: budget.sinks] = True
                forced[context - budget.recents :] = True
            if not bool(chosen[forced].all()):
                return f"{where}: sinks or recents were passed over"
            scores, slack = _group_scores(*estimate(b, h, heads))
            best_left = float(scores[~chosen].max()) if k != context else 0.0
            free = chosen & ~forced
            worst_taken = float(scores[free].min()) if bool(free.any()) else float("inf")
            if worst_taken * (1 + slack) < best_left:
                return (
                    f"{where}: a row of score {worst_taken:.3e} was chosen before one of "
                    f"{best_left:.3e}, which rounding ({slack:.1e}) does not explain"
                )
        return ""

    def _estimate_of(
        self, contender: Contender
    ) -> Callable[[int, int, slice], tuple[Tensor, float]]:
        """The estimated logits [group, context] in float64, and how far rounding may move them."""
        plan, layer, plane = self._plan, self._layer, contender.plane
        scaling = plan.call.scaling

        def exact(b: int, h: int, heads: slice) -> tuple[Tensor, float]:
            query, lead = layer.query[b, heads, 0].double(), layer.keys[b, h].double()
            return query @ lead.T * scaling, _rounding(query, lead, torch.zeros(())) * scaling

        def low_rank(b: int, h: int, heads: slice) -> tuple[Tensor, float]:
            cache = layer.caches[plane or ""]
            lead = cache.plane(LEAD)[b, h].double()
            if plane in {"int8", "int4"}:
                lead = lead * cache.plane(LEAD_SCALE)[b, h].double()[:, None]
            query = layer.query[b, heads, 0].double()
            query = query @ layer.basis.query_map[h, :, : plan.rank].double()
            step = torch.zeros(())
            if plane in {"int8", "int4"}:
                step = query.abs().amax(-1, keepdim=True) * _CODE_STEP
            elif plane == "bf16":
                step = query.abs() * _BF16_STEP
            return query @ lead.T * scaling, _rounding(query, lead, step) * scaling

        return exact if plane is None else low_rank

    def _heads(self) -> Iterator[tuple[int, int, slice]]:
        """Batch row, KV head and its query heads, of the pairs that are compared."""
        group = self._plan.shape.group
        for b, h in self._pairs:
            yield b, h, slice(h * group, (h + 1) * group)


def _refused(reason: str) -> Verdict:
    """Refuse what was not even compared."""
    return Verdict(passed=False, largest_error=float("nan"), allowed=0.0, reason=reason)


def _rows_of(selection: Selection, b: int, h: int) -> Tensor:
    return selection.indices[b, h, : int(selection.counts[b, h])]


def _rounding(query: Tensor, lead: Tensor, step: Tensor) -> float:
    """The most that a rounded query and a float32 sum can move any logit, before scaling."""
    sums = (query.shape[-1] + 8) * _FLOAT_EPS
    return float(((step + sums * query.abs()).expand_as(query) @ lead.abs().T).max())


def _group_scores(logits: Tensor, moved: float) -> tuple[Tensor, float]:
    """Soft-max weights summed over the group, and the share by which two of them may err."""
    # A weight errs through its own logit and through the sum; two weights are compared.
    slack = torch.expm1(torch.tensor(4 * moved, dtype=torch.float64))
    return torch.softmax(logits, -1).sum(0), float(slack) + _SOFT_MAX_ROUNDING

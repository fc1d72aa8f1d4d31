"""The byte model: what one decode step will read, known before it is run.

What a row takes is asked of the selector on a cache of one row, so that no formula stands twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch

from loki_attn.attention import bind
from loki_attn.basis import Basis
from loki_attn.budget import Budget
from loki_attn.cache import KEY, VALUE, LayerCache
from loki_attn.errors import InputError
from loki_attn.evaluate.protocol import LanguageModel, Observation
from loki_attn.policy import Policy
from loki_attn.types import LayerShape

if TYPE_CHECKING:
    from loki_attn.select.base import Select

_PROBE_TOKENS: Final = 8


@final
@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Cache bytes of one decode step over all full-attention layers.

    Attributes:
        scored: What ranking the rows reads, in the layers that select.
        chosen: Keys and values of the chosen rows, in the layers that select.
        whole: Keys and values of all rows, in the layers that read everything.
        dense: What dense attention would read in all of these layers.
        selecting_layers: How many layers select.
    """

    scored: int
    chosen: int
    whole: int
    dense: int
    selecting_layers: int

    @property
    def read(self) -> int:
        """All that is read."""
        return self.scored + self.chosen + self.whole


@final
@dataclass(frozen=True)
class Layout:
    """What a model's full-attention layers look like.

    Attributes:
        shapes: Their sizes by layer index.
        num_layers: Layers of the model, those that stay dense included.
        dtype: Of keys and values.
    """

    shapes: Mapping[int, LayerShape]
    num_layers: int
    dtype: torch.dtype


@final
class ByteModel:
    """Predicts the traffic of policies on one model, one sequence at a time.

    Args:
        basis: For the methods that need one.
        layout: The model's full-attention layers.
    """

    def __init__(self, basis: Basis | None, layout: Layout) -> None:
        """Start without any method bound."""
        self._basis = basis
        self._layout = layout
        self._rows: dict[Select, dict[int, tuple[int, float]]] = {}

    def step(self, policy: Policy, context: int) -> StepBytes:
        """Predict one step.

        Args:
            policy: What selects.
            context: Rows held in the step, the new token's own included.

        Returns:
            The bytes; for the same step they are what an attached model counts.

        Raises:
            InputError: If the rows that a step reads follow from the scores, or `context` is
                below 1.
            LokiAttnError: If policy, basis and model do not fit.
        """
        if context < 1:
            raise InputError(f"A step holds its own row at least, got context={context} tokens.")
        if policy.evicts or policy.reuse_above is not None:
            raise InputError(
                f"What policy {policy.name!r} holds, or reads again, follows from the text; its "
                "bytes cannot be predicted, measure them."
            )
        rows = self._row_bytes(policy)
        scored = chosen = whole = dense = selecting = 0
        for index, shape in self._layout.shapes.items():
            budget = policy.budget.for_layer(index, self._layout.num_layers)
            kept, ranked = rows[index]
            held = shape.num_kv_heads * context
            dense += held * kept
            if budget.is_dense(context):
                whole += held * kept
                continue
            _require_known(policy, budget, shape, ranks=ranked > 0)
            selecting += 1
            scored += round(held * ranked)
            chosen += shape.num_kv_heads * budget.count(context) * kept
        return StepBytes(
            scored=scored, chosen=chosen, whole=whole, dense=dense, selecting_layers=selecting
        )

    def _row_bytes(self, policy: Policy) -> dict[int, tuple[int, float]]:
        """By layer: bytes of a row with its value, and bytes that ranking it reads."""
        if policy.select not in self._rows:
            layout = self._layout
            self._rows[policy.select] = {
                index: _one_row(policy, shape, layout, self._basis)
                for index, shape in layout.shapes.items()
            }
        return self._rows[policy.select]


def step_bytes(policy: Policy, basis: Basis | None, layout: Layout, context: int) -> StepBytes:
    """Predict the bytes that one decode step reads.

    Args:
        policy: What selects.
        basis: Its basis, where it needs one.
        layout: The model's full-attention layers.
        context: Rows held in the step, the new token's own included.

    Returns:
        The bytes of one sequence.

    Raises:
        InputError: See `ByteModel.step`.
        LokiAttnError: If policy, basis and model do not fit.
    """
    return ByteModel(basis, layout).step(policy, context)


def layout_of(lm: LanguageModel) -> Layout:
    """Look at a model's full-attention layers in a short dense forward.

    Raises:
        InputError: If it has none.
    """
    shapes: dict[int, LayerShape] = {}
    dtypes: set[torch.dtype] = set()

    def look(seen: Observation) -> None:
        dtypes.add(seen.key.dtype)
        shapes[seen.layer_index] = LayerShape(
            index=seen.layer_index,
            num_heads=seen.query.shape[1],
            num_kv_heads=seen.key.shape[1],
            head_dim=seen.key.shape[3],
            value_dim=seen.value.shape[3],
        )

    observer: Callable[[Observation], None] = look
    with lm.observing(observer):
        lm.prefill(torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64))
    if not shapes:
        raise InputError(
            "The model has no full-attention layer that could select; there is nothing to predict."
        )
    return Layout(dict(sorted(shapes.items())), lm.num_layers, dtypes.pop())


def _one_row(
    policy: Policy, shape: LayerShape, layout: Layout, basis: Basis | None
) -> tuple[int, float]:
    selector = bind(policy, shape, layout.num_layers, basis).selector
    cache = LayerCache(selector)
    cache.append(
        torch.zeros(1, shape.num_kv_heads, 1, shape.head_dim, dtype=layout.dtype),
        torch.zeros(1, shape.num_kv_heads, 1, shape.value_dim, dtype=layout.dtype),
    )
    return cache.row_bytes(KEY, VALUE), selector.score_bytes(cache)


def _require_known(policy: Policy, budget: Budget, shape: LayerShape, *, ranks: bool) -> None:
    """Refuse what depends on the scores."""
    if budget.mass is not None:
        raise InputError(
            f"Policy {policy.name!r} reads as many rows as reach mass={budget.mass}; how many "
            "follows from the scores. Give top_k or fraction to predict bytes, or measure them."
        )
    if ranks and policy.group_reduce == "none" and shape.group > 1:
        raise InputError(
            f"Policy {policy.name!r} lets {shape.group} query heads choose apart, and what they "
            "read together follows from the scores. Use group_reduce='softmax_sum' to predict "
            "bytes, or measure them."
        )

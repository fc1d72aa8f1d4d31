"""Fidelity: per layer, how much of dense attention a policy's choice keeps.

All contenders see the same queries, keys and values, those of the dense model, so that layers can
be judged one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.cache import LayerCache
from loki_attn.errors import InputError
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import Progress, measure
from loki_attn.evaluate.protocol import Contender, LanguageModel, Observation
from loki_attn.evaluate.results import Row
from loki_attn.evaluate.summary import summarise
from loki_attn.evaluate.task import Item, Record
from loki_attn.evaluate.windows import cut, require_text
from loki_attn.kernels import ops
from loki_attn.policy import preset
from loki_attn.types import LayerShape

PROTOCOL: Final = (
    "one dense forward per window; queries sampled evenly from its second half choose among all "
    "rows before them; recall is the share of the exact top-k of the same budget and group rule, "
    "mass the share of dense attention weight on the chosen rows, output_error the relative "
    "2-norm of the attention output's error; means over windows, queries and heads"
)
METRICS: Final = ("recall", "mass", "exact_mass", "output_error")


def fidelity(
    lm: LanguageModel,
    ids: Sequence[int],
    contenders: Sequence[Contender],
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Row]:
    """Measure recall of the exact top-k, captured mass and output error per layer.

    Args:
        lm: The model.
        ids: Tokens of the text; windows are taken from its start.
        contenders: What to compare.
        journal: Holds what is measured already, and keeps the rest.
        progress: Called after every contender of a window.
        options: Fields of `Fidelity`.

    Returns:
        One row per contender; `metrics` holds the means with intervals over queries and, under
        "layers", lists per layer.

    Raises:
        InputError: If the text is too short, the windows exceed the model's context, or two
            contenders have the same name.
    """
    task = Fidelity(ids=tuple(ids), **options)
    return measure(task, lm, contenders, journal=journal, progress=progress)


@final
@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The task.

    Attributes:
        ids: Tokens of the text; windows are taken from its start.
        windows: How many windows.
        window_tokens: Tokens per window.
        queries: Query positions sampled per window.
        corpus: Name of the text, for the record.
    """

    ids: tuple[int, ...]
    windows: int = 2
    window_tokens: int = 2048
    queries: int = 64
    corpus: str = "unnamed"
    name: str = "fidelity"
    protocol: str = PROTOCOL
    row_labels: tuple[str, ...] = ()
    needs_dense: bool = False
    decodes: bool = False

    def __post_init__(self) -> None:
        """Refuse windows that the text does not fill."""
        if min(self.windows, self.queries) < 1 or self.window_tokens < 2:
            raise InputError(
                "Fidelity needs a window of 2 tokens and a query, got "
                f"{self.windows} windows of {self.window_tokens} tokens, {self.queries} queries."
            )
        require_text(self.ids, self.windows, self.window_tokens, "window")

    @property
    def settings(self) -> dict[str, Any]:
        """What defines the run."""
        return {
            "corpus": self.corpus,
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "queries": self.queries,
        }

    def items(self, lm: LanguageModel) -> list[Item]:
        """The windows."""
        if self.window_tokens > lm.context_tokens:
            raise InputError(
                f"{self.window_tokens} tokens per window exceed the model's context of "
                f"{lm.context_tokens}."
            )
        content = {"queries": self.queries}
        return cut(self.ids, self.windows, self.window_tokens, "window", content)

    def measure(
        self,
        lm: LanguageModel,
        item: Item,
        contenders: Sequence[Contender],
        dense: Record | None,
    ) -> Iterator[tuple[Contender, Record]]:
        """Judge all contenders in one dense forward."""
        del dense
        for contender in contenders:
            if contender.policy.evicts:
                raise InputError(
                    f"Fidelity judges what is read, and {contender.name} also evicts; measure it "
                    "by perplexity, or judge its selection alone."
                )
        probe = _Probe(contenders, lm.num_layers, self.queries, self.window_tokens)
        with lm.observing(probe):
            lm.prefill(torch.tensor([item.content["ids"]]))
        for contender in contenders:
            yield contender, probe.record(contender.name)

    def metrics(
        self, items: Sequence[Item], records: Sequence[Record], dense: Sequence[Record] | None
    ) -> dict[str, Any]:
        """Means over layers and heads with intervals over queries, and the layers' own means."""
        del items, dense
        found = summarise(records, None, block=1, what="queries")
        tables = [record.notes["layers"] for record in records]
        layers = {
            name: torch.tensor([table[name] for table in tables]).double().mean(0).tolist()
            for name in METRICS
        }
        return {**found, "layers": {"index": tables[0]["index"], **layers}}


class _Probe:
    """Judges every contender on what a layer saw."""

    def __init__(
        self, contenders: Sequence[Contender], num_layers: int, queries: int, tokens: int
    ) -> None:
        first = tokens // 2
        self._contenders = contenders
        self._num_layers = num_layers
        self._rows = torch.linspace(first, tokens - 1, min(queries, tokens - first)).long()
        # By contender and layer: [metrics, queries].
        self._found: dict[str, dict[int, Tensor]] = {c.name: {} for c in contenders}

    def __call__(self, seen: Observation) -> None:
        """Judge one layer's forward."""
        visible = ops().causal_mask(seen.query.shape[2], seen.key.shape[2], seen.query.device)
        query, visible = seen.query[:, :, self._rows], visible[:, :, self._rows]
        whole = ops().attend_masked(query, seen.key, seen.value, visible, seen.call)
        logits = ops().score(query, seen.key, None, seen.call)
        # Shares of the rows among themselves: sink logits have no row that could be chosen.
        weights = ops().estimated_weights(logits, visible, replace(seen.call, sink_logits=None))
        for contender in self._contenders:
            layer = _bind(contender, seen, self._num_layers)
            mask = _choose(query, layer, seen, visible)
            exact = _choose(query, _exact_twin(contender, layer), seen, visible)
            part = ops().attend_masked(query, seen.key, seen.value, mask, seen.call)
            error = (part.output - whole.output).float().norm(dim=-1)
            self._found[contender.name][seen.layer_index] = torch.stack(
                [
                    _mean_over_heads((mask & exact).sum(-1) / exact.sum(-1)),
                    _mass(weights, mask),
                    _mass(weights, exact),
                    _mean_over_heads(error / whole.output.float().norm(dim=-1).clamp(min=1e-9)),
                ]
            ).cpu()

    def record(self, name: str) -> Record:
        """Every query's mean over layers and heads, and every layer's mean."""
        layers = dict(sorted(self._found[name].items()))
        table = torch.stack(list(layers.values())).double()  # [layers, metrics, queries]
        per_query, per_layer = table.mean(0).tolist(), table.mean(2).T.tolist()
        return Record(
            values=dict(zip(METRICS, per_query, strict=True)),
            every_query_calls=len(layers),
            notes={"layers": {"index": list(layers), **dict(zip(METRICS, per_layer, strict=True))}},
        )


def _bind(contender: Contender, seen: Observation, num_layers: int) -> LayerPolicy:
    shape = LayerShape(
        index=seen.layer_index,
        num_heads=seen.query.shape[1],
        num_kv_heads=seen.key.shape[1],
        head_dim=seen.key.shape[3],
        value_dim=seen.value.shape[3],
    )
    return attention.bind(contender.policy, shape, num_layers, contender.basis, contender.profile)


def _exact_twin(contender: Contender, layer: LayerPolicy) -> LayerPolicy:
    exact = preset("exact-topk").select.bind(layer.shape, None)
    return LayerPolicy(
        shape=layer.shape, selector=exact, budget=layer.budget, group_reduce=layer.group_reduce
    )


def _choose(query: Tensor, layer: LayerPolicy, seen: Observation, visible: Tensor) -> Tensor:
    cache = LayerCache(layer.selector)
    cache.append(seen.key, seen.value)
    scores, counts, forced = attention.select(query, cache, layer, seen.call, visible)
    return ops().choose_mask(scores, counts, visible, forced)


def _mass(weights: Tensor, mask: Tensor) -> Tensor:
    """Weight on the marked rows, [queries]; the mask may be per KV head."""
    batch, _, q_len, seq = weights.shape
    grouped = weights.view(batch, mask.shape[1], -1, q_len, seq)
    return (grouped * mask[:, :, None]).sum(-1).flatten(0, 2).mean(0)


def _mean_over_heads(values: Tensor) -> Tensor:
    """[batch, heads, queries] -> [queries]."""
    return values.flatten(0, 1).float().mean(0)

"""Fidelity: per layer, how much of dense attention a policy's choice keeps.

All contenders see the same queries, keys and values, those of the dense model, so that layers can
be judged one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.cache import LayerCache
from loki_attn.errors import InputError
from loki_attn.evaluate.protocol import Contender, LanguageModel, Observation, check_names
from loki_attn.evaluate.results import Row, make_row
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

Progress = Callable[[str], None]


def fidelity(
    lm: LanguageModel,
    ids: Sequence[int],
    contenders: Sequence[Contender],
    *,
    windows: int = 2,
    window_tokens: int = 2048,
    queries: int = 64,
    corpus: str = "unnamed",
    progress: Progress | None = None,
) -> list[Row]:
    """Measure recall of the exact top-k, captured mass and output error per layer.

    Args:
        lm: The model.
        ids: Tokens of the text; windows are taken from its start.
        contenders: What to compare.
        windows: How many windows.
        window_tokens: Tokens per window.
        queries: Query positions sampled per window.
        corpus: Name of the text, for the record.
        progress: Called with a line of news.

    Returns:
        One row per contender; `metrics` holds the means and, under "layers", lists per layer.

    Raises:
        InputError: If the text is too short, the windows exceed the model's context, or two
            contenders have the same name.
    """
    check_names(contenders)
    if window_tokens > lm.context_tokens:
        raise InputError(
            f"{window_tokens} tokens per window exceed the model's context of {lm.context_tokens}."
        )
    if len(ids) < windows * window_tokens:
        raise InputError(
            f"{windows} windows of {window_tokens} tokens need {windows * window_tokens} tokens, "
            f"the text has {len(ids)}; give more text, fewer or shorter windows."
        )
    probe = _Probe(contenders, lm.num_layers, queries, window_tokens)
    for index in range(windows):
        window = torch.tensor([ids[index * window_tokens : (index + 1) * window_tokens]])
        with lm.observing(probe):
            lm.prefill(window)
        if progress is not None:
            progress(f"window {index + 1}/{windows}")
    settings = {
        "corpus": corpus,
        "windows": windows,
        "window_tokens": window_tokens,
        "queries": queries,
    }
    return [
        make_row(
            lm,
            contender,
            task="fidelity",
            protocol=PROTOCOL,
            settings=settings,
            metrics=probe.metrics(contender.name),
            n=windows * probe.queries,
        )
        for contender in contenders
    ]


class _Probe:
    """Judges every contender on what a layer saw, and adds up."""

    def __init__(
        self, contenders: Sequence[Contender], num_layers: int, queries: int, tokens: int
    ) -> None:
        first = tokens // 2
        self.queries = min(queries, tokens - first)
        self._contenders = contenders
        self._num_layers = num_layers
        self._rows = torch.linspace(first, tokens - 1, self.queries).long()
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._windows: dict[tuple[str, int], int] = {}

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
            found = torch.stack(
                [
                    ((mask & exact).sum(-1) / exact.sum(-1)).mean(),
                    _mass(weights, mask),
                    _mass(weights, exact),
                    (error / whole.output.float().norm(dim=-1).clamp(min=1e-9)).mean(),
                ]
            ).cpu()
            place = (contender.name, seen.layer_index)
            self._sums[place] = self._sums.get(place, torch.zeros(len(METRICS))) + found
            self._windows[place] = self._windows.get(place, 0) + 1

    def metrics(self, name: str) -> dict[str, Any]:
        """Means over layers, and the layers' own."""
        layers = sorted(index for contender, index in self._sums if contender == name)
        table = torch.stack([self._sums[name, i] / self._windows[name, i] for i in layers])
        means: dict[str, Any] = dict(zip(METRICS, table.mean(0).tolist(), strict=True))
        per_layer = dict(zip(METRICS, table.T.tolist(), strict=True))
        return {**means, "layers": {"index": layers, **per_layer}}


def _bind(contender: Contender, seen: Observation, num_layers: int) -> LayerPolicy:
    shape = LayerShape(
        index=seen.layer_index,
        num_heads=seen.query.shape[1],
        num_kv_heads=seen.key.shape[1],
        head_dim=seen.key.shape[3],
        value_dim=seen.value.shape[3],
    )
    return attention.bind(contender.policy, shape, num_layers, contender.basis)


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
    """Mean weight on the marked rows; the mask may be per KV head."""
    batch, _, q_len, seq = weights.shape
    grouped = weights.view(batch, mask.shape[1], -1, q_len, seq)
    return (grouped * mask[:, :, None]).sum(-1).mean()

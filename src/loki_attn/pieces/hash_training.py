"""Hash training: learn matrices whose signs are near for queries and the keys that they attend to.

The loss per KV head (arXiv 2506.02572, section 3), with h(x) = tanh(x W / 20), soft signs:

    similarity * mean(label * |h(q) - h(k)|^2)     best tenth of a query's keys: 20 down to 1, the
                                                   rest -1
    balance * |mean h(q) + mean h(k)|^2 / bits^2
    decorrelation * |W^T W - Id|                   Frobenius norm
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.artefact import JSON
from loki_attn.errors import InputError

_QUERIES: Final = 8
_KEYS: Final = 512
_BEST_SHARE: Final = 0.1
_BEST_LABEL: Final = 20.0
_OTHER_LABEL: Final = -1.0
_SIGMA: Final = 0.1
_LEARNING_RATE: Final = 0.1
_MOMENTUM: Final = 0.9
_WEIGHT_DECAY: Final = 1e-6


@dataclass(eq=False)
class _Layer:
    """What is kept of a layer: sampled pairs of every window, and the sum of all keys."""

    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    total: Tensor | float = 0.0
    count: int = 0


@final
class HashTraining:
    """A calibrator: samples queries and keys, trains a matrix per KV head when it finishes.

    Heads do not influence each other, and layers neither: they start alike and see samples of the
    same tokens.
    """

    def __init__(
        self,
        *,
        bits: int,
        centre: bool,
        steps: int,
        seed: int,
        similarity: float,
        balance: float,
        decorrelation: float,
    ) -> None:
        """Start without any window; `Hata.calibrator` says what the settings mean."""
        if type(steps) is not int or steps < 1:
            raise InputError(f"steps is a whole number of steps above 0, got {steps!r}.")
        if type(seed) is not int:
            raise InputError(f"seed is a whole number, got {seed!r}.")
        if type(centre) is not bool:
            raise InputError(f"centre is true or false, got {centre!r}.")
        self._bits, self._centre, self._steps, self._seed = bits, centre, steps, seed
        self._weights = {
            "similarity": similarity,
            "balance": balance,
            "decorrelation": decorrelation,
        }
        for name, weight in self._weights.items():
            _require_weight(name, weight)
        self._layers: dict[int, _Layer] = {}

    @property
    def settings(self) -> Mapping[str, JSON]:
        """All that the result depends on, beside the windows."""
        return {
            "bits": self._bits,
            "centre": self._centre,
            "steps": self._steps,
            "seed": self._seed,
            **self._weights,
        }

    def observe(self, layer_index: int, query: Tensor, key: Tensor) -> None:
        """Sample queries from the second half of a window, and keys; see `Calibrator`."""
        layer = self._layers.setdefault(layer_index, _Layer())
        tokens, kv_heads = key.shape[2], key.shape[1]
        for own_query, own_key in zip(query, key, strict=True):
            draw = self._draw(1 + len(layer.pairs))
            last = torch.randint(tokens // 2, tokens, (_QUERIES,), generator=draw)
            some = torch.randperm(tokens, generator=draw)[:_KEYS].sort().values
            last, some = last.to(key.device), some.to(key.device)
            keys = own_key.detach().float()
            asked = own_query.detach()[:, last].float().reshape(kv_heads, -1, keys.shape[2])
            labels = pair_labels(asked, keys, last.repeat(query.shape[1] // kv_heads))
            layer.pairs.append((asked, keys[:, some], labels[:, :, some]))
            layer.total = layer.total + keys.sum(1, dtype=torch.float64)
            layer.count += tokens

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """Train; returns `hash` [kv_heads, head_dim, bits] and `hash_mean` [kv_heads, head_dim]."""
        if not self._layers:
            raise InputError("Nothing was observed; show at least one window of a text.")
        # Windows may come from a forward under inference_mode, which training cannot read.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return {index: self._trained(layer) for index, layer in sorted(self._layers.items())}

    def _draw(self, stream: int) -> torch.Generator:
        """Random numbers that depend on the seed and on what they are for, on nothing else."""
        return torch.Generator().manual_seed((self._seed * 1_000_003 + stream) % 2**63)

    def _trained(self, layer: _Layer) -> dict[str, Tensor]:
        first = layer.pairs[0][1]
        kv_heads, _, dim = first.shape
        mean = first.new_zeros(kv_heads, dim)
        if self._centre and isinstance(layer.total, Tensor):
            mean = (layer.total / layer.count).float()
        pairs = [(q.clone(), k - mean[:, None], labels.clone()) for q, k, labels in layer.pairs]
        start = torch.randn(dim, self._bits, generator=self._draw(0))
        weight = start.to(first.device).expand(kv_heads, -1, -1).clone().requires_grad_()
        optimiser = torch.optim.SGD(
            [weight], lr=_LEARNING_RATE, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY
        )
        for step in range(self._steps):
            optimiser.zero_grad()
            query, key, labels = pairs[step % len(pairs)]
            losses = hash_loss(weight, query, key, labels, **self._weights)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return {"hash": weight.detach().cpu(), "hash_mean": mean.clone().cpu()}


def hash_loss(
    weight: Tensor,
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    *,
    similarity: float,
    balance: float,
    decorrelation: float,
) -> Tensor:
    """Compute the loss of every KV head (arXiv 2506.02572, section 3).

    Args:
        weight: float32 [kv_heads, head_dim, bits].
        query: float32 [kv_heads, queries, head_dim].
        key: float32 [kv_heads, keys, head_dim].
        labels: float32 [kv_heads, queries, keys]; 0 where a query does not see a key.
        similarity: Weight of the mean of label times squared distance.
        balance: Weight of what mean codes are away from 0.
        decorrelation: Weight of what columns are away from orthonormal.

    Returns:
        float32 [kv_heads].
    """
    asked, held = (torch.tanh(_SIGMA / 2 * (rows @ weight)) for rows in (query, key))
    apart = asked.square().sum(-1)[:, :, None] + held.square().sum(-1)[:, None]
    apart = apart - 2 * asked @ held.mT
    # Keys that a query does not see have label 0, and are no pair.
    count = (labels != 0).sum((1, 2)).clamp(min=1)
    similar = (labels * apart).sum((1, 2)) / count
    bits = weight.shape[2]
    balanced = ((asked.mean(1) + held.mean(1)) / bits).square().sum(-1)
    identity = torch.eye(bits, device=weight.device)
    alike: Tensor = torch.linalg.vector_norm(weight.mT @ weight - identity, dim=(1, 2))
    return similarity * similar + balance * balanced + decorrelation * alike


def pair_labels(query: Tensor, key: Tensor, last: Tensor) -> Tensor:
    """Say how much each pair should agree.

    Args:
        query: float32 [kv_heads, queries, head_dim].
        key: float32 [kv_heads, tokens, head_dim].
        last: int64 [queries]: the last key that each query sees.

    Returns:
        float32 [kv_heads, queries, tokens]: from 20 for a query's best key down to 1, linearly by
        rank, for the best tenth of what it sees, -1 for the others, 0 for what it does not see.
    """
    seen = torch.arange(key.shape[1], device=key.device) <= last[:, None]
    scores = (query @ key.mT).masked_fill(~seen, float("-inf"))
    rank = scores.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    best = ((last + 1) * _BEST_SHARE).round().clamp(min=1)[:, None]
    step = (_BEST_LABEL - 1) / (best - 1).clamp(min=1)
    return torch.where(rank < best, _BEST_LABEL - step * rank, _OTHER_LABEL) * seen


def _require_weight(name: str, weight: object) -> None:
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise InputError(f"{name} is a finite weight, at least 0, got {weight!r}.")

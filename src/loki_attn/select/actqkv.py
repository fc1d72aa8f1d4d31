"""ActQKV: rank blocks of rows by the cosine of a probe query and a few keys of each block.

Paper: Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference
arXiv: 2502.13542
What it does: holds a few representative keys of every block, and reads the blocks most similar to
    a probe query, the same for all heads of a layer. The probe of a chunk of queries is their mean,
    weighted by how far each is from the usual query (the activation bias); the probe of one query
    is that query. Layers whose block scores have more entropy get more of the budget.
What we do differently: here every query chooses for itself, so `score` never needs the probe of a
    chunk; `chunk_probe` is that probe, for who selects once per chunk of a prompt. Its running
    mean and variance are per layer, lie with the rows and end with them (the published code has one
    set for all layers and requests), and weigh from the first chunk on. Representatives are picked
    apart from each other: first the key most like the block's mean direction, then always the one
    least like those picked; a block scores by the best of them, mean over the heads. The sheet's
    question weight is left out. Nothing is loaded from another device, so there is no cache of
    blocks. The layers' shares need the entropies of all layers, which a forward in progress has
    not: take them from earlier runs by `normalised_entropy`, and give the table that
    `entropy_budgets` makes as the budget's per_layer. A block cut by the budget gives its first
    rows.
Bytes read per decode step: per KV head, T / block * representatives * head_dim * b, and
    k * (head_dim + value_dim) * b.
State per token: representatives * head_dim * b / block bytes per KV head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.basis import LayerBasis
from loki_attn.budget import require_count
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import InputError, PolicyError
from loki_attn.kernels import ops
from loki_attn.pieces.pages import behind, finite_rows, mean_row, to_rows, whole_pages
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

PICKED: Final = "representatives"
_COUNT: Final = "probe_count"
_MEAN: Final = "probe_mean"
_SPREAD: Final = "probe_spread"
_VARIANCE_FLOOR: Final = 0.01
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "actqkv": {
        "select": {"method": "actqkv", "block": 32, "representatives": 4},
        # 46 blocks that are chosen, 64 first and 512 last rows.
        "budget": {"top_k": 2048, "sinks": 64, "recents": 512},
        # All heads score alike, so this is their score.
        "group_reduce": "max",
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class ActQKV(Select):
    """Rank blocks by the cosine of the query and the block's representatives.

    Attributes:
        block: Rows per block, in tokens.
        representatives: Keys that stand for a block.
    """

    method: ClassVar[str] = "actqkv"
    estimates_mass: ClassVar[bool] = False
    block: int = 32
    representatives: int = 4

    def __post_init__(self) -> None:
        """Refuse blocks without rows or without representatives."""
        require_count("block", self.block, at_least=1)
        require_count("representatives", self.representatives, at_least=1)
        if self.representatives > self.block:
            raise PolicyError(
                f"representatives={self.representatives} is more than the {self.block} rows of a "
                "block; lower it or raise block."
            )

    @property
    def unit(self) -> int:
        """A block."""
        return self.block

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _ActSelector(self)


@final
class _ActSelector(Selector):
    def __init__(self, spec: ActQKV) -> None:
        self._spec = spec

    def page_rows(self) -> int:
        """Rows of a block."""
        return self._spec.block

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The directions of a few keys, [batch, kv_heads, blocks, representatives, head_dim]."""
        del values
        rows, real = finite_rows(keys)
        directions = functional.normalize(rows, dim=-1)
        middle = mean_row(directions, real)
        likeness = (directions @ middle[..., None])[..., 0]
        likest = likeness.masked_fill(~real, float("-inf")).argmax(-1)
        picked = [_row_at(directions, likest)]
        nearest = torch.full_like(likeness, float("-inf"))
        for _ in range(1, self._spec.representatives):
            nearest = torch.maximum(nearest, (directions @ picked[-1][..., None])[..., 0])
            farthest = nearest.masked_fill(~real, float("inf")).argmin(-1)
            picked.append(_row_at(directions, farthest))
        return {PICKED: torch.stack(picked, 3).to(keys.dtype)}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The cosine with the best representative of each row's block, mean over the heads."""
        del call
        picked = cache.summary(PICKED)
        probe = functional.normalize(query.float(), dim=-1).to(query.dtype)
        plane = picked.flatten(2, 3)
        cosine = ops().score(probe, plane, None, AttentionCall(scaling=1.0))
        best = cosine.view(*cosine.shape[:3], picked.shape[2], -1).amax(-1)
        agreed = best.mean(1, keepdim=True).expand(best.shape)
        return to_rows(agreed, self._spec.block, cache.length)

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor:
        """What a query sees of its own unfinished block."""
        size = self._spec.block
        return visible & behind(whole_pages(visible, size), size, cache.length)

    def score_bytes(self, cache: LayerCache) -> float:
        """A row's share of its block's representatives."""
        return cache.row_bytes(KEY) * self._spec.representatives / self._spec.block


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class QueryMoments:
    """What the queries of a layer were so far: running mean and variance of every channel.

    Attributes:
        count: float64 [batch]: queries seen.
        mean: float32 [batch, heads, head_dim].
        spread: float32 [batch, heads, head_dim]: sum of squared distances from the mean.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def none(cls, query: Tensor) -> "QueryMoments":
        """Moments of no query, for queries [batch, heads, q_len, head_dim]."""
        zero = query.new_zeros((query.shape[0], query.shape[1], query.shape[3]))
        count = torch.zeros(query.shape[0], dtype=torch.float64, device=query.device)
        return cls(count=count, mean=zero.float(), spread=zero.float())

    def with_queries(self, query: Tensor, real: Tensor) -> "QueryMoments":
        """Return the moments with more queries, as if all had come at once.

        Args:
            query: [batch, heads, q_len, head_dim].
            real: bool [batch, q_len]: queries that are no padding.
        """
        rows, mask = query.float(), real[:, None, :, None]
        more = real.sum(-1).double()
        total = (self.count + more).clamp(min=1)
        rows = rows.masked_fill(~mask, 0.0)
        mean = rows.sum(2) / more.clamp(min=1).float()[:, None, None]
        spread = (rows - mean[:, :, None]).masked_fill(~mask, 0.0).square().sum(2)
        shift = mean - self.mean
        share = (more / total).float()[:, None, None]
        between = (self.count * more / total).float()[:, None, None]
        return QueryMoments(
            count=self.count + more,
            mean=self.mean + shift * share,
            spread=self.spread + spread + shift.square() * between,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of every channel, float32 [batch, heads, head_dim]."""
        return self.spread / self.count.clamp(min=1).float()[:, None, None]


def activation_weights(query: Tensor, moments: QueryMoments, real: Tensor) -> Tensor:
    """Weigh queries by their activation bias (arXiv 2502.13542, section 3.2).

    The mean over all channels of (q - mean)^2 / (variance + mean variance / 100), as shares.

    Args:
        query: [batch, heads, q_len, head_dim].
        moments: What is usual.
        real: bool [batch, q_len]: queries that are no padding.

    Returns:
        float32 [batch, q_len], shares that sum to 1; equal ones where no query stands out.
    """
    variance = moments.variance
    floor = variance.mean((1, 2), keepdim=True) * _VARIANCE_FLOOR
    away = (query.float() - moments.mean[:, :, None]).square()
    usual = (variance + floor)[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)
    bias = (away / usual).mean((1, 3)).masked_fill(~real, 0.0)
    total = bias.sum(-1, keepdim=True)
    alike = real.float() / real.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, bias / total.clamp(min=torch.finfo(torch.float32).tiny), alike)


def chunk_probe(query: Tensor, cache: LayerCache, real: Tensor | None = None) -> Tensor:
    """The probe query of a chunk of queries, which the layer's running moments take in first.

    Args:
        query: [batch, heads, q_len, head_dim].
        cache: The layer's rows, whose memory holds the moments.
        real: bool [batch, q_len]: queries that are no padding; None for all.

    Returns:
        [batch, heads, 1, head_dim] in the query's dtype.
    """
    if real is None:
        real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    query = query.masked_fill(~real[:, None, :, None], 0.0)
    moments = _recall(query, cache).with_queries(query, real)
    kv_heads = cache.keys.shape[1]
    cache.memory[_COUNT] = moments.count[:, None].repeat(1, kv_heads)
    for name, held in ((_MEAN, moments.mean), (_SPREAD, moments.spread)):
        cache.memory[name] = held.reshape(held.shape[0], kv_heads, -1, held.shape[2])
    weights = activation_weights(query, moments, real)
    return (query.float() * weights[:, None, :, None]).sum(2, keepdim=True).to(query.dtype)


def normalised_entropy(scores: Tensor) -> Tensor:
    """Entropy of the soft-max over block scores [..., blocks], as a share of the largest: [...]."""
    if scores.shape[-1] < 2:
        return scores.new_zeros(scores.shape[:-1])
    log_share = scores.log_softmax(-1)
    entropy = -(log_share.exp() * log_share).sum(-1)
    return entropy / torch.tensor(scores.shape[-1], dtype=entropy.dtype).log()


def entropy_budgets(
    entropies: Sequence[float], total: int, *, least: int, most: int
) -> tuple[int, ...]:
    """Share a budget out over layers by their entropy, in their order (arXiv 2502.13542).

    Every layer gets what is left times its share of the entropy that is left, within bounds; so the
    bounds of early layers are paid by later ones, and the sum may miss the total where they bind.

    Args:
        entropies: Expected normalised entropy of the block scores of every layer.
        total: Rows that all layers together may read, in tokens.
        least: Fewest rows of a layer, in tokens.
        most: Most rows of a layer, in tokens.

    Returns:
        Rows for each layer, a table for `Budget.per_layer`.

    Raises:
        InputError: If entropies are negative or not finite, or the bounds cross.
    """
    if not entropies or not all(0 <= e < float("inf") for e in entropies):
        raise InputError(
            f"entropies must be finite and at least 0, one per layer, got {list(entropies)}."
        )
    require_count("least", least, at_least=1)
    if most < least:
        raise InputError(f"most={most} is less than least={least}; raise most or lower least.")
    left, counts = float(total), []
    for layer, entropy in enumerate(entropies):
        rest = sum(entropies[layer:])
        share = entropy / rest if rest > 0 else 1 / (len(entropies) - layer)
        counts.append(min(max(round(left * share), least), most))
        left = max(0.0, left - counts[-1])
    return tuple(counts)


def _recall(query: Tensor, cache: LayerCache) -> QueryMoments:
    """The moments of the queries so far, those of none at first."""
    if _COUNT not in cache.memory:
        return QueryMoments.none(query)
    mean, spread = (cache.memory[name].flatten(1, 2) for name in (_MEAN, _SPREAD))
    return QueryMoments(count=cache.memory[_COUNT][:, 0], mean=mean, spread=spread)


def _row_at(rows: Tensor, place: Tensor) -> Tensor:
    """The row at `place` [...] of rows [..., rows, head_dim]."""
    index = place[..., None, None].expand(*place.shape, 1, rows.shape[-1])
    return rows.gather(-2, index)[..., 0, :]

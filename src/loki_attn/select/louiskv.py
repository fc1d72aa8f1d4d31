"""LouisKV: rank clusters of similar keys by their mean, choose anew only when the query turns.

Paper: LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences
arXiv: 2510.11292
What it does: clusters the keys of a prompt by k-means, 16 to a cluster on average, and cuts later
    keys into contiguous segments; ranks these units by the soft-max weights of their mean keys,
    averaged over the group, and reads whole units. A step whose queries hardly turned reads again
    what the last choice read (`reuse_above`, which works with every method).
What we do differently: rows are clustered in blocks of 1,024, as soon as a block is full and
    whether the prompt or the model wrote them, so that units do not depend on how the rows came;
    the unfinished block is in segments of 16, not cut at the trigger, and its unfinished segment is
    always read. K-means starts from rows picked farthest from each other and runs a fixed number
    of rounds, so it is the same every time. A unit counts in the soft-max as often as it has rows.
    The budget counts rows, sinks and window included; a unit cut by it gives its first rows.
    Queries are compared with those of the last choice, not of the last step, so slow drift cannot
    go on unseen. The first two layers are sparse too, unless dense_layers=(0, 1) is asked for. The
    preset has the settings of long inputs (sinks 32, window 512, 512 rows, 0.85).
Bytes read per decode step: where it chooses, per KV head, T / cluster * head_dim * b and T for the
    units, on average block / 2 * head_dim * b for the unfinished block; k * (head_dim + value_dim)
    * b in any case, and one row more for each step since the last choice.
State per token: head_dim * b / cluster + 1 bytes per KV head; with reuse_above, the last queries
    and a byte per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.budget import require_count
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.pieces.pages import behind, finite_rows, mean_row, to_rows, whole_pages
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

CENTROID: Final = "centroid"
CLUSTER: Final = "cluster"
_MOST_CLUSTERS: Final = 256
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "louiskv": {
        "select": {"method": "louiskv", "cluster": 16},
        # 512 rows that are chosen, 32 first and 512 last rows.
        "budget": {"top_k": 1056, "sinks": 32, "recents": 512},
        "group_reduce": "softmax_sum",
        "reuse_above": 0.85,
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class LouisKV(Select):
    """Rank clusters by their mean key.

    Attributes:
        cluster: Rows per cluster on average, and per segment, in tokens.
        block: Rows that are clustered together, in tokens; a multiple of `cluster`.
        rounds: Rounds of k-means.
    """

    method: ClassVar[str] = "louiskv"
    estimates_mass: ClassVar[bool] = False
    cluster: int = 16
    block: int = 1024
    rounds: int = 4

    def __post_init__(self) -> None:
        """Refuse blocks that cannot be divided."""
        for name in ("cluster", "block", "rounds"):
            require_count(name, getattr(self, name), at_least=1)
        if self.block % self.cluster or self.block > _MOST_CLUSTERS * self.cluster:
            raise PolicyError(
                f"block must be a multiple of cluster={self.cluster} and at most {_MOST_CLUSTERS} "
                f"times as large, got {self.block}."
            )

    @property
    def unit(self) -> int:
        """A block: its rows are clustered together."""
        return self.block

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _LouisSelector(self)


@final
class _LouisSelector(Selector):
    def __init__(self, spec: LouisKV) -> None:
        self._spec = spec

    def page_rows(self) -> int:
        """Rows of a block."""
        return self._spec.block

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The clusters of whole blocks, and of which of them each row is."""
        del values
        spec, pages = self._spec, keys.shape[:3]
        means = keys.new_zeros(*pages, spec.block // spec.cluster, keys.shape[4])
        owners = torch.zeros(*pages, spec.block, dtype=torch.uint8, device=keys.device)
        if keys.shape[3] == spec.block:
            for page in range(pages[2]):
                found = cluster_rows(keys[:, :, page], spec.cluster, spec.rounds)
                means[:, :, page], owners[:, :, page] = found
        return {CENTROID: means, CLUSTER: owners}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The logit of the mean key of each row's unit, as each query knows it."""
        size, length, q_len = self._spec.block, cache.length, query.shape[2]
        # Blocks that were full when the first and when the last of these queries came.
        first, last = max(0, length - q_len + 1) // size, length // size
        whole, rest = last * size, first * size
        parts = [self._by_cluster(query, cache, call, last)]
        if rest < length:
            segments = self._by_segment(query, cache, call, rest)
            if whole > rest:
                # Full by now, but not when the earlier of these queries came.
                ends = torch.arange(length - q_len + 1, length + 1, device=query.device)
                full = ~behind(ends[:, None] // size, size, whole)[:, rest:]
                overlap = segments[..., : whole - rest]
                overlap = torch.where(full, parts[0][..., rest:], overlap)
                parts = [parts[0][..., :rest], overlap]
            parts.append(segments[..., whole - rest :])
        return torch.cat(parts, -1)

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor:
        """What a query sees of its own unfinished segment."""
        size = self._spec.cluster
        return visible & behind(whole_pages(visible, size), size, cache.length)

    def score_bytes(self, cache: LayerCache) -> float:
        """A row's share of the clusters, and of the keys of the unfinished block."""
        whole = cache.length // self._spec.block * self._spec.block
        row = cache.row_bytes(KEY)
        clusters = whole * (row / self._spec.cluster + 1)
        return (clusters + (cache.length - whole) * row) / cache.length

    def _by_cluster(
        self, query: Tensor, cache: LayerCache, call: AttentionCall, blocks: int
    ) -> Tensor:
        """Logits of the rows of the first blocks, [batch, heads, q_len, rows]."""
        batch, heads, q_len, _ = query.shape
        if not blocks:
            return query.new_zeros((batch, heads, q_len, 0), dtype=torch.float32)
        means = cache.summary(CENTROID)[:, :, :blocks]
        owners = cache.summary(CLUSTER)[:, :, :blocks].long()
        logits = ops().score(query, means.flatten(2, 3), None, call)
        kv_heads, group = means.shape[1], heads // means.shape[1]
        grouped = logits.view(batch, kv_heads, group, q_len, blocks, -1)
        spread = owners[:, :, None, None].expand(-1, -1, group, q_len, -1, -1)
        return grouped.gather(-1, spread).view(batch, heads, q_len, -1)

    def _by_segment(
        self, query: Tensor, cache: LayerCache, call: AttentionCall, start: int
    ) -> Tensor:
        """Logits of the rows from `start` on, by segments; those of an unfinished one are 0."""
        size, keys = self._spec.cluster, cache.keys[:, :, start:]
        whole = keys.shape[2] // size
        cut = keys[:, :, : whole * size].reshape(*keys.shape[:2], whole, size, keys.shape[3])
        out = torch.zeros(*query.shape[:3], keys.shape[2], dtype=torch.float32, device=query.device)
        if whole:
            means = mean_row(*finite_rows(cut)).to(keys.dtype)
            logits = ops().score(query, means, None, call)
            out[..., : whole * size] = to_rows(logits, size, whole * size)
        return out


def cluster_rows(keys: Tensor, size: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Cluster rows by k-means, from rows far from each other on (arXiv 2510.11292, section 4.2).

    Args:
        keys: [batch, kv_heads, rows, head_dim]; rows that are not finite are in no mean.
        size: Rows per cluster on average; divides the rows.
        rounds: Rounds of assigning rows to the nearest mean and taking means.

    Returns:
        The mean key of every cluster [batch, kv_heads, clusters, head_dim] in the dtype of the
        keys (that of a cluster without rows is what it was last), and uint8 [batch, kv_heads,
        rows]: the cluster of each row.
    """
    rows, real = finite_rows(keys)
    means = _far_rows(rows, real, keys.shape[2] // size)
    weight, owners = real.to(rows.dtype), torch.zeros_like(real, dtype=torch.int64)
    for _ in range(rounds):
        nearness = rows @ means.mT - means.square().sum(-1)[:, :, None] / 2
        owners = nearness.argmax(-1)
        place = owners[..., None].expand(rows.shape)
        sums = torch.zeros_like(means).scatter_add_(2, place, rows)
        counts = torch.zeros_like(means[..., 0]).scatter_add_(2, owners, weight)[..., None]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means.to(keys.dtype), owners.to(torch.uint8)


def _far_rows(rows: Tensor, real: Tensor, number: int) -> Tensor:
    """Pick the first real row, then always the one farthest from all that were picked.

    Returns:
        [batch, kv_heads, number, head_dim].
    """
    lengths = rows.square().sum(-1)
    apart = torch.full_like(lengths, float("inf")).masked_fill(~real, -1.0)
    picked = []
    for _ in range(number):
        place = apart.argmax(-1, keepdim=True)
        row = rows.gather(2, place[..., None].expand(-1, -1, -1, rows.shape[3]))
        picked.append(row)
        distance = lengths + lengths.gather(2, place) - 2 * (rows @ row.mT)[..., 0]
        # What is picked lies at 0 but for rounding, and must not be picked again.
        apart = torch.minimum(apart, distance).scatter_(2, place, -1.0)
    return torch.cat(picked, 2)

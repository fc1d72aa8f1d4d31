"""PyramidKV: layers near the input keep more rows than those near the output.

Paper: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling
arXiv: 2406.02069
What it does: capacities fall from layer to layer by the same step, from 2m - m / beta to m / beta
    rows beside the window, m being the mean; all heads of a layer keep the same number.
What we do differently: the capacities add up to layers * capacity exactly (rounded down one by one,
    as released code does, they exceed it by up to 5 %); all protected rows count as the window
    does; where layer 0 would get more rows than there are, the rest goes to the others. The preset
    scores by SnapKV with window 8, kernel 7 and max pooling, one choice per KV head.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, on average over
    layers.
State per token: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot, clamp_counts
from loki_attn.errors import PolicyError
from loki_attn.pieces.pyramid import pyramid_capacities

PRESETS: Final = {
    "pyramidkv": {
        "select": {"method": "dense"},
        "evict": {"method": "snapkv", "window": 8, "kernel": 7, "pooling": "max"},
        "keep": {"capacity": 2048},
        "allocate": {"method": "pyramid"},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocate):
    """An arithmetic progression over layers.

    Attributes:
        beta: How steep it is: the last layer keeps a beta-th of the mean; 1 is uniform.
    """

    method: ClassVar[str] = "pyramid"
    beta: float = 20.0

    def __post_init__(self) -> None:
        """Refuse a pyramid that stands on its head."""
        if self.beta < 1:
            raise PolicyError(
                f"beta is at least 1, which gives every layer the same, got {self.beta!r}; a table "
                "gives layers near the output more."
            )

    def layer_capacities(
        self, capacity: Tensor, protected: int, tokens: Tensor, num_layers: int
    ) -> Tensor:
        """The steps of the pyramid, int64 [num_layers, batch]."""
        return pyramid_capacities(capacity, protected, tokens, num_layers, self.beta)

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """The capacity of the layer, for each of its heads."""
        return [clamp_counts(b.capacity[:, None].expand_as(b.held), b) for b in ballots]

"""The space: every policy that a search may choose, and which of them are more exact than which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, final

import numpy as np

from loki_attn.policy import Policy, preset

Plane = Literal["int4", "int8", "bf16"]
PLANES: Final[tuple[Plane, ...]] = ("int4", "int8", "bf16")
"""From the coarsest to the most exact."""

_RANKS: Final = (8, 16, 32, 48)
_LEAST_TOP_K: Final = 64
_LONGEST_SHARE: Final = 2  # a top_k above half of the context saves too little


@final
@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One policy of the space.

    Attributes:
        rank: Coordinates that rank the rows.
        plane_dtype: What they are stored as.
        top_k: Rows that a query reads, in tokens.
        dense_layers: Layers that read everything, ascending.
    """

    rank: int
    plane_dtype: Plane
    top_k: int
    dense_layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        dense = f" dense={','.join(map(str, self.dense_layers))}" if self.dense_layers else ""
        return f"loki rank={self.rank} {self.plane_dtype} top_k={self.top_k}{dense}"

    def policy(self, context: int) -> Policy:
        """Build the policy.

        Args:
            context: Tokens of the context that it is judged at. Contexts of up to half of it may
                be read whole, as the preset does up to three times `top_k`: what was judged always
                selects.
        """
        return preset(
            "loki",
            name=self.name,
            rank=self.rank,
            plane_dtype=self.plane_dtype,
            top_k=self.top_k,
            dense_layers=self.dense_layers,
            dense_below=min(3 * self.top_k, context // _LONGEST_SHARE),
        )


def ranks_for(head_dim: int) -> tuple[int, ...]:
    """Ranks to try for keys of `head_dim` elements: 8, 16, 32, 48 and half, where below it."""
    return tuple(sorted({r for r in (*_RANKS, max(1, head_dim // 2)) if r < head_dim})) or (1,)


def amounts_for(context: int) -> tuple[int, ...]:
    """Values of top_k to try at a context: 64, 96, 128, 192 and so on, up to half of it.

    Args:
        context: Tokens held; where 64 is more than a sixteenth of them, the values begin lower.
    """
    step = min(_LEAST_TOP_K, max(8, context // 16))
    found = []
    while step <= context // _LONGEST_SHARE:
        found += [step, step + step // 2]
        step *= 2
    return tuple(k for k in found if k <= context // _LONGEST_SHARE)


def dense_sets(layers: Sequence[int], worst: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sets of layers that may stay dense: none, the first, the first two, the worst 1, 2 and 4.

    Args:
        layers: Full-attention layers, ascending.
        worst: The same, the one that loses most first.

    Returns:
        The sets, each of at most a quarter of the layers (a single one where there are two or
        more), without repeats.
    """
    most = max(1, len(layers) // 4) if len(layers) > 1 else 0
    wanted = [(), layers[:1], layers[:2], *(worst[:n] for n in (1, 2, 4))]
    found = dict.fromkeys(tuple(sorted(group)) for group in wanted if len(group) <= most)
    return tuple(found)


def candidates(
    ranks: Iterable[int], amounts: Iterable[int], dense: Iterable[tuple[int, ...]]
) -> tuple[Candidate, ...]:
    """All combinations, in a fixed order."""
    return tuple(
        Candidate(rank=rank, plane_dtype=plane, top_k=top_k, dense_layers=layers)
        for rank, plane, layers, top_k in product(ranks, PLANES, dense, amounts)
    )


def covering(found: Sequence[Candidate]) -> "np.ndarray":
    """Which candidates are at least as exact as which.

    Returns:
        bool [n, n]: at [i, j], whether i has no lower rank, no coarser plane, no smaller top_k than
        j, and every dense layer of j. Divergence from dense attention then is expected to be no
        larger.
    """
    size = len(found)
    rank, top_k = (np.array([getattr(c, name) for c in found]) for name in ("rank", "top_k"))
    plane = np.array([PLANES.index(c.plane_dtype) for c in found])
    within = np.ones((size, size), dtype=bool)
    for values in (rank, top_k, plane):
        within &= values[:, None] >= values[None, :]
    sets = {c.dense_layers: frozenset(c.dense_layers) for c in found}
    names = {layers: index for index, layers in enumerate(sets)}
    includes = np.array([[a >= b for b in sets.values()] for a in sets.values()])
    own = np.array([names[c.dense_layers] for c in found])
    return np.asarray(within & includes[own[:, None], own[None, :]])

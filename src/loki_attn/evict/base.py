"""The contract of an eviction method: a frozen specification that binds to one layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.keep_budget import KeepBudget
from loki_attn.kernels import ops
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall, LayerShape

Needs = Literal[
    "nothing",
    "keys",
    "values",
    "attention of all queries",
    "attention of the last queries",
    "statistics of the queries",
    "a second pass over the prompt",
    "a profile",
]
"""What a method must see to judge rows, cheapest first."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a method is bound to.

    Attributes:
        shape: Sizes of the layer.
        num_layers: Layers of the model, dense ones included.
        rope: The layer's rotary embedding; None where it is not known, or keys are stored in
            another space.
        profile: What was calibrated for this method and layer, by name; None without a profile.
        basis: The layer's basis, None without one.
        budget: The budget of the policy.
        model_profile: The same as `profile` for all layers, where one layer's part depends on the
            others; None without a profile.
    """

    shape: LayerShape
    num_layers: int
    rope: Rope | None = None
    profile: Mapping[str, Tensor] | None = None
    basis: LayerBasis | None = None
    budget: KeepBudget = field(default_factory=KeepBudget)
    model_profile: Profile | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Attended:
    """One attention call of a layer, after it was answered. Its rows are the last of the cache.

    Attributes:
        query: [batch, heads, q_len, head_dim] in the space of the stored key rows.
        call: Scaling, soft-cap, sink logits.
        visible: None where query i sees itself and all rows before it, or bool
            [batch or 1, kv_heads or 1, q_len, seq].
        weights: For single-token calls that had them at no cost: float32 [batch, kv_heads, seq],
            the (estimated) soft-max weights of every row, summed over the group's query heads.
    """

    query: Tensor
    call: AttentionCall
    visible: Tensor | None = None
    weights: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """Rows that are no padding: those that the last query sees, [batch, kv_heads or 1, seq]."""
        return None if self.visible is None else self.visible[:, :, -1]


class Evictor(ABC):
    """A method bound to a layer. It holds no state: that lies in the cache it is given.

    State of a row is a mark, read and written in place as `cache.plane(name)`; whatever else there
    is to remember is a tensor [batch, kv_heads, ...] in `cache.memory`. So an eviction, a reordered
    beam, a copy or a reset treats the state as it treats the rows, and requests cannot mix.

    Attributes:
        wants_weights: Whether a single-token step should hand over the rows' weights, where the
            attention has them at no cost.
    """

    wants_weights: ClassVar[bool] = False

    def marks(self) -> Mapping[str, Mark]:
        """Return the state that is kept with every row, by name."""
        return {}

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Learn from an attention call, before anything is evicted. By default nothing is learnt.

        Args:
            cache: The layer's rows, those of the call included.
            seen: The call.
        """
        del cache, seen

    @abstractmethod
    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Judge every row: higher means keep.

        Args:
            cache: The layer's rows with the marks and the memory of this method.
            call: Scaling, soft-cap, sink logits of the layer's attention.
            valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding. Others
                may hold anything, NaN included; their scores do not matter.

        Returns:
            float32 [batch, kv_heads, length]. The same for all heads where a method keeps one set.
        """

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor | None:
        """Rows that this method never drops, bool [batch, kv_heads or 1, length]; None for none.

        The budget's first and last rows are protected besides.
        """
        del cache, valid
        return None

    def head_weights(self, cache: LayerCache, valid: Tensor | None) -> Tensor | None:
        """How much each KV head deserves, float [batch, kv_heads]; None where none is judged.

        Only allocations that weigh heads ask for it, after `scores`.
        """
        del cache, valid
        return None

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Mark the rows that stay: by default the protected ones and the best of the others.

        Args:
            scores: float32 [batch, kv_heads, length].
            counts: int64 [batch, kv_heads]: how many stay, protected ones included.
            protected: bool [batch, kv_heads, length].
            valid: bool [batch, kv_heads, length]: rows that are no padding; padding stays only
                where there are fewer others than `counts`.

        Returns:
            bool [batch, kv_heads, length].
        """
        return best(scores, counts, protected, valid)

    def may_drop(self, cache: LayerCache, burst: int) -> bool:
        """Whether any row may go, asked of methods without a budget before rows are judged.

        Args:
            cache: The layer's rows.
            burst: Rows above what the method keeps that it may hold.
        """
        del cache, burst
        return True

    def plain_heads(self) -> Tensor | None:
        """Return the KV heads that a selection should leave alone, bool [kv_heads]; None for none.

        They keep so little that all of it is read: their rows are stored apart, without planes.
        """
        return None

    def settle(self, cache: LayerCache) -> None:
        """Put things right after rows were dropped; by default there is nothing to do."""
        del cache

    def narrowed(self, heads: Tensor) -> "Evictor":
        """Return the same method for some of the KV heads, int64 [kv_heads]."""
        del heads
        return self


class Evict(ABC):
    """The specification of a method: subclasses are frozen dataclasses in a file of their own.

    Attributes:
        method: Its name, that of its file.
        needs: What it must see.
        each_step: Whether it evicts at every step by default; otherwise at the end of every
            forward of several tokens, a prompt or a chunk of one.
        needs_budget: Whether it needs an amount; a method without one decides by itself.
        moves_keys: Whether it rotates stored keys or looks at single channels of them, and so
            cannot work on keys that are stored in a basis.
        needs_profile: Whether `bind` needs what was calibrated for this method.
    """

    method: ClassVar[str]
    needs: ClassVar[Needs]
    each_step: ClassVar[bool] = False
    needs_budget: ClassVar[bool] = True
    moves_keys: ClassVar[bool] = False
    needs_profile: ClassVar[bool] = False

    @property
    def window(self) -> int:
        """Last rows that must stay because their queries judge the others."""
        return 0

    def leader(self, layer: int) -> int:
        """The layer whose rows this one keeps, where both are evicted from together; itself."""
        return layer

    @abstractmethod
    def bind(self, place: Place) -> Evictor:
        """Return the evictor of one layer.

        Raises:
            PolicyError: If the specification does not fit the layer.
        """


def best(scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
    """Mark protected rows, then the best, then the lower of equals; padding only at the end.

    Args:
        scores: float32 [batch, kv_heads, length]; NaN ranks last.
        counts: int64 [batch, kv_heads], at most length.
        protected: bool [batch, kv_heads, length].
        valid: bool [batch, kv_heads, length].

    Returns:
        bool [batch, kv_heads, length] with exactly `counts` marks per head.
    """
    real = valid.sum(-1)
    chosen = ops().choose_mask(
        scores[:, :, None],
        counts.minimum(real)[..., None],
        valid[:, :, None],
        (protected & valid)[:, :, None],
    )[:, :, 0]
    missing = (counts - real).clamp(min=0)
    # Padding fills up what is missing, the last rows of it.
    padding = ~valid
    rank = padding.flip(-1).cumsum(-1).flip(-1)
    return chosen | (padding & (rank <= missing[..., None]))

"""UNComp: heads whose queries are many-sided keep more rows, by their matrix entropy.

Paper: UNComp: Uncertainty-Aware Long-Context Compressor
arXiv: 2410.03090
What it does: judges rows as SnapKV does (last 8 queries, average over 5 neighbours), and heads by
    the truncated matrix entropy of their queries: with the allocation "head_groups" (the preset)
    the heads of higher entropy share the larger capacity.
What we do differently: entropies come from the prompt's own last `sample` queries, decided once per
    cache, at the first eviction; groups_from="profile" takes those that a profile averaged over
    calibration windows (the paper counts votes of samples). Heads are KV heads, by the mean over
    their query heads, and nothing is repeated. Capacities average to the stated one. Rows are
    evicted after the prompt, or at steps with when="step". Outside, because it needs the model's
    own loop: pruning of hidden states between layers. Entropies are not renormalised after
    truncation, as in the released code: isotropic queries of dimension d reach K / d.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, on average over
    heads.
State per token: none; the last `sample` queries of a layer until the first eviction, then `window`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import InputError, PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import (
    are_queries,
    keep_queries,
    recent_queries,
    remember_queries,
)
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "uncomp": {
        "select": {"method": "dense"},
        "evict": {"method": "uncomp"},
        "keep": {"capacity": 512},
        "allocate": {"method": "head_groups"},
    }
}

ENTROPY: Final = "query_entropy"


@final
@dataclass(frozen=True, kw_only=True)
class UNComp(Evict):
    """SnapKV's score, and a judgement of heads.

    Attributes:
        window: Last queries that judge, whose rows stay.
        kernel: Neighbours that are averaged, an odd number; 1 pools nothing.
        truncate: Leading eigenvalues that count (the paper's K).
        sample: Last queries of the prompt whose entropy is taken, at least `window`.
        groups_from: Where the entropies come from: "prompt" or "profile".
    """

    method: ClassVar[str] = "uncomp"
    needs: ClassVar[Needs] = "attention of the last queries"
    window: int = 8
    kernel: int = 5
    truncate: int = 32
    sample: int = 256
    groups_from: Literal["prompt", "profile"] = "prompt"

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        """Entropies of the profile are needed only where the prompt's are not taken."""
        return self.groups_from == "profile"

    def __post_init__(self) -> None:
        """Refuse windows and kernels that judge nothing."""
        if self.window < 1 or self.sample < self.window:
            raise PolicyError(
                "UNComp needs a window of at least one query and a sample of at least the window, "
                f"got window={self.window}, sample={self.sample}."
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"UNComp pools over an odd number of rows, got kernel={self.kernel}.")
        if self.truncate < 1:
            raise PolicyError(f"truncate counts eigenvalues, at least 1, got {self.truncate}.")
        if self.groups_from not in ("prompt", "profile"):
            raise PolicyError(f"groups_from is 'prompt' or 'profile', got {self.groups_from!r}.")

    @classmethod
    def calibrator(cls, *, truncate: int = 32) -> "EntropyCalibrator":
        """Return what makes the profile of groups_from="profile".

        Args:
            truncate: As of the method.
        """
        return EntropyCalibrator(truncate=truncate)

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer.

        Raises:
            PolicyError: If the entropies are to come from a profile that does not hold them.
        """
        if self.groups_from == "prompt":
            return _UNComp(self, None)
        if place.profile is None or ENTROPY not in place.profile:
            raise PolicyError(
                f"groups_from='profile' needs a profile with {ENTROPY!r}; make one with "
                "`loki-attn profile --method uncomp`, or take groups_from='prompt'."
            )
        return _UNComp(self, place.profile[ENTROPY])


@final
class _UNComp(Evictor):
    def __init__(self, spec: UNComp, entropy: Tensor | None) -> None:
        self._spec = spec
        self._entropy = entropy

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries, as many as are still needed."""
        judged = self._entropy is not None or ENTROPY in cache.memory
        remember_queries(cache, seen, self._spec.window if judged else self._spec.sample)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Attention of the window, over the group, averaged over neighbours."""
        spec = self._spec
        return prefix_scores(
            cache,
            call,
            valid,
            window=spec.window,
            kernel=spec.kernel,
            pooling="avg",
            reduce="mean",
        )

    def head_weights(self, cache: LayerCache, valid: Tensor | None) -> Tensor:
        """The entropy of each KV head's queries, decided once."""
        heads = cache.keys.shape[1]
        if self._entropy is not None:
            return self._entropy.to(cache.keys.device).expand(cache.keys.shape[0], heads)
        if ENTROPY not in cache.memory:
            query = recent_queries(cache)
            real = None if valid is None else are_queries(cache)[:, :1]
            entropy = matrix_entropy(query, real, self._spec.truncate)
            cache.memory[ENTROPY] = over_heads(entropy, heads)
        return cache.memory[ENTROPY]

    def settle(self, cache: LayerCache) -> None:
        """Forget the queries that only the entropies needed."""
        keep_queries(cache, self._spec.window)

    def narrowed(self, heads: Tensor) -> Evictor:
        """The same for some of the KV heads."""
        if self._entropy is None:
            return self
        return _UNComp(self._spec, self._entropy[heads.to(self._entropy.device)])


@final
@dataclass(kw_only=True)
class EntropyCalibrator:
    """Averages the query entropy of every KV head over windows of text (arXiv 2410.03090).

    Attributes:
        truncate: Leading eigenvalues that count.
    """

    truncate: int = 32
    _sums: dict[int, Tensor] = field(default_factory=dict)
    _windows: dict[int, int] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What the profile was made with."""
        return {"truncate": self.truncate}

    def observe(self, layer_index: int, query: Tensor, key: Tensor) -> None:
        """Learn from one window.

        Args:
            layer_index: The layer's index.
            query: [batch, heads, tokens, head_dim], after RoPE.
            key: [batch, kv_heads, tokens, head_dim]; only its heads are counted.
        """
        found = over_heads(matrix_entropy(query, None, self.truncate), key.shape[1]).double().cpu()
        self._sums[layer_index] = self._sums.get(layer_index, 0.0) + found.sum(0)
        self._windows[layer_index] = self._windows.get(layer_index, 0) + found.shape[0]

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """Return per layer the mean entropy of every KV head, float32 [kv_heads].

        Raises:
            InputError: If nothing was observed.
        """
        if not self._sums:
            raise InputError("No window was observed; give at least one window of text.")
        return {
            index: {ENTROPY: (found / self._windows[index]).float()}
            for index, found in self._sums.items()
        }


def matrix_entropy(rows: Tensor, real: Tensor | None = None, truncate: int | None = None) -> Tensor:
    """Return the matrix entropy of rows, the spread of their directions (arXiv 2410.03090, eq. 3).

    Rows are centred over tokens and scaled to length 1; the eigenvalues of their covariance, with
    trace 1, are the probabilities. The sum over the leading ones is divided by log d, so it lies in
    [0, log K / log d].

    Args:
        rows: float [batch, heads, tokens, d].
        real: None, or bool [batch, 1, tokens]: rows that count.
        truncate: Leading eigenvalues that count (K); None for all.

    Returns:
        float32 [batch, heads]; 0 where all rows are alike, or d is 1.
    """
    dim = rows.shape[-1]
    wide = rows.double()
    counted = torch.ones_like(wide[..., :1]) if real is None else real[..., None].to(wide)
    # Rows that do not count may hold anything, NaN included.
    wide = torch.where(counted > 0, wide, 0.0)
    mean = wide.sum(-2, keepdim=True) / counted.sum(-2, keepdim=True).clamp(min=1)
    centred = (wide - mean) * counted
    length = centred.norm(dim=-1, keepdim=True)
    # What is left of equal rows is rounding, and has no direction.
    noise = torch.finfo(rows.dtype).eps * mean.norm(dim=-1, keepdim=True)
    unit = torch.where(length > noise, centred / length.clamp(min=1e-300), 0.0)
    covariance = unit.mT @ unit
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    normalised = covariance / trace.clamp(min=1e-300)[..., None, None]
    # Of trace 1, so single precision is good for six digits of the entropy, at half the time.
    share = torch.linalg.eigvalsh(normalised.float()).clamp(min=0).flip(-1)[..., :truncate]
    entropy: Tensor = -torch.special.xlogy(share, share).sum(-1) / max(math.log(dim), 1e-300)
    return entropy.clamp(min=0).masked_fill((trace <= 0) | (dim == 1), 0.0).float()


def over_heads(entropy: Tensor, num_kv_heads: int) -> Tensor:
    """Average the entropy of query heads [batch, heads] over each KV head's group."""
    return entropy.reshape(entropy.shape[0], num_kv_heads, -1).mean(-1)

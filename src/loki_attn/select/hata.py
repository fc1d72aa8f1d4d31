"""HATA: rank the rows by the Hamming distance of trained hash codes, attend exactly.

Paper: HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention
arXiv: 2506.02572
What it does: hashes queries and keys to `bits` signs by a matrix per layer and KV head that is
    trained on a calibration text, scores a row by (1 - 2 * distance / bits) * ||key||, sums over
    the query heads of a group, attends exactly to the best rows.
What we do differently: keys are hashed, and their norms taken, relative to the calibrated mean
    key, which shifts all logits of a query alike but spreads the codes of models whose keys have a
    large common part (the setting centre=False is the published form). Training takes 8 queries per
    window at a sample of its keys instead of one query per text at all keys, weighs similarity by
    0.2 (published 0.01, beside which the other terms leave it without effect), balance by 2 and
    decorrelation by 1 as the paper says (the released code has them the other way round), and
    normalises decorrelation per KV head, so that heads are trained independently. The learning rate
    is constant: the published schedule is never stepped. The preset has no dense layers (the paper
    keeps the first two, dense_layers=(0, 1)) and always reads 4 sinks and 64 recents (the paper
    none). weights="random" is the untrained control: Gaussian hashes of uncentred keys.
Bytes read per decode step: per KV head, T * (bits / 8 + 2) for codes and norms, and
    k * (head_dim + value_dim) * b.
State per token: bits / 8 + 2 bytes per KV head, 18 with 128 bits.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.calibrating import Calibrator
from loki_attn.errors import InputError, PolicyError, unknown_name
from loki_attn.kernels import ops
from loki_attn.pieces.hash_training import HashTraining
from loki_attn.select.base import Select, Selector, map_query
from loki_attn.types import AttentionCall, LayerShape

CODE: Final = "hash_code"
NORM: Final = "key_norm"
_WORD_BITS: Final = 32
_WEIGHTS: Final = ("trained", "random")
_HATA: Final[dict[str, Any]] = {
    "budget": {"top_k": 512, "sinks": 4, "recents": 64, "min_k": 128},
    "group_reduce": "sum",
}
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "hata": {"select": {"method": "hata"}, **_HATA},
    "hata-random": {"select": {"method": "hata", "weights": "random"}, **_HATA},
}


@final
@dataclass(frozen=True, kw_only=True)
class Hata(Select):
    """Rank by hash codes.

    Attributes:
        bits: Length of a code; a multiple of 32. That of the profile, where weights are trained.
        weights: "trained" takes the matrices of a profile, "random" draws Gaussian ones, the same
            for all layers and heads.
        seed: Seed of random weights.
    """

    method: ClassVar[str] = "hata"
    estimates_mass: ClassVar[bool] = False
    bits: int = 128
    weights: Literal["trained", "random"] = "trained"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no layer could serve."""
        if type(self.bits) is not int or self.bits < 1 or self.bits % _WORD_BITS:
            raise PolicyError(f"bits must be a multiple of 32 above 0, got {self.bits!r}.")
        if self.weights not in _WEIGHTS:
            raise unknown_name("weights", self.weights, _WEIGHTS)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise PolicyError(f"seed must be a whole number from 0, got {self.seed!r}.")

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        """Whether weights are trained ones."""
        return self.weights == "trained"

    @classmethod
    def calibrator(
        cls,
        *,
        bits: int = 128,
        centre: bool = True,
        steps: int = 300,
        seed: int = 0,
        similarity: float = 0.2,
        balance: float = 2.0,
        decorrelation: float = 1.0,
    ) -> Calibrator:
        """Return what trains the matrices; a few seconds per layer (arXiv 2506.02572, section 3).

        Args:
            bits: Length of a code; a multiple of 32.
            centre: Whether the mean key is taken away before hashing.
            steps: Steps of gradient descent per layer, one window each.
            seed: Of the start and of all sampling.
            similarity: Weight of the term that draws the codes of a query's best keys near.
            balance: Weight of the term that makes half of the bits ones.
            decorrelation: Weight of the term that makes bits differ.

        Raises:
            InputError: If a value cannot be used.
        """
        if type(bits) is not int or bits < 1 or bits % _WORD_BITS:
            raise InputError(f"bits must be a multiple of 32 above 0, got {bits!r}.")
        return HashTraining(
            bits=bits,
            centre=centre,
            steps=steps,
            seed=seed,
            similarity=similarity,
            balance=balance,
            decorrelation=decorrelation,
        )

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer with its matrices."""
        del basis
        heads, dim = shape.num_kv_heads, shape.head_dim
        if self.weights == "random":
            draw = torch.Generator().manual_seed(self.seed)
            weight = torch.randn(dim, self.bits, generator=draw).expand(heads, -1, -1)
            return _HataSelector(weight, torch.zeros(heads, dim))
        if profile is None or not {"hash", "hash_mean"} <= set(profile):
            raise PolicyError(
                f"HATA needs trained hash weights for layer {shape.index}; make a profile with "
                "`loki-attn profile --method hata` and pass profile=, or take weights='random', "
                "which needs none and ranks worse."
            )
        weight, mean = profile["hash"], profile["hash_mean"]
        if tuple(weight.shape[:2]) != (heads, dim) or tuple(mean.shape) != (heads, dim):
            raise PolicyError(
                f"Layer {shape.index} needs hash weights [kv_heads, head_dim, bits] = [{heads}, "
                f"{dim}, {self.bits}], the profile has {list(weight.shape)}: it belongs to another "
                "model."
            )
        if weight.shape[2] != self.bits:
            raise PolicyError(
                f"The profile's codes have {weight.shape[2]} bits, the policy asks for "
                f"{self.bits}; say bits={weight.shape[2]}, or make a profile with "
                f"`loki-attn profile --method hata --set bits={self.bits}`."
            )
        return _HataSelector(weight, mean)


@final
class _HataSelector(Selector):
    """Rows untouched, beside their codes and norms."""

    def __init__(self, weight: Tensor, mean: Tensor) -> None:
        # Bits must not depend on how many rows are hashed at once, and float32 sums do.
        self._weight = weight.double().contiguous()
        self._mean = mean.double()[:, None]

    def narrowed(self, heads: Tensor) -> Selector:
        """The matrices of these heads."""
        other = copy(self)
        other._weight = self._weight[heads.to(self._weight.device)]
        other._mean = self._mean[heads.to(self._mean.device)]
        return other

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Hash new keys."""
        self._to(key.device)
        centred = key.double() - self._mean
        norms = torch.linalg.vector_norm(centred, dim=-1)
        most = torch.finfo(torch.float16).max
        return {CODE: pack_signs(centred @ self._weight), NORM: norms.clamp(max=most).half()}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The agreement of codes, from -1 to 1, times the norm of the key."""
        del call
        self._to(query.device)
        codes = pack_signs(map_query(query.double(), self._weight))
        # In place: nobody else holds what `hamming` returns.
        agreement = ops().hamming(codes, cache.plane(CODE))
        agreement.mul_(-2 / self._weight.shape[2]).add_(1)
        batch, heads, q_len, length = agreement.shape
        norms = cache.plane(NORM).float()[:, :, None, None]
        grouped = agreement.view(batch, norms.shape[1], -1, q_len, length).mul_(norms)
        return grouped.view(batch, heads, q_len, length)

    def score_bytes(self, cache: LayerCache) -> float:
        """Codes and norms."""
        return cache.row_bytes(CODE, NORM)

    def _to(self, device: torch.device) -> None:
        self._weight, self._mean = self._weight.to(device), self._mean.to(device)


def pack_signs(rows: Tensor) -> Tensor:
    """Pack signs to bits: a bit is set where a number is above 0.

    Args:
        rows: float [..., bits], bits a multiple of 32.

    Returns:
        int32 [..., bits / 32]; the first number is the lowest bit of the first byte.
    """
    places = 2 ** torch.arange(8, device=rows.device, dtype=torch.uint8)
    octets = (rows > 0).view(*rows.shape[:-1], rows.shape[-1] // 8, 8).to(torch.uint8) * places
    return octets.sum(-1, dtype=torch.uint8).view(torch.int32)

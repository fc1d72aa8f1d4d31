"""Keyformer: heavy hitters under a noisy, ever flatter soft-max, and the most recent rows.

Paper: Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference
arXiv: 2403.09054
What it does: adds up, for every row, softmax((x + zeta) / tau) over all queries: x the logits, zeta
    Gumbel noise that makes up for the rows that were dropped, tau a temperature that grows with
    every decode step. The last rows stay (30 % of the budget) and the best of the others.
What we do differently: noise is drawn once per token, KV head and layer, from a seed, so that runs
    repeat, a batch row alone equals the same row in a batch, and chunks of a prompt equal the
    prompt; the released code draws it anew at every call. One choice per KV head, from the sum over
    its query heads; rows really go. Queries that are padding judge nothing. tau stops at
    `tau_end`; the released code lets it grow. The budget follows the text (`keep_share`), where
    the paper freezes it at the prompt's length. Truncated queries leave what they added, and tau
    starts again. `burst` lets a step evict many rows at once.
Bytes read per decode step: per KV head, capacity * (2 * head_dim + value_dim) * b + 8 * capacity:
    keys are read once more, because the attention's own weights have neither noise nor temperature.
State per token: 8 bytes per KV head: a score and the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place, best
from loki_attn.kernels import ops
from loki_attn.pieces.real_tokens import count_tokens, seen_by_real
from loki_attn.pieces.recents import with_recents
from loki_attn.pieces.reduction import over_group
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "keyformer": {
        "select": {"method": "dense"},
        "evict": {"method": "keyformer"},
        "keep": {"keep_share": 0.6},
    }
}

_RECEIVED: Final = "received"
_NOISE: Final = "noise"
_STEPS: Final = "decode_steps"
_BLOCK: Final = 64
# Far more layers and tokens than there are, so that no two blocks of noise share a seed.
_SEEDS: Final = 1_000_003


@final
@dataclass(frozen=True, kw_only=True)
class Keyformer(Evict):
    """Score by noisy attention received so far.

    Attributes:
        recent_share: Share of the budget that is for the last rows, in [0, 1], rounded down.
        tau_init: Temperature during the prompt.
        tau_step: What every decode step adds to it.
        tau_end: Where it stops.
        noise: Factor of the Gumbel noise; 0 draws none.
        seed: Seed of the noise, not negative.
    """

    method: ClassVar[str] = "keyformer"
    needs: ClassVar[Needs] = "attention of all queries"
    each_step: ClassVar[bool] = True
    recent_share: float = 0.3
    tau_init: float = 1.0
    tau_step: float = 0.01
    tau_end: float = 2.0
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse temperatures that fall and what is no share."""
        if not 0 <= self.recent_share <= 1:
            raise PolicyError(
                f"recent_share is a share of the budget in [0, 1], got {self.recent_share!r}."
            )
        if not 0 < self.tau_init <= self.tau_end or self.tau_step < 0:
            raise PolicyError(
                "Keyformer's temperature grows from tau_init > 0 to tau_end, got tau_init="
                f"{self.tau_init}, tau_step={self.tau_step}, tau_end={self.tau_end}."
            )
        if self.noise < 0 or self.seed < 0:
            raise PolicyError(
                f"noise and seed are not negative, got noise={self.noise}, seed={self.seed}."
            )

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer, whose index and heads the noise depends on."""
        shape = place.shape
        return _Keyformer(self, shape.index, shape.num_kv_heads, torch.arange(shape.num_kv_heads))


@final
class _Keyformer(Evictor):
    def __init__(self, spec: Keyformer, layer: int, num_kv_heads: int, heads: Tensor) -> None:
        self._spec = spec
        self._layer, self._num_kv_heads, self._heads = layer, num_kv_heads, heads

    def marks(self) -> Mapping[str, Mark]:
        """What a row received, and its noise."""
        return {_RECEIVED: Mark(torch.float32), _NOISE: Mark(torch.float32)}

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Draw the new rows' noise, and add what all rows receive."""
        spec, q_len = self._spec, seen.query.shape[2]
        noise = cache.plane(_NOISE)
        if spec.noise:
            drawn = self._drawn(count_tokens(cache, seen))
            noise[:, :, cache.length - q_len :] = drawn
        tau, call = self._tau(cache, q_len), seen.call
        sink_logits = call.sink_logits
        cooler = replace(
            call,
            scaling=call.scaling / tau,
            # cap * tanh(x / cap) / tau is the same with x and cap divided by tau.
            softcap=None if call.softcap is None else call.softcap / tau,
            sink_logits=None if sink_logits is None else sink_logits / tau,
        )
        bias = noise / tau if spec.noise else None
        sums = ops().column_sums(seen.query, cache.keys, seen_by_real(seen), cooler, bias=bias)
        cache.plane(_RECEIVED).add_(over_group(sums, cache.keys.shape[1], "sum"))

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """What was received."""
        del call, valid
        return cache.plane(_RECEIVED)

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """The last rows, then the best of the others."""
        protected = with_recents(protected, counts, valid, self._spec.recent_share)
        return best(scores, counts, protected, valid)

    def narrowed(self, heads: Tensor) -> "Evictor":
        """The same noise for some of the heads."""
        return _Keyformer(self._spec, self._layer, self._num_kv_heads, self._heads[heads])

    def _tau(self, cache: LayerCache, q_len: int) -> float:
        """The temperature of a call; a single token is a step."""
        steps = cache.memory.get(_STEPS)
        if steps is None:
            steps = torch.zeros(cache.keys.shape[:2], dtype=torch.int64, device=cache.keys.device)
        if q_len == 1:
            steps = steps + 1
        cache.memory[_STEPS] = steps
        spec = self._spec
        return min(spec.tau_init + spec.tau_step * int(steps[0, 0]), spec.tau_end)

    def _drawn(self, numbers: Tensor) -> Tensor:
        """The noise of tokens, float32 like `numbers` [batch, kv_heads, tokens]."""
        numbers = numbers.clamp(min=0)  # leading padding has any noise
        first = int(numbers.min()) // _BLOCK
        blocks = range(first, int(numbers.max()) // _BLOCK + 1)
        base = self._spec.seed * _SEEDS + self._layer
        table = torch.cat([gumbel(base, b, self._num_kv_heads) for b in blocks], 1)
        table = self._spec.noise * table[self._heads].to(numbers.device)
        places = numbers - first * _BLOCK
        return table.expand(numbers.shape[0], -1, -1).gather(2, places)


def gumbel(seed: int, block: int, num_kv_heads: int) -> Tensor:
    """Draw standard Gumbel noise for a block of tokens: float32 [num_kv_heads, tokens]."""
    draw = torch.Generator().manual_seed((seed * _SEEDS + block) % 2**63)
    waits = torch.empty(num_kv_heads, _BLOCK, dtype=torch.float64).exponential_(generator=draw)
    return -waits.log().float()

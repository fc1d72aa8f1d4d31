"""Inputs, truth and the one assertion: for tests of methods and kernels, ours and yours."""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from loki_attn import attention, eviction
from loki_attn.basis import Basis, LayerBasis
from loki_attn.eviction import Turn
from loki_attn.kernels import ops
from loki_attn.policy import Policy
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.serving import How, rows_for, serve
from loki_attn.types import AttentionCall, LayerShape


@final
class DrivenLayer:
    """One layer of a model that evicts, driven by hand: append, attend, learn, evict if it is time.

    Layers that share one budget do not evict by themselves: call `evict_all` after each forward.

    Args:
        policy: The policy; it may select as well.
        shape: Sizes of the layer.
        num_layers: Layers of the model.
        basis: For methods that need one.
        profile: What was calibrated for a method that needs it.
        rope: The layer's rotary embedding, for methods that move keys.
        call: What the model asks; by default a scaling of head_dim ** -0.5.

    Attributes:
        layer: The bound policy.
        rows: The layer's rows.
        turn: What the eviction knows beside them.
    """

    def __init__(
        self,
        policy: Policy,
        shape: LayerShape,
        *,
        num_layers: int = 1,
        basis: Basis | None = None,
        profile: Profile | None = None,
        rope: Rope | None = None,
        call: AttentionCall | None = None,
    ) -> None:
        """Bind the policy and start without rows."""
        self.layer = attention.bind(policy, shape, num_layers, basis, profile, rope)
        self.call = call or AttentionCall(scaling=shape.head_dim**-0.5)
        self.rows = rows_for(self.layer)
        self.turn = Turn(rows=self.rows)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None = None,
        *,
        how: How = "dense",
    ) -> Tensor:
        """Run one forward of the layer, and evict where it is time.

        Args:
            query: [batch, heads, tokens, head_dim].
            key: [batch, kv_heads, tokens, head_dim].
            value: [batch, kv_heads, tokens, value_dim].
            visible: None for causal, or bool [batch or 1, 1, tokens, tokens seen, these included].
            how: Whether everything is read, or the policy selects.

        Returns:
            [batch, heads, tokens, value_dim], attended before anything was evicted.
        """
        self.rows.append(key, value)
        out, _ = serve(query, self.turn, self.layer, self.call, visible, how, always=True)
        own, q_len = self.layer.eviction, query.shape[2]
        if own is not None:
            self.turn.waiting |= q_len > 1
            if own.allocate.scope == "layer" and eviction.is_due(own, self.turn, q_len):
                self.evict()
        return out

    def prompt(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None = None,
        *,
        chunks: Sequence[int] = (),
    ) -> Tensor:
        """Attend densely to a prompt, at once or in chunks.

        Args:
            query: [batch, heads, tokens, head_dim].
            key: [batch, kv_heads, tokens, head_dim].
            value: [batch, kv_heads, tokens, value_dim].
            valid: None, or bool [batch, tokens]: tokens that are no padding.
            chunks: Tokens before which a new forward begins, ascending.

        Returns:
            [batch, heads, tokens, value_dim].
        """
        tokens, past, parts = key.shape[2], self.rows.seen, []
        known = self.turn.valid
        for start, end in zip((0, *chunks), (*chunks, tokens), strict=True):
            seen = None
            if valid is not None:
                before = valid.new_ones(valid.shape[0], past) if known is None else known[:, 0]
                real = torch.cat([before, valid[:, :end]], 1)
                causal = ops().causal_mask(end - start, past + end, key.device)
                seen = causal & real[:, None, None]
            new = [rows[:, :, start:end] for rows in (query, key, value)]
            parts.append(self.attend(new[0], new[1], new[2], seen))
        return torch.cat(parts, 2)

    def evict(self) -> int:
        """Evict now; return how many rows went."""
        return self.evict_all([self])

    def positions(self) -> list[list[list[int]]]:
        """Return the positions of the rows held, per batch row and KV head."""
        parts = [shard.cache.positions for shard in self.rows]
        whole = self.rows.together(parts, -1)
        return [[[p for p in head if p >= 0] for head in row] for row in whole.tolist()]

    @staticmethod
    def evict_all(layers: Sequence["DrivenLayer"]) -> int:
        """Evict from the layers of one model together; return how many rows went."""
        turns = [(driven.layer.eviction, driven.turn) for driven in layers]
        return eviction.evict([(own, turn) for own, turn in turns if own is not None])


def layer_shape(
    num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 64, value_dim: int | None = None
) -> LayerShape:
    """Return the sizes of a small attention layer, layer 0 of its model."""
    return LayerShape(
        index=0,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
    )


def random_rows(
    shape: LayerShape,
    seq: int,
    *,
    batch: int = 1,
    q_len: int = 1,
    decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw Gaussian rows.

    Args:
        shape: Sizes of the layer.
        seq: Key and value rows.
        batch: Batch rows.
        q_len: Query rows.
        decay: Coordinate i of keys and queries has variance (i + 1) ** -decay, in a basis that
            differs between KV heads.
        dtype: Dtype of all three.
        seed: Seed of the draw, which is made in float64.

    Returns:
        query [batch, heads, q_len, head_dim], key [batch, kv_heads, seq, head_dim] and value
        [batch, kv_heads, seq, value_dim].
    """
    draw = torch.Generator().manual_seed(seed)
    kv_heads, dim = shape.num_kv_heads, shape.head_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    query = normal(batch, kv_heads, shape.group * q_len, dim)
    key = normal(batch, kv_heads, seq, dim)
    value = normal(batch, kv_heads, seq, shape.value_dim)
    if decay:
        spread = torch.arange(1, dim + 1, dtype=torch.float64) ** (-decay / 2)
        turn = _orthogonal(kv_heads, dim, seed)
        query, key = (query * spread) @ turn.mT, (key * spread) @ turn.mT
    query = query.reshape(batch, shape.num_heads, q_len, dim)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def spectral_basis(shape: LayerShape, seed: int = 0) -> Basis:
    """Return the basis in which `random_rows` with this seed draws decaying coordinates."""
    return _basis("pca", shape, _orthogonal(shape.num_kv_heads, shape.head_dim, seed))


def tiny_basis(
    shape: LayerShape, kind: Literal["random", "balanced"] = "random", seed: int = 1
) -> Basis:
    """Return a basis of one layer: "random" is orthogonal, "balanced" only invertible."""
    first = _orthogonal(shape.num_kv_heads, shape.head_dim, seed)
    if kind == "random":
        return _basis(kind, shape, first)
    second = _orthogonal(shape.num_kv_heads, shape.head_dim, seed + 1)
    stretch = torch.linspace(2.0, 0.5, shape.head_dim, dtype=torch.float64)
    return _basis(kind, shape, (first * stretch) @ second, (first / stretch) @ second)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """Attention by the textbook, every step in the dtype of the inputs: float64 gives the truth.

    Args:
        query: [batch, heads, q_len, head_dim].
        key: [batch, kv_heads, seq, head_dim].
        value: [batch, kv_heads, seq, value_dim].
        visible: None for all, or bool broadcastable to [batch, heads, q_len, seq].
        call: Scaling, soft-cap, sink logits.

    Returns:
        [batch, heads, q_len, value_dim]; 0 where a query sees nothing.
    """
    weights = plain_weights(query, key, visible, call)
    return _per_kv_head(weights, value)


def plain_weights(
    query: Tensor, key: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """The soft-max weights [batch, heads, q_len, seq] of `plain_attention`."""
    logits = _per_kv_head(query, key.mT) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if visible is not None:
        logits = torch.where(visible, logits, float("-inf"))
    if call.sink_logits is not None:
        sink = call.sink_logits.to(logits.dtype).view(1, -1, 1, 1)
        logits = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return weights if call.sink_logits is None else weights[..., :-1]


def plain_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    call: AttentionCall,
    truth: Tensor,
    orders: int = 8,
) -> Tensor:
    """`plain_attention` in the dtype of the inputs, with the rounding error it really has.

    One evaluation may be right by luck, and no other order of summation could then meet its
    budget. So it is evaluated with rows and coordinates in several orders, which changes nothing
    but rounding, and the one farthest from the truth counts.

    Args:
        query: [batch, heads, q_len, head_dim].
        key: [batch, kv_heads, seq, head_dim].
        value: [batch, kv_heads, seq, value_dim].
        visible: None for all, or bool [batch or 1, heads or 1, q_len, seq].
        call: Scaling, soft-cap, sink logits.
        truth: float64, the same attention.
        orders: How many orders are tried.

    Returns:
        [batch, heads, q_len, value_dim], the reference for `assert_within_budget`.
    """
    draw = torch.Generator().manual_seed(0)
    found = [plain_attention(query, key, value, visible, call)]
    for _ in range(orders - 1):
        rows = torch.randperm(key.shape[2], generator=draw)
        columns = torch.randperm(key.shape[3], generator=draw)
        seen = visible if visible is None else visible[..., rows]
        mixed = key[:, :, rows][..., columns]
        found.append(plain_attention(query[..., columns], mixed, value[:, :, rows], seen, call))
    return max(found, key=lambda out: float((out.double() - truth).abs().max()))


def assert_within_budget(kernel_out: Tensor, reference_out: Tensor, truth: Tensor) -> None:
    """Assert that a kernel errs at most twice as much as the plain reference in its dtype.

    With e the largest error against the truth: e_kernel <= 2 e_reference + eps * max|reference|.

    Args:
        kernel_out: What is tested.
        reference_out: The same from a plain implementation in the same dtype.
        truth: The same in float64, from the same (rounded) inputs.

    Raises:
        AssertionError: If the budget is exceeded, or something is not finite or not comparable.
    """
    _require(truth.dtype == torch.float64, f"the truth is float64, got {truth.dtype}")
    _require(
        kernel_out.shape == reference_out.shape == truth.shape,
        f"shapes differ: {kernel_out.shape}, {reference_out.shape}, {truth.shape}",
    )
    _require(
        kernel_out.dtype == reference_out.dtype,
        f"dtypes differ: {kernel_out.dtype}, {reference_out.dtype}",
    )
    _require(bool(torch.isfinite(truth).all()), "the truth is not finite")
    _require(bool(torch.isfinite(kernel_out).all()), "the kernel's result is not finite")
    error = float((kernel_out.double() - truth).abs().max())
    allowed = 2 * float((reference_out.double() - truth).abs().max())
    allowed += torch.finfo(kernel_out.dtype).eps * float(reference_out.double().abs().max())
    _require(error <= allowed, f"largest error {error:.3e}, allowed {allowed:.3e}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _per_kv_head(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply each query head's rows with its KV head's columns, a group at a time.

    One product per group, as a kernel makes it: products of single rows sum in another, more
    exact order, and would hold every kernel to a budget that no grouped product can meet.
    """
    group = rows.shape[1] // columns.shape[1]
    parts = []
    for head in range(columns.shape[1]):
        own = rows[:, head * group : (head + 1) * group]
        product = own.flatten(1, 2) @ columns[:, head]
        parts.append(product.view(*own.shape[:3], -1))
    return torch.cat(parts, 1)


def _orthogonal(count: int, size: int, seed: int) -> Tensor:
    """Draw `count` orthogonal float64 matrices."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(count, size, size, generator=draw, dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(matrix).Q
    return columns


def _basis(
    kind: Literal["pca", "random", "balanced"],
    shape: LayerShape,
    key_map: Tensor,
    query_map: Tensor | None = None,
) -> Basis:
    layer = LayerBasis(
        key_map=key_map.float(),
        query_map=(key_map if query_map is None else query_map).float(),
        spectrum=torch.ones(key_map.shape[:2], dtype=torch.float64),
    )
    return Basis(kind=kind, side="post", orthogonal=query_map is None, layers={shape.index: layer})

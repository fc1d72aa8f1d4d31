"""Calls of `column_sums` of random sizes, and what they must give, in float64."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from native_scenes import DIMS, DTYPES, LAYOUTS, laid_out
from native_truth import EPS, TINY, logit_error
from torch import Tensor

from loki_attn.kernels import reference
from loki_attn.types import AttentionCall

NAN = float("nan")


@dataclass(frozen=True, repr=False)
class Columns:
    """One call. What an op gets may hold poison; the truth is made of what is clean."""

    query: Tensor
    keys: Tensor
    visible: Tensor | None
    call: AttentionCall
    window: int | None
    bias: Tensor | None
    how: str
    clean_query: Tensor
    clean_keys: Tensor
    clean_bias: Tensor | None

    def __repr__(self):
        sizes = [list(rows.shape) for rows in (self.query, self.keys)]
        masked = None if self.visible is None else list(self.visible.shape)
        biased = self.bias is not None
        return (
            f"Columns({sizes}, {self.query.dtype}, mask {masked}, window {self.window}, "
            f"bias {biased}, {self.how}, {self.call})"
        )

    @property
    def counted(self):
        """How many queries count."""
        q_len = self.query.shape[2]
        return q_len if self.window is None else min(self.window, q_len)

    @property
    def seen(self):
        """bool [batch or 1, heads or 1, q_len, T]."""
        heads, q_len = self.query.shape[1:3]
        if self.visible is None:
            return reference.causal_mask(q_len, self.keys.shape[2], torch.device("cpu"))
        return self.visible.repeat_interleave(heads // self.visible.shape[1], 1)

    def by(self, op):
        """What an op makes of it."""
        more = {"window": self.window, "bias": self.bias, "how": self.how}
        return op(self.query, self.keys, self.visible, self.call, **more)


@st.composite
def columns(draw, *, dtypes=DTYPES, longest=700):
    """A call of random sizes, layouts, mask, window, bias and soft-max."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seq = draw(st.one_of(st.sampled_from([1, 16, 64, 65, 512, 513, 700]), st.integers(1, 130)))
    seq = min(seq, longest)
    masked = draw(st.booleans())
    q_len = draw(st.one_of(st.sampled_from([1, 6, 7, 64]), st.integers(1, 70)))
    q_len = q_len if masked else min(q_len, seq)
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    dim, dtype = draw(st.sampled_from(DIMS)), draw(st.sampled_from(dtypes))
    size = draw(st.sampled_from([1.0, 1.0, 1.0, 4.0, 0.0]))
    query = (torch.randn(batch, heads, q_len, dim, generator=seed) * size).to(dtype)
    keys = torch.randn(batch, kv_heads, seq, dim, generator=seed).to(dtype)
    visible = None
    if masked:
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads])))
        share = draw(st.sampled_from([0.02, 0.5, 0.95, 1.0]))
        visible = torch.rand(*shape, q_len, seq, generator=seed) < share
        if draw(st.booleans()):  # rows that nobody sees
            visible = visible & (torch.rand(*shape, 1, seq, generator=seed) < 0.5)
    window = draw(st.sampled_from([None, 1, 5, q_len, q_len + 3]))
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(batch, kv_heads, seq, generator=seed) * draw(
            st.sampled_from([1.0, 20.0])
        )
    call = AttentionCall(
        scaling=dim**-0.5,
        softcap=draw(st.sampled_from([None, None, 2.0, 50.0])),
        sink_logits=torch.randn(heads, generator=seed) if draw(st.booleans()) else None,
    )
    how = draw(st.sampled_from(["sum", "sum", "max"]))
    scene = Columns(query, keys, visible, call, window, bias, how, query, keys, bias)
    return laid(scene, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([None, NAN, math.inf])))


def laid(scene, layout, poison):
    """The same call in other memory, with poison in what nobody may read."""
    query, keys, visible, bias = scene.query, scene.keys, scene.visible, scene.bias
    if poison is not None:
        query = query.clone()
        query[:, :, : query.shape[2] - scene.counted] = poison
    if poison is not None and visible is not None:
        unread = ~visible[:, :, query.shape[2] - scene.counted :].any(2)
        keys = keys.masked_fill(unread[..., None], poison)
        bias = bias if bias is None else bias.masked_fill(unread, poison)
    if visible is not None:
        visible = laid_out(visible, "plain" if layout == "by token" else layout)
    if bias is not None and layout == "view":
        bias = laid_out(bias[..., None], "view")[..., 0]
    query, keys = laid_out(query, layout), laid_out(keys, layout)
    return Columns(
        query, keys, visible, scene.call, scene.window, bias, scene.how,
        scene.clean_query, scene.clean_keys, scene.clean_bias,
    )  # fmt: skip


def weights(scene, order=None, columns=None, dtype=torch.float64):
    """Soft-max weights [batch, heads, counted, T] by the textbook, in `dtype`."""
    query, keys = scene.clean_query.to(dtype), scene.clean_keys.to(dtype)
    if columns is not None:
        query, keys = query[..., columns], keys[..., columns]
    heads, kv_heads = query.shape[1], keys.shape[1]
    group = heads // kv_heads
    logits = query @ keys.repeat_interleave(group, 1).mT * scene.call.scaling
    if scene.call.softcap is not None:
        logits = scene.call.softcap * torch.tanh(logits / scene.call.softcap)
    if scene.clean_bias is not None:
        logits = logits + scene.clean_bias.to(dtype).repeat_interleave(group, 1)[:, :, None]
    logits = logits.masked_fill(~scene.seen, float("-inf"))
    if scene.call.sink_logits is not None:
        sink = scene.call.sink_logits.to(dtype).view(1, -1, 1, 1)
        logits = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1)
    found = torch.softmax(logits, -1).nan_to_num(0.0)[..., : keys.shape[2]]
    found = found[:, :, found.shape[2] - scene.counted :]
    return found if order is None else found[:, :, order]


def gathered(scene, found):
    return found.sum(2) if scene.how == "sum" else found.amax(2)


def plain(scene, truth, orders=8):
    """The textbook in float32: of several orders of summation the one farthest from the truth."""
    draw = torch.Generator().manual_seed(0)
    results = [gathered(scene, weights(scene, dtype=torch.float32))]
    for _ in range(orders - 1):
        order = torch.randperm(scene.counted, generator=draw)
        mixed = torch.randperm(scene.keys.shape[3], generator=draw)
        results.append(gathered(scene, weights(scene, order, mixed, torch.float32)))
    return max(results, key=lambda out: float((out.double() - truth).abs().max()))


def bound(scene):
    """How far float32 may be from the truth, by the error of its logits and its sums."""
    known = weights(scene)
    query, keys = scene.clean_query.double(), scene.clean_keys.double()
    error = logit_error(query, keys, scene.seen, scene.call)
    if scene.clean_bias is not None:
        error = error + 8 * EPS * float(scene.clean_bias.abs().max())
    slack = torch.expm1(2 * error + 16 * EPS)[:, :, error.shape[2] - scene.counted :]
    most = gathered(scene, known * slack + 8 * TINY)
    return most + scene.counted * EPS * gathered(scene, known)

"""What the tests of the Triton kernels share: the device, small blocks, layers of rows, one truth.

They run in Triton's interpreter on the CPU, and on a GPU where `TRITON_INTERPRET=0` was set before
the start. Inputs and truths are made on the CPU, so that both meet the same numbers.
"""

from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import Phase, settings
from native_truth import EPS, TINY, Estimate, agreed, logit_error, shares

pytest.importorskip("triton")

from loki_attn import tiles
from loki_attn.kernels import triton as kernels
from loki_attn.kernels.triton import device as triton_device
from loki_attn.kernels.triton import tuning
from loki_attn.kernels.triton.tuning import Cut
from loki_attn.pieces.lead_plane import quantise_rows
from loki_attn.testing import assert_within_budget, plain_attention, plain_reference
from loki_attn.tiles import Tiles
from loki_attn.types import Lead, Selection

if reason := kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

NAN = float("nan")
BITS = {"int8": 8, "int4": 4}
KINDS = ["int8", "int4", "bf16", "fp32"]
GROUPS = [1, 2, 3, 7, 16]
DEVICE = "cpu" if triton_device.interpreted() else "cuda"
# The interpreter computes with numpy, which warns of infinities that kernels know what to do with.
IEEE = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
# Few examples, as each takes up to a second; shrinking one would take minutes.
FEW = settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@contextmanager
def small_blocks(block=32):
    """Cut work so small that a few rows make several blocks, splits and pieces of a list.

    A block of 32 rows is a row to a thread of one warp: the least that hardware runs. 24 programs
    give the choosers of these tests a few splits each, of one block or two.
    """
    cut = Cut(block=block, warps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_device, "programs_wanted", lambda _: 24)
        patch.setattr(tuning, "score_cut", lambda *_: cut)
        patch.setattr(tuning, "attend_cut", lambda *_: cut)
        for name in ("CHOOSE", "REFINE"):
            patch.setattr(tuning, name, cut)
        yield


def there(inputs):
    """Inputs on the device, laid out as they were: tensors, and dataclasses and tuples of them."""
    if isinstance(inputs, torch.Tensor):
        return _moved(inputs)
    if isinstance(inputs, tuple):
        return tuple(map(there, inputs))
    if is_dataclass(inputs):
        return replace(inputs, **{f.name: there(getattr(inputs, f.name)) for f in fields(inputs)})
    return inputs


def _moved(rows):
    """The same view into a copy of the whole memory around it."""
    if DEVICE == "cpu":
        return rows
    whole = rows.as_strided((rows.untyped_storage().nbytes() // rows.itemsize,), (1,), 0)
    return whole.to(DEVICE).as_strided(rows.shape, rows.stride(), rows.storage_offset())


def here(results):
    """Results on the CPU."""
    if isinstance(results, torch.Tensor):
        return results.cpu()
    if isinstance(results, tuple):
        return tuple(map(here, results))
    held = {f.name: getattr(results, f.name).cpu() for f in fields(results)}
    return type(results)(**held)


def normal(*size, seed=0, dtype=torch.float32):
    """Gaussian numbers, the same on every device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)


def lead_of(rows, kind, query_map=None):
    """Rows [batch, kv_heads, seq, rank] as a lead, and as the float64 numbers that it holds.

    Every column beyond the rows holds poison: tiles end with a tile that nobody filled.
    """
    if kind == "rows":
        return Lead(rows, None, query_map), rows.double()
    scales = None
    if kind in BITS:
        rows, scales = quantise_rows(rows.float(), BITS[kind])
    packed = tiles.pack(rows, kind)
    numbers = packed.rows().double()
    room = -(-packed.length // 16) * 16 + 16
    shape = tiles.tiles_shape(*rows.shape[:2], room, kind, packed.rank)
    data = torch.empty(shape, dtype=tiles.tile_dtype(kind), device=rows.device)
    data.view(torch.int32).fill_(-1)
    tiles.write_rows(Tiles(data, kind, packed.rank, 0), 0, rows)
    if scales is not None:
        numbers = numbers * scales.double()[..., None]
        around = scales.new_full((*scales.shape[:2], room), NAN)
        scales = around[..., : packed.length].copy_(scales)
    return Lead(Tiles(data, kind, packed.rank, packed.length), scales, query_map), numbers


def agreed_by(how, logits, kv_heads, seen, call):
    """One score per row from those of a group, by any rule, as an estimate."""
    if how not in {"softmax_max", "sum"} or logits.value.shape[1] == kv_heads:
        return agreed(logits, kv_heads, how, seen, call)
    if how == "softmax_max":
        logits = shares(logits, seen, call)
    value, margin = (part.unflatten(1, (kv_heads, -1)) for part in (logits.value, logits.margin))
    if how == "softmax_max":
        return Estimate(value.amax(2), margin.amax(2) + TINY * 8)
    # The order of a sum of large numbers that cancel is rounding, too.
    return Estimate(value.sum(2), margin.sum(2) + 8 * EPS * value.abs().sum(2))


def random_selection(seq, most, batch, choosers, *, seed=0, empty=False):
    """Ascending rows, as many as each chooser wants: padded with -1, none at all for the first."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (batch, choosers), generator=draw)
    counts[-1, -1] = most
    if empty:
        counts[0, 0] = 0
    order = torch.rand(batch, choosers, seq, generator=draw).argsort(-1)[..., :most]
    order = order.masked_fill(torch.arange(most) >= counts[..., None], seq).sort(-1).values
    return Selection(order.masked_fill(order == seq, -1), counts)


def unread(rows, selection, poison=NAN):
    """Rows [batch, kv_heads, seq, dim] in which those that no index names hold poison."""
    batch, kv_heads, seq, _ = rows.shape
    read = torch.zeros(batch, selection.indices.shape[1], seq + 1, dtype=torch.bool)
    read.scatter_(2, selection.indices.masked_fill(selection.indices < 0, seq), True)
    read = read[..., :seq].unflatten(1, (kv_heads, -1)).any(2)
    return rows.masked_fill(~read[..., None], poison)


def check_attended(out, query, keys, values, mask, call, *, budget=True):
    """Hold an attention result to float64, number by number, and to the budget of its dtype.

    Args:
        out: What is tested, on the CPU.
        query: [batch, heads, 1, head_dim].
        keys: [batch, kv_heads, seq, head_dim], clean.
        values: The same with value_dim.
        mask: bool [batch, heads, 1, seq]: what was read.
        call: Scaling, soft-cap, sink logits.
        budget: Whether this is enough of a sample for the budget, which compares largest errors.
    """
    assert out.dtype == query.dtype
    wide = [rows.double() for rows in (query, keys, values)]
    truth = plain_attention(*wide, mask, call)
    limits, group = torch.finfo(out.dtype), query.shape[1] // keys.shape[1]
    sizes = plain_attention(*wide[:2], wide[2].abs(), mask, call)
    slack = torch.expm1(2 * logit_error(*wide[:2], mask, call) + 16 * EPS)
    lost = TINY
    if out.dtype != torch.float32:  # weights are rounded to the dtype of the values they meet
        slack, lost = slack + limits.eps / 2, limits.tiny * limits.eps + TINY
    lost = lost * (wide[2].abs().sum(2, keepdim=True) + 1).repeat_interleave(group, 1)
    bound = slack * sizes + lost + truth.abs() * limits.eps / 2 + limits.tiny * limits.eps
    worst = ((out.double() - truth).abs() - bound).max()
    assert bool(torch.isfinite(out).all())
    assert float(worst) <= 0, f"an output lies {float(worst):.3e} beyond its bound"
    if budget:
        rows = (query, keys, values)
        assert_within_budget(out, plain_reference(*rows, mask, call, truth), truth)

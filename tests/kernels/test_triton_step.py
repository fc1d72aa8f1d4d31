"""A decode step in Triton: what it reads is right, and what comes out fits what it read."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from native_scenes import laid_out, scenes, spoil_columns
from native_truth import check_selection, lead_logits, marked
from triton_scenes import (
    DEVICE,
    FEW,
    IEEE,
    KINDS,
    agreed_by,
    check_attended,
    here,
    kernels,
    lead_of,
    normal,
    small_blocks,
    there,
)

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.kernels import backends, ops, reference
from loki_attn.policy import preset
from loki_attn.testing import layer_shape, random_rows, tiny_basis
from loki_attn.types import AttentionCall, GroupReduce, Lead, Reading

pytestmark = IEEE

HOWS = list(get_args(GroupReduce))


def step_of(query, keys, values, lead, reading, how, call, visible=None):
    """The output and the selection of one step, on the CPU."""
    args = there((query, query, keys, values, lead, reading, how, call, visible))
    return here(kernels.step(*args))


def check_step(rows, lead, numbers, reading, how, call, visible=None, *, ties_are_exact=False):
    """Hold a step to float64: its choice, by what scores of float32 can tell, and its output."""
    query, keys, values = rows
    (batch, heads, _, _), (kv_heads, seq) = query.shape, keys.shape[1:3]
    shown = torch.ones(1, 1, 1, seq, dtype=torch.bool) if visible is None else visible
    shown = shown.expand(batch, 1, 1, seq)
    kind = getattr(lead.plane, "kind", None)
    logits = lead_logits(query, lead.query_map, numbers, kind, call)
    scores = agreed_by(how, logits, kv_heads, shown, call)
    out, selection = step_of(query, keys, values, lead, reading, how, call, visible)
    wanted = torch.as_tensor(reading.counts).expand(batch)
    assert torch.equal(selection.counts, wanted[:, None].expand_as(selection.counts))
    must = reference.protect(shown, reading.sinks, reading.recents)
    check_selection(selection, scores, shown, must, ties_are_exact=ties_are_exact)
    mask = marked(selection.indices, seq, heads)
    check_attended(out, query, keys, values, mask, call, budget=False)
    return out, selection


def rows_of(heads, kv_heads, seq, dim=24, batch=2, dtype=torch.float32):
    """Query, keys, values."""
    sizes = ((batch, heads, 1, dim), (batch, kv_heads, seq, dim), (batch, kv_heads, seq, dim))
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "softmax_sum") for kind in (*KINDS, "rows")),
        ("int8", "max"), ("rows", "max"), ("int4", "none"), ("bf16", "none"),
        ("int8", "softmax_max"), ("fp32", "sum"),
    ],
)  # fmt: skip
def test_every_kind_by_every_rule(kind, how):
    """Over several blocks, splits and pieces of a list."""
    rows = rows_of(6, 2, 75, batch=1)
    query_map = normal(2, 24, 11, seed=5) / 5
    plane = rows[1][..., :11] if kind == "rows" else rows[1] @ (normal(2, 24, 11, seed=6) / 5)
    lead, numbers = lead_of(plane, kind, query_map)
    call = AttentionCall(scaling=0.2, softcap=3.0 if how == "max" else None)
    if how != "max":
        call = AttentionCall(scaling=0.2, sink_logits=normal(6, seed=9))
    with small_blocks():
        check_step(rows, lead, numbers, Reading(counts=23, sinks=2, recents=5, most=23), how, call)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"plane_dtype": "int8"}, "softmax_sum"), ({"plane_dtype": "int4"}, "max"),
        ({"plane_dtype": "bf16"}, "softmax_sum"), ({"plane_dtype": "fp32"}, "none"),
        ({"layout": "rotated"}, "softmax_max"), ({"layout": "rotated"}, "sum"),
    ],
)  # fmt: skip
def test_the_straight_line_says_the_same(monkeypatch, settings, how):
    """A layer's own lead and budget; holes in its mask, and padding on the left of a batch row."""
    shape = layer_shape(4, 2, 32)
    query, keys, values = random_rows(shape, 40, batch=2, decay=1.0, seed=3)
    amount = {"top_k": 13, "sinks": 2, "recents": 3, "dense_below": 0}
    policy = preset("loki", rank=8, group_reduce=how, **amount, **settings)
    layer = attention.bind(policy, shape, 1, tiny_basis(shape))
    cache = LayerCache(layer.selector)
    cache.append(keys, values)
    visible = torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    visible[1, ..., :9] = False
    call = AttentionCall(scaling=shape.head_dim**-0.5)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    ops.cache_clear()
    wanted, chosen = attention.decode(query, cache, layer, call, visible)
    ops.cache_clear()
    reading = layer.budget.reading(cache.length, visible)
    args = (query, layer.selector.query_rows(query), cache.keys, cache.values)
    args = (*args, layer.selector.lead(cache), reading, how, call, visible)
    out, selection = here(kernels.step(*there(args)))
    assert torch.equal(selection.counts, chosen.counts)
    assert torch.equal(selection.indices, chosen.indices)
    torch.testing.assert_close(out, wanted)


def masked_reading(visible, amount, most, **kept):
    """A budget of `amount` rows where that many are visible, by a tensor on the device."""
    counts = visible.sum(-1)[:, 0, 0].clamp(max=amount)
    return Reading(counts=counts, most=most, **kept)


@pytest.mark.parametrize("how", ["softmax_sum", "none"])
def test_masks_with_holes_padding_and_nothing(how):
    """A batch row that sees nothing reads nothing, gives zeros and leaves the others alone."""
    rows = rows_of(2 if how == "none" else 4, 2, 50, batch=4)
    visible = torch.rand(4, 1, 1, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[1, ..., :33] = False
    visible[2] = False
    visible[3] = torch.arange(50) == 17
    lead, numbers = lead_of(rows[1][..., :8], "fp32", normal(2, 24, 8))
    poisoned = [r.masked_fill(~visible[:, :, 0, :, None], torch.nan) for r in rows[1:]]
    reading = masked_reading(visible, 12, 12, sinks=2, recents=3)
    call = AttentionCall(scaling=0.2)
    with small_blocks():
        out, selection = check_step(rows, lead, numbers, reading, how, call, visible)
        spoilt, again = step_of(rows[0], *poisoned, lead, reading, how, call, visible)
    assert torch.equal(out, spoilt)
    assert torch.equal(selection.indices, again.indices)
    assert bool((out[2] == 0).all())
    assert bool((selection.indices[2] == -1).all())
    assert selection.counts[3].unique().tolist() == [1]


def test_a_mask_for_all_batch_rows_and_a_bound_above_what_is_read():
    rows = rows_of(4, 2, 40, batch=3)
    visible = laid_out(torch.rand(1, 1, 1, 40) < 2.0, "view")
    visible[..., 30:] = False
    lead, numbers = lead_of(rows[1][..., :8], "int8", normal(2, 24, 8))
    reading = masked_reading(visible, 50, 37, sinks=1, recents=1)
    assert reading.counts.shape == (1,)
    _, selection = check_step(
        rows, lead, numbers, reading, "softmax_sum", AttentionCall(scaling=0.2), visible
    )
    assert selection.indices.shape == (3, 2, 37)
    assert selection.counts.unique().tolist() == [30]


@pytest.mark.parametrize("apart", [0, 2], ids=["expanded", "every other"])
def test_a_mask_whose_marks_do_not_lie_side_by_side(apart):
    """Is read as it lies, not as the bytes beside it."""
    rows = rows_of(2, 2, 33, batch=1)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 1, 33)
    if apart:
        seen = torch.tensor([True, False]).repeat(1, 1, 1, 33)[..., ::2]
    reading = Reading(counts=33, most=33)
    _, selection = step_of(*rows, Lead(rows[1]), reading, "max", AttentionCall(scaling=0.2), seen)
    assert torch.equal(selection.indices[0, 0], torch.arange(33))


@pytest.mark.parametrize("counts", [0, 1, 2, 6, 40])
def test_more_sinks_and_recents_than_are_read(counts):
    """The lower of the forced rows come first; at most as many rows as there are are read."""
    rows = rows_of(2, 2, 40, batch=1)
    lead, _ = lead_of(rows[1][..., :8], "int8", normal(2, 24, 8))
    reading = Reading(counts=counts, sinks=2, recents=3, most=counts)
    _, selection = step_of(*rows, lead, reading, "softmax_sum", AttentionCall(scaling=0.2))
    forced = [0, 1, 37, 38, 39]
    for chosen in selection.indices[0].tolist():
        real = [row for row in chosen if row >= 0]
        assert len(real) == counts
        assert set(forced[:counts]) <= set(real)


@pytest.mark.parametrize("how", ["softmax_sum", "softmax_max", "sum"])
@pytest.mark.parametrize("numbers", ["equal", "huge", "tiny", "one takes all"])
def test_scores_that_the_bins_do_not_divide(how, numbers):
    """All alike, beyond the outermost bins, denormal; ties go to the lower row."""
    seq = 70
    query, keys = torch.ones(1, 2, 1, 1), normal(1, 1, seq, 1, seed=4)
    if numbers == "equal":
        keys[:] = -0.7
    elif numbers == "one takes all":
        keys[:] = -300.0
        keys[0, 0, 41] = 300.0
    else:
        keys *= {"huge": 1e4, "tiny": 1e-41}[numbers]
    lead, wide = lead_of(keys, "fp32")
    reading, call = Reading(counts=20, most=20), AttentionCall(scaling=1.0)
    tied = numbers in {"equal", "one takes all"}
    with small_blocks():
        _, selection = check_step(
            (query, keys, keys), lead, wide, reading, how, call,
            ties_are_exact=numbers == "equal",
        )  # fmt: skip
    if not how.startswith("softmax") and not tied:  # logits are compared bit by bit
        wanted = keys[0, 0, :, 0].sort(descending=True, stable=True).indices[:20].sort().values
        assert torch.equal(selection.indices[0, 0], wanted)
    if numbers == "one takes all":
        assert selection.indices[0, 0].tolist() == [*range(19), 41]


@pytest.mark.parametrize("how", ["max", "softmax_max", "softmax_sum", "sum"])
@pytest.mark.parametrize("kind", ["int8", "rows"])
def test_heads_that_fill_a_group_up_have_no_say(kind, how):
    """Kernels work on 4 or 16 heads for the 3 of a group: a logit of 0 would beat the real ones."""
    query, keys = -normal(1, 3, 1, 8).abs(), normal(1, 1, 40, 8, seed=1).abs()
    lead, numbers = lead_of(keys, kind)
    reading, call = Reading(counts=7, most=7), AttentionCall(scaling=1.0)
    check_step((query, keys, keys), lead, numbers, reading, how, call)


@FEW
@given(scene=scenes(), data=st.data(), how=st.sampled_from(HOWS))
def test_any_step(scene, data, how):
    """Odd sizes, layouts, masks and soft-maxes; what is hidden holds poison."""
    batch, kv_heads, seq, dim = scene.keys.shape
    # The interpreter reads bfloat16 numbers below the normal ones as 0.
    assume(scene.numbers != "tiny" or scene.keys.dtype != torch.bfloat16)
    kind = data.draw(st.sampled_from([*KINDS, "rows"]))
    rank = data.draw(st.integers(1, dim if kind == "rows" else 40))
    seed = data.draw(st.integers(0, 2**31))
    query_map = normal(kv_heads, dim, rank, seed=seed) / dim**0.5
    if kind == "rows":
        lead = Lead(scene.keys[..., :rank], None, query_map if seed % 2 else None)
        numbers = scene.clean_keys[..., :rank].double()
    else:
        plane = normal(batch, kv_heads, seq, rank, seed=seed)
        equal = scene.numbers == "equal"
        lead, numbers = lead_of(
            plane[:, :, :1].expand_as(plane) if equal else plane, kind, query_map
        )
        spoil_columns(lead.plane, scene.visible)
        if lead.scales is not None and scene.visible is not None:
            lead.scales.masked_fill_(~scene.visible[:, :, 0], torch.nan)
    sinks, recents = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    amount = data.draw(st.integers(max(sinks + recents, 1), seq + 8))
    shown = scene.seen.sum(-1)[:, 0, 0]
    counts = shown.clamp(max=amount) if scene.visible is not None else min(amount, seq)
    reading = Reading(counts=counts, sinks=sinks, recents=recents, most=min(amount, seq))
    tiles = None if kind == "rows" else kind
    logits = lead_logits(scene.query, lead.query_map, numbers, tiles, scene.call)
    scores = agreed_by(how, logits, kv_heads, scene.seen, scene.call)
    with small_blocks(data.draw(st.sampled_from([32, 128]))):
        args = (scene.query, scene.keys, scene.values, lead, reading, how, scene.call)
        out, selection = step_of(*args, scene.visible)
    must = reference.protect(scene.seen, sinks, recents)
    exact = scene.numbers == "equal" and kind in {"int8", "int4"}
    check_selection(selection, scores, scene.seen, must, ties_are_exact=exact)
    mask = marked(selection.indices, seq, scene.query.shape[1])
    rows = (scene.query, scene.clean_keys, scene.clean_values)
    check_attended(out, *rows, mask, scene.call, budget=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["softmax_sum", "none"])
def test_recency_reads_sinks_and_the_last_rows(how, masked):
    """Nothing ranks them but their age; all query heads of a group read the same."""
    rows, visible, wanted = rows_of(4, 2, 70, batch=2), None, [[0, 1, *range(59, 70)]] * 2
    reading = Reading(counts=13, sinks=2, recents=3, most=13)
    if masked:
        visible = torch.ones(2, 1, 1, 70, dtype=torch.bool)
        visible[1, ..., :40] = visible[1, ..., 69] = visible[0, ..., 8:] = False
        reading = masked_reading(visible, 13, 20, sinks=2, recents=3)
        wanted = [[*range(8)], [40, 41, *range(58, 69)]]
    call = AttentionCall(scaling=0.2)
    with small_blocks():
        out, selection = step_of(*rows, Lead(None), reading, how, call, visible)
    assert selection.counts.tolist() == [[len(listed)] * 2 for listed in wanted]
    for head in range(2):
        found = [
            indices[:count].tolist()
            for indices, count in zip(
                selection.indices[:, head], selection.counts[:, head], strict=True
            )
        ]
        assert found == wanted
    check_attended(out, *rows, marked(selection.indices, 70, 4), call, budget=False)


@pytest.mark.parametrize("by", ["int8", "recency"])
@pytest.mark.parametrize("held", [1, 70])
def test_storage_that_is_hardly_filled_is_shared_out_alike(by, held):
    """How many rows are written only says who reads which: the result is that of the mask alone."""
    query, keys, values = rows_of(4, 2, 300)
    lead = Lead(None) if by == "recency" else lead_of(keys[..., :9], "int8", None)[0]
    visible = (torch.arange(300) < held).expand(2, 1, 1, -1).clone()
    visible[1, ..., : held // 3] = False
    reading = masked_reading(visible, 13, 20, sinks=2, recents=3)
    call, found = AttentionCall(scaling=0.2), []
    for known in (None, torch.tensor([held])):
        own = replace(reading, held=known)
        with small_blocks():
            found.append(step_of(query, keys, values, lead, own, "softmax_sum", call, visible))
    (out, chosen), (out_known, chosen_known) = found
    assert torch.equal(chosen.indices, chosen_known.indices)
    assert torch.equal(chosen.counts, chosen_known.counts)
    torch.testing.assert_close(out, out_known)


def test_a_budget_by_mass_has_no_fused_form():
    rows = there(tuple(rows_of(2, 2, 16)))
    reading, call = Reading(counts=None, mass=0.5), AttentionCall(scaling=0.2)
    args = (rows[0], rows[0], rows[1], rows[2], Lead(rows[1]), reading)
    assert kernels.step(*args, "max", call, None) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dtype": torch.float64}, "it reads float16, bfloat16 and float32, not torch.float64"),
        ({"dim": 264}, "rows of 264 elements are longer than 256"),
        ({"heads": 130}, "130 query heads cannot share 2 KV heads, 64 each"),
        ({"heads": 3}, "3 query heads cannot share 2 KV heads, 64 each"),
        ({"seq": 0}, "there are no rows"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_before_anything_is_done(changed, why):
    sizes = {"heads": 4, "dim": 16, "seq": 8, "dtype": torch.float32, **changed}
    rows = rows_of(sizes["heads"], 2, sizes["seq"], sizes["dim"], dtype=sizes["dtype"])
    with pytest.raises(backends.Unserved, match=why):
        step_of(*rows, Lead(rows[1]), Reading(counts=2, most=2), "max", AttentionCall(scaling=1.0))


def test_queries_and_rows_of_two_dtypes_are_refused():
    query, keys, values = rows_of(4, 2, 8, 16)
    rows = (query.half(), keys, values)
    with pytest.raises(backends.Unserved, match="float16 queries met torch"):
        step_of(*rows, Lead(keys), Reading(counts=2, most=2), "max", AttentionCall(scaling=1.0))


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 1, 1, 8).bool(), torch.ones(1, 1, 1, 7).bool(), torch.ones(1, 1, 1, 8)]
)
def test_a_mask_of_other_sizes_or_numbers_is_refused(mask):
    rows = rows_of(4, 2, 8, 16)
    lead, reading = Lead(rows[1]), Reading(counts=2, most=2)
    with pytest.raises(backends.Unserved, match=r"a mask is bool \[2 or 1, 8\], not torch"):
        step_of(*rows, lead, reading, "max", AttentionCall(scaling=1.0), mask)


@pytest.mark.parametrize(
    ("part", "spoilt", "why"),
    [
        ("query_map", lambda held: held.double(), "map is contiguous float32; got torch.float64"),
        ("query_map", lambda held: held.mT.contiguous().mT, "map is contiguous float32"),
        (
            "scales",
            lambda held: held.float(),
            "scales are float16, got torch.float32",
        ),
        ("scales", lambda held: None, "only codes, by scales: int8, no scales"),
        (
            "scales",
            lambda held: held.mT.contiguous().mT,
            "scales of a head do not lie side by side",
        ),
        ("scales", lambda held: held.to("meta"), "the scale of the lead lies on meta, the rows on"),
    ],
)
def test_a_lead_that_lies_otherwise_is_refused(part, spoilt, why):
    rows = there(tuple(rows_of(4, 2, 8, 16)))
    lead, _ = lead_of(normal(2, 2, 8, 4), "int8", normal(2, 16, 4))
    lead = there(lead)
    lead = replace(lead, **{part: spoilt(getattr(lead, part))})
    args = (rows[0], rows[0], rows[1], rows[2], lead, Reading(counts=2, most=2))
    with pytest.raises(backends.Unserved, match=why):
        kernels.step(*args, "max", AttentionCall(scaling=1.0), None)


def test_other_devices_are_refused():
    other = "meta" if DEVICE == "cpu" else "cpu"
    rows = [r.to(other) for r in rows_of(4, 2, 8, 16)]
    args = (rows[0], rows[0], rows[1], rows[2], Lead(rows[1]), Reading(counts=2, most=2))
    with pytest.raises(backends.Unserved, match=f"it serves {DEVICE} tensors, not {other}"):
        kernels.step(*args, "max", AttentionCall(scaling=1.0), None)

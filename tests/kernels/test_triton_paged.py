"""Rows in pages in Triton: the same bits as rows in one piece; what is stale holds NaN."""

from dataclasses import replace

import pytest
import torch
from triton_scenes import DEVICE, IEEE, KINDS, here, kernels, normal, small_blocks, there
from triton_stores import Store

from loki_attn.kernels import backends
from loki_attn.tiles import Tiles
from loki_attn.types import AttentionCall, Lead, Reading

pytestmark = IEEE

BATCH, KV_HEADS, GROUP, DIM, VALUE_DIM, RANK = 3, 2, 2, 24, 20, 13
CAPACITY = 144  # whole pages of 16 and of 48 rows
MOST = 21
QUERY = normal(BATCH, KV_HEADS * GROUP, 1, DIM, seed=3)
QUERY_MAP = normal(KV_HEADS, DIM, RANK, seed=4) / 5
CALL = AttentionCall(scaling=0.2, sink_logits=normal(KV_HEADS * GROUP, seed=5))
RAGGED = [[144, 144, 144], [1, 97, 16], [48, 0, 130]]


def filled(lengths, kind, capacity=CAPACITY, dtype=torch.float32):
    """Storage with as many rows as each batch row holds; everything behind them is NaN."""
    store = Store.of(BATCH, KV_HEADS, capacity, (DIM, VALUE_DIM), dtype, kind, RANK)
    rows = normal(BATCH, KV_HEADS, 2 * CAPACITY, DIM, dtype=dtype)[:, :, :capacity]
    values = normal(BATCH, KV_HEADS, 2 * CAPACITY, VALUE_DIM, seed=1, dtype=dtype)[:, :, :capacity]
    store.write_plainly(rows, values, normal(KV_HEADS, DIM, RANK, seed=2) / 5, 0)
    for row, length in enumerate(lengths):
        store.keys[row, :, length:] = store.values[row, :, length:] = torch.nan
        if store.scales is not None:
            store.scales[row, :, length:] = torch.nan
        if store.data is not None:
            words = store.data.view(torch.int32).transpose(3, 4)[row].flatten(1, 2)
            words[:, length:] = -1
            columns = store.data.view(torch.int32).transpose(3, 4)
            columns[row] = words.unflatten(1, columns.shape[2:4])
    return store


def spoil(store, table):
    """Pages that no batch row has hold NaN."""
    for held in store.parts().values():
        stale = torch.ones(held.shape[0], dtype=torch.bool)
        stale[table[:, :-1].flatten().long()] = False
        held[stale] = torch.nan if held.dtype.is_floating_point else -1
    return store


def lead_over(store):
    """The lead of storage in one piece or in pages."""
    if store.kind is None:
        return Lead(store.keys[..., :RANK], None, QUERY_MAP)
    plane = Tiles(store.data, store.kind, store.rank, store.keys.shape[2])
    return Lead(plane, store.scales, QUERY_MAP)


def step_over(store, table, lengths, how, query=QUERY):
    """One step over what is held, with counts and lengths on the device."""
    held = torch.tensor(lengths)
    reading = Reading(counts=held.clamp(max=MOST), sinks=2, recents=3, most=MOST)
    query, reading, call = there((query, reading, CALL))
    place = kernels.Held(
        keys=there(store.keys), values=there(store.values),
        pages=there(table), lengths=there(held.to(torch.int32)),
    )  # fmt: skip
    return here(kernels.step_over(place, query, query, there(lead_over(store)), reading, how, call))


def assert_same_bits(found, wanted):
    """Outputs and selections."""
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].indices, wanted[1].indices)
    assert torch.equal(found[1].counts, wanted[1].counts)


@pytest.mark.parametrize(
    ("kind", "page_rows", "how", "lengths"),
    [
        ("int8", 16, "softmax_sum", RAGGED[1]),
        ("int8", 48, "none", RAGGED[2]),
        ("int4", 48, "softmax_sum", RAGGED[2]),
        ("bf16", 16, "max", RAGGED[0]),
        ("fp32", 48, "softmax_sum", RAGGED[1]),
        (None, 16, "softmax_sum", RAGGED[2]),
    ],
)
def test_a_step_over_shuffled_pages(kind, page_rows, how, lengths):
    """Ragged, with a stale page in the table behind the last one."""
    store = filled(lengths, kind)
    pool, table = store.paged(page_rows, spare=2)
    capacity = CAPACITY + page_rows  # what the table has room for
    plain = filled(lengths, kind, capacity)
    wanted = step_over(plain, None, lengths, how)
    found = step_over(spoil(pool, table), table, lengths, how)
    assert bool(torch.isfinite(found[0]).all())
    assert_same_bits(found, wanted)


def test_pages_of_another_size_in_bfloat16():
    """By the rule that compares logits; over several blocks of all kernels."""
    lengths, query = [128, 65, 3], QUERY.bfloat16()
    pool, table = filled(lengths, "int8", 128, query.dtype).paged(64, spare=1)
    plain = filled(lengths, "int8", 192, query.dtype)
    with small_blocks(32):
        wanted = step_over(plain, None, lengths, "max", query)
        found = step_over(spoil(pool, table), table, lengths, "max", query)
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("lengths", RAGGED[1:], ids=str)
def test_each_batch_row_as_if_it_were_alone(lengths):
    """With its own length, its own last rows forced; a row of length 0 gets zeros."""
    store = filled(lengths, "int8")
    out, selection = step_over(store, None, lengths, "softmax_sum")
    for row, length in enumerate(lengths):
        count = min(length, MOST)
        assert selection.counts[row].tolist() == [count] * KV_HEADS
        assert bool((selection.indices[row, :, count:] == -1).all())
        if length == 0:
            assert bool((out[row] == 0).all())
            continue
        mine = slice(row, row + 1)
        data = store.data[mine, :, : -(-length // 16)]
        lead = Lead(Tiles(data, "int8", RANK, length), store.scales[mine, :, :length], QUERY_MAP)
        keys, values = store.keys[mine, :, :length], store.values[mine, :, :length]
        reading = Reading(counts=count, sinks=2, recents=3, most=count)
        args = (QUERY[mine], QUERY[mine], keys, values, lead, reading, "softmax_sum", CALL)
        alone, chosen = here(kernels.step(*there(args), None))
        assert torch.equal(selection.indices[row, :, :count], chosen.indices[0])
        torch.testing.assert_close(out[row], alone[0], rtol=1e-5, atol=1e-6)


def test_lengths_with_a_mask():
    """Padding on the left of some batch rows; the last rows are those that are held and visible."""
    lengths = [100, 40, 3]
    store = filled(lengths, "int8")
    mask = torch.ones(BATCH, CAPACITY, dtype=torch.bool)
    mask[1, :30] = False
    held = there(torch.tensor(lengths, dtype=torch.int32))
    shown = torch.minimum(torch.tensor([100, 10, 3]), torch.tensor(MOST))
    reading = there(Reading(counts=shown, sinks=2, recents=3, most=MOST))
    place = kernels.Held(keys=there(store.keys), values=there(store.values), lengths=held)
    args = there((QUERY, QUERY, lead_over(store)))
    _, selection = here(kernels.step_over(place, *args, reading, "max", there(CALL), there(mask)))
    assert selection.indices[1, :, :10].tolist() == [list(range(30, 40))] * KV_HEADS
    assert selection.indices[2, :, :3].tolist() == [[0, 1, 2]] * KV_HEADS
    for chosen in selection.indices[0].tolist():
        assert {0, 1, 97, 98, 99} <= set(chosen)
        assert max(chosen) == 99


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_append_to_pages(kind, tokens):
    """Behind what each batch row holds, across pages; every byte to its page, and to no other."""
    starts = [5, 47, 100]
    key_map = normal(KV_HEADS, DIM, RANK, seed=2)
    draw = torch.Generator().manual_seed(1)
    key = torch.randint(-9, 9, (BATCH, KV_HEADS, tokens, DIM), generator=draw).float()
    value = key[..., :VALUE_DIM].contiguous()
    key_map = torch.round(key_map * 4)
    store = Store.of(BATCH, KV_HEADS, CAPACITY, (DIM, VALUE_DIM), torch.float32, kind, RANK)
    pool, table = store.paged(48, spare=2)
    for row, start in enumerate(starts):
        mine = slice(row, row + 1)
        alone = replace(store, **{name: held[mine] for name, held in store.parts().items()})
        alone.write_plainly(key[mine], value[mine], key_map, start, positioned=False)
    wanted, _ = store.paged(48, spare=2)
    device_pool = there(pool)
    place = there(torch.tensor(starts))
    request = device_pool.request(*there((key, value, key_map)), place, positioned=False)
    assert kernels.append(request, pages=there(table)) is True
    device_pool.assert_same_bytes(wanted)


def test_pages_that_hold_no_whole_tiles_are_refused():
    keys = torch.zeros(4, 2, 24, 16, device=DEVICE)
    held = kernels.Held(keys=keys, values=keys, pages=there(torch.zeros(1, 3, dtype=torch.int32)))
    query = torch.zeros(1, 2, 1, 16, device=DEVICE)
    reading = Reading(counts=2, most=2)
    with pytest.raises(backends.Unserved, match="pages hold whole tiles of 16 rows, not 24 rows"):
        kernels.step_over(
            held, query, query, Lead(keys), reading, "max", AttentionCall(scaling=1.0)
        )


def test_pages_are_appended_to_at_device_positions_only():
    store = there(Store.of(1, 2, 48, (8, 8), torch.float32, None, 4))
    rows = torch.zeros(1, 2, 1, 8, device=DEVICE)
    table = there(torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(backends.Unserved, match="pages of 48 rows are appended to at device pos"):
        kernels.append(store.request(rows, rows, None, 0, positioned=False), pages=table)

"""Storage: rows and tiles answer the same verbs alike."""

import pytest
import torch

from loki_attn.storage import storage_for, take_rows

KINDS = [None, "fp32", "bf16", "int8", "int4"]
DTYPES = {None: torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def rows_of(kind, tokens, batch=2, dim=10):
    draw = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-7, 8, (batch, 3, tokens, dim), generator=draw)
    return codes.to(DTYPES.get(kind, torch.int8))


def junk(shape, dtype, device):
    storage = torch.empty(shape, dtype=dtype, device=device)
    return storage.fill_(float("nan") if dtype.is_floating_point else 127)


def filled(kind, tokens=40, capacity=64):
    rows = rows_of(kind, tokens)
    storage = storage_for(rows[:, :, :0], kind).grown(capacity, 0, junk)
    storage.write(0, rows)
    return storage, rows


@pytest.mark.parametrize("kind", KINDS)
def test_written_rows_are_read(kind):
    storage, rows = filled(kind)
    assert storage.capacity == 64
    assert torch.equal(storage.read(40), rows)
    assert torch.equal(storage.read(7), rows[:, :, :7])
    storage.write(7, rows[:, :, :2])
    assert torch.equal(
        storage.read(40), torch.cat([rows[:, :, :7], rows[:, :, :2], rows[:, :, 9:]], 2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_growth_keeps_rows(kind):
    storage, rows = filled(kind)
    larger = storage.grown(128, 39, junk)
    assert larger.capacity == 128
    assert torch.equal(larger.read(39), rows[:, :, :39])
    assert larger.nbytes == 2 * storage.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_picked_rows_are_copied(kind):
    storage, rows = filled(kind)
    index = torch.tensor([0, 3, 17, 39]).expand(2, 3, -1).clone()
    index[1, 1] = torch.tensor([5, 6, 15, 16])
    target = storage.empty(16, junk)
    storage.copy_rows(index, target)
    assert torch.equal(target.read(4), take_rows(rows, index))


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_may_change(kind):
    storage, rows = filled(kind)
    turned = storage.changed(lambda data: data.index_select(0, torch.tensor([1, 1, 0])))
    assert torch.equal(turned.read(40), rows[[1, 1, 0]])


@pytest.mark.parametrize(
    ("kind", "row_bytes"), [(None, 20), ("fp32", 40), ("bf16", 20), ("int8", 12), ("int4", 8)]
)
def test_bytes_are_what_is_held(kind, row_bytes):
    storage, _ = filled(kind)
    assert storage.row_bytes == row_bytes
    assert storage.nbytes == 2 * 3 * 64 * row_bytes == storage.data.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_only_tiles_are_tiles(kind):
    storage, rows = filled(kind)
    found = storage.as_tiles(33)
    if kind is None:
        assert found is None
        return
    assert (found.kind, found.rank, found.length) == (kind, 10, 33)
    assert found.data.data_ptr() == storage.data.data_ptr()
    assert torch.equal(found.rows(), rows[:, :, :33])


def test_rows_without_inner_sizes():
    places = torch.arange(6).expand(2, 3, -1)
    storage = storage_for(places[:, :, :0], None).grown(16, 0, junk)
    storage.write(2, places[:1, :1])
    assert storage.read(8)[1, 2, 2:].tolist() == list(range(6))
    assert storage.row_bytes == 8

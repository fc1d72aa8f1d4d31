"""KeyStats: streamed moments equal the one-shot ones, whatever the order, chunks and padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.key_stats import KeyStats

SHAPES = st.tuples(
    st.integers(1, 3),  # batch
    st.sampled_from([1, 2, 3, 5]),  # KV heads
    st.sampled_from([1, 2, 4]),  # group
    st.sampled_from([1, 2, 7, 33, 130]),  # tokens
    st.sampled_from([8, 16, 64, 80]),  # head_dim
)
SEEDS = st.integers(0, 2**31)


def draw_rows(shape, seed, dtype=torch.float32):
    batch, heads, group, tokens, size = shape
    g = torch.Generator().manual_seed(seed)
    mean = 20 * torch.randn(heads, 1, size, generator=g)
    key = torch.randn(batch, heads, tokens, size, generator=g) + mean
    pre = torch.randn(batch, heads, tokens, size, generator=g) - mean
    query = torch.randn(batch, heads * group, tokens, size, generator=g)
    weight = torch.rand(batch, heads * group, tokens, generator=g)
    return [t.to(dtype) for t in (key, query, pre, weight)]


def record(key, query, pre, weight, valid=None, layer=0, stats=None):
    stats = KeyStats() if stats is None else stats
    stats.update(layer, key, query, pre_key=pre, query_weight=weight, valid=valid)
    return stats


def assert_same(one, other, layer=0):
    for rows in ("key", "pre", "query", "sharp"):
        a, b = one.moments(layer, rows), other.moments(layer, rows)
        for part in ("weight", "total", "outer"):
            x, y = getattr(a, part), getattr(b, part)
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-11 * float(y.abs().max()))


@given(SHAPES, SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_moments_equal_the_numpy_oracle(shape, seed, dtype):
    batch, heads, group, tokens, size = shape
    key, query, pre, weight = draw_rows(shape, seed, dtype)
    stats = record(key, query, pre, weight)
    assert (stats.tokens, stats.layers, stats.shape(0)) == (batch * tokens, (0,), (heads, size))
    for head in range(heads):
        k, p = (t[:, head].double().reshape(-1, size).numpy() for t in (key, pre))
        own = slice(head * group, (head + 1) * group)
        q = query[:, own].double().reshape(-1, size).numpy()
        w = weight[:, own].double().reshape(-1, 1).numpy()
        for rows, side in ((k, "post"), (p, "pre")):
            scale = np.abs(rows).max() ** 2
            got = stats.covariance(0, side)[head].numpy()
            np.testing.assert_allclose(got, np.cov(rows.T, bias=True), rtol=0, atol=1e-12 * scale)
            got = stats.covariance(0, side, centred=False)[head].numpy()
            np.testing.assert_allclose(got, rows.T @ rows / len(rows), rtol=0, atol=1e-12 * scale)
        got = stats.query_moment(0)[head].numpy()
        np.testing.assert_allclose(got, q.T @ q / len(q), rtol=0, atol=1e-12 * (q**2).max())
        got = stats.query_moment(0, sharp=True)[head].numpy()
        np.testing.assert_allclose(got, (w * q).T @ q / w.sum(), atol=1e-12 * (q**2).max())


@given(SHAPES, SEEDS, st.data())
def test_chunks_and_shards_merge_in_any_order(shape, seed, data):
    rows = draw_rows(shape, seed)
    whole = record(*rows)
    tokens = shape[3]
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3)))
    bounds = list(zip([0, *cuts], [*cuts, tokens], strict=True))
    order = data.draw(st.permutations(bounds))
    streamed, merged = KeyStats(), KeyStats()
    for start, stop in order:
        part = [t[:, :, start:stop] for t in rows]
        record(*part, stats=streamed)
        merged = merged.merge(record(*part))
    assert_same(streamed, whole)
    assert_same(merged, whole)
    assert streamed.tokens == merged.tokens == whole.tokens


def test_merge_leaves_its_inputs_alone():
    one, other = (record(*draw_rows((1, 2, 2, 9, 8), seed)) for seed in (0, 1))
    before = [s.covariance(0).clone() for s in (one, other)]
    both = one.merge(other)
    record(*draw_rows((1, 2, 2, 9, 8), 2), stats=both)
    assert torch.equal(one.covariance(0), before[0])
    assert torch.equal(other.covariance(0), before[1])
    assert (one.tokens, both.tokens) == (9, 27)


@given(SHAPES, SEEDS)
def test_padding_is_never_read(shape, seed):
    rows = draw_rows(shape, seed)
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(shape[0], shape[3], generator=g) < 0.6
    poisoned = [t.clone() for t in rows]
    for tensor in poisoned:
        tensor.transpose(1, 2)[~valid] = float("nan")
    alone = KeyStats()
    for b in range(shape[0]):
        record(*[t[b : b + 1, :, valid[b]] for t in rows], stats=alone)
    padded = record(*poisoned, valid=valid)
    assert_same(padded, alone)
    assert padded.tokens == int(valid.sum())


def test_a_refused_update_changes_nothing():
    key, query, pre, weight = draw_rows((1, 2, 2, 5, 8), 0)
    stats = record(key, query, pre, weight)
    before = stats.moments(0, "key").outer.clone()
    for spoilt, bad in (("key", key), ("query", query), ("pre_key", pre), ("query_weight", weight)):
        for value in (float("nan"), float("inf")):
            kept = bad.clone()
            bad.view(-1)[3] = value
            with pytest.raises(InputError, match=f"^{spoilt} holds NaN or infinity"):
                record(key, query, pre, weight, stats=stats)
            bad.copy_(kept)
    with pytest.raises(InputError, match="negative weight"):
        record(key, query, pre, -weight, stats=stats)
    with pytest.raises(InputError, match="to every update or to none"):
        stats.update(0, key, query)
    with pytest.raises(InputError, match="belong to different models"):
        record(key[:, :1], query[:, :2], pre[:, :1], weight[:, :2], stats=stats)
    assert torch.equal(stats.moments(0, "key").outer, before)
    assert stats.tokens == 5


def test_shapes_are_checked():
    key, query, pre, weight = draw_rows((2, 2, 2, 5, 8), 0)
    ok = torch.ones(2, 5, dtype=torch.bool)
    cases = [
        ((key[0], query, pre, weight, ok), r"key must be a float tensor \[batch, heads"),
        ((key.long(), query, pre, weight, ok), "key must be a float tensor .* torch.int64"),
        ((key, query[:, :, :4], pre, weight, ok), "agree in batch, seq and head_dim"),
        ((key, query[..., :4], pre, weight, ok), "agree in batch, seq and head_dim"),
        ((key, query[:, :3], pre, weight, ok), "3 query heads cannot be shared by 2 KV heads"),
        ((key, query, pre[:1], weight, ok), r"pre_key must be \[2, 2, 5, 8\], got \[1, 2, 5, 8\]"),
        ((key, query, pre, weight[..., :1], ok), r"query_weight must be \[2, 4, 5\]"),
        ((key, query, pre, weight, ok[:, :2]), r"valid must be \[2, 5\], got \[2, 2\]"),
        ((key, query, pre, weight, ok.long()), "valid must be bool, got torch.int64"),
    ]
    for arguments, message in cases:
        stats = KeyStats()
        with pytest.raises(InputError, match=message):
            record(*arguments, stats=stats)
        assert stats.layers == ()


def test_merge_refuses_other_shapes():
    one = record(*draw_rows((1, 2, 1, 4, 8), 0))
    with pytest.raises(InputError, match="different models"):
        one.merge(record(*draw_rows((1, 2, 1, 4, 16), 0)))
    with pytest.raises(InputError, match=r"layers \[0\] with layers \[1\]"):
        one.merge(record(*draw_rows((1, 2, 1, 4, 8), 0), layer=1))


def test_what_was_not_recorded_is_named():
    key, query, _, _ = draw_rows((1, 2, 1, 4, 8), 0)
    stats = KeyStats()
    assert (stats.layers, stats.tokens) == ((), 0)
    stats.update(3, key, query)
    with pytest.raises(InputError, match=r"No keys of layer 0 were seen; seen: \[3\]"):
        stats.covariance(0)
    with pytest.raises(InputError, match="without `pre_key`"):
        stats.covariance(3, "pre")
    with pytest.raises(InputError, match="without `query_weight`"):
        stats.query_moment(3, sharp=True)


def test_save_and_load_are_bit_equal_and_resume(tmp_path):
    stats = record(*draw_rows((1, 3, 2, 40, 16), 0))
    record(*draw_rows((1, 3, 2, 40, 16), 1), layer=12, stats=stats)
    path = tmp_path / "new folder" / "stats.safetensors"
    stats.save(path, {"corpus": {"name": "brown"}, "windows_done": 1})
    loaded, provenance = KeyStats.load(path)
    assert provenance == {"corpus": {"name": "brown"}, "windows_done": 1}
    assert loaded.layers == (0, 12)
    for layer in (0, 12):
        for rows in ("key", "pre", "query", "sharp"):
            for part in ("weight", "total", "outer"):
                a, b = (getattr(s.moments(layer, rows), part) for s in (stats, loaded))
                assert torch.equal(a, b)
    more = draw_rows((1, 3, 2, 7, 16), 2)
    record(*more, stats=loaded)
    record(*more, stats=stats)
    assert torch.equal(loaded.covariance(0), stats.covariance(0))


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.safetensors"
    stats = record(*draw_rows((1, 1, 1, 4, 8), 0))
    stats.save(path, {})
    old = path.read_bytes()

    def interrupt(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record(*draw_rows((1, 1, 1, 9, 8), 1), stats=stats).save(path, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    with pytest.raises(InputError, match="There is no calibration statistics file"):
        KeyStats.load(path)
    stats = record(*draw_rows((1, 1, 1, 4, 8), 0))
    with pytest.raises(InputError, match="cannot be written as JSON"):
        stats.save(path, {"when": object()})
    stats.save(path, {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"corrupt or cut short .* `loki-attn calibrate`"):
        KeyStats.load(path)

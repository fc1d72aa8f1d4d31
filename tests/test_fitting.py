"""fit: each basis against numpy, its own identities, and the loss that it promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError, UnknownNameError
from loki_attn.fitting import fit
from loki_attn.key_stats import KeyStats

KINDS = ("pca", "balanced", "mixed", "random", "identity")
SEEDS = st.integers(0, 2**31)
SIZES = st.sampled_from([8, 16, 64, 80])


def random_moment(size, decay, g):
    """A covariance whose standard deviations fall as i^-decay in a random basis."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q
    deviation = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    return basis * deviation @ basis.T


def draw_stats(heads, group, tokens, size, seed, layers=(0,), weighted=False):
    g = torch.Generator().manual_seed(seed)
    stats = KeyStats()
    for layer in layers:
        roots = [
            torch.stack([random_moment(size, decay, g) for _ in range(heads)])
            for decay in (0.5, 1.0)
        ]
        mean = 5 * torch.randn(heads, 1, size, generator=g, dtype=torch.float64)
        key = torch.randn(1, heads, tokens, size, generator=g, dtype=torch.float64) @ roots[0]
        query = torch.randn(heads, group * tokens, size, generator=g, dtype=torch.float64)
        query = (query @ roots[1]).reshape(1, heads * group, tokens, size)
        weight = torch.rand(1, heads * group, tokens, generator=g) if weighted else None
        stats.update(layer, key + mean, query, pre_key=key, query_weight=weight)
    return stats


def exact_stats(key_root, query_root, offset=0.0):
    """Statistics whose moments are exactly root^2: rows +-sqrt(d) * root."""
    size = key_root.shape[-1]
    k, q = (size**0.5 * torch.cat([r, -r]) for r in (key_root, query_root))
    stats = KeyStats()
    stats.update(0, (k + offset)[None, None], q[None, None])
    return stats


def loss(basis, rank, key_moment, query_moment, head=0):
    """E[(q^T (Id - A) k)^2] of independent q and k, A the first `rank` columns of a basis."""
    layer = basis.layer(0)
    lead = layer.query_map[head, :, :rank].double() @ layer.key_map[head, :, :rank].double().T
    rest = torch.eye(lead.shape[0], dtype=torch.float64) - lead
    return float(torch.trace(query_moment @ rest @ key_moment @ rest.T))


@given(st.sampled_from([1, 2, 5]), st.sampled_from([1, 4]), SIZES, SEEDS, st.data())
def test_every_basis_keeps_every_score(heads, group, size, seed, data):
    tokens = data.draw(st.sampled_from([1, 2, size // 2, 3 * size]))
    kind = data.draw(st.sampled_from(KINDS))
    stats = draw_stats(heads, group, tokens, size, seed)
    layer = fit(stats, kind).layer(0)
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, heads, 50, size, generator=g, dtype=torch.float64)
    exact = query @ key.mT
    mapped = (query @ layer.query_map.double()) @ (key @ layer.key_map.double()).mT
    assert float((mapped - exact).abs().max()) < 1e-4 * float(exact.abs().max())
    assert layer.key_map.shape == (heads, size, size)
    assert layer.key_map.dtype == layer.query_map.dtype == torch.float32
    assert bool((layer.spectrum >= 0).all())
    largest = layer.key_map.gather(1, layer.key_map.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


@given(
    st.sampled_from([1, 2]),
    st.sampled_from([8, 16, 40]),
    SEEDS,
    st.booleans(),
    st.sampled_from(["post", "pre"]),
)
def test_pca_equals_numpy(heads, size, seed, centred, side):
    stats = draw_stats(heads, 2, 3 * size, size, seed)
    layer = fit(stats, "pca", side=side, centred=centred).layer(0)
    for head in range(heads):
        moment = stats.covariance(0, side, centred)[head].numpy()
        values, vectors = np.linalg.eigh(moment)
        np.testing.assert_allclose(
            layer.spectrum[head].numpy(), values[::-1], rtol=1e-9, atol=1e-12 * values[-1]
        )
        cosines = (layer.key_map[head].double().numpy() * vectors[:, ::-1]).sum(0)
        np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-5)
    assert torch.equal(layer.key_map, layer.query_map)


@given(st.sampled_from(["balanced", "mixed"]), st.sampled_from([1, 2, 7]), SIZES, SEEDS)
def test_both_sides_are_balanced_and_keys_uncorrelated(kind, pca_columns, size, seed):
    stats = draw_stats(2, 4, 3 * size, size, seed)
    given_columns = pca_columns if kind == "mixed" else None
    layer = fit(stats, kind, pca_columns=given_columns).layer(0)
    m, mq = layer.key_map.double(), layer.query_map.double()
    key_side = m.mT @ stats.covariance(0) @ m
    query_side = mq.mT @ stats.query_moment(0) @ mq
    root = layer.spectrum.sqrt()
    scale = 1e-4 * float(root.max())
    torch.testing.assert_close(key_side, torch.diag_embed(root), rtol=1e-4, atol=scale)
    diagonal = query_side.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, root, rtol=1e-4, atol=scale)
    if kind == "balanced":
        torch.testing.assert_close(query_side, torch.diag_embed(root), rtol=1e-4, atol=scale)
        assert bool((layer.spectrum.diff(dim=-1) <= 0).all())


@given(SIZES, SEEDS, st.sampled_from([(0.5, 0.5), (1.0, 0.5), (0.5, 1.0)]))
def test_loss_is_the_spectrums_tail_and_balanced_loses_least(size, seed, decays):
    g = torch.Generator().manual_seed(seed)
    key_root, query_root = (random_moment(size, decay, g) for decay in decays)
    key_moment, query_moment = key_root @ key_root, query_root @ query_root
    stats = exact_stats(key_root, query_root, offset=3.0)
    bases = {kind: fit(stats, kind) for kind in KINDS}
    total = float(torch.trace(key_moment @ query_moment))
    for rank in range(0, size + 1, size // 8):
        lost = {kind: loss(b, rank, key_moment, query_moment) for kind, b in bases.items()}
        for kind in ("balanced", "mixed"):
            tail = float(bases[kind].layer(0).spectrum[0, rank:].sum())
            assert lost[kind] == pytest.approx(tail, rel=1e-3, abs=1e-5 * total)
        assert all(lost["balanced"] <= other + 1e-6 * total for other in lost.values())


@given(SIZES, SEEDS)
def test_balanced_equals_pca_where_queries_are_white(size, seed):
    g = torch.Generator().manual_seed(seed)
    stats = exact_stats(random_moment(size, 0.7, g), torch.eye(size, dtype=torch.float64))
    pca, balanced = (fit(stats, kind).layer(0) for kind in ("pca", "balanced"))
    query, key = torch.randn(2, 20, size, generator=g, dtype=torch.float64)
    for rank in range(1, size + 1):
        scores = [
            (query @ b.query_map[0, :, :rank].double()) @ (key @ b.key_map[0, :, :rank].double()).T
            for b in (pca, balanced)
        ]
        # Neighbouring singular values may be close, which turns their columns by a little.
        torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3 * size**0.5)


@given(SIZES, st.sampled_from([1, 3]), SEEDS, st.data())
def test_mixed_scores_are_regressions_at_every_rank(size, pca_columns, seed, data):
    """q'[:r] . k'[:r] == q^T E[k | k'[:r]], with the regression done by least squares on rows."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size, size, generator=g, dtype=torch.float64)
    rows = rows @ random_moment(size, 0.5, g)
    query = torch.randn(1, 1, 4 * size, size, generator=g, dtype=torch.float64)
    stats = KeyStats()
    stats.update(0, rows[None, None], query @ random_moment(size, 1.0, g))
    layer = fit(stats, "mixed", pca_columns=pca_columns).layer(0)
    rank = data.draw(st.integers(1, size))
    centred = rows - rows.mean(0)
    lead = centred @ layer.key_map[0, :, :rank].double()
    estimate = lead @ torch.linalg.lstsq(lead, centred).solution
    probe = query[0, 0, :10]
    scores = (probe @ layer.query_map[0, :, :rank].double()) @ lead.T
    torch.testing.assert_close(scores, probe @ estimate.T, rtol=0, atol=1e-4 * size**0.5)


@pytest.mark.parametrize("pca_columns", [1, 2, 3])
def test_mixed_columns_span_both_sources(pca_columns):
    stats = draw_stats(1, 2, 300, 16, seed=5)
    pca, balanced = (fit(stats, kind).layer(0).key_map[0].double() for kind in ("pca", "balanced"))
    mixed = fit(stats, "mixed", pca_columns=pca_columns).layer(0).key_map[0].double()
    period = pca_columns + 1
    for turns in (1, 2):
        lead = mixed[:, : turns * period]
        wanted = torch.cat([balanced[:, : turns * pca_columns], pca[:, :turns]], dim=1)
        wanted = wanted / wanted.norm(dim=0)
        rest = wanted - lead @ torch.linalg.lstsq(lead, wanted).solution
        assert float(rest.norm(dim=0).max()) < 1e-4
    # Before the first pca column it is the balanced basis itself.
    first = mixed[:, :pca_columns]
    torch.testing.assert_close(first, balanced[:, :pca_columns], rtol=1e-5, atol=1e-5)


def test_mixed_equals_balanced_where_both_agree():
    """Keys and queries with the same axes: every pca column is in the span already."""
    deviation = torch.arange(1, 17, dtype=torch.float64) ** -0.5
    stats = exact_stats(torch.diag(deviation), torch.diag(deviation**2))
    mixed, balanced = (fit(stats, kind).layer(0) for kind in ("mixed", "balanced"))
    torch.testing.assert_close(mixed.key_map, balanced.key_map)
    torch.testing.assert_close(mixed.spectrum, balanced.spectrum)


def test_sharpness_moves_the_query_moment_at_equal_traces():
    stats = draw_stats(2, 2, 200, 16, seed=3, weighted=True)
    plain, sharp = stats.query_moment(0), stats.query_moment(0, sharp=True)
    traces = [t.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for t in (plain, sharp)]
    mixed = traces[0] * (0.75 * plain / traces[0] + 0.25 * sharp / traces[1])
    layer = fit(stats, "balanced", sharpness=0.25).layer(0)
    mq = layer.query_map.double()
    diagonal = (mq.mT @ mixed @ mq).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, layer.spectrum.sqrt(), rtol=1e-4, atol=1e-5)
    assert fit(stats, "balanced", sharpness=0.25).provenance["fit"]["sharpness"] == 0.25
    unweighted = draw_stats(2, 2, 200, 16, seed=3)
    with pytest.raises(InputError, match="without `query_weight`"):
        fit(unweighted, "balanced", sharpness=0.5)


def test_random_bases_are_orthogonal_seeded_and_all_different():
    stats = draw_stats(3, 1, 4, 16, seed=0, layers=(0, 1))
    maps = torch.cat([fit(stats, "random", seed=7).layer(i).key_map for i in (0, 1)])
    again = torch.cat([fit(stats, "random", seed=7).layer(i).key_map for i in (0, 1)])
    other = torch.cat([fit(stats, "random", seed=8).layer(i).key_map for i in (0, 1)])
    assert torch.equal(maps, again)
    everything = torch.cat([maps, other])
    for i, one in enumerate(everything):
        assert all(float((one - two).abs().max()) > 0.1 for two in everything[i + 1 :])


@pytest.mark.parametrize("kind", ["pca", "balanced", "mixed"])
def test_grouped_heads_have_their_own_bases(kind):
    """The suspected error of the published post-rotary tables (methods/loki.md, section 7)."""
    heads, group, size = 4, 4, 16
    g = torch.Generator().manual_seed(1)
    roots = torch.stack([random_moment(size, 0.7, g) for _ in range(heads)])
    key = torch.randn(1, heads, 300, size, generator=g, dtype=torch.float64) @ roots
    query = torch.randn(1, heads * group, 300, size, generator=g, dtype=torch.float64)
    stats, moved = KeyStats(), KeyStats()
    order = [2, 0, 3, 1]
    stats.update(0, key, query)
    grouped = query.reshape(1, heads, group, 300, size)[:, order]
    moved.update(0, key[:, order], grouped.reshape(1, heads * group, 300, size))
    basis, permuted = fit(stats, kind), fit(moved, kind)
    maps = basis.layer(0).key_map
    for i in range(heads):
        for j in range(i):
            assert float((maps[i] - maps[j]).abs().max()) > 0.1
    expected = basis.permute_heads(order).layer(0)
    torch.testing.assert_close(permuted.layer(0).key_map, expected.key_map)
    torch.testing.assert_close(permuted.layer(0).query_map, expected.query_map)


@pytest.mark.parametrize(
    ("decays", "margin"), [((0.5, 0.5), 0.08), ((1.0, 0.5), 0.02), ((0.5, 1.0), 0.3)]
)
def test_balanced_ranks_better_than_pca(decays, margin):
    """The synthetic table of methods/loki.md, section 6, at rank 16 of 128, top 256 of 4,096."""
    g = torch.Generator().manual_seed(0)
    heads, size, kept = 6, 128, 256
    key_root, query_root = (
        torch.stack([random_moment(size, decay, g) for _ in range(heads)]) for decay in decays
    )

    def draw(tokens):
        key, query = torch.randn(2, heads, tokens, size, generator=g, dtype=torch.float64)
        return key @ key_root, query @ query_root

    stats = KeyStats()
    stats.update(0, *(rows[None] for rows in draw(2000)))
    key, query = draw(4096)
    query = query[:, :64]
    exact = (query @ key.mT).topk(kept).indices
    recall = {}
    for kind in ("random", "pca", "mixed", "balanced"):
        layer = fit(stats, kind).layer(0)
        lead_query = query @ layer.query_map[..., :16].double()
        lead_key = key @ layer.key_map[..., :16].double()
        score = lead_query @ lead_key.mT
        chosen = torch.zeros_like(score).scatter(-1, score.topk(kept).indices, 1.0)
        recall[kind] = float(chosen.gather(-1, exact).mean())
    assert recall["balanced"] > recall["pca"] + margin, recall
    order = [recall[kind] for kind in ("random", "pca", "mixed", "balanced")]
    assert all(low < high for low, high in pairwise(order)), recall


def test_a_larger_regularisation_conditions_the_map():
    stats = draw_stats(1, 1, 4, 16, seed=0)
    conditions = [
        float(torch.linalg.cond(fit(stats, "balanced", regularisation=r).layer(0).key_map))
        for r in (1e-6, 1e-2)
    ]
    assert conditions[1] < 11 < conditions[0] < 1.1e3


def test_bad_arguments_are_refused():
    stats = draw_stats(1, 1, 9, 8, seed=0)
    bare = KeyStats()
    bare.update(0, torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8))
    with pytest.raises(UnknownNameError, match=r"Unknown basis kind 'balancd'.*'balanced'"):
        fit(stats, "balancd")
    with pytest.raises(UnknownNameError, match="Unknown side 'after'"):
        fit(stats, "pca", side="after")
    for kind, arguments, message in (
        ("balanced", {"regularisation": 0.0}, r"regularisation is a share in \(0, 1\), got 0.0"),
        ("balanced", {"sharpness": 1.5}, r"sharpness is a share in \[0, 1\], got 1.5"),
        ("balanced", {"side": "pre"}, "recorded after RoPE: use side='post'"),
        ("balanced", {"pca_columns": 1}, "belongs to kind 'mixed', got kind 'balanced'"),
        ("mixed", {"pca_columns": 0}, "pca_columns must be 1 or more, got 0"),
        ("pca", {"sharpness": 0.5}, "which a pca basis does not use"),
    ):
        with pytest.raises(InputError, match=message):
            fit(stats, kind, **arguments)
    with pytest.raises(InputError, match="without `pre_key`"):
        fit(bare, "pca", side="pre")
    with pytest.raises(InputError, match="the statistics hold no tokens"):
        fit(KeyStats(), "pca")


def test_layers_of_different_sizes_are_refused():
    stats = draw_stats(1, 1, 9, 8, seed=0)
    stats.update(1, torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16))
    with pytest.raises(InputError, match=r"Layer 1: key_map must be torch.float32 \[1, 8, 8\]"):
        fit(stats, "identity")

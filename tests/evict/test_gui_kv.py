"""GUI-KV: screenshots, the last of which matters most."""

import pytest
import torch

from loki_attn.errors import PolicyError, UnknownNameError
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)
TOKENS = 90
OLD, MIDDLE, LAST = (5, 25), (28, 48), (52, 72)


def orthogonal():
    draw = torch.Generator().manual_seed(7)
    matrix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


def driven_over(query, key, value, valid=None, name="gui-kv", cuts=(), **fields):
    own = {"capacity": 1000, "window": 8, "kernel": 5, "pooling": "avg", **fields}
    driven = DrivenLayer(preset(name, **own), SHAPE)
    driven.prompt(query, key, value, valid, chunks=cuts)
    return driven


def scores_of(driven):
    evictor, valid = driven.layer.eviction.evictor, driven.turn.valid
    cache = driven.rows.whole
    rows = None if valid is None else valid.expand(-1, 2, -1)
    return evictor.scores(cache, driven.call, rows)


def rows_of(seed=0, batch=1):
    return random_rows(SHAPE, TOKENS, batch=batch, q_len=TOKENS, seed=seed)


def behind(scores):
    """Rows that are put behind all others, per batch row and head."""
    return [[(head < 0).nonzero()[:, 0].tolist() for head in row] for row in scores]


@pytest.mark.parametrize("spans", [(), (LAST,)])
def test_with_one_screenshot_and_no_norms_it_is_snapkv(spans):
    rows = rows_of(batch=2)
    own = scores_of(driven_over(*rows, spans=spans, alpha=0.0))
    assert torch.equal(own, scores_of(driven_over(*rows, name="snapkv")))


@pytest.mark.parametrize("norm", ["value", "key"])
def test_norms_add_a_softmax_over_the_last_screenshot(norm):
    query, key, value = rows_of(batch=2)
    fields = {"alpha": 3.0, "temperature": 0.5, "norm": norm, "redundant": 0.0}
    more = scores_of(driven_over(query, key, value, spans=(OLD, LAST), **fields))
    more = (more - scores_of(driven_over(query, key, value, name="snapkv"))).double()
    span = slice(*LAST)
    tokens = (value if norm == "value" else key)[:, :, span].transpose(1, 2).flatten(2)
    norms = tokens.double().norm(dim=-1)
    standard = (norms - norms.mean(1, keepdim=True)) / norms.std(1, correction=0, keepdim=True)
    expected = 3.0 * (standard / 0.5).softmax(1)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(more[..., span], expected, rtol=1e-4, atol=1e-5)
    assert not more[..., : LAST[0]].any()
    assert not more[..., LAST[1] :].any()


def test_equal_norms_favour_nobody():
    query, key, value = rows_of()
    more = scores_of(driven_over(query, key, torch.ones_like(value), spans=(LAST,)))
    more = more - scores_of(driven_over(query, key, value, name="snapkv"))
    torch.testing.assert_close(more[..., slice(*LAST)], torch.full((1, 2, 20), 2.0 / 20))


def test_older_rows_inside_the_subspace_of_the_last_screenshot_go_first():
    query, key, value = rows_of(batch=2)
    draw = torch.Generator().manual_seed(1)
    # The last screenshot's keys span 3 dimensions; 7 older keys lie in there, the others do not.
    inside = torch.randn(2, 2, 3, 16, generator=draw)
    key[:, :, slice(*LAST)] = torch.randn(2, 2, 20, 3, generator=draw) @ inside
    again = [6, 7, 11, 24, 30, 31, 47]
    key[:, :, again] = torch.randn(2, 2, 7, 3, generator=draw) @ inside
    spans = (OLD, MIDDLE, LAST)
    scores = scores_of(driven_over(query, key, value, spans=spans, redundant=7 / 40))
    assert behind(scores) == [[again] * 2] * 2


def test_directions_that_the_last_screenshot_has_not_make_nothing_redundant():
    """Beyond the rank of its keys any direction would do, and shorten residuals at random."""
    query, key, value = rows_of()
    key[:, :, slice(*LAST)] = 0.0
    key[:, :, slice(*LAST), 0] = torch.linspace(1, 2, 20)  # one direction: the first coordinate
    rest = key[0, :, slice(*OLD), 1:].norm(dim=-1)
    expected = (rest.argsort(dim=-1)[:, :6] + OLD[0]).sort().values.tolist()
    scores = scores_of(driven_over(query, key, value, spans=(OLD, LAST), redundant=0.3))
    assert behind(scores) == [expected]


def test_the_subspace_is_the_principal_one_not_that_of_the_first_tokens():
    """The first keys of the screenshot are short; the direction of all others is what counts."""
    query, key, value = rows_of()
    span = list(range(*LAST))
    key[:, :, span] = 0.0
    key[:, :, span[:2], 1] = 0.1
    key[:, :, span[2:], 0] = 1.0
    key[:, :, slice(*OLD)] = 0.0
    key[:, :, OLD[0] : OLD[1] : 2, 0] = 1.0  # like the bulk
    key[:, :, OLD[0] + 1 : OLD[1] : 2, 1] = 1.0  # like the first two
    scores = scores_of(driven_over(query, key, value, spans=(OLD, LAST), rank=1))
    assert behind(scores) == [[list(range(OLD[0], OLD[1], 2))] * 2]


def test_a_screenshot_that_comes_twice_is_kept_once():
    query, key, value = rows_of()
    key[:, :, slice(*OLD)] = key[:, :, slice(*LAST)]
    key[:, :, slice(*LAST)] *= 2
    # As many directions as keys have would hold every older key; so many as its 5 tokens span.
    spans = (OLD, (30, 50), (LAST[0], LAST[0] + 5))
    repeated = list(range(OLD[0], OLD[0] + 5))
    driven = driven_over(query, key, value, spans=spans, redundant=5 / 40, rank=16, capacity=85)
    assert behind(scores_of(driven_over(query, key, value, spans=spans, redundant=5 / 40))) == [
        [repeated] * 2
    ]
    assert driven.positions()[0] == [[p for p in range(TOKENS) if p not in repeated]] * 2


def test_with_all_directions_the_whole_older_screenshots_can_go():
    rows = rows_of()
    scores = scores_of(driven_over(*rows, spans=(OLD, MIDDLE, LAST), rank=16, redundant=1.0))
    assert behind(scores) == [[[*range(*OLD), *range(*MIDDLE)]] * 2]


def test_the_share_is_of_the_older_rows_and_rounded_down():
    rows = rows_of(batch=2)
    for share, amount in ((0.0, 0), (0.02, 0), (0.26, 10), (0.5, 20), (1.0, 40)):
        scores = scores_of(driven_over(*rows, spans=(OLD, MIDDLE, LAST), redundant=share))
        assert [[len(head) for head in row] for row in behind(scores)] == [[amount] * 2] * 2


def test_an_orthogonal_map_of_queries_and_keys_changes_nothing():
    query, key, value = rows_of()
    turn = orthogonal()
    spans = (OLD, MIDDLE, LAST)
    own, other = (
        scores_of(driven_over(q, k, value, spans=spans, rank=4))
        for q, k in ((query, key), (query @ turn, key @ turn))
    )
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_spans_are_of_the_prompt_so_padding_moves_them():
    query, key, value = rows_of(batch=2)
    pad = 11
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :pad] = False
    padded = [rows.clone() for rows in (query, key, value)]
    for rows in padded:
        rows[1, :, :pad] = float("nan")
    fields = {"spans": (OLD, MIDDLE, LAST), "capacity": 40}
    batch = driven_over(*padded, valid, **fields).positions()
    alone = driven_over(*[rows[1:, :, pad:] for rows in (query, key, value)], **fields)
    assert batch[1] == [[p + pad for p in head] for head in alone.positions()[0]]
    assert (
        batch[0]
        == driven_over(*[rows[:1] for rows in (query, key, value)], **fields).positions()[0]
    )


def test_spans_stay_where_they_are_when_rows_before_them_are_gone():
    query, key, value = rows_of()
    driven = driven_over(query, key, value, spans=(OLD, MIDDLE, LAST), capacity=50)
    driven.prompt(*random_rows(SHAPE, 8, q_len=8, seed=9))
    held = driven.rows.whole.positions[0]
    scores = scores_of(driven)[0]
    for head in range(2):
        marked = held[head, (scores[head] < 0).nonzero()[:, 0]].tolist()
        older = [p for p in held[head].tolist() if p in {*range(*OLD), *range(*MIDDLE)}]
        assert len(marked) == len(older) // 2
        assert set(marked) <= set(older)


def test_screenshots_to_come_do_not_count_yet():
    """In the first chunks of a prompt the last screenshot is the last that is there."""
    query, key, value = (rows[:, :, :60] for rows in rows_of())
    spans = (OLD, MIDDLE, (70, 80))
    own = scores_of(driven_over(query, key, value, spans=spans))
    assert torch.equal(own, scores_of(driven_over(query, key, value, spans=spans[:2])))
    early = [rows[:, :, :4] for rows in (query, key, value)]
    own = scores_of(driven_over(*early, spans=spans))
    assert torch.equal(own, scores_of(driven_over(*early, name="snapkv")))


def test_spans_survive_plain_json():
    policy = preset("gui-kv", spans=[[5, 25], [28, 48]])
    assert policy.evict.spans == ((5, 25), (28, 48))
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize(
    "spans", [((5, 5),), ((9, 5),), ((-1, 4),), ((5, 9), (8, 12)), ((5, 7, 9),)]
)
def test_spans_that_are_none_are_refused(spans):
    with pytest.raises(PolicyError, match=r"spans are \(start, end\) positions with start < end"):
        preset("gui-kv", spans=spans)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "at least one query"),
        ({"kernel": 2}, "odd number of rows, got 2"),
        ({"temperature": 0.0}, "temperature divides norms"),
        ({"alpha": -1.0}, "alpha weighs norms"),
        ({"rank": 0}, "counts directions from 1"),
        ({"redundant": 1.1}, "share in .*, got 1.1"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(PolicyError, match=message):
        preset("gui-kv", **fields)


def test_unknown_norms_are_refused():
    with pytest.raises(UnknownNameError, match="Unknown norm 'hidden'"):
        preset("gui-kv", norm="hidden")

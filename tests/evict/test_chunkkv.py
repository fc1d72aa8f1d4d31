"""ChunkKV: whole chunks, the same for all heads, by the attention of the window."""

import pytest
import torch

from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, plain_weights, random_rows

SHAPE = layer_shape(6, 2, 16)
TOKENS, WINDOW = 83, 8


def driven_over(query, key, value, valid=None, **fields):
    driven = DrivenLayer(preset("chunkkv", window=WINDOW, **fields), SHAPE)
    driven.prompt(query, key, value, valid)
    return driven


def received(query, key, call):
    """What every row gets of the last queries' attention, mean over all heads: [batch, tokens]."""
    seen = ops().causal_mask(WINDOW, key.shape[2], key.device)
    weights = plain_weights(query[:, :, -WINDOW:].double(), key.double(), seen, call)
    return weights.sum(2).mean(1)


def test_the_best_chunks_stay_whole_and_what_is_left_goes_to_recent_rows():
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    driven = driven_over(query, key, value, capacity=30, chunk=10)
    for row, scores in enumerate(received(query, key, driven.call)):
        # Rows 75 to 82 stay as the window, and the rest of the chunks that they begin in: 70 to 82.
        # 30 - 13 leaves one chunk and 7 rows before that tail (or before the chunk, if it is last).
        judged = [float(scores[start : start + 10].mean()) for start in range(0, 70, 10)]
        first = 10 * max(range(7), key=judged.__getitem__)
        whole = set(range(first, first + 10)) | set(range(70, 83))
        recent = [p for p in range(83) if p not in whole][-7:]
        assert driven.positions()[row] == [sorted(whole | set(recent))] * 2


def test_chunks_of_one_row_are_the_layer_wide_window_score():
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    driven = driven_over(query, key, value, capacity=30, chunk=1)
    for row, scores in enumerate(received(query, key, driven.call)):
        best = scores[:-WINDOW].topk(30 - WINDOW).indices.tolist()
        expected = sorted(best) + list(range(TOKENS - WINDOW, TOKENS))
        assert driven.positions()[row] == [expected] * 2


def test_every_batch_row_has_its_own_chunks():
    """The reference uses those of the first row for all."""
    query, key, value = random_rows(SHAPE, TOKENS, batch=3, q_len=TOKENS)
    kept = driven_over(query, key, value, capacity=30, chunk=10).positions()
    assert kept[0] != kept[1]
    for row in range(3):
        one = [rows[row : row + 1] for rows in (query, key, value)]
        assert driven_over(*one, capacity=30, chunk=10).positions()[0] == kept[row]


def test_a_padded_row_keeps_what_it_keeps_alone():
    """Chunks begin at the first real token, not at the first row."""
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :7] = False
    padded = [rows.clone() for rows in (query, key, value)]
    for rows in padded:
        rows[1, :, :7] = float("nan")
    batch = driven_over(*padded, valid, capacity=30, chunk=10)
    rest = [rows[1:, :, 7:] for rows in (query, key, value)]
    alone = driven_over(*rest, capacity=30, chunk=10).positions()[0]
    assert batch.positions()[1] == [[p + 7 for p in head] for head in alone]
    assert batch.rows.whole is not None  # all rows of the batch keep as many


def test_a_capacity_of_everything_keeps_everything():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    driven = driven_over(query, key, value, capacity=TOKENS)
    assert driven.positions() == [[list(range(TOKENS))] * 2]


def test_chunked_prompts_that_are_judged_together_keep_the_same():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    kept = []
    for cuts in ((), (20, 50)):
        driven = DrivenLayer(preset("chunkkv", window=WINDOW, capacity=30, when="prompt"), SHAPE)
        driven.prompt(query, key, value, chunks=cuts)
        driven.evict()
        kept.append(driven.positions())
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("field", "message"), [("chunk", "at least one row"), ("window", "one que")]
)
def test_sizes_of_nothing_are_refused(field, message):
    with pytest.raises(PolicyError, match=message):
        preset("chunkkv", **{field: 0})

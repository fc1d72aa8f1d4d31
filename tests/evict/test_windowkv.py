"""WindowKV: whole windows, judged by strategy; the layers of a group keep the same rows."""

from dataclasses import replace

import pytest
import torch

from loki_attn.errors import PolicyError, UnknownNameError
from loki_attn.kernels import ops
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, plain_weights, random_rows

SHAPE = layer_shape(6, 2, 16)
TOKENS, SUFFIX = 96, 8


def policy(**fields):
    return preset("windowkv", **{"suffix": SUFFIX, "allocate": "uniform", **fields})


def model(num_layers, **fields):
    return [
        DrivenLayer(policy(when="prompt", **fields), replace(SHAPE, index=i), num_layers=num_layers)
        for i in range(num_layers)
    ]


def prompt(layers, seed=0, tokens=TOKENS, first=0):
    """A forward over all layers, whose rows differ, and the eviction of all of them."""
    for i, driven in enumerate(layers):
        driven.prompt(*random_rows(SHAPE, tokens, q_len=tokens, seed=seed + first + i))
    return DrivenLayer.evict_all(layers)


def received(query, key, call):
    seen = ops().causal_mask(SUFFIX, key.shape[2], key.device)
    weights = plain_weights(query[:, :, -SUFFIX:].double(), key.double(), seen, call)
    return weights.sum(2).mean(1)


@pytest.mark.parametrize("strategy", ["max", "mean"])
def test_the_best_windows_stay_whole_by_the_strategy(strategy):
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS, seed=3)
    driven = DrivenLayer(policy(capacity=32, strategy=strategy), SHAPE)
    driven.prompt(query, key, value)
    for row, scores in enumerate(received(query, key, driven.call)):
        windows = scores[:-SUFFIX].view(-1, 8)
        if strategy == "max":
            windows = windows.sort(descending=True).values[:, :4]
        chosen = windows.mean(1).topk(3).indices
        expected = sorted(8 * int(w) + i for w in chosen for i in range(8))
        assert driven.positions()[row] == [expected + list(range(TOKENS - SUFFIX, TOKENS))] * 2


def test_the_strategies_differ():
    """One row of a window that is attended to wins by its better half, not by the mean."""
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    logits = torch.zeros(TOKENS)
    logits[8:12], logits[16:24] = 2.0, 1.8  # half a window; a whole one, a little less
    query, key = torch.ones_like(query), (logits / 4)[None, None, :, None].expand_as(key)
    kept = []
    for strategy in ("max", "mean"):
        driven = DrivenLayer(policy(capacity=SUFFIX + 8, strategy=strategy), SHAPE)
        driven.prompt(query, key.contiguous(), value)
        kept.append(driven.positions()[0][0][:8])
    assert kept == [list(range(8, 16)), list(range(16, 24))]


@pytest.mark.parametrize("tokens", [93, 96, 101])
@pytest.mark.parametrize("capacity", [24, 33, 47])
def test_beside_the_recent_rows_only_whole_windows_stay(tokens, capacity):
    driven = DrivenLayer(policy(capacity=capacity), SHAPE)
    driven.prompt(*random_rows(SHAPE, tokens, q_len=tokens))
    for head in driven.positions()[0]:
        assert len(head) == capacity
        counts = [sum(p // 8 == unit for p in head) for unit in range(-(-tokens // 8))]
        protected = {p // 8 for p in range(tokens - SUFFIX, tokens)}
        cut = [u for u, n in enumerate(counts) if n % 8 and u not in protected]
        assert len(cut) <= 1
        # The window that is cut is the last that is not whole, and keeps its last rows.
        assert all(counts[u] in (0, 8) for u in range(len(counts)) if u not in {*cut, *protected})
        assert all(counts[u] == 8 for last in cut for u in range(last + 1, min(protected)))


def test_windows_of_one_in_groups_of_one_by_the_mean_are_head_averaged_snapkv():
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    fields = {"unit": 1, "layers": 1, "strategy": "mean", "capacity": 32}
    driven = DrivenLayer(policy(**fields), SHAPE)
    driven.prompt(query, key, value)
    for row, scores in enumerate(received(query, key, driven.call)):
        best = sorted(scores[:-SUFFIX].topk(32 - SUFFIX).indices.tolist())
        assert driven.positions()[row] == [best + list(range(TOKENS - SUFFIX, TOKENS))] * 2


def test_all_layers_of_a_group_hold_identical_positions():
    layers = model(5, layers=2, capacity=32)
    assert prompt(layers) == 5 * 2 * (TOKENS - 32)
    held = [driven.positions() for driven in layers]
    assert held[0] == held[1]
    assert held[2] == held[3]
    assert held[0] != held[2]
    assert held[2] != held[4]


def test_the_first_layer_of_a_group_chooses_as_it_would_alone():
    layers, alone = model(3, layers=3, capacity=32), model(3, layers=1, capacity=32)
    prompt(layers)
    prompt(alone)
    assert layers[2].positions() == alone[0].positions()
    assert alone[2].positions() != alone[0].positions()


def test_where_the_first_layer_keeps_everything_the_next_one_leads():
    layers = model(4, layers=4, capacity=32, whole_layers=(0,))
    prompt(layers)
    assert layers[0].positions()[0][0] == list(range(TOKENS))
    assert layers[1].positions() == layers[2].positions() == layers[3].positions()


def test_a_group_stays_together_over_turns():
    layers = model(2, layers=2, capacity=32)
    prompt(layers)
    prompt(layers, tokens=40, first=10)
    assert layers[0].positions() == layers[1].positions()
    assert len(layers[0].positions()[0][0]) == 32


def test_a_layer_that_holds_other_rows_than_its_leader_chooses_for_itself():
    layers = model(3, layers=3, capacity=32)
    # Layer 1 has dropped rows before, and by its own choice: its leader's may be gone.
    for i, driven in enumerate(layers):
        driven.prompt(*random_rows(SHAPE, TOKENS, q_len=TOKENS, seed=i))
    DrivenLayer.evict_all(layers[1:2])
    held = {*layers[1].positions()[0][0], *range(TOKENS, TOKENS + 16)}
    prompt(layers, tokens=16, first=7)
    assert not set(layers[0].positions()[0][0]) <= held
    assert set(layers[1].positions()[0][0]) <= held
    assert len(layers[1].positions()[0][0]) == 32
    # It does not lead the next one, which goes on with the leader.
    assert layers[2].positions() == layers[0].positions()


def test_two_prompts_in_a_row_keep_what_fresh_runs_keep():
    """Also where the first layer keeps everything of the second: no indices are left over."""
    for tokens in (TOKENS, 30):
        used, fresh = model(2, layers=2, capacity=32), model(2, layers=2, capacity=32)
        prompt(used)
        for driven in used:
            driven.rows.reset()
            driven.turn.call = driven.turn.valid = None
        prompt(used, tokens=tokens, first=50)
        prompt(fresh, tokens=tokens, first=50)
        assert [d.positions() for d in used] == [d.positions() for d in fresh]


def test_layers_of_a_padded_batch_agree_row_by_row():
    layers = model(2, layers=2, capacity=32)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :21] = False
    for i, driven in enumerate(layers):
        rows = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS, seed=i)
        for part in rows:
            part[1, :, :21] = float("nan")
        driven.prompt(*rows, valid)
    DrivenLayer.evict_all(layers)
    assert layers[0].positions() == layers[1].positions()
    alone = DrivenLayer(policy(capacity=32), SHAPE)
    first = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS, seed=0)
    alone.prompt(*[rows[1:, :, 21:] for rows in first])
    shifted = [[p + 21 for p in head] for head in alone.positions()[0]]
    assert layers[1].positions()[1] == shifted


def test_groups_share_out_what_their_layers_get_and_no_more():
    """By its own share of a pyramid, every layer of a group would keep what its leader gets."""
    layers = model(6, layers=2, capacity=32, allocate="pyramid")
    prompt(layers)
    held = [len(driven.positions()[0][0]) for driven in layers]
    assert held[0] == held[1] > held[2] == held[3] > held[4] == held[5]
    assert 6 * 32 - 6 < sum(held) <= 6 * 32


def test_the_preset_narrows_towards_the_last_group():
    kept = preset("windowkv")
    assert (kept.allocate.method, kept.allocate.beta) == ("pyramid", 14.0)


def test_only_kv_heads_are_stored():
    layers = model(2, layers=2, capacity=32)
    prompt(layers)
    for driven in layers:
        assert driven.rows.whole.keys.shape == (1, 2, 32, 16)
        assert driven.rows.whole.capacity == 32


@pytest.mark.parametrize("field", ["unit", "suffix", "layers"])
def test_sizes_of_nothing_are_refused(field):
    with pytest.raises(PolicyError, match=f"counts {field} from 1"):
        preset("windowkv", **{field: 0})


def test_unknown_strategies_are_refused():
    with pytest.raises(UnknownNameError, match=r"Unknown strategy 'min'.*Valid: max, mean"):
        preset("windowkv", strategy="min")

"""PrefixKV: attention of all queries, one set per layer, one share of mass over layers."""

from dataclasses import replace

import pytest
import torch
from stepping import pieces, visible_of

from loki_attn.allocate.prefix_mass import shortest_prefixes
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, plain_weights, random_rows

SHAPE = layer_shape(6, 2, 16)
TOKENS = 50
IMPORTANCE = "prefixkv_importance"


def prompt(tokens=TOKENS, *, batch=2, seed=0, heavy=2.0):
    """Rows of which every seventh draws attention, the more the heavier."""
    query, key, value = random_rows(SHAPE, tokens, batch=batch, q_len=tokens, seed=seed)
    query[..., 0] += 4.0
    key[:, :, ::7, 0] += heavy
    return query, key, value


def driven(rows, *, valid=None, chunks=(), allocate="uniform", **more):
    """One layer on its own; layers that share a budget are driven together."""
    more = {"keep_share": 0.5, "keep_last": 3, **more}
    layer = DrivenLayer(preset("prefixkv", allocate=allocate, **more), SHAPE)
    layer.prompt(*rows, valid, chunks=chunks)
    return layer


def model(heaviness, tokens=TOKENS, **more):
    """Layers of one budget, the prompt read; and what their rows received."""
    more = {"keep_share": 0.3, "keep_first": 0, "keep_last": 0, **more}
    policy = preset("prefixkv", **more)
    layers, importance = [], []
    for index, heavy in enumerate(heaviness):
        rows = prompt(tokens, batch=1, seed=index, heavy=heavy)
        layer = DrivenLayer(policy, replace(SHAPE, index=index), num_layers=len(heaviness))
        layer.prompt(*rows)
        layers.append(layer)
        importance.append(received(rows)[0])
    return layers, torch.stack(importance)


def received(rows):
    """Attention of all queries, averaged over query heads, in float64: [batch, tokens]."""
    query, key, _ = (part.double() for part in rows)
    causal = torch.ones(key.shape[2], key.shape[2]).tril().bool()
    weights = plain_weights(query, key, causal, DrivenLayer(preset("dense"), SHAPE).call)
    return weights.sum(2).mean(1)


def lengths(layers):
    return [sum(len(head) for head in layer.positions()[0]) // 2 for layer in layers]


def test_importance_is_what_all_queries_give_on_average_over_heads():
    rows = prompt()
    layer = driven(rows, keep_share=1.0)
    got = layer.rows.whole.plane(IMPORTANCE)
    torch.testing.assert_close(got, received(rows)[:, None].expand(-1, 2, -1).float())


def test_decoded_tokens_add_their_attention():
    rows = prompt(TOKENS + 4)
    layer = driven(pieces(rows, 0, TOKENS), keep_share=1.0)
    for token in range(TOKENS, TOKENS + 4):
        layer.attend(*pieces(rows, token, token + 1), visible_of(None, token, token + 1))
    got = layer.rows.whole.plane(IMPORTANCE)[:, 0]
    torch.testing.assert_close(got, received(rows).float())


def test_all_heads_of_a_layer_keep_the_best_rows_of_the_layer():
    rows = prompt()
    for row, judged in zip(driven(rows, keep_first=2).positions(), received(rows), strict=True):
        assert row[0] == row[1]
        middle = judged[2:-3].argsort(descending=True)[: 25 - 5] + 2
        assert row[0] == sorted([0, 1, *middle.tolist(), 47, 48, 49])


@pytest.mark.parametrize("chunks", [(20,), (1, 2, 30)])
def test_the_cut_of_a_prompt_does_not_matter(chunks):
    rows = prompt()
    whole, cut = driven(rows, keep_share=1.0), driven(rows, keep_share=1.0, chunks=chunks)
    torch.testing.assert_close(whole.rows.whole.plane(IMPORTANCE), cut.rows.whole.plane(IMPORTANCE))


@pytest.mark.parametrize("side", ["before", "behind"])
def test_padding_changes_nothing(side):
    query, key, value = prompt()
    own = slice(12, TOKENS) if side == "before" else slice(0, TOKENS - 12)
    valid = torch.zeros(2, TOKENS, dtype=torch.bool)
    valid[0], valid[1, own] = True, True
    padding = ~valid[1]
    key[1, :, padding], value[1, :, padding] = float("nan"), 1e9
    layer = driven((query, key, value), valid=valid, keep_first=2)
    alone = driven([part[1:, :, own] for part in (query, key, value)], keep_first=2)
    shift = own.start
    real = [[p - shift for p in head if valid[1, p]] for head in layer.positions()[1]]
    assert real == alone.positions()[0]


def test_a_share_of_one_keeps_everything():
    layers, _ = model([0.0, 4.0], keep_share=1.0)
    DrivenLayer.evict_all(layers)
    assert lengths(layers) == [TOKENS, TOKENS]


@pytest.mark.parametrize("keep_share", [0.1, 0.3, 0.7])
def test_layers_keep_the_shortest_prefixes_of_one_share_of_mass(keep_share):
    layers, importance = model([0.0, 3.0, 6.0], keep_share=keep_share)
    DrivenLayer.evict_all(layers)
    total = 3 * round(TOKENS * keep_share)
    assert lengths(layers) == shortest_prefixes(importance, total)[0].tolist()
    assert sum(lengths(layers)) == total
    for layer, judged in zip(layers, importance, strict=True):
        kept = layer.positions()[0][0]
        assert kept == sorted(judged.argsort(descending=True)[: len(kept)].tolist())


@pytest.mark.parametrize("keep_share", [0.16, 0.4, 0.9])
def test_first_and_last_rows_survive_at_every_share(keep_share):
    layers, _ = model([0.0, 3.0, 6.0], keep_share=keep_share, keep_first=4, keep_last=4)
    DrivenLayer.evict_all(layers)
    for layer in layers:
        for head in layer.positions()[0]:
            assert head[:4] == [0, 1, 2, 3]
            assert head[-4:] == [46, 47, 48, 49]


def test_layers_go_on_sharing_one_budget_while_decoding():
    """A layer that gave rows up stays small: it may not grow back to the mean at others' cost."""
    rows, burst, capacity = 30, 4, 20
    layers, _ = model(
        [0.0, 6.0], tokens=60, keep_share=None, capacity=capacity, when="step", burst=burst
    )
    DrivenLayer.evict_all(layers)
    assert sum(lengths(layers)) == 2 * capacity
    assert lengths(layers)[0] > lengths(layers)[1] + 2 * burst
    for token in range(rows):
        for index, layer in enumerate(layers):
            new = prompt(1, batch=1, seed=100 + 2 * token + index, heavy=(0.0, 6.0)[index])
            layer.attend(*new)
        DrivenLayer.evict_all(layers)
        assert sum(lengths(layers)) <= 2 * (capacity + burst)
    assert lengths(layers)[0] > lengths(layers)[1] + 2 * burst


def test_state_is_four_bytes_per_row():
    assert driven(prompt()).rows.whole.row_bytes(IMPORTANCE) == 4


def test_a_cache_that_was_reset_remembers_nothing():
    layer = driven(prompt(seed=1))
    layer.rows.reset()
    layer.prompt(*prompt(seed=2))
    assert layer.positions() == driven(prompt(seed=2)).positions()


def test_the_preset_round_trips():
    policy = preset("prefixkv", keep_share=0.25)
    assert Policy.from_json(policy.to_json()) == policy
    assert (policy.keep.keep_first, policy.keep.keep_last) == (4, 25)

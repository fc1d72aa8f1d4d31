"""Law 3: KV heads are alike, and a group is the same thing as repeated KV heads."""

import pytest
import torch

from loki_attn import attention
from loki_attn.testing import layer_shape, random_rows, tiny_basis
from loki_attn.types import Selection

SHAPE = layer_shape(6, 3, 32)
ORDER = [2, 0, 1]
AMOUNTS = [{"top_k": 9, "sinks": 1, "recents": 2}, {"fraction": 0.3}, {"mass": 0.8}]


def by_group(rows, order):
    """Permute query heads as their KV heads are permuted."""
    return rows.unflatten(1, (3, -1))[:, order].flatten(1, 2)


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_kv_heads_permute(sparse_case, amount):
    if "mass" in amount and not sparse_case.select.estimates_mass:
        amount = {"top_k": 9}
    query, key, value = random_rows(SHAPE, 41, batch=2)
    basis = tiny_basis(SHAPE)
    turned = basis.permute_heads(ORDER)
    layer = sparse_case.layer(SHAPE, basis, **amount)
    out, selection = sparse_case.decode(layer, query, key, value)
    per_query_head = selection.indices.shape[1] == 6
    index = by_group(selection.indices, ORDER) if per_query_head else selection.indices[:, ORDER]
    # What a layer holds per head follows its heads; a basis may also be permuted beforehand.
    others = [layer.of(torch.tensor(ORDER))]
    if sparse_case.select.needs_basis:
        others.append(sparse_case.layer(SHAPE, turned, **amount))
    for own in others:
        rows = by_group(query, ORDER), key[:, ORDER], value[:, ORDER]
        other, permuted = sparse_case.decode(own, *rows, basis=turned)
        assert torch.equal(permuted.indices, index)
        assert torch.equal(other, by_group(out, ORDER))


def test_a_group_equals_repeated_kv_heads(sparse_case, kernels, laws):
    """The same rows, chosen once per KV head, read by heads that each own a copy."""
    query, key, value = random_rows(SHAPE, 41, batch=2)
    out, selection = sparse_case.decode(
        sparse_case.layer(SHAPE, top_k=9, sinks=1), query, key, value
    )
    per_head = 6 // selection.indices.shape[1]
    spread = Selection(
        selection.indices.repeat_interleave(per_head, 1),
        selection.counts.repeat_interleave(per_head, 1),
    )
    copies = [rows.repeat_interleave(2, 1) for rows in (key, value)]
    other = kernels.attend(query, *copies, spread, laws.call(SHAPE)).output
    layer = sparse_case.layer(SHAPE, top_k=9, sinks=1)
    mask = laws.mask(selection, 6, 41)
    sparse_case.check(other, layer, query, key, value, mask)
    if not sparse_case.corrects:  # else `decode` has checked it
        sparse_case.check(out, layer, query, key, value, mask)


def test_without_groups_the_way_to_agree_is_irrelevant(sparse_case):
    """MHA: every reduction chooses what "none" chooses."""
    shape = layer_shape(3, 3, 32)
    query, key, value = random_rows(shape, 41)
    mine, _ = sparse_case.decode(sparse_case.layer(shape, top_k=7), query, key, value)
    alone = type(sparse_case)(sparse_case.select, "none")
    other, _ = alone.decode(alone.layer(shape, top_k=7), query, key, value)
    assert torch.equal(mine, other)


def test_a_shared_choice_has_one_index_row_per_kv_head(sparse_case):
    query, key, value = random_rows(SHAPE, 41)
    _, selection = sparse_case.decode(sparse_case.layer(SHAPE, top_k=9), query, key, value)
    alone = sparse_case.group_reduce == "none" and sparse_case.ranks
    assert selection.indices.shape == (1, 6 if alone else 3, 9)


@pytest.mark.parametrize("how", ["softmax_sum", "softmax_max", "sum", "max"])
def test_sharing_follows_its_definition(kernels, laws, how):
    query, key, _ = random_rows(SHAPE, 20, q_len=2)
    logits = kernels.score(query, key, None, laws.call(SHAPE))
    got = kernels.reduce_group(logits, 3, how, None, laws.call(SHAPE))
    for head in range(3):
        first, second = logits[:, 2 * head], logits[:, 2 * head + 1]
        if how.startswith("softmax"):
            first, second = first.softmax(-1), second.softmax(-1)
        expected = first + second if how.endswith("sum") else torch.maximum(first, second)
        torch.testing.assert_close(got[:, head], expected)


def test_masses_of_a_group_with_sink_logits(scoring_case, laws):
    """Sink logits come per query head, whatever the group agrees on."""
    query, key, value = random_rows(SHAPE, 41)
    call = laws.call(SHAPE, sink_logits=torch.linspace(-2, 2, 6))
    layer = scoring_case.layer(SHAPE, mass=0.7)
    out, selection = scoring_case.decode(layer, query, key, value, call=call)
    assert 1 <= int(selection.counts.min()) <= int(selection.counts.max()) < 41
    assert out.shape == query.shape


def test_a_policy_is_bound_to_one_layer_of_many():
    from loki_attn.policy import preset

    with pytest.raises(ValueError, match="dense_layers names"):
        attention.bind(preset("exact-topk", dense_layers=(5,)), SHAPE, 2, None)

"""What generate and forward do with a model that really reads fewer rows."""

import copy

import pytest
import torch
from sparse_policies import METHODS, sparse
from tiny_models import build, greedy, prompts
from transformers import cache_utils

from loki_attn import Budget
from loki_attn.errors import CacheError, InputError

# float32 through two layers; the rows that are read agree exactly.
CLOSE = {"atol": 5e-5, "rtol": 0.0}
HYBRID = "Gemma3 (windows)"
# transformers 5.5 looks up prompts only if there is an end token; this one does not come.
LOOKUP = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": 1}

pytestmark = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture(scope="module")
def hybrid():
    return build(HYBRID)


@pytest.fixture(params=["Llama", HYBRID])
def model(request):
    return request.getfixturevalue("llama" if request.param == "Llama" else "hybrid")


def _decode(model, cache, ids, follow):
    """Read `ids` at once and `follow` one by one; logits [batch, follow, vocab] of the latter."""
    _read(model, cache, [ids])
    return _read(model, cache, torch.split(follow, 1, 1))


@torch.no_grad()
def _read(model, cache, parts):
    """Read parts of a text one after the other; their logits [batch, tokens, vocab]."""
    logits = [model(input_ids=part, past_key_values=cache).logits for part in parts]
    return torch.cat(logits, 1)


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], **CLOSE)


def test_selection_changes_the_answer(llama, method):
    """Otherwise nothing below would prove anything."""
    dense = greedy(llama, prompts())[1]
    with sparse(llama, method) as attachment:
        logits = greedy(llama, prompts())[1]
        assert attachment.traffic.rows_read < attachment.traffic.rows_held
    assert (logits - dense).abs().max() > 0.1


def test_left_padding_changes_nothing(model, method):
    short, long = prompts(1, 9, seed=4), prompts(1, 14, seed=5)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = (batch != 0).long()
    with sparse(model, method):
        alone = [greedy(model, ids) for ids in (short, long)]
        tokens, logits = greedy(model, batch, attention_mask=mask)
    for row, (expected_tokens, expected_logits) in enumerate(alone):
        expected = expected_tokens[0, -12:], expected_logits[0]
        assert_same((tokens[row, 14:], logits[row]), expected)


def test_right_padding_changes_nothing(llama, method):
    """Padding rows stay in the cache between the prompt and what follows."""
    short, long = prompts(1, 9, seed=4), prompts(1, 14, seed=5)
    follow = prompts(1, 4, seed=6)
    batch = torch.cat([torch.cat([short, torch.zeros(1, 5, dtype=torch.long)], 1), long])
    mask = (batch != 0).long()
    with sparse(llama, method) as attachment:
        alone = [_decode(llama, attachment.cache(), ids, follow) for ids in (short, long)]
        cache, rows = attachment.cache(), []
        llama(input_ids=batch, attention_mask=mask, past_key_values=cache)
        for step in range(follow.shape[1]):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = llama(
                input_ids=follow[:, step : step + 1].expand(2, 1),
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            rows.append(out.logits)
    torch.testing.assert_close(torch.cat(rows, 1), torch.cat(alone), **CLOSE)


def test_a_batch_is_its_rows(model, method):
    ids = prompts(3)
    with sparse(model, method):
        together = greedy(model, ids)
        for row in range(3):
            alone = greedy(model, ids[row : row + 1])
            assert_same((together[0][row], together[1][row]), (alone[0][0], alone[1][0]))


def test_every_query_without_cache_is_decoding_step_by_step(model, method):
    """What log-likelihood evaluation computes is what decoding would have done."""
    ids = prompts(2, 20)
    with sparse(model, method, mode="every_query") as attachment, torch.no_grad():
        at_once = model(input_ids=ids, use_cache=False).logits
        assert attachment.traffic.every_query_calls == len(attachment.shapes)
        steps = _decode(model, attachment.cache(), ids[:, :1], ids[:, 1:])
        chunks = _read(model, attachment.cache(), torch.split(ids, 7, 1))
    torch.testing.assert_close(steps, at_once[:, 1:], **CLOSE)
    torch.testing.assert_close(chunks, at_once, **CLOSE)


def test_decode_mode_reads_multi_token_forwards_densely(model, method):
    ids = prompts(2, 20)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with sparse(model, method) as attachment:
            got = model(input_ids=ids, use_cache=False).logits
            assert attachment.traffic.sparse_calls == attachment.traffic.every_query_calls == 0
    torch.testing.assert_close(got, dense, **CLOSE)


def test_beams_keep_their_rows(model, method):
    """With and without cache: a cache whose planes missed a reordering would differ."""
    with sparse(model, method, mode="every_query"):
        options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
        cached = model.generate(prompts(2), **options)
        uncached = model.generate(prompts(2), use_cache=False, **options)
    assert torch.equal(cached, uncached)


def test_prefill_in_chunks(model, method):
    with sparse(model, method) as attachment:
        expected = greedy(model, prompts(2, 17))
        assert_same(greedy(model, prompts(2, 17), prefill_chunk_size=5), expected)
        attachment.use(attachment.policy, mode="every_query")
        expected = greedy(model, prompts(2, 17))
        assert_same(greedy(model, prompts(2, 17), prefill_chunk_size=5), expected)


def test_prompt_lookup_rolls_back(model, method):
    """Every query selects for itself, so guessing several tokens at once changes nothing."""
    ids = prompts(1, 6).repeat(1, 4)
    _stock_lookup(model, ids)
    with sparse(model, method, mode="every_query") as attachment:
        expected = model.generate(ids, **LOOKUP)
        calls = attachment.traffic.sparse_calls
        attachment.traffic.reset()
        got = model.generate(ids, prompt_lookup_num_tokens=3, **LOOKUP)
        assert attachment.traffic.sparse_calls < calls
    assert torch.equal(got, expected)


def test_prompt_lookup_at_full_budget_is_stock(model, method):
    ids = prompts(1, 6).repeat(1, 4)
    stock = _stock_lookup(model, ids)
    with sparse(model, method, budget=Budget(fraction=1.0)) as attachment:
        attachment.always_select = True
        got = model.generate(ids, prompt_lookup_num_tokens=3, **LOOKUP)
    assert torch.equal(got, stock)
    assert got.shape == (1, 24 + 16)


def _stock_lookup(model, ids):
    try:
        return model.generate(ids, prompt_lookup_num_tokens=3, **LOOKUP)
    except ValueError as error:
        if "Cannot `crop` a `DynamicSlidingWindowLayer`" not in str(error):
            raise
        pytest.skip("this transformers cannot roll back sliding layers")


def test_one_cache_over_two_calls_is_one_long_run(model, method):
    with sparse(model, method) as attachment:
        long = greedy(model, prompts(), 14)
        cache = attachment.cache()
        first = greedy(model, prompts(), 6, past_key_values=cache)
        second = greedy(model, first[0], 8, past_key_values=cache)
    assert_same((second[0], torch.cat([first[1], second[1]], 1)), long)


def test_a_second_turn_reads_the_first(model, method):
    with sparse(model, method, mode="every_query") as attachment:
        cache = attachment.cache()
        first = model.generate(prompts(), max_new_tokens=5, do_sample=False, past_key_values=cache)
        turn = torch.cat([first, prompts(1, 6, seed=8)], 1)
        assert_same(greedy(model, turn, past_key_values=cache), greedy(model, turn))


def test_reset_and_reuse(model, method):
    if "Gemma3" in type(model).__name__ and not _stock_resets_windows():
        pytest.skip("this transformers does not reset sliding layers")
    with sparse(model, method) as attachment:
        cache = attachment.cache()
        expected = greedy(model, prompts(2), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_same(greedy(model, prompts(2), past_key_values=cache), expected)
        cache.reset()
        other = prompts(1, 5, seed=9)
        assert_same(greedy(model, other, past_key_values=cache), greedy(model, other))


def _stock_resets_windows():
    layer = cache_utils.DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))
    layer.reset()
    return layer.keys is None


def test_the_stock_model_may_begin(model, method):
    """A stock cache that is half filled goes on as if the prefill had been attached."""
    ids, follow = prompts(2, 15), prompts(2, 5, seed=6)
    with torch.no_grad():
        stock = model(input_ids=ids, use_cache=True).past_key_values
    with sparse(model, method) as attachment:
        expected = _decode(model, attachment.cache(), ids, follow)
        got = _read(model, stock, torch.split(follow, 1, 1))
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_copied_cache_goes_its_own_way(model, method):
    ids, one, other = prompts(2), prompts(2, 4, seed=6), prompts(2, 4, seed=7)
    with sparse(model, method) as attachment:
        cache = attachment.cache()
        _read(model, cache, [ids])
        twin = copy.deepcopy(cache)
        assert twin.layers[-1].get_seq_length() == 12
        got = [
            _read(model, which, torch.split(follow, 1, 1))
            for which, follow in ((cache, one), (twin, other))
        ]
        expected = [_decode(model, attachment.cache(), ids, follow) for follow in (one, other)]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), **CLOSE)


def test_sampling_is_reproducible(llama, method):
    with sparse(llama, method):
        torch.manual_seed(5)
        one = llama.generate(prompts(2), max_new_tokens=10, do_sample=True)
        torch.manual_seed(5)
        other = llama.generate(prompts(2), max_new_tokens=10, do_sample=True)
    assert torch.equal(one, other)


def test_several_answers_of_one_prompt(llama, method):
    with sparse(llama, method):
        torch.manual_seed(5)
        many = llama.generate(prompts(), max_new_tokens=8, do_sample=True, num_return_sequences=3)
    assert many.shape == (3, 20)


def test_weights_are_those_of_the_rows_read(llama, method):
    with sparse(llama, method):
        out = llama.generate(
            prompts(2),
            max_new_tokens=4,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    prefill, step = out.attentions[0][0], out.attentions[2][1]
    assert prefill.shape == (2, 4, 12, 12)
    assert step.shape == (2, 4, 1, 14)
    assert ((step > 0).sum(-1) == 6).all()
    torch.testing.assert_close(step.sum(-1), torch.ones(2, 4, 1))
    eager = build("Llama")
    eager.set_attn_implementation("eager")
    expected = eager(prompts(2), output_attentions=True).attentions[0]
    torch.testing.assert_close(prefill, expected, **CLOSE)


def test_weights_are_not_to_be_had_for_every_query(llama, method):
    with (
        sparse(llama, method, mode="every_query"),
        pytest.raises(InputError, match="output_attentions cannot be had in mode 'every_query'"),
    ):
        llama(input_ids=prompts(), output_attentions=True)


def test_quantized_caches_are_refused(method):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers quantizes a cache only with further packages")
    model = build("Llama")
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with (
        sparse(model, method),
        pytest.raises(CacheError, match="needs the default dynamic cache or a static one"),
    ):
        model.generate(prompts(), max_new_tokens=3, **quantized)


BUDGETS = [Budget(mass=0.7, sinks=1), Budget(fraction=0.3, dense_below=14)]


@pytest.mark.parametrize("group_reduce", ["softmax_sum", "max", "none"])
@pytest.mark.parametrize("budget", BUDGETS, ids=["mass", "fraction"])
def test_any_budget_and_any_agreement_hold_the_same_laws(llama, method, budget, group_reduce):
    with sparse(llama, method, "every_query", budget, group_reduce=group_reduce) as attachment:
        ids = prompts(2, 20)
        with torch.no_grad():
            at_once = llama(input_ids=ids, use_cache=False).logits
        steps = _decode(llama, attachment.cache(), ids[:, :1], ids[:, 1:])
        assert 0 < attachment.traffic.rows_read < attachment.traffic.rows_held
    torch.testing.assert_close(steps, at_once[:, 1:], **CLOSE)

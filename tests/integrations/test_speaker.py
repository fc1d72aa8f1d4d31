"""Speakers: plain generate in turns, twins that share weights, and the full budget."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from loki_attn import preset  # noqa: E402
from loki_attn.errors import InputError  # noqa: E402
from loki_attn.integrations.transformers.speaker import Speaker, attached_twin, twin  # noqa: E402

IDS = torch.randint(1, 90, (1, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=5,
        pad_token_id=0,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def expected(stock):
    """What one call of generate says, were there no end."""
    whole = stock.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
    )
    return tuple(whole[0, 30:].tolist())


def sparse_policy():
    return preset("streaming-llm", top_k=8, sinks=2)


def test_turns_say_what_one_generation_says(stock, expected):
    speakers = {
        "dynamic": Speaker(stock),
        "static": Speaker(stock, static=True),
        "attached": attached_twin(stock, preset("dense"), None),
    }
    for name, speaker in speakers.items():
        speaker.begin(IDS, 12)
        turns = [speaker.speak(4, keep_logits=turn == 0) for turn in range(3)]
        assert sum((turn.tokens for turn in turns), ()) == expected, name
        assert turns[0].logits.shape == (4, 97)
        assert turns[0].logits.argmax(-1).tolist() == list(turns[0].tokens)
        assert turns[1].logits is None
        for turn in turns:
            assert len(turn.steps_s) == 3
            assert min(turn.first_s, *turn.steps_s) > 0


def test_a_conversation_ends_when_another_begins(stock, expected):
    speaker = attached_twin(stock, preset("dense"), None)
    for _ in range(2):
        speaker.begin(IDS, 4)
        assert speaker.speak(4).tokens == expected[:4]
    speaker.end()
    assert speaker.cache_bytes == 0
    with pytest.raises(InputError, match="begin one first"):
        speaker.speak(4)


def test_a_twin_shares_every_weight_and_no_hook(stock):
    other = twin(stock)
    pairs = zip(stock.named_parameters(), other.named_parameters(), strict=True)
    for (name, mine), (same, theirs) in pairs:
        assert name == same
        assert mine.data_ptr() == theirs.data_ptr()
    assert other.config is not stock.config
    attached_twin(stock, preset("dense"), None)
    assert stock.config._attn_implementation != "loki_attn"
    assert not any(module._forward_pre_hooks for module in stock.modules())


def test_cache_bytes_are_those_held(stock):
    row = 2 * 2 * 16 * 2 * 4  # layers, KV heads, head_dim, keys and values, float32
    dynamic, static = Speaker(stock), Speaker(stock, static=True)
    for speaker in (dynamic, static):
        speaker.begin(IDS, 20)
        speaker.speak(5)
    assert dynamic.cache_bytes == 34 * row
    assert static.cache_bytes == 50 * row


def test_a_policy_selects_and_says_when_it_will(stock, expected):
    speaker = attached_twin(stock, sparse_policy(), None)
    assert (speaker.policy, speaker.sparse_calls) == ("streaming-llm", 0)
    assert speaker.selects_at(9)
    assert not speaker.selects_at(8)
    speaker.begin(IDS, 12)
    speaker.speak(12)
    assert speaker.sparse_calls == 2 * 11
    speaker.begin(IDS, 12)
    assert speaker.sparse_calls == 0
    assert Speaker(stock).policy == "stock"
    assert not Speaker(stock).selects_at(10**6)


def test_at_full_budget_a_policy_selects_and_says_the_same(stock, expected):
    speaker = attached_twin(stock, sparse_policy(), None)
    with speaker.full_budget():
        speaker.begin(IDS, 12)
        assert speaker.speak(12).tokens == expected
        assert speaker.sparse_calls == 2 * 11
    assert speaker.sparse_calls == 0
    assert speaker.attachment.policy == sparse_policy()
    assert not speaker.attachment.always_select


@pytest.mark.parametrize("allocate", ["uniform", "pyramid", "adaptive", "global_rows"])
def test_an_eviction_is_weighed_and_off_at_full_budget(stock, expected, allocate):
    policy = preset("snapkv", capacity=12, window=4, allocate=allocate)
    speaker = attached_twin(stock, policy, None)
    assert speaker.evicts
    with speaker.full_budget():
        speaker.begin(IDS, 12)
        assert speaker.speak(12).tokens == expected
        assert speaker.evicted_rows == 0
    dense = attached_twin(stock, preset("dense"), None)
    for one in (dense, speaker):
        one.begin(IDS.repeat(1, 6), 4)
        one.speak(4)
    assert speaker.evicted_rows == 2 * 2 * (IDS.shape[1] * 6 - 12)
    assert speaker.cache_bytes <= speaker.peak_cache_bytes
    # A budget over all layers waits for the last of them.
    falls = speaker.peak_cache_bytes < dense.peak_cache_bytes
    assert falls == (allocate != "global_rows")
    assert not dense.evicts

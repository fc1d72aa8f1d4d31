"""Gates: which heads must see everything is learnt, and the model is left as it was."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import REFUSED, build, greedy, prompts, random_basis
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import loki_attn
from loki_attn.errors import (
    BudgetError,
    InputError,
    PolicyError,
    ProfileError,
    UnknownNameError,
    UnsupportedModelError,
)
from loki_attn.integrations.transformers import gates as gates_of
from loki_attn.integrations.transformers.gates import GateSettings, optimise_gates
from loki_attn.integrations.transformers.layers import cache_bytes
from loki_attn.integrations.transformers.passkeys import Passkeys
from loki_attn.policy import preset
from loki_attn.profile import Profile

WORDS = [a + b for a in ("lamp", "dust", "moor", "fern", "gold", "iron") for b in "abcdefgh"]
TEXT = " ".join(WORDS[i * 7 % len(WORDS)] for i in range(400))
SMALL = {
    "steps": 3,
    "context_tokens": (90, 110),
    "sinks": 2,
    "recents": 6,
    "passkeys": 2,
    "passkey_words": 3,
}


class Speller:
    """A tokenizer of the tiny models: a number per letter or digit."""

    bos_token_id = None

    def __call__(self, text, **options):
        del options
        words = text.replace("\n", " \n ").split(" ")
        ids = [5 + sum(map(ord, word)) % 90 for word in words if word]
        return type("Read", (), {"input_ids": [*self.begin, *ids] if text == "" else ids})

    @property
    def begin(self):
        return [] if self.bos_token_id is None else [self.bos_token_id]


def learnt(model, **more):
    return optimise_gates(model, Speller(), TEXT, **{**SMALL, **more})


def test_gates_are_one_per_kv_head_within_bounds():
    made = learnt(build(), steps=4, lr=0.5)
    assert {i: list(layer["gates"].shape) for i, layer in made.layers.items()} == {0: [2], 1: [2]}
    table = made.table("gates")
    assert table.dtype == torch.float32
    assert bool(((table >= 0) & (table <= 1)).all())
    assert bool((table < 1).any())


def test_it_repeats_under_a_seed():
    model = build()
    one, again, other = learnt(model), learnt(model), learnt(model, seed=1)
    assert torch.equal(one.table("gates"), again.table("gates"))
    assert not torch.equal(one.table("gates"), other.table("gates"))


def test_the_model_is_left_as_it_was():
    model = build()
    model.train()
    model.lm_head.weight.requires_grad_(requires_grad=False)
    learning = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.detach().clone() for weight in model.parameters()]
    used = model.config._attn_implementation
    learnt(model)
    assert model.config._attn_implementation == used
    assert all(module.training for module in model.modules())
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    assert gates_of._IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS


def test_it_is_undone_when_something_fails():
    model = build()
    used = model.config._attn_implementation

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learnt(model, progress=stop)
    assert model.config._attn_implementation == used
    assert gates_of._IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS
    assert all(weight.requires_grad for weight in model.parameters())
    greedy(model, prompts(), 2)


def mixed(model, ids, gate, **settings):
    """Last hidden states under these gates, and whether gates act."""
    with loki_attn.attach(model, "dense", verify_first=False) as attachment:
        shapes = dict(attachment.shapes)
    chosen = GateSettings(**{**SMALL, **settings})
    mixture = gates_of._Mixture(shapes, chosen, model.device)
    mixture.mixing = True
    with gates_of._mixing(model, mixture), torch.no_grad():
        for own in mixture.gates.values():
            own.fill_(gate)
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    "name", ["Llama", "Gemma2 (soft-cap, windows)", "gpt-oss (sinks, windows)"]
)
def test_open_gates_are_the_model_itself(name):
    model, ids = build(name), prompts(1, 40)
    with torch.no_grad():
        stock = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(mixed(model, ids, 1.0), stock, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mixed(model, ids, 0.0), stock, rtol=1e-2, atol=1e-2)


def test_shut_gates_are_streaming_attention_at_every_token():
    """As every token decoded by StreamingLLM at true positions; recents include the token."""
    model, ids = build(), prompts(1, 30)
    shut = mixed(model, ids, 0.0)
    policy = preset("streaming-keep", capacity=2 + 5, **{"evict.sinks": 2})
    with loki_attn.attach(model, policy) as attachment, torch.no_grad():
        cache, base = attachment.cache(), model.base_model
        states = [
            base(input_ids=token, past_key_values=cache).last_hidden_state
            for token in ids.split(1, 1)
        ]
    torch.testing.assert_close(shut, torch.cat(states, 1), rtol=1e-3, atol=1e-4)


def test_windows_that_hold_everything_leave_only_the_price_of_gates():
    """Nothing is lost then, so nothing pushes back: all gates fall alike."""
    made = learnt(build(), recents=200, steps=5)
    table = made.table("gates")
    assert float(table.max()) < 1
    assert float(table.max() - table.min()) < 1e-3
    assert made.provenance["methods"]["duo_attention"]["distance"] < 1e-6


def test_without_a_price_gates_that_are_open_stay_open():
    assert torch.equal(learnt(build(), sparsity_weight=0.0).table("gates"), torch.ones(2, 2))


def test_a_head_that_writes_nothing_loses_its_gate_before_one_that_does():
    """KV head 0 of layer 0 writes nothing into the output: its gate must fall below the other's."""
    model = build()
    with torch.no_grad():
        out = model.base_model.layers[0].self_attn.o_proj.weight
        out[:, : out.shape[1] // 2] = 0
    table = learnt(model, steps=8, sparsity_weight=0.001).table("gates")
    assert float(table[0, 0]) < float(table[0, 1])


def test_provenance_says_all_that_the_result_depends_on():
    news = []
    made = learnt(build(), corpus="words", progress=lambda *n: news.append(n))
    assert news == [(1, 3), (2, 3), (3, 3)]
    about = made.provenance["methods"]["duo_attention"]
    assert about["settings"] == {
        "steps": 3,
        "context_tokens": [90, 110],
        "lr": 0.02,
        "sparsity_weight": 0.05,
        "sinks": 2,
        "recents": 6,
        "passkeys": 2,
        "passkey_words": 3,
        "seed": 0,
    }
    assert about["corpus"]["name"] == "words"
    assert 3 * 90 <= about["tokens"] <= 3 * 110
    assert made.methods == ("duo_attention",)


def test_gates_are_used_by_a_policy_and_memory_falls(tmp_path):
    model = build()
    learnt(model).save(tmp_path / "gates.safetensors")
    profile = Profile.load(tmp_path / "gates.safetensors")
    policy = preset("duo-attention", burst=0, **{"evict.sinks": 2, "evict.recents": 6})
    with loki_attn.attach(model, policy, profile=profile) as attachment:
        cache = attachment.cache()
        tokens, _ = greedy(model, prompts(1, 200), 12, past_key_values=cache)
        assert tokens.shape == (1, 212)
        held = cache_bytes(cache)
    with loki_attn.attach(model, "dense") as attachment:
        whole = attachment.cache()
        greedy(model, prompts(1, 200), 12, past_key_values=whole)
        # Half of the heads hold all rows, the others 8.
        assert held < 0.65 * cache_bytes(whole)
    with pytest.raises(ProfileError, match="was made for model"):
        loki_attn.attach(build(seed=1), policy, profile=profile)


def test_without_a_profile_the_policy_says_what_to_do():
    with pytest.raises(PolicyError, match="needs gates: learn them with optimise_gates"):
        loki_attn.attach(build(), "duo-attention")


def with_loki():
    """Head 0 of layer 0 selects, the others stream."""
    settings = {"full_heads": ((0,), ()), "evict.sinks": 2, "evict.recents": 6, "burst": 0}
    budget = {"top_k": 8, "budget.sinks": 1, "budget.recents": 1, "min_k": 1, "dense_below": 0}
    return preset("loki", evict="duo_attention", rank=4, **settings, **budget)


def test_in_a_model_full_heads_select_by_loki_and_streaming_heads_have_no_planes():
    model = build()
    with loki_attn.attach(model, with_loki(), basis=random_basis(model)) as attachment:
        cache = attachment.cache()
        model.generate(prompts(1, 40), max_new_tokens=6, do_sample=False, past_key_values=cache)
        first, second = (cache.layers[i].rows for i in range(2))
        assert [shard.heads.tolist() for shard in first] == [[0], [1]]
        full, streaming = (shard.cache for shard in first)
        assert full.row_bytes() > streaming.row_bytes() == second.whole.row_bytes()
        assert (full.length, streaming.length, second.whole.length) == (45, 8, 8)
        # One of two heads of one of two layers chooses, after the prompt.
        assert attachment.traffic.sparse_calls == 5


@torch.no_grad()
def test_a_prompt_looked_back_at_is_as_if_read_under_the_policy():
    model, ids, step = build(), prompts(2, 40), prompts(2, 1, seed=9)
    with loki_attn.attach(model, with_loki(), basis=random_basis(model)) as attachment:
        straight, looked = attachment.cache(), attachment.cache()
        model(input_ids=ids, past_key_values=straight)
        attachment.use("dense")
        with attachment.recording():
            model(input_ids=ids, past_key_values=looked)
        attachment.use(with_loki())
        assert attachment.compress(looked) == 2 * 3 * (40 - 8)
        assert cache_bytes(looked) == cache_bytes(straight)
        one, other = (
            model(input_ids=step, past_key_values=cache).logits for cache in (straight, looked)
        )
    assert torch.equal(one, other)


@torch.no_grad()
def test_where_every_query_selects_a_cache_changes_nothing():
    model, ids = build(), prompts(2, 40)
    policy, basis = with_loki(), random_basis(model)
    with loki_attn.attach(model, policy, basis=basis, mode="every_query") as attachment:
        with_cache = model(input_ids=ids, past_key_values=attachment.cache()).logits
        without = model(input_ids=ids, use_cache=False).logits
        attachment.use("dense")
        dense = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(with_cache, without)
    assert not torch.allclose(with_cache, dense)


def test_what_the_method_makes_of_full_heads_is_what_decoding_gives():
    """Every head full is dense, whatever else the model does."""
    model, ids = build(), prompts(2, 30)
    _, stock = greedy(model, ids)
    policy = preset("duo-attention", full_heads=((0, 1), (0, 1)))
    with loki_attn.attach(model, policy):
        _, ours = greedy(model, ids)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({"rate": 1}, UnknownNameError, "Unknown setting of duo_attention 'rate'"),
        ({"steps": 0}, BudgetError, "steps"),
        ({"context_tokens": (90,)}, InputError, r"shortest and the longest text, got \(90,\)"),
        ({"context_tokens": (90, 80)}, InputError, "shortest and the longest text"),
        ({"context_tokens": (90, 300)}, InputError, "exceed the model's context of 256"),
        ({"lr": 0.0}, InputError, "lr is above 0"),
        ({"passkey_words": 30}, InputError, "2 passkeys of 30 words take .* of 90 tokens"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(more, error, text):
    with pytest.raises(error, match=text):
        learnt(build(), **more)


def test_a_model_without_full_attention_has_no_gates():
    with pytest.warns(UserWarning, match="sliding window"), pytest.raises(InputError, match="gate"):
        learnt(build("Mistral (window 8)"))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        learnt(build(REFUSED["T5"]))


# The texts.


def test_a_text_has_the_length_that_was_asked_for_and_asks_for_every_word():
    exams = Passkeys(Speller(), TEXT, count=3, words=4)
    for total in (120, 133):
        exam = exams.draw(total, torch.Generator().manual_seed(total))
        assert exam.tokens.shape == (total,)
        # Four words an answer, the last with a full stop: each is asked for by the token before.
        assert exam.asked.numel() == 3 * 4
        assert int(exam.asked.max()) == total - 2
        assert bool((exam.asked[1:] > exam.asked[:-1]).all())


def test_what_is_asked_for_was_told_before():
    """An answer's first words stand behind the passkey's number in the text, once."""
    exams = Passkeys(Speller(), TEXT, count=2, words=5)
    exam = exams.draw(120, torch.Generator().manual_seed(0))
    tokens = exam.tokens.tolist()
    for first in (int(exam.asked[0]), int(exam.asked[5])):
        answer = tokens[first + 1 : first + 6]
        assert any(tokens[i : i + 5] == answer for i in range(first - 5))


def test_texts_differ_and_begin_as_the_model_expects():
    draw = torch.Generator().manual_seed(0)
    speller = Speller()
    speller.bos_token_id = 1
    exams = Passkeys(speller, TEXT, count=2, words=3)
    one, other = exams.draw(100, draw), exams.draw(100, draw)
    assert one.tokens[0] == other.tokens[0] == 1
    assert not torch.equal(one.tokens, other.tokens)


def test_filler_must_do():
    with pytest.raises(InputError, match="2 different words of 4 to 8 letters"):
        Passkeys(Speller(), "some words " * 200, count=1, words=2)
    exams = Passkeys(Speller(), TEXT, count=1, words=2)
    with pytest.raises(InputError, match="tokens of filler, the text has 400; give more text"):
        exams.draw(600, torch.Generator())

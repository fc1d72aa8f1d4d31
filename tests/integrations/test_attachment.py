"""attach: what it does to a model while it lasts, and that nothing of it stays."""

import copy
import re

import pytest
import torch
import transformers
from sparse_policies import FEW, METHODS, sparse
from tiny_models import REFUSED, SERVED, build, greedy, prompts, random_basis

import loki_attn
from loki_attn import Budget, Policy
from loki_attn.errors import (
    BasisError,
    CacheError,
    InputError,
    LokiAttnError,
    PolicyError,
    UnsupportedModelError,
)
from loki_attn.integrations.transformers.attachment import bound_layers
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki

CLOSE = {"atol": 5e-5, "rtol": 0.0}


class Interrupted(Exception):
    """Stands for whatever may happen inside the block."""


@pytest.fixture
def llama():
    return build("Llama")


@torch.no_grad()
def logits_of(model, ids=None):
    return model(input_ids=prompts(2) if ids is None else ids, use_cache=False).logits


def traces(model):
    """Everything that an attachment could leave behind."""
    modules = [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    config = model.config
    inner = [getattr(config, name)._attn_implementation for name in config.sub_configs]
    return modules, config._attn_implementation, inner, config.to_dict(), model.training


# ---------------------------------------------------------------- restored


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_restored_exactly(llama, method, implementation):
    llama.set_attn_implementation(implementation)
    before, logits = traces(llama), logits_of(llama)
    with sparse(llama, method) as attachment:
        llama.generate(prompts(), max_new_tokens=4, do_sample=False)
        assert llama.config._attn_implementation == "loki_attn"
        assert attachment.attached
    assert not attachment.attached
    assert traces(llama) == before
    assert torch.equal(logits_of(llama), logits)


def test_restored_after_an_exception(llama):
    before, logits = traces(llama), logits_of(llama)

    def explode():
        with sparse(llama):
            raise Interrupted

    with pytest.raises(Interrupted):
        explode()
    assert traces(llama) == before
    assert torch.equal(logits_of(llama), logits)


@pytest.mark.parametrize(
    ("policy", "basis", "error"),
    [
        ("loki", None, PolicyError),
        ("no-such-method", None, InputError),
        (Policy(select=ExactTopK(), budget=Budget(top_k=5, dense_layers=(7,))), None, InputError),
        (Policy(select=Loki(rank=99)), "fitting", PolicyError),
        (Policy(select=Loki(layout="rotated")), "skewed", PolicyError),
        (Policy(select=Loki()), "foreign", BasisError),
    ],
)
def test_restored_after_a_refusal(llama, policy, basis, error):
    bases = {
        None: lambda: None,
        "fitting": lambda: random_basis(llama),
        "skewed": lambda: random_basis(llama, orthogonal=False),
        "foreign": lambda: random_basis(build("Llama", num_key_value_heads=4)),
    }
    used = bases[basis]()
    before, logits = traces(llama), logits_of(llama)
    with pytest.raises(error):
        loki_attn.attach(llama, policy, basis=used)
    assert traces(llama) == before
    assert torch.equal(logits_of(llama), logits)


def test_a_model_that_only_fails_in_the_probe_is_restored():
    model = build(REFUSED["Mamba"])
    before = traces(model)
    with pytest.raises(UnsupportedModelError):
        loki_attn.attach(model, "exact-topk")
    assert traces(model) == before


def test_sub_configs_keep_their_own_implementation():
    if not hasattr(transformers, "Gemma3ForConditionalGeneration"):
        pytest.skip("this transformers has no Gemma3")
    text = build("Gemma3 (windows)").config.to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=3, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = traces(model)
    with loki_attn.attach(model, Policy(select=ExactTopK(), budget=FEW)) as attachment:
        assert list(attachment.shapes) == [1]
        model.generate(prompts(), max_new_tokens=3, do_sample=False)
        assert attachment.traffic.sparse_calls == 2
    assert traces(model) == before


def test_training_flags_are_restored(llama):
    llama.train()
    llama.model.layers[1].eval()
    flags = [module.training for module in llama.modules()]
    with sparse(llama):
        assert [module.training for module in llama.modules()] == flags


def test_detach_twice_is_fine(llama):
    attachment = sparse(llama)
    attachment.detach()
    llama.set_attn_implementation("eager")
    attachment.detach()
    assert llama.config._attn_implementation == "eager"


def test_a_handle_works_without_a_block(llama):
    expected = logits_of(llama)
    attachment = loki_attn.attach(llama, "exact-topk", top_k=6, sinks=1)
    llama.generate(prompts(), max_new_tokens=3, do_sample=False)
    assert attachment.traffic.sparse_calls > 0
    attachment.detach()
    assert torch.equal(logits_of(llama), expected)


def test_the_random_state_is_left_alone(llama):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with loki_attn.attach(llama, "exact-topk"):
        assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- verified


def test_verification_notices_another_attention(llama, monkeypatch):
    def wrong(self, query):
        return query * 1.1

    monkeypatch.setattr("loki_attn.select.base.Selector.query_rows", wrong)
    before = traces(llama)
    with pytest.raises(UnsupportedModelError, match="At full budget LlamaForCausalLM gives other"):
        loki_attn.attach(llama, "exact-topk")
    assert traces(llama) == before
    loki_attn.attach(llama, "exact-topk", verify_first=False).detach()


def test_verification_does_not_depend_on_the_budget(llama):
    """The tiniest budget attaches: the check itself reads everything."""
    budget = Budget(top_k=1)
    with loki_attn.attach(llama, Policy(select=ExactTopK(), budget=budget)) as attachment:
        assert {layer.budget for layer in bound_layers(attachment).values()} == {budget}
        assert not attachment.always_select
        assert attachment.traffic.sparse_calls == attachment.traffic.dense_calls == 0


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "gpt-oss (sinks, windows)"])
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_attaches(name, method):
    model = build(name, dtype=torch.bfloat16)
    with sparse(model, method) as attachment:
        model.generate(prompts(2), max_new_tokens=4, do_sample=False)
        assert attachment.traffic.sparse_calls > 0


def test_always_select_is_the_selection_at_full_budget(llama):
    with loki_attn.attach(llama, Policy(select=ExactTopK())) as attachment:
        greedy(llama, prompts(), 4)
        assert (attachment.traffic.sparse_calls, attachment.traffic.dense_calls) == (0, 6)
        attachment.traffic.reset()
        attachment.always_select = True
        greedy(llama, prompts(), 4)
        assert (attachment.traffic.sparse_calls, attachment.traffic.dense_calls) == (6, 0)
        assert attachment.traffic.rows_read == attachment.traffic.rows_held


# ---------------------------------------------------------------- refused


def test_attach_twice(llama):
    with sparse(llama):
        with pytest.raises(LokiAttnError, match="LlamaForCausalLM is attached already"):
            sparse(llama)
        llama.generate(prompts(), max_new_tokens=3, do_sample=False)


def test_unknown_mode(llama):
    with pytest.raises(InputError, match="mode must be 'decode' or 'every_query', got 'prefill'"):
        loki_attn.attach(llama, "exact-topk", mode="prefill")


def test_overrides_need_a_preset(llama):
    with pytest.raises(PolicyError, match="Only a preset's name takes overrides"):
        loki_attn.attach(llama, Policy(select=ExactTopK()), top_k=4)


class WithExtras(transformers.LlamaForCausalLM):
    """A model whose attention is given something that we never heard of."""

    extras = None

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **(self.extras or {}))


def test_unknown_arguments_are_refused(llama):
    model = WithExtras(copy.deepcopy(llama.config)).eval()
    model.extras = {"salt": 1.0}
    before = traces(model)
    text = "passes 'salt' to its attention: its meaning is not known here; it cannot be served"
    with pytest.raises(UnsupportedModelError, match=text):
        loki_attn.attach(model, "exact-topk")
    assert traces(model) == before
    model.extras = {"salt": None}
    with loki_attn.attach(model, "exact-topk"):
        model.extras = {"position_bias": torch.zeros(1, 4, 12, 12)}
        with pytest.raises(UnsupportedModelError, match="it adds a position bias to the logits"):
            model(input_ids=prompts())


def test_biases_in_the_mask_are_refused(llama):
    bias = torch.zeros(1, 1, 12, 12)
    bias[..., 3] = -2.5
    with sparse(llama), pytest.raises(UnsupportedModelError, match="a bias; only masks that show"):
        llama(input_ids=prompts(), attention_mask=bias)


def test_masks_that_differ_between_heads_are_refused(llama):
    mask = torch.ones(1, 4, 12, 12, dtype=torch.bool)
    with sparse(llama), pytest.raises(UnsupportedModelError, match="differs between heads"):
        llama(input_ids=prompts(), attention_mask=mask)


@pytest.mark.parametrize("additive", [False, True])
def test_own_masks_are_obeyed(llama, additive):
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    mask[..., 5:, 3] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = llama(input_ids=prompts(), attention_mask=mask).logits
        with sparse(llama):
            got = llama(input_ids=prompts(), attention_mask=mask).logits
    torch.testing.assert_close(got, expected, **CLOSE)


def test_attention_dropout_is_refused():
    model = build("Llama", attention_dropout=0.1).train()
    with sparse(model), pytest.raises(LokiAttnError, match=r"asks for attention dropout 0\.1"):
        model(input_ids=prompts())


def test_gradients_are_refused_but_not_needed_to_be_off(llama):
    with sparse(llama) as attachment:
        cache = attachment.cache()
        llama(input_ids=prompts(), past_key_values=cache)
        loss = llama(input_ids=prompts(1, 1), past_key_values=cache).logits.sum()
        assert not cache.layers[0].keys.requires_grad
        with pytest.raises(LokiAttnError, match="for inference: its sparse attention has no grad"):
            loss.backward()


def test_changing_the_implementation_meanwhile_is_noticed(llama):
    with sparse(llama):
        llama.set_attn_implementation("sdpa")
        with pytest.raises(LokiAttnError, match=r"was changed to sdpa\s+meanwhile"):
            logits_of(llama)


# ---------------------------------------------------------------- one config, two models


def test_models_that_share_a_config(llama):
    """The attention's name lives in the config, so the other model sees it too: it stays dense."""
    config = llama.config
    other = transformers.LlamaForCausalLM(config).eval()
    expected = logits_of(other)
    expected_tokens = other.generate(prompts(2), max_new_tokens=6, do_sample=False)
    with sparse(llama) as attachment:
        torch.testing.assert_close(logits_of(other), expected, **CLOSE)
        tokens = other.generate(prompts(2), max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected_tokens)
        assert attachment.traffic.sparse_calls == 0
        with pytest.raises(LokiAttnError, match="shares its config object with a model that is"):
            sparse(other)
    assert torch.equal(logits_of(other), expected)


def test_two_models_attach_side_by_side(llama):
    other = build("Llama", seed=1)
    with sparse(llama) as mine, sparse(other, "exact_topk") as theirs:
        llama.generate(prompts(), max_new_tokens=3, do_sample=False)
        assert mine.traffic.sparse_calls == 4
        assert theirs.traffic.sparse_calls == 0


# ---------------------------------------------------------------- caches have an owner


def test_a_cache_serves_its_own_attachment_only(llama):
    other, stock = build("Llama", seed=1), build("Llama", seed=2)
    with sparse(llama) as attachment, sparse(other):
        cache = attachment.cache()
        llama(input_ids=prompts(), past_key_values=cache)
        with pytest.raises(CacheError, match="made by another attachment"):
            other(input_ids=prompts(1, 1), past_key_values=cache)
        with pytest.raises(CacheError, match="belongs to a Loki attachment, but the model"):
            stock(input_ids=prompts(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == 12
        llama(input_ids=prompts(1, 1), past_key_values=cache)
    with pytest.raises(CacheError, match="belongs to a Loki attachment, but the model"):
        llama(input_ids=prompts(1, 1), past_key_values=cache)
    with sparse(llama), pytest.raises(CacheError, match="made by another attachment"):
        llama(input_ids=prompts(1, 1), past_key_values=cache)


def test_a_failed_forward_leaves_no_cache_armed(llama):
    with sparse(llama) as attachment:
        cache = attachment.cache()
        bias = torch.full((1, 1, 12, 12), -2.5)
        with pytest.raises(UnsupportedModelError):
            llama(input_ids=prompts(), attention_mask=bias, past_key_values=cache)
    with pytest.raises(CacheError):
        llama(input_ids=prompts(), past_key_values=cache)


def test_no_cache_is_kept_alive(llama):
    import gc
    import weakref

    with sparse(llama) as attachment:
        cache = attachment.cache()
        llama.generate(prompts(), max_new_tokens=3, do_sample=False, past_key_values=cache)
        rows = weakref.ref(cache.layers[0].rows)
        del cache
        gc.collect()
        assert rows() is None


def test_another_batch_needs_another_cache(llama):
    with sparse(llama) as attachment:
        cache = attachment.cache()
        llama(input_ids=prompts(1), past_key_values=cache)
        with pytest.raises(CacheError, match="one cache serves one batch of one model"):
            llama(input_ids=prompts(2, 1), past_key_values=cache)


def test_reserved_room_is_allocated_at_once(llama):
    with loki_attn.attach(llama, "exact-topk", reserve_tokens=200) as attachment:
        cache = attachment.cache()
        llama(input_ids=prompts(), past_key_values=cache)
        assert cache.layers[0].rows.whole.capacity == 256
        cache = attachment.cache(reserve_tokens=500)
        llama(input_ids=prompts(), past_key_values=cache)
        assert cache.layers[0].rows.whole.capacity == 512


def test_a_cache_filled_in_inference_mode_grows_outside_of_it(llama):
    with sparse(llama) as attachment:
        cache = attachment.cache()
        with torch.inference_mode():
            llama(input_ids=prompts(), past_key_values=cache)
        with torch.no_grad():
            got = llama(input_ids=prompts(1, 1), past_key_values=cache).logits
            cache = attachment.cache()
            llama(input_ids=prompts(), past_key_values=cache)
            expected = llama(input_ids=prompts(1, 1), past_key_values=cache).logits
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- use


def test_use_changes_policy_basis_and_mode(llama):
    with torch.no_grad():
        stock = greedy(llama, prompts(2))
        with sparse(llama, "loki_planes") as attachment:
            expected = greedy(llama, prompts(2))
            attachment.use("dense")
            got = greedy(llama, prompts(2))
            torch.testing.assert_close(got[1], stock[1], **CLOSE)
            attachment.use(Policy(select=METHODS["loki_planes"], budget=FEW))
            assert torch.equal(greedy(llama, prompts(2))[1], expected[1])
            attachment.use(Policy(select=METHODS["exact_topk"], budget=FEW), mode="every_query")
            assert attachment.mode == "every_query"
            greedy(llama, prompts(2))
            assert attachment.traffic.every_query_calls == 2


def test_use_that_is_refused_changes_nothing(llama):
    with sparse(llama, "exact_topk") as attachment:
        expected = greedy(llama, prompts(2))[1]
        policy = attachment.policy
        with pytest.raises(PolicyError):
            attachment.use(Policy(select=Loki(rank=99)), random_basis(build("Llama")))
        assert attachment.policy is policy
        assert torch.equal(greedy(llama, prompts(2))[1], expected)


def test_use_after_detach(llama):
    attachment = sparse(llama)
    attachment.detach()
    with pytest.raises(LokiAttnError, match="was detached; attach the model anew"):
        attachment.use("dense")


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_cache_follows_a_new_policy(llama, method):
    basis = random_basis(llama)
    policy = Policy(select=METHODS[method], budget=FEW)
    with loki_attn.attach(llama, policy, basis=basis) as attachment, torch.no_grad():
        expected = attachment.cache()
        llama(input_ids=prompts(), past_key_values=expected)
        wanted = llama(input_ids=prompts(1, 1), past_key_values=expected).logits
        attachment.use("dense")
        cache = attachment.cache()
        llama(input_ids=prompts(), past_key_values=cache)
        attachment.use(policy)
        got = llama(input_ids=prompts(1, 1), past_key_values=cache).logits
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_rotated_rows_do_not_follow(llama):
    with sparse(llama, "loki_rotated") as attachment:
        cache = attachment.cache()
        llama(input_ids=prompts(), past_key_values=cache)
        attachment.use("dense")
        with pytest.raises(CacheError, match="holds rotated keys of another policy"):
            llama(input_ids=prompts(1, 1), past_key_values=cache)


def test_a_basis_is_read_from_its_file(llama, tmp_path):
    random_basis(llama).save(tmp_path / "basis.safetensors")
    policy = Policy(select=METHODS["loki_planes"], budget=FEW)
    with sparse(llama, "loki_planes"):
        expected = greedy(llama, prompts())[1]
    with loki_attn.attach(llama, policy, basis=str(tmp_path / "basis.safetensors")):
        assert torch.equal(greedy(llama, prompts())[1], expected)


def test_a_basis_of_another_model_is_refused(llama):
    basis = random_basis(llama)
    record = {"model": {"id": "someone/else", "hash": "0" * 64}}
    foreign = type(basis)(
        kind=basis.kind,
        side=basis.side,
        orthogonal=True,
        layers=basis.layers,
        provenance=record,
    )
    with pytest.raises(BasisError, match=re.escape("was fitted on model 'someone/else'")):
        loki_attn.attach(llama, Policy(select=Loki()), basis=foreign)


# ---------------------------------------------------------------- layers


def test_dense_layers_stay_dense(llama):
    budget = Budget(top_k=4, dense_layers=(0,))
    with sparse(llama, "exact_topk", budget=budget) as attachment:
        greedy(llama, prompts(), 6)
        assert (attachment.traffic.sparse_calls, attachment.traffic.dense_calls) == (5, 5)


def test_per_layer_budgets(llama):
    budget = Budget(top_k=4, per_layer=(3, 5))
    with sparse(llama, "exact_topk", budget=budget) as attachment:
        assert [layer.budget.top_k for layer in bound_layers(attachment).values()] == [3, 5]
        greedy(llama, prompts(), 2)
        assert attachment.traffic.rows_read == 2 * (3 + 5)


def test_short_contexts_are_dense(llama):
    budget = Budget(top_k=4, dense_below=14)
    with sparse(llama, "exact_topk", budget=budget) as attachment:
        greedy(llama, prompts(), 6)  # five single-token steps, of 13 to 17 rows
        assert (attachment.traffic.dense_calls, attachment.traffic.sparse_calls) == (4, 6)


def test_observer_sees_every_full_layer():
    model = build("Gemma3 (windows)")
    seen = []
    with loki_attn.attach(model, "dense") as attachment:
        attachment.observe(seen.append)
        logits_of(model, prompts(2))
        attachment.observe(None)
        logits_of(model, prompts(2))
    assert [one.layer_index for one in seen] == [1]
    assert seen[0].query.shape == (2, 4, 12, 16)
    assert seen[0].key.shape == seen[0].value.shape == (2, 2, 12, 16)
    assert seen[0].rotary is not None


def test_every_served_name_is_known():
    assert set(SERVED) & set(REFUSED) == set()

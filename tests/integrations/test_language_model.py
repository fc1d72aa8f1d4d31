"""TransformersLM: policies for a block only, caches that do not touch, stock logits."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import build, prompts, random_basis

from loki_attn import Budget, Policy
from loki_attn.errors import BasisError, InputError, PolicyError
from loki_attn.integrations.transformers import Traffic, TransformersLM
from loki_attn.integrations.transformers.identity import model_name
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki

IDS = prompts(1, 30)
FEW = Policy(select=ExactTopK(), budget=Budget(top_k=4, sinks=1, recents=1))
LOKI = Policy(select=Loki(rank=4), budget=Budget(top_k=4))
ROTATED = Policy(select=Loki(rank=4, layout="rotated"), budget=Budget(top_k=4))
MODELS = ["Llama", "Gemma3 (windows)"]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def lm(name):
    with TransformersLM(build(name), None) as made:
        yield made


def logits(lm, cache, ids):
    return torch.cat(list(lm.extend(cache, ids)))


def stock(name, ids=IDS):
    with torch.no_grad():
        return build(name)(input_ids=ids, use_cache=False).logits[0]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_extend_without_a_cache_gives_stock_logits(lm, name):
    assert_same(logits(lm, None, IDS), stock(name))


def test_extend_yields_float32_blocks_in_order():
    ids = torch.cat([prompts(1, 200, seed=1), prompts(1, 200, seed=2)], 1)
    wide = build("Llama", max_position_embeddings=512, dtype=torch.bfloat16)
    with TransformersLM(wide, None) as lm:
        blocks = list(lm.extend(None, ids))
    assert [tuple(block.shape) for block in blocks] == [(256, 97), (144, 97)]
    assert {block.dtype for block in blocks} == {torch.float32}


@pytest.mark.parametrize("split", [1, 12, 29])
def test_extend_with_a_cache_gives_stock_logits_and_grows_it(lm, name, split):
    cache = lm.prefill(IDS[:, :split])
    assert cache.get_seq_length() == split
    assert_same(logits(lm, cache, IDS[:, split:]), stock(name)[split:])
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("chunk_tokens", [1, 7, 15, 64])
def test_prefill_in_chunks_is_prefill_at_once(lm, chunk_tokens):
    news = []
    chunked = lm.prefill(
        IDS[:, :25], chunk_tokens=chunk_tokens, progress=lambda *n: news.append(n), reserve_tokens=0
    )
    whole = lm.prefill(IDS[:, :25])
    assert news[-1] == (25, 25)
    assert len(news) == -(-25 // chunk_tokens)
    assert_same(logits(lm, chunked, IDS[:, 25:]), logits(lm, whole, IDS[:, 25:]))


def test_a_fork_and_its_origin_do_not_touch(lm, name):
    origin = lm.prefill(IDS[:, :20])
    fork = lm.fork(origin)
    other = (IDS[:, 20:] + 7) % 90 + 5
    assert_same(logits(lm, fork, other), stock(name, torch.cat([IDS[:, :20], other], 1))[20:])
    assert (origin.get_seq_length(), fork.get_seq_length()) == (20, 30)
    assert_same(logits(lm, origin, IDS[:, 20:]), stock(name)[20:])


@pytest.mark.parametrize("policy", [FEW, LOKI, ROTATED], ids=["exact", "planes", "rotated"])
def test_a_fork_read_sparsely_leaves_its_origin_dense(lm, name, policy):
    origin = lm.prefill(IDS[:, :20])
    with lm.using(policy, random_basis(build(name)), "every_query"):
        sparse = logits(lm, lm.fork(origin), IDS[:, 20:])
    assert float((sparse - stock(name)[20:]).abs().max()) > 0.01
    assert_same(logits(lm, origin, IDS[:, 20:]), stock(name)[20:])


def test_crop_forgets_the_last_tokens():
    """Sliding windows forget for good, so a model without them."""
    with TransformersLM(build("Llama"), None) as lm:
        cache = lm.prefill(torch.cat([IDS[:, :20], IDS[:, :5]], 1))
        lm.crop(cache, 0)
        lm.crop(cache, 5)
        assert cache.get_seq_length() == 20
        assert_same(logits(lm, cache, IDS[:, 20:]), stock("Llama")[20:])


@pytest.mark.parametrize("mode", ["decode", "every_query"])
def test_using_ends_with_its_block(lm, name, mode):
    with lm.using(FEW, mode=mode):
        sparse = logits(lm, None, IDS)
    acts = mode == "every_query"
    assert (float((sparse - stock(name)).abs().max()) > 0.01) == acts
    assert_same(logits(lm, None, IDS), stock(name))


def test_using_ends_with_an_error_too(lm, name):
    with pytest.raises(ZeroDivisionError), lm.using(FEW, mode="every_query"):
        raise ZeroDivisionError
    assert_same(logits(lm, None, IDS), stock(name))


def test_traffic_begins_anew_with_every_block(lm):
    for _ in range(2):
        with lm.using(FEW):
            cache = lm.prefill(IDS[:, :20])
            assert lm.traffic == Traffic()
            logits(lm, cache, IDS[:, 20:21])
            calls = lm.traffic.sparse_calls
        assert 0 < calls <= lm.num_layers
    with lm.using(FEW, mode="every_query"):
        logits(lm, None, IDS)
        assert lm.traffic.every_query_calls == calls
        assert lm.traffic.sparse_calls == 0


def test_a_basis_holds_for_its_block_only(lm, name):
    """Without this, a contender that lacks its basis is measured with another's."""
    with lm.using(LOKI, random_basis(build(name))):
        pass
    for _ in range(2):
        with pytest.raises(PolicyError, match="basis"), lm.using(LOKI):
            pass
    assert_same(logits(lm, None, IDS), stock(name))


def test_a_basis_of_another_model_is_refused_and_the_model_stays_dense(lm, name):
    other = random_basis(build("Qwen3"))
    with pytest.raises(BasisError, match="head"), lm.using(LOKI, other):
        pass
    assert_same(logits(lm, None, IDS), stock(name))


def test_observing_shows_full_layers_and_ends_with_its_block(lm, name):
    seen = []
    with lm.observing(seen.append):
        lm.prefill(IDS)
    lm.prefill(IDS)
    full = {"Llama": [0, 1], "Gemma3 (windows)": [1]}[name]
    assert [observation.layer_index for observation in seen] == full
    assert seen[0].query.shape == (1, 4, 30, 16)
    assert seen[0].key.shape == seen[0].value.shape == (1, 2, 30, 16)


def test_what_it_says_of_itself(lm, name):
    assert (lm.context_tokens, lm.head_dim) == (256, 16)
    assert lm.num_layers == {"Llama": 2, "Gemma3 (windows)": 3}[name]
    assert lm.identity["id"] == type(lm.model).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_dtype_is_a_plain_name(dtype):
    with TransformersLM(build("Llama", dtype=dtype), None) as lm:
        assert lm.dtype == {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "ends"),
    [
        ([7, 9], 11, {7, 9, 11}),
        ([7, 9], 7, {7, 9}),
        ([7, 9], None, {7, 9}),
        (7, 11, {7, 11}),
        (0, None, {0}),
        (None, 0, {0}),
        (None, 11, {11}),
        (None, None, set()),
    ],
)
def test_texts_end_by_the_model_or_the_tokenizer(of_model, of_tokenizer, ends):
    model = build("Llama")
    model.generation_config.eos_token_id = of_model
    with TransformersLM(model, SimpleNamespace(eos_token_id=of_tokenizer)) as lm:
        assert lm.end_tokens == ends
        assert all(isinstance(token, int) for token in lm.end_tokens)


def test_texts_end_by_the_tokenizer_where_the_model_says_nothing():
    model = build("Llama")
    model.generation_config = None
    with TransformersLM(model, SimpleNamespace(eos_token_id=11)) as lm:
        assert lm.end_tokens == {11}


def test_text_and_tokens_pass_through_the_tokenizer():
    class Letters:
        eos_token_id = None

        def __call__(self, text, add_special_tokens, verbose):
            assert (add_special_tokens, verbose) == (False, False)
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

        def decode(self, ids):
            return "".join(map(chr, ids))

    with TransformersLM(build("Llama"), Letters()) as lm:
        assert lm.encode("abc") == [97, 98, 99]
        assert lm.decode([97, 98, 99]) == "abc"


def test_switching_changes_when_the_policy_acts_and_counts_on(lm, name):
    """A chunk selects in "every_query" and not in "decode"; single tokens select in both."""
    layers = {"Llama": 2, "Gemma3 (windows)": 1}[name]
    cache = lm.prefill(IDS[:, :15])
    with lm.using(FEW, mode="every_query"):
        logits(lm, cache, IDS[:, 15:20])
        assert (lm.traffic.every_query_calls, lm.traffic.sparse_calls) == (layers, 0)
        logits(lm, cache, IDS[:, 20:21])
        lm.switch("decode")
        logits(lm, cache, IDS[:, 21:22])
        assert (lm.traffic.every_query_calls, lm.traffic.sparse_calls) == (layers, 2 * layers)
        logits(lm, cache, IDS[:, 22:25])
        assert lm.traffic.every_query_calls == layers
        lm.switch("every_query")
        logits(lm, cache, IDS[:, 25:30])
        assert (lm.traffic.every_query_calls, lm.traffic.sparse_calls) == (2 * layers, 2 * layers)
    assert 0 < lm.traffic.read_bytes < lm.traffic.dense_bytes


def test_switching_gives_the_logits_of_the_other_mode(lm, name):
    def after(mode, switch_to=None):
        cache = lm.prefill(IDS[:, :20])
        with lm.using(FEW, mode=mode):
            if switch_to:
                lm.switch(switch_to)
            return logits(lm, cache, IDS[:, 20:])

    every_query, decode = after("every_query"), after("decode")
    assert float((every_query - decode).abs().max()) > 0.01
    assert torch.equal(after("decode", "every_query"), every_query)
    assert torch.equal(after("every_query", "decode"), decode)


def test_a_switch_ends_with_its_block(lm, name):
    with lm.using(FEW):
        lm.switch("every_query")
    assert_same(logits(lm, None, IDS), stock(name))
    with lm.using(FEW):
        logits(lm, None, IDS)
        assert lm.traffic.every_query_calls == 0


def test_an_unknown_mode_is_refused_and_changes_nothing(lm):
    with lm.using(FEW, mode="every_query"):
        with pytest.raises(
            InputError, match="mode must be 'decode' or 'every_query', got 'decoed'"
        ):
            lm.switch("decoed")
        logits(lm, None, IDS)
        assert lm.traffic.every_query_calls > 0


def test_leaving_it_restores_the_model():
    model = build("Llama")
    before = model.config._attn_implementation
    with TransformersLM(model, None):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_names_carry_no_paths(tmp_path, monkeypatch):
    model = build("Llama")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for given, name in [
        ("org/model", "org/model"),
        (str(tmp_path / "mine"), "mine"),
        (".", "mine"),
        ("../mine", "mine"),
        ("", "LlamaForCausalLM"),
    ]:
        model.config._name_or_path = given
        assert model_name(model) == name

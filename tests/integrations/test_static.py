"""Static caches: what `generate(cache_implementation="static")` says of an attached model."""

import copy
from dataclasses import replace

import pytest
import torch
from sparse_policies import FEW, METHODS, sparse
from tiny_models import build, greedy, left_padded, prompts, random_basis
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import loki_attn
from loki_attn import Budget, Policy, preset
from loki_attn.errors import CacheError, InputError
from loki_attn.integrations.transformers.layers import cache_bytes
from loki_attn.integrations.transformers.static_layers import LokiStaticLayer
from loki_attn.kernels import backends, ops
from loki_attn.select.double_sparsity import DoubleSparsity
from loki_attn.select.loki import Loki

CLOSE = {"atol": 5e-5, "rtol": 0.0}
STATIC = {"cache_implementation": "static"}
HYBRID = "Gemma3 (windows)"
SINKS = "gpt-oss (sinks, windows)"
PLANES = {kind: Loki(rank=6, plane_dtype=kind) for kind in ("int8", "int4", "bf16", "fp32")}
FORMS = {
    **METHODS,
    **{f"planes in {kind}": select for kind, select in PLANES.items()},
    "double_sparsity": DoubleSparsity(rank=6, channels="random"),
}
BUDGETS = {
    "top_k": FEW,
    "fraction": Budget(fraction=0.3, sinks=1, recents=2),
    "dense_below": Budget(top_k=6, dense_below=20),
    "min_k": Budget(fraction=0.1, min_k=5),
}


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture(scope="module")
def hybrid():
    return build(HYBRID)


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if isinstance(backends.probe(request.param), backends.Rejected):
        pytest.skip(f"{request.param} cannot run here")
    monkeypatch.setenv("LOKI_ATTN_BACKEND", request.param)
    ops.cache_clear()
    yield request.param
    ops.cache_clear()


def compiling():
    """What makes stock `generate` compile its steps on a CPU, without any graph break."""
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


def attached(model, select, budget=FEW, **more):
    policy = Policy(select=select, budget=budget, **more)
    return loki_attn.attach(model, policy, basis=random_basis(model), verify_first=False)


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], **CLOSE)


@torch.no_grad()
def read(model, cache, parts):
    """Read parts of a text one after the other; their logits [batch, tokens, vocab]."""
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], 1)


def steps(ids):
    return torch.split(ids, 1, 1)


@pytest.mark.parametrize(
    ("form", "backend"),
    [*((form, "native") for form in FORMS), ("loki_planes", "reference")],
    indirect=["backend"],
)
def test_a_static_cache_says_what_a_dynamic_one_says(llama, form, backend):
    with attached(llama, FORMS[form]) as attachment:
        expected = greedy(llama, prompts(2), 16)
        selected = attachment.traffic.sparse_calls
        got = greedy(llama, prompts(2), 16, **STATIC)
        assert attachment.traffic.static_calls == selected == 2 * 15
        assert attachment.traffic.rows_read < attachment.traffic.rows_held
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("budget", "how"),
    [
        ("top_k", "softmax_max"),
        ("fraction", "softmax_sum"),
        ("fraction", "sum"),
        ("dense_below", "max"),
        ("min_k", "none"),
    ],
)
def test_budgets_follow_what_is_visible(llama, budget, how):
    batch = left_padded()
    more = {"attention_mask": batch["attention_mask"]}
    with attached(llama, PLANES["int8"], BUDGETS[budget], group_reduce=how):
        expected = greedy(llama, batch["ids"], 12, **more)
        assert_same(greedy(llama, batch["ids"], 12, **more, **STATIC), expected)


@pytest.mark.parametrize("method", METHODS)
def test_windows_stay_the_hosts_business(hybrid, method, backend):
    batch = left_padded()
    more = {"attention_mask": batch["attention_mask"]}
    with sparse(hybrid, method) as attachment:
        expected = greedy(hybrid, batch["ids"], 12, **more)
        got = greedy(hybrid, batch["ids"], 12, **more, **STATIC)
        assert attachment.traffic.static_calls == 11
    assert_same(got, expected)


def test_sixteen_bits(backend):
    model = build("Llama", dtype=torch.bfloat16)
    with sparse(model):
        expected = greedy(model, prompts(2), 16)
        assert torch.equal(greedy(model, prompts(2), 16, **STATIC)[0], expected[0])


def test_beams_reorder_the_plane(llama):
    wide = {"num_beams": 3}
    with sparse(llama):
        expected = llama.generate(prompts(2), max_new_tokens=10, do_sample=False, **wide)
        got = llama.generate(prompts(2), max_new_tokens=10, do_sample=False, **wide, **STATIC)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("select", ["loki_planes", "loki_rotated"])
@pytest.mark.parametrize("always", [False, True], ids=["dense path", "selecting"])
def test_full_budget_is_the_stock_static_cache(llama, hybrid, select, always):
    for model in (llama, hybrid):
        expected = greedy(model, prompts(2), 16, **STATIC)
        with sparse(model, select, budget=Budget(fraction=1.0)) as attachment:
            attachment.always_select = always
            got = greedy(model, prompts(2), 16, **STATIC)
            assert (attachment.traffic.static_calls > 0) == always
        assert_same(got, expected)


def test_dense_layers_keep_the_stock_layer(llama):
    cache = StaticCache(config=llama.config, max_cache_len=40)
    with sparse(llama, budget=replace(FEW, dense_layers=(0,))):
        expected = greedy(llama, prompts(2), 16)
        got = greedy(llama, prompts(2), 16, past_key_values=cache)
    assert_same(got, expected)
    assert [type(layer).__name__ for layer in cache.layers] == ["StaticLayer", "LokiStaticLayer"]


@pytest.mark.parametrize("method", METHODS)
def test_turns_resets_and_copies(llama, method, backend):
    first, second = prompts(2, 12), prompts(2, 7, seed=5)
    with sparse(llama, method) as attachment:
        dynamic, static = attachment.cache(), StaticCache(llama.config, max_cache_len=48)
        expected = [
            read(llama, dynamic, [first]),
            read(llama, dynamic, steps(second)),
            read(llama, dynamic, [second]),  # several tokens on a filled cache
            read(llama, dynamic, steps(first)),
        ]
        got = [read(llama, static, [first]), read(llama, static, steps(second))]
        fork = copy.deepcopy(static)
        got += [read(llama, static, [second]), read(llama, static, steps(first))]
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.testing.assert_close(read(llama, fork, [second]), expected[2], **CLOSE)
        static.reset()
        torch.testing.assert_close(read(llama, static, [first]), expected[0], **CLOSE)
        torch.testing.assert_close(read(llama, static, steps(second)), expected[1], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_unwritten_slots_are_never_read(llama, method, backend):
    first, second = prompts(2, 12), prompts(2, 7, seed=5)
    with sparse(llama, method):
        clean, spoilt = (StaticCache(llama.config, max_cache_len=40) for _ in range(2))
        for cache in (clean, spoilt):
            read(llama, cache, [first])
        for layer in spoilt.layers:
            rows = layer.rows
            rows.keys[:, :, 12:], rows.values[:, :, 12:] = float("nan"), float("nan")
            if rows.plane is not None:
                rows.scales[:, :, 12:] = float("nan")
                rows.plane[:, :, 1:] = 127
        for parts in (steps(second), [second], steps(first)):
            expected = read(llama, clean, parts)
            torch.testing.assert_close(read(llama, spoilt, parts), expected, atol=0.0, rtol=0.0)


def test_a_half_filled_stock_cache_is_taken_over(llama):
    follow = prompts(2, 6, seed=5)
    cache, dynamic = StaticCache(llama.config, max_cache_len=40), None
    read(llama, cache, [prompts(2)])
    with sparse(llama) as attachment:
        dynamic = attachment.cache()
        read(llama, dynamic, [prompts(2)])
        expected = read(llama, dynamic, steps(follow))
        torch.testing.assert_close(read(llama, cache, steps(follow)), expected, **CLOSE)
        assert cache_bytes(cache) > cache.layers[0].keys.nbytes * 4


def test_another_policy_finds_its_plane(llama):
    follow = prompts(2, 6, seed=5)
    with sparse(llama, "loki_rotated") as attachment:
        cache = StaticCache(llama.config, max_cache_len=40)
        attachment.use(Policy(select=PLANES["int8"], budget=FEW))
        read(llama, cache, [prompts(2)])
        attachment.use(Policy(select=PLANES["int4"], budget=replace(FEW, top_k=8)))
        dynamic = attachment.cache()
        read(llama, dynamic, [prompts(2)])
        expected = read(llama, dynamic, steps(follow))
        torch.testing.assert_close(read(llama, cache, steps(follow)), expected, **CLOSE)
        attachment.use(Policy(select=METHODS["loki_rotated"], budget=FEW))
        read(llama, cache, [follow])
        attachment.use(Policy(select=PLANES["int8"], budget=FEW))
        with pytest.raises(CacheError, match="holds rotated keys of another policy"):
            read(llama, cache, [follow])


def test_compiled_steps_are_one_graph_at_every_length(llama):
    """From 12 tokens to 76: past tiles of 16 rows, and blocks of 64."""
    torch._dynamo.reset()
    with sparse(llama) as attachment:
        expected = greedy(llama, prompts(2), 64, **STATIC)
        again_expected = greedy(llama, prompts(2, 9, seed=8), 16, **STATIC)
        counted = attachment.traffic.static_calls
        counters.clear()
        got = greedy(llama, prompts(2), 64, **compiling())
        assert counters["stats"]["unique_graphs"] == 1
        again = greedy(llama, prompts(2, 9, seed=8), 16, **compiling())
        assert counters["stats"]["unique_graphs"] == 1  # nor does another cache need one
        assert not counters["graph_break"]
        assert attachment.traffic.static_calls == counted
    assert_same(got, expected)
    assert_same(again, again_expected)


def test_compiled_models_with_windows_and_sinks():
    torch._dynamo.reset()
    kinds = ["sliding_attention", "full_attention"]
    model, batch = build(SINKS, num_hidden_layers=2, layer_types=kinds), left_padded()
    more = {"attention_mask": batch["attention_mask"]}
    with sparse(model):
        expected = greedy(model, batch["ids"], 12, **more, **STATIC)
        counters.clear()
        got = greedy(model, batch["ids"], 12, **more, **compiling())
    assert_same(got, expected)
    assert not counters["graph_break"]
    # Stock window layers count their tokens in Python, which takes a second graph, once.
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_steps_follow_the_policy_and_its_end():
    torch._dynamo.reset()
    llama = build("Llama", num_hidden_layers=1)
    stock = greedy(llama, prompts(2), 16, **STATIC)
    policies = [
        Policy(select=PLANES["bf16"], budget=BUDGETS["fraction"]),
        Policy(select=METHODS["loki_rotated"], budget=FEW),
    ]
    with sparse(llama) as attachment:
        for policy in policies:
            attachment.use(policy)
            expected = greedy(llama, prompts(2), 16, **STATIC)
            assert_same(greedy(llama, prompts(2), 16, **compiling()), expected)
            assert (expected[1] - stock[1]).abs().max() > 0.1
    assert_same(greedy(llama, prompts(2), 16, **compiling()), stock)


@pytest.mark.parametrize("select", [PLANES["int8"], METHODS["loki_rotated"]])
def test_triton_kernels_serve_compiled_steps(select, interpreted, monkeypatch):
    """What appends and attends here is what does it on a GPU."""
    torch._dynamo.reset()
    model = build("Llama", num_hidden_layers=1)
    with attached(model, select):
        expected = greedy(model, prompts(2), 6, **STATIC)
        monkeypatch.setenv("LOKI_ATTN_BACKEND", "triton")
        ops.cache_clear()
        counters.clear()
        got = greedy(model, prompts(2), 6, **compiling())
    monkeypatch.undo()
    ops.cache_clear()
    assert_same(got, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_replays_compiled_steps(method):
    """As stock `generate` does it by itself there: inductor, and a CUDA graph of every step."""
    torch._dynamo.reset()
    model = build("Llama", head_dim=64).cuda()
    ids = prompts(2, 40).cuda()
    with sparse(model, method, budget=replace(FEW, top_k=16)):
        expected = greedy(model, ids, 64, **STATIC, disable_compile=True)
        counters.clear()
        got = greedy(model, ids, 64, **STATIC)
    assert counters["stats"]["unique_graphs"] >= 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-3, rtol=0.0)


REFUSED = {
    "mass": (Policy(select=PLANES["int8"], budget=Budget(mass=0.8)), "a mass budget reads as many"),
    "eviction": (preset("snapkv", capacity=40), "it evicts rows"),
    "reuse": (Policy(select=PLANES["int8"], budget=FEW, reuse_above=0.9), "reuse_above decides"),
    "no lead": (preset("quest", top_k=16), "does not rank rows by a lead"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_needs_rows_that_move_is_refused(llama, kind):
    policy, reason = REFUSED[kind]
    cache = StaticCache(llama.config, max_cache_len=40)
    with (
        loki_attn.attach(llama, policy, basis=random_basis(llama)),
        pytest.raises(CacheError, match=f"because .*{reason}.*; drop cache_implementation="),
    ):
        read(llama, cache, [prompts()])
    assert not cache.layers[0].is_initialized


def test_what_looks_at_every_step_is_refused(llama):
    cache = StaticCache(llama.config, max_cache_len=40)
    with sparse(llama, mode="every_query"), pytest.raises(CacheError, match="every query of a"):
        read(llama, cache, [prompts()])
    with sparse(llama) as attachment:
        attachment.observe(lambda seen: None)
        with pytest.raises(CacheError, match="an observer looks at the rows of every step"):
            read(llama, cache, [prompts()])
        attachment.observe(None)
        with attachment.recording(), pytest.raises(CacheError, match="keeps the queries"):
            read(llama, cache, [prompts()])
        with pytest.raises(InputError, match="output_attentions cannot be had"):
            llama(input_ids=prompts(), past_key_values=cache, output_attentions=True)


def test_a_cache_serves_its_attachment_only(llama):
    cache = StaticCache(llama.config, max_cache_len=40)
    with sparse(llama):
        read(llama, cache, [prompts()])
    assert isinstance(cache.layers[0], LokiStaticLayer)
    with pytest.raises(CacheError, match="belongs to a Loki attachment"):
        read(llama, cache, [prompts()])
    with sparse(llama), pytest.raises(CacheError, match="made by another attachment"):
        read(llama, cache, [prompts()])


@pytest.mark.parametrize("before", ["loki_rotated", "loki_planes"])
def test_a_cache_that_was_reset_is_anybodys(llama, before):
    """Some versions of transformers keep the cache of `generate`, and reset it."""
    kept, fresh = (StaticCache(llama.config, max_cache_len=40) for _ in range(2))
    parts = [prompts(2), *steps(prompts(2, 5, seed=5))]
    with sparse(llama, before):
        read(llama, kept, parts)
        kept.reset()
        torch.testing.assert_close(read(llama, kept, parts), read(llama, fresh, parts), **CLOSE)
    kept.reset()
    stock = StaticCache(llama.config, max_cache_len=40)
    torch.testing.assert_close(read(llama, kept, parts), read(llama, stock, parts), **CLOSE)
    with sparse(llama) as attachment:  # what the stock model wrote is taken over
        dynamic = attachment.cache()
        read(llama, dynamic, [torch.cat(parts, 1)])
        follow = steps(prompts(2, 6, seed=6))
        torch.testing.assert_close(read(llama, kept, follow), read(llama, dynamic, follow), **CLOSE)
        kept.reset()
        attachment.use(Policy(select=METHODS["loki_rotated"], budget=FEW))
        fresh = StaticCache(llama.config, max_cache_len=40)
        torch.testing.assert_close(read(llama, kept, parts), read(llama, fresh, parts), **CLOSE)


def test_no_more_rows_than_slots(llama):
    cache = StaticCache(llama.config, max_cache_len=16)
    with sparse(llama):
        read(llama, cache, [prompts(1, 12)])
        message = "A static cache of 16 slots holds 12 tokens and cannot take 5 more"
        with pytest.raises(CacheError, match=message):
            read(llama, cache, [prompts(1, 5)])
        read(llama, cache, [prompts(1, 4)])
        with pytest.raises(CacheError, match="holds 16 tokens and cannot take 1 more"):
            read(llama, cache, [prompts(1, 1)])

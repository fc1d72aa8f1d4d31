"""Calibration: moments against plain hooks, partial files, and the basis that comes out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import SERVED, build, prompts

import loki_attn
from loki_attn.errors import BasisError, InputError
from loki_attn.integrations.transformers.calibration import calibrate, collect_stats, sharpness
from loki_attn.integrations.transformers.function import Observation
from loki_attn.types import AttentionCall

WINDOW, COUNT = 16, 3
IDS = prompts(1, 400, seed=6)[0]
G4 = {"num_attention_heads": 8, "num_key_value_heads": 2}


def hooked(name, pre_modules, query_module, **settings):
    """Keys before RoPE and queries before RoPE of every layer, by hooks on the stock model.

    Returns the rows [layer][tokens of all windows, heads, head_dim] and the stock cos and sin.
    """
    model = build(name, dtype=torch.float64, **settings)
    rows, angles = {}, []
    for index, block in enumerate(model.base_model.layers):
        for kind, module in (("key", pre_modules), ("query", query_module)):
            getattr(block.self_attn, module).register_forward_hook(
                lambda _, __, out, place=(index, kind): rows.setdefault(place, []).append(out[0])
            )
    model.base_model.rotary_emb.register_forward_hook(lambda _, __, out: angles.append(out))
    with torch.no_grad():
        for window in IDS[: WINDOW * COUNT].split(WINDOW):
            model.base_model(input_ids=window[None], use_cache=False)
    size = angles[0][0].shape[-1]
    split = {place: [r.reshape(WINDOW, -1, size) for r in found] for place, found in rows.items()}
    return split, [(cos[0], sin[0]) for cos, sin in angles]


def turn(rows, cos, sin):
    """Llama's rotation, written out: coordinate i turns with coordinate i + half."""
    half = rows.shape[-1] // 2
    one, other = rows[..., :half], rows[..., half:]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def close(moments, rows, weights=None):
    """Whether moments are the sums over rows [n, kv_heads, head_dim], to float64 rounding."""
    outer = torch.einsum("nha,nhb->hab", rows, rows)
    torch.testing.assert_close(moments.outer, outer, rtol=1e-9, atol=1e-11 * float(outer.max()))
    torch.testing.assert_close(moments.total, rows.sum(0), rtol=1e-9, atol=1e-10)
    assert moments.weight.tolist() == [rows.shape[0]] * rows.shape[1]


@pytest.mark.parametrize(
    ("name", "key_module", "query_module", "settings"),
    [
        ("Llama", "k_proj", "q_proj", {}),
        ("Llama", "k_proj", "q_proj", G4),
        ("Qwen3", "k_norm", "q_norm", {}),
    ],
    ids=["llama", "llama of groups of four", "qwen3 with norms on keys and queries"],
)
def test_moments_are_those_that_hooks_see(name, key_module, query_module, settings):
    model = build(name, dtype=torch.float64, **settings)
    stats, run = collect_stats(model, IDS, tokens=WINDOW * COUNT + 5, window=WINDOW)
    rows, angles = hooked(name, key_module, query_module, **settings)
    assert stats.layers == (0, 1)
    assert stats.tokens == run["tokens"] == WINDOW * COUNT
    for layer in stats.layers:
        pre, query = rows[layer, "key"], rows[layer, "query"]
        post = [turn(r, *a) for r, a in zip(pre, angles, strict=True)]
        turned = torch.cat([turn(r, *a) for r, a in zip(query, angles, strict=True)])
        kv_heads = pre[0].shape[1]
        assert stats.shape(layer) == (kv_heads, pre[0].shape[2])
        close(stats.moments(layer, "key"), torch.cat(post))
        close(stats.moments(layer, "pre"), torch.cat(pre))
        grouped = turned.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
        close(stats.moments(layer, "query"), grouped)


def test_every_kv_head_has_a_covariance_of_its_own():
    """Hooks behind the repetition to query heads see one head four times; we see two heads."""
    model = build("Llama", dtype=torch.float64, **G4)
    stats, _ = collect_stats(model, IDS, tokens=WINDOW * COUNT, window=WINDOW)
    rows, angles = hooked("Llama", "k_proj", "q_proj", **G4)
    for layer in stats.layers:
        post = torch.cat([turn(r, *a) for r, a in zip(rows[layer, "key"], angles, strict=True)])
        first, second = stats.covariance(layer)
        for head, found in enumerate((first, second)):
            wanted = torch.from_numpy(np.cov(post[:, head].T.numpy(), bias=True))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        assert float((first - second).norm() / first.norm()) > 0.5


@pytest.mark.parametrize(
    ("name", "key_module", "without"),
    [("GLM", "k_proj", ()), ("SmolLM3 (layers without RoPE)", "k_proj", (1,))],
)
def test_keys_before_rope_of_other_rotations(name, key_module, without):
    """GLM passes angles in halves and rotates pairs; SmolLM3 passes them to layers without RoPE."""
    if SERVED[name].missing:
        pytest.skip(SERVED[name].missing)
    model = build(name, dtype=torch.float64)
    stats, _ = collect_stats(model, IDS, tokens=WINDOW * COUNT, window=WINDOW)
    kept = {}
    stock = build(name, dtype=torch.float64)
    for index, block in enumerate(stock.base_model.layers):
        getattr(block.self_attn, key_module).register_forward_hook(
            lambda _, __, out, place=index: kept.setdefault(place, []).append(out[0])
        )
    with torch.no_grad():
        for window in IDS[: WINDOW * COUNT].split(WINDOW):
            stock.base_model(input_ids=window[None], use_cache=False)
    for layer in stats.layers:
        close(stats.moments(layer, "pre"), torch.cat(kept[layer]).unflatten(1, (2, -1)))
        same = torch.equal(stats.moments(layer, "pre").outer, stats.moments(layer, "key").outer)
        assert same == (layer in without)


def test_only_full_attention_layers_are_calibrated():
    stats, _ = collect_stats(build("Gemma3 (windows)"), IDS, tokens=64, window=32)
    assert stats.layers == (1,)


def test_windows_shorter_than_the_samples_stride_are_calibrated():
    stats, _ = collect_stats(build(), IDS, tokens=12, window=4)
    assert stats.tokens == 12
    assert stats.moments(0, "sharp").weight.tolist() == [0, 0]


def brute_force_sharpness(seen):
    query, key = seen.query[0].double().numpy(), seen.key[0].double().numpy()
    heads, tokens, _ = query.shape
    found = np.zeros((heads, tokens))
    for head in range(heads):
        keys = key[head * key.shape[0] // heads]
        for t in range(7, tokens, 8):
            logits = keys[: t + 1] @ query[head, t] * seen.call.scaling
            if seen.call.softcap:
                logits = seen.call.softcap * np.tanh(logits / seen.call.softcap)
            total = np.exp(logits).sum()
            if seen.call.sink_logits is not None:
                total += np.exp(float(seen.call.sink_logits[head]))
            far = [np.exp(logits[s]) / total for s in range(4, t - 64 + 1)]
            found[head, t] = max(far, default=0.0)
    return torch.from_numpy(found)[None]


@pytest.mark.parametrize(
    "call", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.0, 3.0, -1.0, 2.0])}]
)
def test_sharpness_is_the_largest_far_weight_of_every_eighth_query(call):
    draw = torch.Generator().manual_seed(2)
    seen = Observation(
        layer_index=0,
        query=torch.randn(1, 4, 100, 8, generator=draw),
        key=torch.randn(1, 2, 100, 8, generator=draw),
        value=torch.randn(1, 2, 100, 8, generator=draw),
        call=AttentionCall(scaling=0.7, **call),
        visible=None,
        rotary=None,
    )
    found = sharpness(seen)
    torch.testing.assert_close(found.double(), brute_force_sharpness(seen), atol=1e-6, rtol=1e-5)
    assert int((found > 0).sum()) == 4 * 4  # queries 71, 79, 87, 95 look behind 64 and 4 rows


class Stop(Exception):
    """What ends a calibration in the middle."""


def moments_of(stats):
    return [
        getattr(stats.moments(layer, rows), part)
        for layer in stats.layers
        for rows in ("key", "pre", "query", "sharp")
        for part in ("weight", "total", "outer")
    ]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, error, after):
    model, partial = build(), tmp_path / "partial.safetensors"
    whole, run = collect_stats(model, IDS, tokens=6 * WINDOW, window=WINDOW)
    first, second = [], []

    def stop(done, total):
        first.append(done)
        if done == after * WINDOW:
            raise error

    with pytest.raises(error):
        collect_stats(model, IDS, tokens=6 * WINDOW, window=WINDOW, partial=partial, progress=stop)
    again, run_again = collect_stats(
        model,
        IDS,
        tokens=6 * WINDOW,
        window=WINDOW,
        partial=partial,
        progress=lambda done, total: second.append(done),
    )
    assert first + second == [WINDOW * n for n in range(1, 7)]
    assert run_again == run
    assert all(map(torch.equal, moments_of(again), moments_of(whole)))


def test_an_error_within_a_window_forgets_that_window_only(tmp_path):
    model, partial = build(), tmp_path / "partial.safetensors"
    whole, _ = collect_stats(model, IDS, tokens=3 * WINDOW, window=WINDOW)
    calls = []

    def fail(_, __, out):
        calls.append(out.shape[1])
        if calls.count(WINDOW) == 2:  # probes are shorter
            raise Stop

    hook = model.base_model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(Stop):
        collect_stats(model, IDS, tokens=3 * WINDOW, window=WINDOW, partial=partial)
    hook.remove()
    done = []
    again, _ = collect_stats(
        model,
        IDS,
        tokens=3 * WINDOW,
        window=WINDOW,
        partial=partial,
        progress=lambda tokens, total: done.append(tokens),
    )
    assert done == [2 * WINDOW, 3 * WINDOW]
    assert all(map(torch.equal, moments_of(again), moments_of(whole)))


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 2 * WINDOW},
        {"window": 8},
        {"corpus": {"name": "another"}},
        {"model": lambda: build(seed=1)},
    ],
    ids=["tokens", "window", "corpus", "model"],
)
def test_a_partial_file_of_another_run_is_refused(tmp_path, other):
    partial = tmp_path / "partial.safetensors"
    asked = {"tokens": 4 * WINDOW, "window": WINDOW, "corpus": {"name": "one"}}

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        collect_stats(build(), IDS, **asked, partial=partial, progress=stop)
    model = other.get("model", build)()
    changed = {**asked, **{k: v for k, v in other.items() if k != "model"}}
    before = partial.read_bytes()
    with pytest.raises(InputError, match="holds the beginning of another calibration"):
        collect_stats(model, IDS, **changed, partial=partial)
    assert partial.read_bytes() == before
    assert not hasattr(model.base_model.layers[0].self_attn, "_loki_attn_state")


@pytest.mark.parametrize(
    ("ids", "asked", "message"),
    [
        (IDS[:31], {"window": 32}, "at least one window of 32 tokens, the text has 31"),
        (IDS, {"window": 32, "tokens": 16}, r"the text has 400 \(asked for 16\); give more text"),
        (IDS, {"window": 257}, "Windows of 257 tokens exceed the model's context of 256"),
    ],
)
def test_refusals(ids, asked, message):
    with pytest.raises(InputError, match=message):
        collect_stats(build(), ids, **asked)


def words(text, **_):
    """A tokenizer of characters, as ids below the tiny models' vocabulary."""
    return SimpleNamespace(input_ids=torch.tensor([[5 + ord(c) % 90 for c in text]]))


def test_calibrate_gives_a_basis_that_fits_this_model_and_no_other():
    model, text, news = build(), "It was a dark and stormy night. " * 8, []
    before = model(input_ids=IDS[None, :20]).logits
    basis = calibrate(
        model,
        words,
        text,
        tokens=128,
        window=64,
        corpus="night",
        progress=lambda *n: news.append(n),
    )
    assert (basis.kind, basis.layer_indices) == ("mixed", (0, 1))
    assert basis.provenance["corpus"]["name"] == "night"
    assert basis.provenance["tokens"] == 128
    assert news == [(64, 128), (128, 128)]
    assert torch.equal(model(input_ids=IDS[None, :20]).logits, before)
    with loki_attn.attach(model, "loki", basis=basis, rank=4, top_k=8) as attachment:
        model.generate(IDS[None, :30], max_new_tokens=4, do_sample=False)
        assert attachment.traffic.sparse_calls > 0
    with pytest.raises(BasisError, match=r"was fitted on model 'LlamaForCausalLM'.*is used with"):
        loki_attn.attach(build(seed=1), "loki", basis=basis, rank=4, top_k=8)


def test_calibrate_passes_its_options_on():
    basis = calibrate(build(), words, "word " * 40, kind="pca", tokens=64, window=64, side="pre")
    assert (basis.kind, basis.side) == ("pca", "pre")
    with pytest.raises(InputError, match="at least one window of 2048 tokens, the text has 4"):
        calibrate(build(), words, "text")

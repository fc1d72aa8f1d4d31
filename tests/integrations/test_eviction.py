"""What generate does with a model that really drops rows: memory, positions, masks, turns."""

import copy

import pytest
import torch
from tiny_models import build, random_basis

import loki_attn
from loki_attn.errors import CacheError, PolicyError
from loki_attn.policy import preset

CLOSE = {"atol": 5e-5, "rtol": 0.0}
SNAP = {"capacity": 9, "evict.window": 3, "kernel": 1}
POLICIES = {
    "snapkv": preset("snapkv", **SNAP),
    "ragged": preset("snapkv", **SNAP, allocate="adaptive"),
    "model-wide": preset("snapkv", **SNAP, allocate="global_rows"),
    "h2o": preset("h2o", capacity=9),
    "streaming": preset("streaming-keep", capacity=9, sinks=2),
    "snapkv, then exact top-k": preset(
        "exact-topk", top_k=5, sinks=1, recents=2, min_k=1, evict="snapkv", **SNAP
    ),
    "h2o, then Loki": preset(
        "loki", top_k=5, sinks=1, recents=2, min_k=1, rank=6, evict="h2o", capacity=9
    ),
}
LENGTH = 40


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


def text(length=LENGTH, batch=1, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 97, (batch, length), generator=draw)


def attach(model, policy, **more):
    basis = random_basis(model) if policy.select.needs_basis else None
    return loki_attn.attach(model, policy, basis=basis, **more)


def generate(model, ids, count=6, **more):
    return model.generate(
        ids,
        attention_mask=more.pop("attention_mask", torch.ones_like(ids)),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


def positions(cache):
    """By layer and KV head, the positions of the rows of the first batch row."""
    found = []
    for layer in cache.layers:
        parts = [shard.cache.positions for shard in layer.rows]
        found.append(layer.rows.together(parts, -1)[0].tolist())
    return found


@torch.no_grad()
def read(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


def test_rows_go_and_memory_with_them(llama, policy):
    with loki_attn.attach(llama, "dense") as attachment:
        dense = generate(llama, text(200), 3).past_key_values
    with attach(llama, policy) as attachment:
        cache = generate(llama, text(200), 3).past_key_values
        traffic = attachment.traffic
    assert traffic.evicted_rows > 2 * 2 * 180
    for layer in cache.layers:
        held = sum(s.cache.length * s.cache.positions[..., 0].numel() for s in layer.rows)
        assert held <= 2 * (9 + 3) * len(cache.layers)  # a global budget may favour a layer
        assert layer.get_seq_length() == 202
    held, before = (sum(layer.rows.nbytes() for layer in c.layers) for c in (cache, dense))
    assert held < before / 3
    assert 0 < traffic.kept_bytes < traffic.dense_bytes / 8


@pytest.mark.parametrize("name", [n for n, p in POLICIES.items() if p.select.method == "dense"])
def test_a_capacity_for_all_changes_nothing(llama, name):
    policy = POLICIES[name]
    roomy = preset(policy.name, capacity=500, allocate=policy.allocate.method)
    dense = generate(llama, text())
    with attach(llama, roomy) as attachment:
        ours = generate(llama, text())
        assert attachment.traffic.evicted_rows == 0
    assert torch.equal(ours.sequences, dense.sequences)
    torch.testing.assert_close(ours.logits, dense.logits, **CLOSE)


def test_streaming_is_a_mask_over_the_stock_model(llama):
    """One set for all heads and layers: the stock model can be shown the same rows."""
    ids = text(30)
    with attach(llama, preset("streaming-keep", capacity=9, sinks=2)) as attachment:
        cache = attachment.cache()
        read(llama, cache, ids[:, :20])
        ours = [read(llama, cache, token) for token in torch.split(ids[:, 20:], 1, 1)]
    seen = torch.ones(30, 30).tril().bool()
    for query in range(20, 30):
        # What was dropped after the step before is gone; the newest row is there besides.
        seen[query, 2 : query - 7] = False
    stock = llama(input_ids=ids, attention_mask=seen[None, None])
    torch.testing.assert_close(torch.cat(ours, 1), stock.logits[:, 20:], **CLOSE)


def test_a_row_alone_and_padded_in_a_batch(llama, policy):
    ids, pads = text(30, batch=2), 7
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    with attach(llama, policy):
        batch = generate(llama, ids, attention_mask=mask)
        alone = generate(llama, ids[1:, pads:])
        first = generate(llama, ids[:1])
    for step, logits in enumerate(batch.logits):
        torch.testing.assert_close(logits[1:], alone.logits[step], **CLOSE)
        torch.testing.assert_close(logits[:1], first.logits[step], **CLOSE)


def test_two_requests_are_two_fresh_runs(llama, policy):
    with attach(llama, policy):
        generate(llama, text(35, seed=8))
        second = generate(llama, text())
    with attach(llama, policy):
        fresh = generate(llama, text())
    assert torch.equal(second.sequences, fresh.sequences)
    assert positions(second.past_key_values) == positions(fresh.past_key_values)


@pytest.mark.parametrize("name", ["snapkv", "ragged", "model-wide"])
def test_chunks_of_a_prompt_are_judged_together(llama, name):
    """With when="prompt" rows go at the first step, whatever the chunks were."""
    late = preset("snapkv", **SNAP, when="prompt", allocate=POLICIES[name].allocate.method)
    found = []
    for chunks in ([40], [17, 23], [1, 30, 9]):
        with attach(llama, late) as attachment:
            cache = attachment.cache()
            for part in torch.split(text(), chunks, 1):
                read(llama, cache, part)
            # A chunk of one token is a step like any other, and nothing waits yet.
            assert cache.layers[0].rows.longest == LENGTH
            logits = read(llama, cache, text(1))
            found.append((positions(cache), logits))
            assert cache.layers[0].rows.longest < LENGTH
    for kept, logits in found[1:]:
        assert kept == found[0][0]
        torch.testing.assert_close(logits, found[0][1], **CLOSE)


def test_each_chunk_is_compressed_by_default(llama):
    with attach(llama, POLICIES["snapkv"]) as attachment:
        cache = attachment.cache()
        for part in torch.split(text(), 10, 1):
            read(llama, cache, part)
            assert cache.layers[0].rows.longest == 9


def test_a_recorded_prompt_is_compressed_like_a_generated_one(llama, policy):
    with attach(llama, policy) as attachment:
        cache = attachment.cache()
        read(llama, cache, text())
        expected = positions(cache)
        step = read(llama, cache, text(1))
    basis = random_basis(llama) if policy.select.needs_basis else None
    with loki_attn.attach(llama, "dense") as attachment:
        recorded = attachment.cache()
        with attachment.recording():
            read(llama, recorded, text())
        twin = copy.deepcopy(recorded)
        attachment.use(policy, basis)
        dropped = attachment.compress(twin)
        assert dropped == attachment.traffic.evicted_rows > 0
        assert positions(twin) == expected
        torch.testing.assert_close(read(llama, twin, text(1)), step, **CLOSE)
        assert recorded.layers[0].rows.longest == LENGTH
        with pytest.raises(CacheError, match="compress needs a cache that was filled inside"):
            attachment.compress(twin)


def test_a_second_turn_goes_on_at_true_positions(llama, policy):
    with attach(llama, policy) as attachment:
        cache = attachment.cache()
        read(llama, cache, text())
        read(llama, cache, text(12, seed=5))
        assert cache.get_seq_length() == LENGTH + 12
        last = [max(head) for layer in positions(cache) for head in layer]
        assert set(last) == {LENGTH + 11}
        assert bool(torch.isfinite(read(llama, cache, text(1))).all())


def test_beams_follow_their_rows(llama, policy):
    with attach(llama, policy):
        beams = generate(llama, text(), num_beams=3)
        # Without eviction pressure on the order of beams, one beam is greedy decoding.
        single = generate(llama, text(), num_beams=1)
    assert beams.sequences.shape == single.sequences.shape


@pytest.mark.parametrize("name", ["snapkv", "ragged"])
def test_an_evicted_cache_is_copied_and_cropped(llama, name):
    with attach(llama, POLICIES[name]) as attachment:
        cache = attachment.cache()
        read(llama, cache, text())
        expected = read(llama, copy.deepcopy(cache), text(1))
        read(llama, cache, text(2, seed=6)[:, :1])
        read(llama, cache, text(2, seed=6)[:, 1:])
        cache.crop(-2)
        assert cache.get_seq_length() == LENGTH
        torch.testing.assert_close(read(llama, cache, text(1)), expected, **CLOSE)
        with pytest.raises(CacheError, match="were evicted from a head"):
            cache.crop(-39)


@pytest.mark.parametrize(
    "name", ["Qwen3", "Gemma2 (soft-cap, windows)", "gpt-oss (sinks, windows)", "GPT-NeoX", "Phi"]
)
@pytest.mark.parametrize("kind", ["snapkv", "ragged", "h2o"])
def test_other_architectures(name, kind):
    """Layers of several kinds: full ones evict, windows stay as they are, masks fit both."""
    model = build(name)
    ids = text(30, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with attach(model, POLICIES[kind]) as attachment:
        out = generate(model, ids, attention_mask=mask)
        assert attachment.traffic.evicted_rows > 0
        alone = generate(model, ids[1:, 5:])
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[1:], alone.logits[step], atol=2e-4, rtol=0.0)


def test_evaluation_mode_drops_nothing(llama):
    with attach(llama, POLICIES["snapkv"], mode="every_query") as attachment:
        cache = attachment.cache()
        read(llama, cache, text())
        assert cache.layers[0].rows.longest == LENGTH


def test_slot_positions_need_a_known_rotation():
    learned = build("GPT-2")
    with pytest.raises(PolicyError, match="rot"):
        attach(learned, preset("streaming-slot", capacity=9, sinks=2))
    with pytest.raises(PolicyError, match="does not commute with RoPE"):
        attach(
            build("Llama"),
            preset("loki-paper", rank=6, fraction=0.5, evict="streaming", capacity=9,
                   positions="slot"),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "GLM", "Phi"])
def test_slot_positions_are_those_of_a_fresh_text(name):
    """Sinks right before the window: as if the text between had never been."""
    model, ids = build(name), text(30)
    with attach(model, preset("streaming-slot", capacity=10, sinks=2)) as attachment:
        cache = attachment.cache()
        read(model, cache, ids)
        held = cache.layers[0].rows.whole
        first = held.keys.clone(), held.values.clone()
        alone = read(model, cache, text(1))
    # The first layer's rows depend on token and position only: compare with the text cut short.
    short = torch.cat([ids[:, :2], ids[:, 22:]], 1)
    with loki_attn.attach(model, "dense") as attachment:
        cache = attachment.cache()
        read(model, cache, short)
        plain = cache.layers[0].rows.whole
    assert bool(torch.isfinite(alone).all())
    torch.testing.assert_close(first[1], plain.values, **CLOSE)
    scores = (first[0] @ first[0].mT, plain.keys @ plain.keys.mT)
    torch.testing.assert_close(*scores, atol=2e-4, rtol=1e-3)

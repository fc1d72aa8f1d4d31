"""A prompt read again: what judges its rows, and that nothing of the pass is left behind."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build, random_basis

import loki_attn
from loki_attn.errors import CacheError, InputError
from loki_attn.evaluate.contending import contending, read
from loki_attn.evaluate.protocol import Contender
from loki_attn.integrations.transformers import Prompt, TransformersLM
from loki_attn.integrations.transformers.second_pass import INSTRUCTION
from loki_attn.policy import preset

LENGTH, CHUNK, QUOTE, FIRST = 40, 16, 3, 2
ASKING = [11, 12, 13, 14]
CLOSE = {"atol": 5e-5, "rtol": 0.0}
ZIP = preset("kvzip", chunk=CHUNK, quote=QUOTE, keep_first=FIRST)
EVEN = preset("kvzip", chunk=CHUNK, quote=QUOTE, keep_first=FIRST, allocate="uniform")
PARTS = [(0, 16), (16, 32), (32, 40)]
ROOMY = preset("kvzip", chunk=CHUNK, quote=QUOTE, keep_first=FIRST, keep_share=1.0)


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


def text(length=LENGTH, batch=1, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 97, (batch, length), generator=draw)


def tokenizer(said, **settings):
    del said, settings
    return SimpleNamespace(input_ids=ASKING)


def prompt(ids):
    return Prompt(ids=ids, instruction_ids=ASKING)


@torch.no_grad()
def read_on(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


def read_prompt(attachment, ids):
    cache = attachment.cache()
    read_on(attachment.model, cache, ids)
    return cache


def ours(cache):
    return [layer for layer in cache.layers if hasattr(layer, "rows")]


def positions(cache):
    """By layer, batch row and KV head, the positions of the rows."""
    found = []
    for layer in ours(cache):
        parts = [shard.cache.positions for shard in layer.rows]
        found.append(layer.rows.together(parts, -1).tolist())
    return [[[[p for p in head if p >= 0] for head in row] for row in layer] for layer in found]


def marks(cache):
    """By layer, float32 [batch, kv_heads, length]."""
    return [layer.rows.whole.plane("read_in_repeating") for layer in ours(cache)]


def expected_marks(model, ids, asking=ASKING):
    """The definition: every chunk repeated in one forward with the whole prompt before it.

    float32 [batch, kv_heads, length] by layer, from queries and keys of a densely attached model.
    """
    found = {}
    for start, stop in PARTS:
        seen = {}
        again = torch.tensor(asking).expand(len(ids), -1)
        quote = ids[:, max(0, start - QUOTE) : start]
        whole = torch.cat([ids, again, quote, ids[:, start:stop]], 1)
        with loki_attn.attach(model, "dense") as attachment:
            attachment.observe(lambda one, seen=seen: seen.update({one.layer_index: one}))
            read_on(model, None, whole)
        for index, one in seen.items():
            query, key = one.query.double(), one.key.double()
            group = query.shape[1] // key.shape[1]
            first = [*range(min(FIRST, start))]
            held = [*first, *range(start, stop), *range(LENGTH, whole.shape[1])]
            logits = query[:, :, LENGTH:] @ key[:, :, held].mT.repeat_interleave(group, 1)
            logits = logits * one.call.scaling
            if one.call.softcap:
                logits = one.call.softcap * torch.tanh(logits / one.call.softcap)
            text_rows = whole.shape[1] - LENGTH
            hidden = torch.ones(text_rows, len(held)).triu(len(held) - text_rows + 1).bool()
            logits = logits.masked_fill(hidden, float("-inf"))
            if one.call.sink_logits is not None:
                sink = one.call.sink_logits.double().view(1, -1, 1, 1)
                logits = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1)
            largest = logits.softmax(-1).amax(2)[..., len(first) : len(first) + stop - start]
            largest = largest.view(len(ids), key.shape[1], group, -1).amax(2)
            found.setdefault(index, []).append(largest)
    return [torch.cat(parts, -1).float() for _, parts in sorted(found.items())]


@pytest.mark.parametrize(
    "name",
    ["Llama", "Qwen3", "Gemma2 (soft-cap, windows)", "Gemma3 (windows)",
     "gpt-oss (sinks, windows)", "GPT-NeoX", "GPT-2"],
)  # fmt: skip
def test_rows_are_judged_by_what_repeating_the_prompt_reads(name):
    """Chunks lie on the whole prompt, at the positions behind it, led by their instruction."""
    model, ids = build(name), text(batch=2)
    with loki_attn.attach(model, ROOMY) as attachment:
        cache = read_prompt(attachment, ids)
        assert attachment.compress(cache, prompt(ids)) == 0
        found = marks(cache)
    expected = expected_marks(model, ids)
    assert len(found) == len(expected) > 0
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-3)
        assert float(mine.min()) > 0
        assert float(mine.max()) <= 1


def test_the_best_rows_of_the_model_stay(llama):
    ids = text()
    with loki_attn.attach(llama, ZIP) as attachment:
        cache = read_prompt(attachment, ids)
        before = sum(layer.rows.nbytes() for layer in ours(cache))
        dropped = attachment.compress(cache, prompt(ids))
        assert dropped == attachment.traffic.evicted_rows == 4 * (LENGTH - 12)
        kept = positions(cache)
        assert sum(layer.rows.nbytes() for layer in ours(cache)) < 0.6 * before
    judged = [one.clone() for one in expected_marks(llama, ids)]
    for one in judged:
        one[:, :, :FIRST] = 2.0
    ranked = torch.stack([one[0] for one in judged]).flatten().argsort(descending=True)
    best = sorted(ranked[: 4 * 12].tolist())
    flat = [
        (layer * 2 + head) * LENGTH + place
        for layer, rows in enumerate(kept)
        for head, places in enumerate(rows[0])
        for place in places
    ]
    assert sorted(flat) == best
    assert cache.get_seq_length() == LENGTH


def snapshot(cache):
    found = []
    for layer in cache.layers:
        if not hasattr(layer, "rows"):
            found.append((layer, layer.keys.clone(), layer.values.clone(), layer.get_seq_length()))
            continue
        rows = layer.rows.whole
        memory = {name: held.clone() for name, held in rows.memory.items()}
        planes = {
            name: rows.plane(name).clone() for name in rows._storage if name != "read_in_repeating"
        }
        turn = layer.turn.valid, layer.turn.call, layer.turn.waiting
        found.append((layer, planes, memory, turn, rows.length, rows.seen))
    return found


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


@pytest.mark.parametrize("name", ["Llama", "Gemma3 (windows)", "Qwen3-Next (linear layers)"])
def test_the_cache_is_as_it_was_bit_by_bit(name):
    """Windows and running states cannot forget what was read: they never see it."""
    model, ids = build(name), text()
    with loki_attn.attach(model, ROOMY) as attachment:
        plain, cache = read_prompt(attachment, ids), read_prompt(attachment, ids)
        if name.startswith("Qwen3-Next"):
            attachment.compress(cache, prompt(ids))
        else:
            before = snapshot(cache)
            attachment.compress(cache, prompt(ids))
            assert all(same(*pair) for pair in zip(before, snapshot(cache), strict=True))
        assert torch.equal(read_on(model, cache, text(5)), read_on(model, plain, text(5)))


def test_what_methods_remember_beside_the_rows_survives(llama):
    """A truncation forgets it, and the pass ends in one."""
    ids = text()
    with loki_attn.attach(llama, ROOMY) as attachment:
        cache = read_prompt(attachment, ids)
        for layer in ours(cache):
            layer.rows.whole.memory["a mean"] = torch.arange(4.0).view(1, 2, 2)
            layer.rows.whole.chosen["a choice"] = torch.arange(6).view(1, 2, 3)
        attachment.compress(cache, prompt(ids))
    for layer in ours(cache):
        assert torch.equal(layer.rows.whole.memory["a mean"], torch.arange(4.0).view(1, 2, 2))
        assert torch.equal(layer.rows.whole.chosen["a choice"], torch.arange(6).view(1, 2, 3))


def forwards(model):
    """What a patch would change, by module."""
    return {
        name: (
            module.forward.__func__, "forward" in vars(module),
            tuple(module._forward_hooks), tuple(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }  # fmt: skip


class Stopped(Exception):
    """A forward that fails on purpose."""


def test_no_patched_forward_is_left_behind(llama):
    ids, plain = text(), forwards(llama)
    with loki_attn.attach(llama, ZIP) as attachment:
        attached = forwards(llama)
        shared = copy.copy(vars(attachment._shared))
        cache = read_prompt(attachment, ids)
        attachment.compress(cache, prompt(ids))
        assert forwards(llama) == attached
        assert vars(attachment._shared) == shared
    assert forwards(llama) == plain
    assert llama.config._attn_implementation != "loki_attn"


def test_a_pass_that_fails_leaves_cache_and_model_as_they_were(llama):
    ids, passes = text(), []

    def stop(module, args, output):
        passes.append(1)
        if len(passes) == 2:
            raise Stopped

    with loki_attn.attach(llama, ZIP) as attachment:
        cache = read_prompt(attachment, ids)
        before, shared = snapshot(cache), copy.copy(vars(attachment._shared))
        hook = llama.model.layers[0].register_forward_hook(stop)
        with pytest.raises(Stopped):
            attachment.compress(cache, prompt(ids))
        hook.remove()
        assert all(same(*pair) for pair in zip(before, snapshot(cache), strict=True))
        assert all(bool(torch.isinf(one).all()) for one in marks(cache))
        assert vars(attachment._shared) == shared
        attachment.compress(cache, prompt(ids))
        fresh = read_prompt(attachment, ids)
        attachment.compress(fresh, prompt(ids))
        assert positions(cache) == positions(fresh)


@pytest.mark.parametrize("mode", ["decode", "every_query"])
def test_neither_observers_nor_recordings_nor_modes_notice(llama, mode):
    ids, seen = text(), []
    with loki_attn.attach(llama, ZIP) as attachment:
        expected = read_prompt(attachment, ids)
        attachment.compress(expected, prompt(ids))
        cache = read_prompt(attachment, ids)
        attachment.observe(seen.append)
        attachment.mode = mode
        with attachment.recording():
            attachment.compress(cache, prompt(ids))
        assert attachment.mode == mode
        assert seen == []
        assert all(layer.asked is None for layer in cache.layers)
        assert positions(cache) == positions(expected)
        assert attachment.traffic.every_query_calls == 0


def test_a_share_of_one_is_the_dense_model(llama):
    ids = text()
    with loki_attn.attach(llama, "dense") as attachment:
        dense = read_on(llama, read_prompt(attachment, ids), text(6, seed=4))
    with loki_attn.attach(llama, ROOMY) as attachment:
        cache = read_prompt(attachment, ids)
        assert attachment.compress(cache, prompt(ids)) == 0
        torch.testing.assert_close(read_on(llama, cache, text(6, seed=4)), dense, **CLOSE)


@pytest.mark.parametrize("policy", [ZIP, EVEN], ids=["model-wide", "per head"])
def test_the_order_of_questions_does_not_matter(llama, policy):
    """What was kept does not know what will be asked, and no question drops more of it."""
    ids, asked = text(), [text(7, seed=5), text(9, seed=6)]
    answers = []
    with loki_attn.attach(llama, policy) as attachment:
        for order in ((0, 1), (1, 0)):
            cache = read_prompt(attachment, ids)
            attachment.compress(cache, prompt(ids))
            kept, found = positions(cache), {}
            for question in order:
                own = copy.deepcopy(cache)
                found[question] = read_on(llama, own, asked[question])
                read_on(llama, own, text(1))
                here = [[[p for p in head if p < LENGTH] for head in row[0]]
                        for row in positions(own)]  # fmt: skip
                assert here == [row[0] for row in kept]
            answers.append((kept, found))
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(answers[0][1][q], answers[1][1][q]) for q in (0, 1))


def test_a_row_of_a_batch_is_judged_as_alone(llama):
    ids = text(batch=2)
    with loki_attn.attach(llama, ZIP) as attachment:
        both = read_prompt(attachment, ids)
        attachment.compress(both, prompt(ids))
        alone = read_prompt(attachment, ids[1:])
        attachment.compress(alone, prompt(ids[1:]))
        logits = read_on(llama, both, text(3, batch=2)), read_on(llama, alone, text(3, batch=2)[1:])
    assert [row[1:] for row in positions(both)] == positions(alone)
    torch.testing.assert_close(logits[0][1:], logits[1], **CLOSE)


def test_two_prompts_in_a_row_are_two_fresh_ones(llama):
    found = []
    for seeds in ((3, 8), (8,)):
        with loki_attn.attach(llama, ZIP) as attachment:
            for seed in seeds:
                ids = text(seed=seed)
                cache = read_prompt(attachment, ids)
                attachment.compress(cache, prompt(ids))
        found.append(positions(cache))
    assert found[0] == found[1]


def test_loki_reads_what_is_left(llama):
    policy = preset(
        "loki", top_k=5, sinks=1, recents=2, min_k=1, rank=6,
        evict="kvzip", allocate="global_rows", keep_share=0.5, chunk=CHUNK, quote=QUOTE,
    )  # fmt: skip
    ids = text()
    with loki_attn.attach(llama, policy, basis=random_basis(llama)) as attachment:
        cache = read_prompt(attachment, ids)
        attachment.compress(cache, prompt(ids))
        assert bool(torch.isfinite(read_on(llama, cache, text(1))).all())
        assert attachment.traffic.sparse_calls > 0
        held = sum(len(head) for layer in positions(cache) for head in layer[0])
    assert held == 4 * (20 + 1)


def test_generate_alone_drops_nothing_and_says_so_once(llama):
    ids = text()
    settings = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    dense = llama.generate(ids, **settings)
    with loki_attn.attach(llama, ZIP) as attachment:
        with pytest.warns(UserWarning, match="second pass over the prompt, which generate does"):
            ours = llama.generate(ids, **settings)
        again = llama.generate(ids, **settings)
        assert attachment.traffic.evicted_rows == 0
    assert torch.equal(ours, dense)
    assert torch.equal(again, dense)


def test_generate_goes_on_from_a_compressed_prompt(llama):
    ids = text()
    with loki_attn.attach(llama, ZIP) as attachment:
        cache = read_prompt(attachment, ids[:, :-1])
        attachment.compress(cache, prompt(ids[:, :-1]))
        done = llama.generate(
            ids, past_key_values=cache, max_new_tokens=4, do_sample=False,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    assert done.shape[1] == LENGTH + 4
    assert cache.get_seq_length() == LENGTH + 3
    held = sum(len(head) for layer in positions(cache) for head in layer[0])
    assert held == 4 * (math.ceil(0.3 * (LENGTH - 1)) + 4)


def test_layers_that_keep_everything_are_not_judged(llama):
    policy = preset("kvzip", chunk=CHUNK, whole_layers=(0,))
    ids = text()
    with loki_attn.attach(llama, policy) as attachment:
        cache = read_prompt(attachment, ids)
        attachment.compress(cache, prompt(ids))
    assert positions(cache)[0] == [[list(range(LENGTH))] * 2]
    assert cache.layers[1].rows.longest < LENGTH


def test_a_tokenizer_spells_the_instruction_without_special_tokens():
    asked = []

    def spell(said, **settings):
        asked.append((said, settings))
        return SimpleNamespace(input_ids=ASKING)

    assert Prompt(ids=text(), tokenizer=spell).instruction == ASKING
    assert asked == [(INSTRUCTION, {"add_special_tokens": False})]


class TestWhatIsRefused:
    """Prompts that are not the cache's, and caches that were judged already."""

    @pytest.fixture
    def attachment(self, llama):
        with loki_attn.attach(llama, ZIP) as made:
            yield made

    def test_no_prompt(self, attachment):
        cache = read_prompt(attachment, text())
        with pytest.raises(InputError, match=r"was not told it; give compress\(cache, Prompt"):
            attachment.compress(cache)

    @pytest.mark.parametrize("length", [LENGTH - 1, LENGTH + 1])
    def test_another_prompt(self, attachment, length):
        cache = read_prompt(attachment, text())
        with pytest.raises(InputError, match=r"but the cache holds \[batch=1, tokens=40\]"):
            attachment.compress(cache, prompt(text(length)))

    @pytest.mark.parametrize("said", [{}, {"instruction_ids": []}])
    def test_no_instruction(self, attachment, said):
        cache = read_prompt(attachment, text())
        with pytest.raises(InputError, match="give the prompt's tokenizer, or instruction_ids"):
            attachment.compress(cache, Prompt(ids=text(), **said))

    def test_padding(self, attachment):
        ids, mask = text(batch=2), torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, :4] = 0
        cache = attachment.cache()
        with torch.no_grad():
            attachment.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(InputError, match="without padding; read and compress rows"):
            attachment.compress(cache, prompt(ids))

    def test_a_second_time(self, attachment):
        cache = read_prompt(attachment, text())
        attachment.compress(cache, prompt(text()))
        with pytest.raises(CacheError, match="of which nothing was evicted"):
            attachment.compress(cache, prompt(text()))

    def test_a_cache_of_the_stock_model(self, attachment):
        stock = copy.deepcopy(attachment.cache())
        stock.layers[:] = [object() for _ in stock.layers]
        with pytest.raises(CacheError, match="compress needs a cache"):
            attachment.compress(stock, prompt(text()))


class TestEvaluation:
    """`TransformersLM` remembers what a cache was filled with."""

    @pytest.fixture
    def lm(self, llama):
        with TransformersLM(llama, tokenizer) as made:
            yield made

    def test_a_fork_is_compressed_and_its_origin_is_not(self, lm):
        ids = text()
        with loki_attn.attach(build("Llama"), ZIP) as attachment:
            expected = read_prompt(attachment, ids)
            attachment.compress(expected, prompt(ids))
        contenders = [Contender(name="kvzip", policy=ZIP), Contender(name="even", policy=EVEN)]
        cache = read(lm, ids, contenders)
        for contender in contenders:
            with contending(lm, cache, contender) as own:
                logits = torch.cat(list(lm.extend(own, ids[:, :1])))
                assert bool(torch.isfinite(logits).all())
                assert lm.traffic.evicted_rows == 4 * (LENGTH - 12)
                assert lm.traffic.kept_bytes < lm.traffic.dense_bytes / 2
                if contender.name == "kvzip":
                    kept = [
                        [[p for p in head if p < LENGTH] for head in row[0]]
                        for row in positions(own)
                    ]
                    assert kept == [row[0] for row in positions(expected)]
        assert cache.layers[0].rows.longest == LENGTH

    def test_chunks_of_a_prefill_do_not_matter(self, lm):
        found = []
        for chunk_tokens in (None, 7):
            cache = lm.prefill(text(), record=True, chunk_tokens=chunk_tokens)
            with lm.using(ZIP):
                lm.compress(cache)
                found.append(positions(cache))
        assert found[0] == found[1]

    def test_a_cropped_prompt_is_what_is_left_of_it(self, lm):
        found = []
        for length in (LENGTH, LENGTH - 8):
            cache = lm.prefill(text()[:, :length], record=True)
            lm.crop(cache, length - (LENGTH - 8))
            with lm.using(ZIP):
                lm.compress(cache)
                found.append(positions(cache))
        assert found[0] == found[1]

    def test_tokens_that_came_later_are_not_of_the_prompt(self, lm):
        cache = lm.prefill(text(), record=True)
        list(lm.extend(cache, text(2)))
        with lm.using(ZIP), pytest.raises(InputError, match="tokens=42"):
            lm.compress(cache)

    def test_an_unrecorded_prompt_is_refused(self, lm):
        cache = lm.prefill(text())
        with lm.using(ZIP), pytest.raises(InputError, match="was not told it"):
            lm.compress(cache)

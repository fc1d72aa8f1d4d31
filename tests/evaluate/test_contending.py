"""Policies that evict, evaluated: what goes after the prompt, what is read one by one."""

import pytest
import torch

pytest.importorskip("transformers")

from scripted import END, ScriptedLM, contender, dense, recites
from tiny_models import prompts

from loki_attn.errors import LokiAttnError
from loki_attn.evaluate.answering import answer
from loki_attn.evaluate.contending import contending, read
from loki_attn.evaluate.perplexity import perplexity
from loki_attn.evaluate.protocol import Contender
from loki_attn.policy import preset

IDS = prompts(1, 400, seed=8)[0].tolist()
RUN = {"how": "decode", "windows": 2, "window_tokens": 12, "prefix_tokens": 40}
SNAP = Contender(name="snapkv", policy=preset("snapkv", capacity=12, window=4, name="snapkv"))


def test_a_share_of_one_is_dense(lm):
    whole = Contender(name="all", policy=preset("snapkv", keep_share=1.0, window=4))
    with pytest.raises(LokiAttnError, match="all never selected anything, nor evicted"):
        perplexity(lm, IDS, [whole], **RUN)


def test_what_is_kept_is_measured(lm):
    """12 of the 39 prefix rows stay, and the forced ones that come."""
    (row,) = perplexity(lm, IDS, [SNAP], **RUN)
    held, seen = sum(12 + i for i in range(1, 13)), sum(39 + i for i in range(1, 13))
    row_bytes, position = 2 * 16 * 4, 4
    assert row.metrics["kept_bytes_share"] == pytest.approx(
        held * (row_bytes + position) / (seen * row_bytes)
    )
    assert row.metrics["read_bytes_share"] == pytest.approx(held / seen)
    assert row.metrics["kl_to_dense"] > 1e-4
    assert row.metrics["held_bytes"] < 2 * 2 * 80 * (row_bytes + position)


def test_other_contenders_do_not_see_what_one_evicted(lm):
    plain = Contender(name="dense", policy=preset("dense"))
    found = perplexity(lm, IDS, [SNAP, plain], **RUN)
    assert found[1].metrics["kl_to_dense"] == pytest.approx(0, abs=1e-6)
    assert found[1].metrics["kept_bytes_share"] > 1  # positions are held as well


def test_a_fork_is_compressed_and_its_origin_is_not(lm):
    cache = read(lm, torch.tensor([IDS[:30]]), [SNAP])
    with contending(lm, cache, SNAP) as own:
        assert own.layers[0].rows.longest == 12
    assert cache.layers[0].rows.longest == 30


def test_queries_are_recorded_only_for_those_that_evict(lm):
    selecting = contender("exact")
    cache = read(lm, torch.tensor([IDS[:30]]), [selecting])
    assert all(layer.asked is None for layer in cache.layers)


class EvictingLM(ScriptedLM):
    """Notes what is compressed."""

    def compress(self, cache):
        self.reads.append("compress")
        return 1


def test_an_evicting_policy_reads_the_question_token_by_token():
    said = EvictingLM(lambda name, text: END if text.endswith("k") else "ok"[text.endswith("o")])
    one = preset("exact-topk", top_k=8, min_k=1, sinks=0, recents=0, evict="snapkv", capacity=40)
    context, asked = torch.tensor([[65, 66]]), torch.tensor([[67, 63]])
    found = Contender(name="snapkv", policy=one)
    assert answer(said, said.prefill(context), asked, found, max_new_tokens=9).text == "ok"
    assert said.reads[0] == "compress"
    assert [(r.mode, r.text) for r in said.reads[1:]] == [("decode", c) for c in "C?ok"]


def test_a_dense_policy_is_not_compressed():
    said = EvictingLM(recites({"dense": "ok"}))
    cache = said.prefill(torch.tensor([[65, 66]]))
    answer(said, cache, torch.tensor([[67, 63]]), dense(), max_new_tokens=9)
    assert "compress" not in said.reads

"""The engine on a real model: a tiny llama of 2 layers in float32 that reads characters."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import build, random_basis

from loki_attn import Budget, Policy
from loki_attn.evaluate.agreement import Agreement
from loki_attn.evaluate.asking import PROTOCOLS, Asking
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import measure
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.samples import Question, Sample
from loki_attn.integrations.transformers import TransformersLM
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.select.streaming_llm import StreamingLLM

LAYERS = 2
SELECTS = {
    "exact": ExactTopK(),
    "loki": Loki(rank=6),
    "rotated": Loki(rank=6, layout="rotated"),
    "streaming": StreamingLLM(),
}
TALE = "Cats eat fish, dogs chew bones; cows graze on the long green hills until night falls."
QUESTIONS = (
    Question(text=" Who grazes?", references=("cows",), max_new_tokens=7),
    Question(text=" What do dogs chew?", references=("bones",), max_new_tokens=5),
)
SAMPLES = tuple(
    Sample(name=f"tale {start}", context=TALE[start:], questions=QUESTIONS) for start in (0, 31)
)


class Characters:
    """A tokenizer of the 97 characters from the escape on; no token ends a text."""

    eos_token_id = None

    def __call__(self, text, **settings):
        return SimpleNamespace(input_ids=[ord(character) - 27 for character in text])

    def decode(self, ids):
        return "".join(chr(token + 27) for token in ids)


@pytest.fixture(scope="module")
def lm():
    with TransformersLM(build("Llama"), Characters()) as made:
        yield made


@pytest.fixture
def always(lm):
    """Steps that would read everything select as well."""
    lm._attachment.always_select = True
    yield lm
    lm._attachment.always_select = False


@pytest.fixture(scope="module")
def basis():
    return random_basis(build("Llama"))


def contenders(basis, **budget):
    chosen = Budget(**(budget or {"top_k": 6, "sinks": 1, "recents": 2}))
    return [
        Contender(
            name=name,
            policy=Policy(select=select, budget=chosen, name=name),
            basis=basis if isinstance(select, Loki) else None,
        )
        for name, select in SELECTS.items()
    ]


def share_of_letters(sample, question, text):
    """A score that tells answers apart."""
    return sum(character in TALE for character in text) / max(1, len(text))


def asking(seen="after"):
    return Asking(name="tales", about="tales", samples=SAMPLES, score=share_of_letters, seen=seen)


def agreement(lm):
    ids = tuple(lm.encode(TALE))
    return Agreement(ids=ids, prompts=2, prompt_tokens=40, new_tokens=9, corpus="tale")


def answers_of(lm, task, contenders):
    """What each contender says, by its name."""
    found = {contender.name: [] for contender in contenders}
    for item in task.items(lm):
        for contender, record in task.measure(lm, item, contenders, None):
            found[contender.name] += record.notes["answers"]
    return found


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_sparse_steps_are_layers_times_decoded_tokens(lm, basis, seen):
    """All tokens of an answer but the last, and the question's last where it is seen before."""
    rows = measure(asking(seen), lm, contenders(basis))
    steps = (6 + 4 if seen == "after" else 7 + 5) * len(SAMPLES)
    assert [row.contender for row in rows] == ["dense", *SELECTS]
    for row in rows[1:]:
        assert row.metrics["selecting_calls"] == LAYERS * steps, row.contender
        assert 0 < row.metrics["read_bytes_share"] < 0.8
        asked = LAYERS * len(QUESTIONS) * len(SAMPLES)
        assert row.metrics.get("every_query_calls", 0) == (asked if seen == "after" else 0)
        assert row.model["dtype"] == "float32"
    assert (rows[0].metrics["selecting_calls"], rows[0].metrics["read_bytes_share"]) == (0, 1.0)
    shares = {row.contender: row.metrics["read_bytes_share"] for row in rows}
    assert shares["streaming"] < shares["loki"] < shares["exact"]


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_at_full_budget_every_policy_says_what_dense_says(always, basis, seen):
    """Really selecting, in questions and answers; with few rows they say something else."""
    dense = Contender(name="dense", policy=preset("dense"))
    wanted = answers_of(always, asking(seen), [dense])["dense"]
    assert len(set(wanted)) > 1
    full = contenders(basis, fraction=1.0)
    assert answers_of(always, asking(seen), full) == dict.fromkeys(SELECTS, wanted)
    few = answers_of(always, asking(seen), contenders(basis))
    assert all(said != wanted for said in few.values())


def test_at_full_budget_continuations_are_identical(always, basis):
    rows = measure(agreement(always), always, contenders(basis, fraction=1.0))
    for row in rows:
        assert (row.metrics["identical"], row.metrics["shared_tokens"]) == (1.0, 9.0)
    for row in rows[1:]:
        assert row.metrics["selecting_calls"] == LAYERS * 9 * 2
    few = measure(agreement(always), always, contenders(basis))[1:]
    assert all(row.metrics["shared_share"] < 1 for row in few)
    assert all(row.metrics["selecting_calls"] == LAYERS * 9 * 2 for row in few)


def test_the_answer_that_is_decoded_is_the_answer_that_is_read_at_once(lm, basis):
    """Every token selects alike, alone or in a longer step: teacher-forced, all are repeated."""
    (sample, *_), question = SAMPLES, QUESTIONS[0]
    for contender in contenders(basis):
        task = Asking(name="t", about="t", samples=(sample,), score=share_of_letters)
        said = answers_of(lm, task, [contender])[contender.name][0]
        cache = lm.prefill(torch.tensor([lm.encode(sample.context)]))
        asked = lm.encode(question.text)
        with lm.using(contender.policy, contender.basis, "every_query"):
            ids = torch.tensor([asked + lm.encode(said)])
            logits = torch.cat(list(lm.extend(cache, ids)))
        again = logits[len(asked) - 1 : -1].argmax(-1).tolist()
        assert lm.decode(again) == said, contender.name


@pytest.mark.parametrize("make", [lambda lm: asking(), agreement], ids=["asking", "agreement"])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(lm, basis, tmp_path, make):
    """Killed after the third and the sixth of 8 measurements."""
    task, file, news = make(lm), tmp_path / "journal.jsonl", []
    chosen = contenders(basis)[:3]
    whole = measure(task, lm, chosen)

    def kill(done, total, text):
        news.append((done, total))
        if done in (3, 6):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure(task, lm, chosen, journal=Journal(file), progress=kill)
    resumed = measure(task, lm, chosen, journal=Journal(file), progress=kill)
    assert news == [(done, 8) for done in range(1, 9)]
    assert [row.contender for row in resumed] == [row.contender for row in whole]
    assert [row.metrics for row in resumed] == [row.metrics for row in whole]
    assert [row.n for row in resumed] == [row.n for row in whole]


def test_contenders_do_not_touch_each_other(lm, basis):
    """Alone, beside others and in another order, each says the same."""
    chosen = contenders(basis)
    together = answers_of(lm, asking(), chosen)
    assert answers_of(lm, asking(), chosen[::-1]) == together
    alone = answers_of(lm, asking(), chosen[1:2])
    assert alone["loki"] == together["loki"]

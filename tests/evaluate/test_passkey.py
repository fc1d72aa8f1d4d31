"""Passkey: prompts as promised, and scores of models whose knowledge is known."""

import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from loki_attn import Budget, Policy
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.passkey import make_trial, passkey
from loki_attn.evaluate.protocol import Contender
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK

HAYSTACK = "".join(f"Line {i} of a tale that goes on. " for i in range(200))
QUESTION = "\n\nQuestion: what is the pass key in the text above?\nAnswer: The pass key is"
LENGTH = 600


class Characters:
    """A language model of single characters that knows as much of the key as its policy's name.

    The name says how many of the answer's six characters (a space, five digits) it gets right.
    """

    context_tokens = 1000
    num_layers = 1
    identity = {"id": "characters"}  # noqa: RUF012 - a constant

    def __init__(self):
        self.traffic = SimpleNamespace(every_query_calls=0)
        self.knows, self.prompts = 0, {}

    def encode(self, text):
        return [ord(c) for c in text]

    @contextmanager
    def using(self, policy, basis=None, mode="decode"):
        assert mode == "every_query"
        self.name = policy.name
        self.knows = int(policy.name.partition(" ")[0])
        self.traffic.every_query_calls = 0
        yield
        self.knows = None

    def prefill(self, ids):
        return ids[0].tolist()

    def fork(self, cache):
        return list(cache)

    def extend(self, cache, ids):
        self.traffic.every_query_calls += "idle" not in self.name
        asked = ids[0].tolist()
        self.prompts.setdefault(self.name, []).append((list(cache), asked))
        text, place = text_of(cache), len(QUESTION) - 1
        key = text[text.index("The pass key is ") + 16 :][:5]
        logits = torch.zeros(len(asked), 128)
        for step, character in enumerate(f" {key}"[: self.knows]):
            logits[place + step, ord(character)] = 1.0
        cache += asked
        yield from logits.split(50)


def text_of(tokens):
    return "".join(map(chr, tokens))


def contender(name):
    policy = Policy(select=ExactTopK(), budget=Budget(top_k=8), name=name)
    return Contender(name=name, policy=policy)


def trial_texts(seed, length=LENGTH, lm=None):
    lm = lm or Characters()
    trial = make_trial(lm, lm.encode(HAYSTACK), length, random.Random(seed))
    return [text_of(part[0].tolist()) for part in (trial.context, trial.question, trial.answer)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [400, 601])
def test_a_trial(seed, length):
    """The needle stands once in an unbroken stretch of the haystack; the question comes last."""
    context, question, answer = trial_texts(seed, length)
    key = answer[1:]
    needle = f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
    assert len(context + question + answer) == length
    assert (question, answer[0]) == (QUESTION, " ")
    assert 10_000 <= int(key) < 100_000
    assert context.count(needle) == 1
    assert context.count(key) == 2
    before, after = context.split(needle)
    introduction, _, before = before.partition("\n\n")
    assert introduction.startswith("A pass key is hidden in the long text below.")
    assert before + after in HAYSTACK
    assert "Question" not in context


def test_trials_are_drawn_by_the_seed():
    assert trial_texts(3) == trial_texts(3)
    assert len({tuple(trial_texts(seed)) for seed in range(20)}) == 20
    depths = [trial_texts(seed)[0].index("The pass key is") for seed in range(60)]
    first, last = 130, LENGTH - len(QUESTION) - 65
    assert min(depths) < first + 0.2 * (last - first)
    assert max(depths) > first + 0.8 * (last - first)


def test_a_tokenizer_that_joins_the_question_to_the_key():
    class Joining(Characters):
        def encode(self, text):
            tokens, joint = super().encode(text), text.find(" is 1")
            found = text.startswith(QUESTION) and joint >= 0
            return [*tokens[:joint], 127, *tokens[joint + 5 :]] if found else tokens

    texts = [trial_texts(seed, lm=Joining()) for seed in range(60)]
    joined = [(question, answer) for _, question, answer in texts if "\x7f" in answer]
    assert joined
    for question, answer in joined:
        assert (question + answer).replace("\x7f", " is 1")[: len(QUESTION) + 1] == QUESTION + " "
        assert len(answer) == 5  # the joint and four digits


def test_scores_are_what_the_model_knows():
    lm, names = Characters(), ["6 all", "0 nothing", "4 some", "5 all but one"]
    rows = passkey(
        lm, HAYSTACK, [contender(n) for n in names], length_tokens=LENGTH, trials=3, corpus="tale"
    )
    assert [row.contender for row in rows] == names
    assert [row.metrics["accuracy"] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    shares = [row.metrics["token_accuracy"] for row in rows]
    assert shares == pytest.approx([1.0, 0.0, 4 / 6, 5 / 6])
    for row in rows:
        assert (row.task, row.n, row.model) == ("passkey", 3, {"id": "characters"})
        assert row.settings == {
            "corpus": "tale",
            "length_tokens": LENGTH,
            "trials": 3,
            "seed": 0,
        }


def test_all_contenders_see_the_same_prompts():
    lm = Characters()
    passkey(lm, HAYSTACK, [contender("6 a"), contender("0 b")], length_tokens=LENGTH, trials=4)
    assert lm.prompts["6 a"] == lm.prompts["0 b"]
    assert len({tuple(context) for context, _ in lm.prompts["6 a"]}) == 4


def test_the_seed_decides_the_prompts():
    def prompts(seed):
        lm = Characters()
        passkey(lm, HAYSTACK, [contender("6 a")], length_tokens=LENGTH, trials=2, seed=seed)
        return lm.prompts

    assert prompts(1) == prompts(1) != prompts(2)


def test_progress_tells_of_every_trial():
    news = []
    passkey(
        Characters(),
        HAYSTACK,
        [contender("6 a")],
        length_tokens=LENGTH,
        trials=2,
        progress=news.append,
    )
    assert news == ["600 tokens, trial 1/2: {'6 a': 1}", "600 tokens, trial 2/2: {'6 a': 2}"]


def test_a_policy_that_never_acts_is_refused_and_dense_is_not():
    lm = Characters()
    with pytest.raises(LokiAttnError, match="6 idle never selected anything: its budget covers"):
        passkey(lm, HAYSTACK, [contender("6 idle")], length_tokens=LENGTH, trials=1)
    dense = Contender(name="dense", policy=preset("dense", name="6 idle dense"))
    (row,) = passkey(lm, HAYSTACK, [dense], length_tokens=LENGTH, trials=1)
    assert row.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("haystack", "length", "message"),
    [
        (HAYSTACK[:300], LENGTH, "600 tokens needs a haystack of more than 3[0-9]+ tokens"),
        (HAYSTACK, 200, "200 tokens needs a haystack of more than 1 tokens and room for"),
        (HAYSTACK, 1001, "1001 tokens exceed the model's context of 1000"),
    ],
)
def test_refusals(haystack, length, message):
    with pytest.raises(InputError, match=message):
        passkey(Characters(), haystack, [contender("6 a")], length_tokens=length)


def test_two_contenders_of_one_name_are_refused():
    with pytest.raises(InputError, match="Contender '6 a' is given twice"):
        passkey(Characters(), HAYSTACK, [contender("6 a")] * 2, length_tokens=LENGTH)

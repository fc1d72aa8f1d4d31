"""Answering: where an answer ends, by which mode each token is read, and what was counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import END, LAYERS, ROW_BYTES, Cache, Read, ScriptedLM, contender, recites

from loki_attn.evaluate.answering import answer

LONG = "the first line\nthe second line\n"
CONTEXT = "A tale that is longer than the budget."


def asked(script, question="Who?", name="exact", **more):
    """The model after an answer, and the answer."""
    lm = ScriptedLM(recites({name: script}))
    cache = lm.fork(Cache(CONTEXT))
    ids = torch.tensor([lm.encode(question)])
    chosen = {"max_new_tokens": 50, **more}
    return lm, answer(lm, cache, ids, contender(name), **chosen)


def test_an_answer_is_what_the_model_says_until_it_ends():
    _, said = asked(LONG)
    assert said.text == LONG
    assert said.tokens == tuple(map(ord, LONG))


def test_an_end_token_ends_an_answer_and_is_no_part_of_it():
    _, said = asked("")
    assert (said.text, said.tokens) == ("", ())


@pytest.mark.parametrize(
    ("ends", "text"), [(".t", "one"), ("n.", "o"), ("wo", ""), ("z", "one.two")]
)
def test_any_of_the_end_tokens_ends_an_answer(ends, text):
    lm = ScriptedLM(recites({"exact": "one.two"}), end_tokens=frozenset({END, *map(ord, ends)}))
    ids = torch.tensor([lm.encode("Who?")])
    said = answer(lm, lm.fork(Cache(CONTEXT)), ids, contender(), max_new_tokens=9)
    assert (said.text, len(said.tokens)) == (text, len(text))


@pytest.mark.parametrize("count", [1, 2, 14, 30, 31])
def test_an_answer_has_at_most_so_many_tokens(count):
    lm, said = asked(LONG, max_new_tokens=count)
    assert said.text == LONG[:count]
    assert len(said.tokens) == count
    assert len(lm.reads) == count  # the question, and every token but the last


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("\n",), "the first line", 15),
        (("second", "\n"), "the first line", 15),
        (("\nthe second",), "the first line", 25),
        (("nowhere",), LONG, 31),
        (("the",), "", 3),
        (("line\nthe", "ne\n"), "the first li", 15),
        (("first line\n", "st line\n"), "the ", 15),
    ],
)
def test_the_first_stop_string_ends_an_answer_and_is_cut_off(stop, text, tokens):
    """Of several that end in one token, the one that begins first."""
    lm, said = asked(LONG, stop=stop)
    assert said.text == text
    assert said.tokens == tuple(map(ord, LONG[:tokens]))
    assert "".join(read.text for read in lm.reads[1:]) in (LONG[: tokens - 1], LONG)


def test_a_text_that_is_enough_ends_an_answer():
    _, said = asked(LONG, enough=lambda text: "first" in text)
    assert said.text == "the first"


def test_what_is_asked_to_be_enough_is_the_text_without_the_stop_string():
    seen = []
    asked("a\nb", stop=("\n",), enough=lambda text: bool(seen.append(text)))
    assert seen == ["a"]


def test_a_question_selects_for_every_token_and_the_answer_is_decoded():
    lm, said = asked("Me")
    assert lm.reads == [
        Read("exact", "every_query", CONTEXT, "Who?"),
        Read("exact", "decode", CONTEXT + "Who?", "M"),
        Read("exact", "decode", CONTEXT + "Who?M", "e"),
    ]
    assert said.every_query_calls == LAYERS
    assert said.decode_calls == 2 * LAYERS
    held = len(CONTEXT) + 4
    assert said.dense_bytes == ROW_BYTES * (held + 1 + held + 2)
    assert said.read_bytes == ROW_BYTES * 2 * 8


def test_a_question_of_one_token_goes_through_the_decode_path():
    _, said = asked("Me", question="?")
    assert said.every_query_calls == 0
    assert said.decode_calls == 3 * LAYERS


def test_a_policy_ends_with_its_answer():
    lm, _ = asked("Me")
    assert (lm.policy, lm.mode) == ("dense", "decode")

    class Cut(ScriptedLM):
        def decode(self, ids):
            raise KeyboardInterrupt

    lm = Cut(recites({"exact": "Me"}))
    with pytest.raises(KeyboardInterrupt):
        answer(lm, Cache(CONTEXT, True), torch.tensor([[63]]), contender(), max_new_tokens=3)
    assert (lm.policy, lm.mode) == ("dense", "decode")


def test_counts_begin_anew_with_every_answer():
    lm = ScriptedLM(recites({"exact": "Me"}))
    ids = torch.tensor([lm.encode("Who?")])
    counts = [
        answer(lm, lm.fork(Cache(CONTEXT)), ids, contender(), max_new_tokens=9).decode_calls
        for _ in range(3)
    ]
    assert counts == [2 * LAYERS] * 3


@given(
    script=st.text(st.sampled_from("abc\n"), max_size=12),
    stop=st.lists(st.text(st.sampled_from("abc\n"), min_size=1, max_size=3), max_size=3),
    count=st.integers(1, 14),
)
def test_a_text_is_a_prefix_without_any_stop_string(script, stop, count):
    _, said = asked(script, stop=tuple(stop), max_new_tokens=count)
    whole = "".join(map(chr, said.tokens))
    assert script.startswith(whole)
    assert len(whole) <= count
    assert whole.startswith(said.text)
    assert not any(s in said.text for s in stop)
    if said.text != whole:
        assert any(whole.endswith(s) for s in stop)
    elif len(whole) < min(count, len(script)):
        pytest.fail(f"it ended too early: {whole!r} of {script!r}")
    assert END not in said.tokens

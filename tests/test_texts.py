"""Packaged texts, the user's files, and quizzes."""

import re

import pytest

from loki_attn import texts
from loki_attn.errors import InputError, UnknownNameError


def count_words(text):
    return len(text.split())


@pytest.mark.parametrize(
    ("name", "least_chars"),
    [("calibration", 250_000), ("continuation", 100_000), ("question", 1000)],
)
def test_packaged_texts(name, least_chars):
    text = texts.load(name)
    assert name in texts.names()
    assert len(text) >= least_chars
    assert "gutenberg" not in text.lower()
    assert "\r" not in text
    assert not re.search(r"\n{4,}", text)


def test_calibration_and_continuation_share_no_text():
    known = set(texts.load("calibration").split("\n\n"))
    shared = {p for p in texts.load("continuation").split("\n\n") if p in known}
    assert all(len(paragraph) < 40 for paragraph in shared)


def test_unknown_text_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"calibraton.*calibration"):
        texts.load("calibraton")


def test_read_file(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\n")
    assert texts.read_file(path) == "naïve\n"
    assert texts.read_file(str(path)) == "naïve\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No text file at .*one\.txt.*give the path of a UTF-8 text file"),
        (b"", r"one\.txt.* is empty; expected some text"),
        (b" \n\t\n", r"is empty"),
        (b"caf\xe9 au lait", r"not UTF-8 \(byte 0xe9 at offset 3\); convert it .*iconv"),
        ("wide".encode("utf-16"), r"not UTF-8 \(byte 0xff at offset 0\)"),
    ],
    ids=["missing", "empty", "blank", "latin-1", "utf-16"],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "one.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts.read_file(path)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputError, match="is a folder; expected one UTF-8 text file"):
        texts.read_file(tmp_path)


def test_digest_is_that_of_the_bytes():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert texts.digest("") == empty
    assert texts.digest("naïve") != texts.digest("naive")


def test_quiz_contains_its_answer_and_asks_for_it():
    quiz = texts.quiz()
    assert quiz.keyword in quiz.text
    assert quiz.keyword not in quiz.question
    assert quiz.question in quiz.prompt
    assert quiz.answered_by("A silver WHISTLE.")
    assert not quiz.answered_by("A silver coin.")


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_tokens", [400, 5000, 60_000])
def test_passkey_fills_the_prompt(max_tokens, depth):
    quiz = texts.passkey(max_tokens, count_words, depth=depth, seed=3)
    assert max_tokens - 400 < count_words(quiz.prompt) <= max_tokens
    assert quiz.prompt.count(quiz.keyword) == 2
    assert quiz == texts.passkey(max_tokens, count_words, depth=depth, seed=3)
    place = quiz.text.index(quiz.keyword) / len(quiz.text)
    assert place == pytest.approx(depth, abs=0.35 if max_tokens == 400 else 0.05)


def test_passkeys_differ_by_seed():
    keys = {texts.passkey(400, count_words, seed=seed).keyword for seed in range(20)}
    assert len(keys) == 20


def test_passkey_refuses_what_cannot_be():
    with pytest.raises(InputError, match=r"depth is 1\.5; expected a share"):
        texts.passkey(1000, count_words, depth=1.5)
    with pytest.raises(InputError, match="does not fit into 20 tokens"):
        texts.passkey(20, count_words)

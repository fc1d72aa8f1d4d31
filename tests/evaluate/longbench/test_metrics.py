"""Expected numbers are those of the published evaluation (THUDM/LongBench) on these texts."""
# ruff: noqa: RUF001 - Chinese texts have Chinese punctuation

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.evaluate.longbench import metrics, words

SYMMETRIC = (metrics.qa_f1, metrics.qa_f1_zh)
PAIRS = (
    *SYMMETRIC,
    metrics.rouge_l,
    metrics.rouge_l_zh,
    metrics.count,
    metrics.code_similarity,
    metrics.choice,
)
TEXTS = st.text(alphabet="ab the.,#/`\n 71海灯。，Paragraph段落", max_size=40)
CLASSES = ("Number", "Number of years", "Date", "Place")


@pytest.fixture(autouse=True)
def _characters(monkeypatch):
    """Chinese falls apart into characters here, whatever is installed."""
    monkeypatch.setattr(words, "segmenter", lambda: "characters")


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The lighthouse keeper was Ellen Marsh.", "Ellen Marsh", 0.5714285714285715),
        ("a fox, an owl", "the owl and the fox", 0.8),
        ("blue-green", "blue green", 0),
        ("", "Ellen", 0),
        ("ELLEN", "ellen!", 1),
        ("yes yes no", "yes no no", 0.6666666666666666),
        ("the", "a", 0),
    ],
)
def test_qa_f1(text, reference, expected):
    assert metrics.qa_f1(text, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Words of common subsequences are united over all pairs of sentences, and count once.
        (
            "The ship left at dawn. It carried salt.",
            "The ship carried salt. It left at dawn.",
            0.999999995,
        ),
        ("rain fell on the hill", "rain fell on the quiet hill at night", 0.7692307644970415),
        ("one two one two", "one two", 0.999999995),
        ("b a d c", "a b c d", 0.4999999950000001),
        ("x y z. q", "z y x. q", 0.4999999950000001),
        ("a. . b", "a. b", 0.7999999952000001),
        ("Salt", "salt", 0),
        ("...", "salt", 0),
        ("salt", "", 0),
    ],
)
def test_rouge_l(text, reference, expected):
    # The package adds 1e-8 to a denominator; we do not.
    assert metrics.rouge_l(text, reference) == pytest.approx(expected, abs=1e-8)


def test_rouge_l_of_sentences_that_would_exceed_a_stack():
    drawn = random.Random(0)
    ours, theirs = (" ".join(drawn.choices(letters, k=700)) for letters in ("abcdef", "abcdefg"))
    assert metrics.rouge_l(ours, theirs) == pytest.approx(12 / 13)


@pytest.mark.parametrize(
    ("text", "reference", "f1", "rouge"),
    [
        ("灯塔在北边。", "灯塔在北边", 1, 0.9090909041322315),
        ("他住在北京大学旁边", "北京大学", 0.6153846153846153, 0.6153846111242604),
        # The opening mark is not among those that are dropped; the closing one is.
        ("《灯塔》，ABC", "灯塔abc", 0.8571428571428571, 0.44444444000000005),
        ("南", "北", 0, 0),
    ],
)
def test_chinese_by_characters(text, reference, f1, rouge):
    assert metrics.qa_f1_zh(text, reference) == pytest.approx(f1, abs=1e-12)
    assert metrics.rouge_l_zh(text, reference) == pytest.approx(rouge, abs=1e-8)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("Date", "Date", 1),
        ("Date or Place", "Place", 1 / 2),
        ("Number of years", "Number of years", 1),
        ("Number of years, Date", "Number", 1 / 3),
        ("none of them", "Date", 0),
    ],
)
def test_classification(text, reference, expected):
    assert metrics.classification(text, reference, CLASSES) == pytest.approx(expected)


def test_classification_passes_over_the_class_after_a_dropped_one():
    right = "Number of Years"
    assert metrics.classification(right, right, ("Years", "Number", right)) == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Paragraph 7", 1), ("7 or 8", 1 / 2), ("seventeen: 17", 0), ("no idea", 0), ("7, 7", 1)],
)
def test_numbers(text, expected):
    assert metrics.retrieval(text, "Paragraph 7") == expected
    assert metrics.retrieval_zh(text, "段落7") == expected
    assert metrics.count(text, "7") == expected


def test_a_reference_without_a_paragraph_is_refused():
    with pytest.raises(InputError, match="Reference '7' names no paragraph; expected Paragraph"):
        metrics.retrieval("7", "7")


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("def area(w, h):", "def area(width, height):", 0.77),
        ("# sum\n\ntotal = a + b\nreturn", "total = a + c", 0),  # the empty line is the first
        ("```\nprint(x)", "print(x)", 1),
        ("\n\nprint(x)\nprint(y)", "print(x)", 1),
        ("", "x", 0),
        ("// c", "x", 0),
        ("abcd", "bcda", 0.75),
        ("x = [1, 2]", "y = (1, 2)", 0.7),
    ],
)
def test_code_similarity(text, reference, expected):
    assert metrics.code_similarity(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The correct answer is (B)", 1),
        ("I think so. **The correct answer is (B) the sea**.", 1),
        ("The correct answer is B.", 1),
        (
            "The correct answer is A. No: The correct answer is (B)",
            1,
        ),  # brackets are looked for first
        ("The correct answer is (A). The correct answer is (B)", 0),
        ("the correct answer is (B)", 0),
        ("B", 0),
        ("", 0),
    ],
)
def test_choice(text, expected):
    assert metrics.choice(text, "B") == expected


@pytest.mark.parametrize("metric", PAIRS, ids=lambda metric: metric.__name__)
@given(text=TEXTS, reference=TEXTS)
def test_scores_lie_between_0_and_1(metric, text, reference):
    assert 0 <= metric(text, reference) <= 1


@pytest.mark.parametrize("metric", SYMMETRIC, ids=lambda metric: metric.__name__)
@given(text=TEXTS, reference=TEXTS)
def test_f1_is_symmetric(metric, text, reference):
    assert metric(text, reference) == pytest.approx(metric(reference, text), abs=1e-12)


@given(text=st.text(alphabet="xyz .\n海灯", max_size=30).map(lambda text: f"x{text}"))
def test_a_text_is_most_like_itself(text):
    for metric in (*SYMMETRIC, metrics.rouge_l, metrics.rouge_l_zh):
        assert metric(text, text) == 1, metric
    line = metrics.first_line(text)
    assert metrics.code_similarity(line, line) == 1


@given(classes=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, unique=True))
def test_a_class_alone_scores_highest(classes):
    for name in classes:
        alone = metrics.classification(name, name, classes)
        assert alone > 0
        assert alone >= metrics.classification(" ".join(classes), name, classes)


def test_first_line():
    assert metrics.first_line("\n\nDate\nPlace") == "Date"
    assert metrics.first_line("") == ""

"""Tokenizers of three sorts, and a sample of a task for each of them."""

import pytest

from loki_attn import texts
from loki_attn.evaluate import ruler

LENGTHS = {"characters": 9001, "words": 1303, "pieces": 4099}


def byte_pairs():
    """A byte-level BPE trained on a little text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        [texts.load("calibration")[:20_000]],
        tokenizers.trainers.BpeTrainer(
            vocab_size=512,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return lambda text: made.encode(text).ids


@pytest.fixture(scope="session")
def encoders():
    """Ways to count tokens, by name."""
    return {
        "characters": lambda text: [ord(letter) for letter in text],
        "words": lambda text: [len(word) for word in text.split()],
        "pieces": byte_pairs(),
    }


@pytest.fixture(scope="session")
def haystack():
    return texts.load("continuation")


@pytest.fixture(scope="session")
def make(encoders, haystack):
    """Make samples of a task with one of the tokenizers."""

    def run(task, *, tokenizer="pieces", length_tokens=None, count=2, **options):
        return ruler.samples(
            task,
            length_tokens=length_tokens or LENGTHS[tokenizer],
            count=count,
            encode=encoders[tokenizer],
            **{"haystack": haystack, **options},
        )

    return run

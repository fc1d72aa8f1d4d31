"""A model that remembers: the same caches, read once."""

import pytest
import torch

from loki_attn.tune.remembering import remembering


class Counting:
    """Counts what is asked of it; a cache is the list of its tokens."""

    dtype = "float32"

    def __init__(self):
        self.read = []
        self.hashed = 0

    @property
    def identity(self):
        self.hashed += 1
        return {"id": "counting"}

    def prefill(self, ids, *, record=False):
        self.recorded = record
        self.read.append(ids[0].tolist())
        return self.read[-1]


@pytest.fixture
def made():
    lm = Counting()
    return lm, remembering(lm, 2)


def ids(*tokens):
    return torch.tensor([tokens])


def test_the_same_tokens_are_read_once(made):
    lm, fast = made
    first = fast.prefill(ids(1, 2, 3))
    assert fast.prefill(ids(1, 2, 3)) is first
    assert fast.prefill(ids(1, 2)) is not first
    assert lm.read == [[1, 2, 3], [1, 2]]


def test_a_prefix_with_its_queries_is_another_one(made):
    lm, fast = made
    plain = fast.prefill(ids(1, 2))
    recorded = fast.prefill(ids(1, 2), record=True)
    assert lm.recorded
    assert recorded is not plain
    assert fast.prefill(ids(1, 2)) is plain


def test_the_one_not_used_for_longest_is_forgotten(made):
    lm, fast = made
    for tokens in ((1,), (2,), (1,), (3,), (1,), (2,)):
        fast.prefill(ids(*tokens))
    assert lm.read == [[1], [2], [3], [2]]


def test_the_identity_is_worked_out_once_and_all_else_is_the_models(made):
    lm, fast = made
    assert fast.identity == fast.identity == {"id": "counting"}
    assert lm.hashed == 1
    assert fast.dtype == "float32"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing

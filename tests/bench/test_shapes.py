"""Shapes by name, shapes of one's own, and amounts as they are typed."""

import pytest

from loki_attn.bench.shapes import SHAPES, custom_shape, rows_wanted, shape_named
from loki_attn.errors import InputError


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-3.1-8b", (32, 8, 128)),
        ("llama-2-7b", (32, 32, 128)),
        ("qwen2.5-coder-1.5b", (12, 2, 128)),
        ("qwen2.5-coder-0.5b", (14, 2, 64)),
        ("smollm2-135m", (9, 3, 64)),
    ],
)
def test_named_shapes_are_those_of_the_models(name, sizes):
    shape = shape_named(name)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == sizes
    assert shape.layer().group * shape.num_kv_heads == shape.num_heads
    assert shape.layer().value_dim == shape.head_dim


def test_an_unknown_shape_names_the_valid_ones():
    with pytest.raises(InputError, match=r"Did you mean 'llama-3\.1-8b'") as refused:
        shape_named("llama-3.1")
    assert all(name in str(refused.value) for name in SHAPES)


def test_a_shape_of_ones_own_is_named_by_its_sizes():
    assert custom_shape(6, 2, 32).name == "6x2x32"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, None, 32), "needs all of --heads, --kv-heads and --head-dim"),
        ((6, 4, 32), "4 KV heads do not divide 6 heads"),
        ((6, 0, 32), "at least 1, got 6 heads, 0 KV heads"),
    ],
)
def test_shapes_that_cannot_be(sizes, message):
    with pytest.raises(InputError, match=message):
        custom_shape(*sizes)


@pytest.mark.parametrize(
    ("amount", "k"), [("1", 1), ("100", 100), (" 64 ", 64), ("T/8", 12), ("T/1", 100)]
)
def test_amounts(amount, k):
    assert rows_wanted(amount, 100) == k


@pytest.mark.parametrize("amount", ["0", "101", "T/0", "T/101", "8/T", "0.5", "-3", "", "many"])
def test_amounts_that_no_step_could_read(amount):
    with pytest.raises(InputError, match="k"):
        rows_wanted(amount, 100)

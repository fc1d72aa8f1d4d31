"""Windows of a text: whole, in order, without overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.evaluate.windows import cut, require_text


@given(count=st.integers(1, 6), size=st.integers(1, 9), more=st.integers(0, 9))
def test_windows_cover_the_beginning_of_the_text(count, size, more):
    ids = tuple(range(count * size + more))
    require_text(ids, count, size, "window")
    items = cut(ids, count, size, "window", {"queries": 3})
    assert sum((item.content["ids"] for item in items), ()) == ids[: count * size]
    assert {len(item.content["ids"]) for item in items} == {size}
    assert all(item.content["queries"] == 3 for item in items)
    assert [item.name for item in items] == [f"window {n}/{count}" for n in range(1, count + 1)]


def test_a_text_that_is_too_short():
    message = (
        "2 prompts of 5 tokens need 10 tokens, the text has 9; give more text, fewer or shorter "
        "prompts."
    )
    with pytest.raises(InputError, match=message):
        require_text(range(9), 2, 5, "prompt")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.evaluate.longbench import cut_middle


@given(n=st.integers(0, 30), limit=st.integers(1, 30))
def test_both_ends_stay_and_the_middle_goes(n, limit):
    ids = list(range(n))
    kept = cut_middle(ids, limit)
    assert len(kept) == min(n, limit)
    if n > limit:
        assert kept == ids[: limit // 2] + ids[-(limit - limit // 2) :]
    else:
        assert kept == ids


@pytest.mark.parametrize("limit", [0, -3])
def test_a_context_without_room_is_refused(limit):
    message = rf"No room for a context: {limit} tokens are left .* take a model with a longer"
    with pytest.raises(InputError, match=message):
        cut_middle([1, 2], limit)

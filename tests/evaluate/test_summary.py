"""Summary: observations in groups, differences in pairs, traffic in sums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.evaluate.summary import flatten, notes_of, spelt, summarise, traffic_of
from loki_attn.evaluate.task import Record
from loki_attn.statistics import Interval, mean_interval, paired_interval


def records(*values, metric="m"):
    return [Record(values={metric: own}) for own in values]


@pytest.mark.parametrize(
    ("block", "groups"),
    [
        (None, [0, 0, 0, 1, 2, 2, 2, 2, 2]),
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (2, [0, 0, 1, 2, 3, 3, 4, 4, 5]),
        (3, [0, 0, 0, 1, 2, 2, 2, 3, 3]),
        (9, [0, 0, 0, 1, 2, 2, 2, 2, 2]),
    ],
)
def test_groups_never_span_two_items(block, groups):
    made = records([1, 2, 3], [4], [5, 6, 7, 8, 9])
    assert flatten(made, "m", block) == ([1.0, 2, 3, 4, 5, 6, 7, 8, 9], groups)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    block=st.none() | st.integers(1, 25),
)
def test_groups_are_as_large_as_they_may_be(sizes, block):
    values, groups = flatten(records(*([0.0] * size for size in sizes)), "m", block)
    assert len(values) == len(groups) == sum(sizes)
    assert groups == sorted(groups)
    assert set(groups) == set(range(groups[-1] + 1))
    assert groups[-1] + 1 == sum(-(-size // (block or size)) for size in sizes)
    assert max(groups.count(group) for group in groups) <= (block or max(sizes))


def test_an_item_without_observations_makes_no_group():
    assert flatten(records([], [1.0], [], [2.0, 3.0]), "m", None) == ([1.0, 2.0, 3.0], [0, 1, 1])


def test_every_metric_has_its_interval_and_its_difference_to_dense():
    ours = [Record(values={"a": [0.1, 0.4], "b": [1]}), Record(values={"a": [0.9], "b": [0]})]
    dense = [Record(values={"a": [0.3, 0.3], "b": [1]}), Record(values={"a": [0.5], "b": [1]})]
    found = summarise(ours, dense, what="pairs")
    own, other, groups = [0.1, 0.4, 0.9], [0.3, 0.3, 0.5], [0, 0, 1]
    assert found.pop("intervals").count("resamples of pairs, seed 0") == 1
    assert found == {
        **spelt("a", mean_interval(own, groups)),
        **spelt("a_delta", paired_interval(own, other, groups)),
        **spelt("b", mean_interval([1, 0])),
        **spelt("b_delta", paired_interval([1, 0], [1, 1])),
    }
    assert set(summarise(ours, None)) == {
        *(f"{metric}{end}" for metric in "ab" for end in ("", "_low", "_high")),
        "intervals",
    }


def test_records_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match="in pairs, got 3 and 2"):
        summarise(records([1, 0], [0.5]), records([1], [0.5]))


def test_an_interval_is_spelt_by_its_ends():
    interval = Interval(0.5, 0.25, 0.75, "bootstrap")
    assert spelt("score", interval) == {"score": 0.5, "score_low": 0.25, "score_high": 0.75}


def test_traffic_is_summed_before_it_is_divided():
    made = [
        Record(values={}, decode_calls=3, read_bytes=10, dense_bytes=20),
        Record(values={}, decode_calls=4, read_bytes=10, dense_bytes=80),
    ]
    assert traffic_of(made) == {"selecting_calls": 7, "read_bytes_share": 0.2}
    assert traffic_of(iter(made)) == traffic_of(made)
    longer = [Record(values={}, every_query_calls=2)] * 2
    assert traffic_of(longer) == {"selecting_calls": 0, "every_query_calls": 4}


def test_notes_of_those_that_have_them():
    made = [
        Record(values={}, notes={"a": [1]}),
        Record(values={}),
        Record(values={}, notes={"a": 2}),
    ]
    assert notes_of(made, "a") == [[1], 2]
    assert notes_of(made, "b") == []

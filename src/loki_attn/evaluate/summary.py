"""Summary: from observations to means with intervals, beside dense attention on the same items."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loki_attn.evaluate.task import Record
from loki_attn.statistics import Interval, mean_interval, paired_interval

METHOD: Final = (
    "95 %: Wilson's score interval for yes or no, else a percentile bootstrap of 2,000 resamples "
    "of {what}, seed 0; differences to dense are paired"
)


def summarise(
    records: Sequence[Record],
    dense: Sequence[Record] | None,
    *,
    block: int | None = None,
    what: str = "items",
) -> dict[str, Any]:
    """Return every metric's mean and interval, and its paired difference to dense.

    Args:
        records: One per item.
        dense: Dense attention's, item by item; None compares with nothing.
        block: Observations of an item that are drawn together; None for all of them.
        what: What is drawn, in words.

    Returns:
        `m`, `m_low`, `m_high` and `m_delta`, `m_delta_low`, `m_delta_high` for each metric m, and
        under "intervals" how they were made.
    """
    found: dict[str, Any] = {}
    for metric in records[0].values:
        own, groups = flatten(records, metric, block)
        found |= spelt(metric, mean_interval(own, groups))
        if dense is not None:
            other, _ = flatten(dense, metric, block)
            found |= spelt(f"{metric}_delta", paired_interval(own, other, groups))
    return {**found, "intervals": METHOD.format(what=what)}


def spelt(name: str, interval: Interval) -> dict[str, float]:
    """A mean and its ends under their names in a row."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def flatten(
    records: Iterable[Record], metric: str, block: int | None
) -> tuple[list[float], list[int]]:
    """All observations of a metric, and the number of the group that each belongs to."""
    values: list[float] = []
    groups: list[int] = []
    group = -1
    for record in records:
        for index, value in enumerate(record.values[metric]):
            group += index % (block or len(record.values[metric])) == 0
            values.append(float(value))
            groups.append(group)
    return values, groups


def traffic_of(records: Iterable[Record]) -> dict[str, Any]:
    """Selecting calls, and shares of the bytes of all tokens' rows: read by decoding, and held."""
    kept = list(records)
    found: dict[str, Any] = {"selecting_calls": sum(r.decode_calls for r in kept)}
    if queries := sum(r.every_query_calls for r in kept):
        found["every_query_calls"] = queries
    if whole := sum(r.dense_bytes for r in kept):
        found["read_bytes_share"] = sum(r.read_bytes for r in kept) / whole
        if held := sum(r.kept_bytes for r in kept):
            found["kept_bytes_share"] = held / whole
    return found


def notes_of(records: Iterable[Record], name: str) -> list[Mapping[str, Any]]:
    """One note of every record that has it."""
    return [record.notes[name] for record in records if name in record.notes]

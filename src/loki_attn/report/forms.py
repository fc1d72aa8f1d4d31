"""Forms of rows: those of the bench and of lm-eval are brought into that of all others."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

_Row = Mapping[str, Any]

_TASK: Final = "bench "
_HARNESS: Final = "lm-eval"
_SETTINGS: Final = ("context", "batch", "dtype", "threads", "k", "plane", "part", "kind")
_METRICS: Final = (
    "median_us",
    "p20_us",
    "p80_us",
    "gb_per_s",
    "share_of_bandwidth",
    "ratio_best_torch",
    "ratio_dense_native",
    "prefill_s",
    "tokens_per_s",
    "ratio_stock_dynamic",
    "peak_added_bytes",
    "sparse_calls",
)
_PROTOCOLS: Final = {
    "bench decode": "one token through the attention of one layer, on cold caches, contenders in "
    "turns, after a check that all of them agree; the median, and the 20th and 80th percentile",
    "bench generate": "a whole model generates, contenders in turns; the median time of a token, "
    "and the 20th and 80th percentile",
}


def unify(rows: Iterable[Any]) -> list[Any]:
    """Give flat rows of the bench the fields that all other rows have, and lm-eval's one task.

    Args:
        rows: Rows of any kind.

    Returns:
        Rows in their order; those of the bench name their shape as the model, those of
        "lm-eval:piqa" are of task "lm-eval" and sub-task "piqa"; others are untouched.
    """
    return [_unified(row) for row in rows]


def is_bench(row: object) -> bool:
    """Whether a row was timed by the bench."""
    return isinstance(row, Mapping) and str(row.get("task", "")).startswith(_TASK)


def _unified(row: Any) -> Any:
    if is_bench(row) and "metrics" not in row:
        return _timed(row)
    # A row that is no object is refused later, by its number.
    task = str(row.get("task", "")) if isinstance(row, Mapping) else ""
    kind, colon, subtask = task.partition(":")
    if kind == _HARNESS and colon and isinstance(row.get("settings"), Mapping):
        return {**row, "task": kind, "settings": {"subtask": subtask, **row["settings"]}}
    return row


def _timed(row: _Row) -> _Row:
    task = str(row["task"])
    settings = {name: row[name] for name in _SETTINGS if row.get(name) is not None}
    # What says nothing of a row says nothing of its neighbours either: None would be a column.
    metrics = {name: row[name] for name in _METRICS if row.get(name) is not None}
    return {
        "task": task,
        "protocol": _PROTOCOLS.get(task, "as the bench says"),
        "model": {"id": str(row.get("shape", "unnamed"))},
        "contender": row.get("contender"),
        "policy": {},
        "basis": None,
        "settings": settings,
        "metrics": metrics,
        "n": row.get("samples", 1),
        "provenance": row.get("provenance"),
    }

"""Measuring: a task's items, every contender on each, rows at the end."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.journal import Journal, keys_of
from loki_attn.evaluate.protocol import Contender, LanguageModel, check_names
from loki_attn.evaluate.results import Row, make_row
from loki_attn.evaluate.task import Item, Record, Task
from loki_attn.policy import preset

Progress = Callable[[int, int, str], None]
"""Called with the measurements done, those to do in all, and a line of news."""


def measure(
    task: Task,
    lm: LanguageModel,
    contenders: Sequence[Contender],
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
    refused: Callable[[LokiAttnError], None] | None = None,
) -> list[Row]:
    """Measure contenders on a task.

    Args:
        task: The task.
        lm: The model.
        contenders: What to compare. Where the task compares with dense attention and none of them
            is dense, dense is added, as the first.
        journal: Holds what is measured already, and keeps the rest; None keeps nothing.
        progress: Called after every measurement.
        refused: Called, if given, instead of raising, for a contender that has no row because it
            never selected.

    Returns:
        One row per contender and combination of the task's row labels.

    Raises:
        InputError: If two contenders have the same name, or the task has no items.
        LokiAttnError: If a contender never selected anything: its figure would be dense's.
    """
    everyone = _with_dense(contenders) if task.needs_dense else tuple(contenders)
    check_names(everyone)
    items = task.items(lm)
    if not items or not everyone:
        raise InputError(f"Nothing to measure: {len(items)} items, {len(everyone)} contenders.")
    book = _Book(task, lm, items, everyone, journal or Journal(), progress)
    for item in items:
        book.fill(item)
    rows = []
    for contender in everyone:
        for group in _groups(task, items):
            try:
                rows.append(book.row(contender, group))
            except LokiAttnError as error:
                if refused is None:
                    raise
                refused(error)
    return rows


def total_of(task: Task, lm: LanguageModel, contenders: Sequence[Contender]) -> int:
    """How many measurements a task takes."""
    everyone = _with_dense(contenders) if task.needs_dense else contenders
    return len(task.items(lm)) * len(everyone)


class _Book:
    """The records of one run."""

    def __init__(
        self,
        task: Task,
        lm: LanguageModel,
        items: Sequence[Item],
        contenders: Sequence[Contender],
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self._task, self._lm, self._journal, self._progress = task, lm, journal, progress
        self._contenders = contenders
        self._dense = next((c for c in contenders if is_dense(c)), None)
        model = {**lm.identity, "dtype": lm.dtype}
        self._keys = keys_of(task, model, items, contenders)
        if len(self._keys) != len(items) * len(contenders):
            raise InputError("Two items have the same name; give each a name of its own.")
        self._done = sum(self._journal.find(key) is not None for key in self._keys.values())

    def record(self, item: Item, contender: Contender) -> Record | None:
        """What is known of a contender on an item."""
        return self._journal.find(self._keys[item.name, contender.name])

    def fill(self, item: Item) -> None:
        """Measure on an item what is not known yet; dense attention first."""
        missing = [c for c in self._contenders if self.record(item, c) is None]
        if not missing:
            return
        reference = self._dense if self._task.needs_dense else None
        missing.sort(key=lambda contender: contender != reference)
        known = None if reference is None else self.record(item, reference)
        for contender, record in self._task.measure(self._lm, item, missing, known):
            self._journal.keep(self._keys[item.name, contender.name], record)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, len(self._keys), f"{item.name}  {contender.name}")

    def row(self, contender: Contender, group: Sequence[Item]) -> Row:
        """The row of one contender on the items that belong together."""
        records = self._known(contender, group)
        self._require_acted(contender, records)
        dense = self._dense if self._task.needs_dense else None
        others = None if dense is None or dense == contender else self._known(dense, group)
        metrics = self._task.metrics(group, records, others)
        labels = {name: group[0].labels[name] for name in self._task.row_labels}
        return make_row(
            self._lm,
            contender,
            task=self._task.name,
            protocol=self._task.protocol,
            settings={**self._task.settings, **labels},
            metrics=metrics,
            n=sum(len(next(iter(record.values.values()))) for record in records),
        )

    def _known(self, contender: Contender, group: Sequence[Item]) -> list[Record]:
        found = [self.record(item, contender) for item in group]
        return [record for record in found if record is not None]

    def _require_acted(self, contender: Contender, records: Sequence[Record]) -> None:
        """Refuse figures of a policy that never acted where the task exercises it."""
        calls = sum(r.decode_calls for r in records)
        if not self._task.decodes:
            calls += sum(r.every_query_calls for r in records)
        calls += sum(r.evicted_rows for r in records)
        policy = contender.policy
        if calls == 0 and (policy.evicts or not policy.budget.reads_everything):
            raise LokiAttnError(
                f"{contender.name} never selected anything, nor evicted: its budget covers the "
                "whole context, or every answer ended at once, so its figures would be dense's. "
                "Lower the budget or dense_below, or lengthen the text."
            )


def is_dense(contender: Contender) -> bool:
    """Whether a contender is dense attention itself."""
    return contender.policy.is_dense


def _with_dense(contenders: Sequence[Contender]) -> tuple[Contender, ...]:
    if any(is_dense(contender) for contender in contenders):
        return tuple(contenders)
    return (Contender(name="dense", policy=preset("dense")), *contenders)


def _groups(task: Task, items: Sequence[Item]) -> list[list[Item]]:
    """Items by the labels that make a row, in order of arrival."""
    found: dict[str, list[Item]] = {}
    for item in items:
        key: Any = {name: item.labels[name] for name in task.row_labels}
        found.setdefault(json.dumps(key, sort_keys=True), []).append(item)
    return list(found.values())

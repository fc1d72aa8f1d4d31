"""The tidy table: one line per number, for a spreadsheet or a data frame."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loki_attn.errors import InputError
from loki_attn.report.files import write_whole
from loki_attn.report.forms import unify
from loki_attn.report.intervals import estimate, measured_names
from loki_attn.report.rows import Section, amounts, sections

_Row = Mapping[str, Any]

_FIRST: Final = ("task", "model", "contender")
_LAST: Final = ("metric", "value", "low", "high", "interval", "n")


def write_csv(rows: Iterable[_Row], out: Path) -> Path:
    """Write every measured number of the rows as a line of a comma-separated table.

    The columns are task, model, contender, the amounts of the budget and the settings of the runs,
    metric, value, low and high (95 %; empty where the row has no interval), how the interval came
    about, and n. Lists, such as ranks per head, are no numbers and are not in it.

    Args:
        rows: Rows as `loki_attn.evaluate.results` or the bench write them.
        out: The `.csv` file.

    Returns:
        The file.

    Raises:
        InputError: If there are no rows, a row lacks something, or the file cannot be written.
    """
    if out.suffix != ".csv":
        raise InputError(f"The table is a .csv file; got {str(out)!r}.")
    found = sections(unify(rows))
    kept = [row for section in found for row in section.rows]
    names = list(dict.fromkeys(name for row in kept for name in _conditions(row)))
    # A setting may bear the name of a column of ours.
    heads = [f"setting_{name}" if name in {*_FIRST, *_LAST} else name for name in names]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_FIRST, *heads, *_LAST])
    for section in found:
        for row in section.rows:
            writer.writerows(_lines(section, row, names))
    try:
        write_whole(out, buffer.getvalue().encode())
    except OSError as error:
        raise InputError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    return out


def _lines(section: Section, row: _Row, names: list[str]) -> Iterable[list[object]]:
    conditions = _conditions(row)
    where = [_cell(conditions.get(name)) for name in names]
    for metric in measured_names(row):
        found = estimate(row, metric)
        sure = (found.low, found.high, found.how) if found else ("", "", "")
        value = row["metrics"][metric]
        yield [
            section.task,
            section.model,
            row["contender"],
            *where,
            metric,
            value,
            *sure,
            row["n"],
        ]


def _conditions(row: _Row) -> dict[str, Any]:
    return {**{f"budget_{name}": value for name, value in amounts(row).items()}, **row["settings"]}


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else "" if value is None else value

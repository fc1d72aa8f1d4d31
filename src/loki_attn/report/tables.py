"""Markdown: tables of rows, figures with their data, and where the figures come from."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from loki_attn.report.intervals import STATED, estimate, measured_names
from loki_attn.report.origin import MISSING, basis_text, facts, policy_text
from loki_attn.report.rows import Section, amounts, is_dense

Best = Literal["low", "high"] | None


@final
@dataclass(frozen=True, kw_only=True)
class FigureFile:
    """A drawn figure with all that a reader who cannot see it needs.

    Attributes:
        name: Part of its file's name.
        title: One line.
        alt: What it shows, in words and figures.
        header: Names of the columns of its data.
        data: The plotted values.
        png: The picture.
    """

    name: str
    title: str
    alt: str
    header: tuple[str, ...]
    data: tuple[tuple[str, ...], ...]
    png: bytes


@final
@dataclass(frozen=True, kw_only=True)
class _Column:
    """One metric: its heading, how it is written, its standard error, which end is good."""

    head: str
    metric: str
    form: str = ".3f"
    error: str | None = None
    best: Best = None
    scale: float = 1.0


_KIB: Final = 1 / 1024
_COLUMNS: Final[dict[str, tuple[_Column, ...]]] = {
    "perplexity": (
        _Column(head="perplexity", metric="perplexity", best="low"),
        _Column(
            head="nll - dense", metric="nll_delta", form="+.4f", error="nll_delta_standard_error"
        ),
        _Column(
            head="KL to dense",
            metric="kl_to_dense",
            form=".4f",
            error="kl_standard_error",
            best="low",
        ),
        _Column(head="same top token", metric="top1_agreement", form=".1%", best="high"),
        _Column(head="KV bytes read", metric="read_bytes_share", form=".1%"),
    ),
    "fidelity": (
        _Column(head="recall of exact top-k", metric="recall", best="high"),
        _Column(head="captured mass", metric="mass", form=".4f", best="high"),
        _Column(head="mass of exact top-k", metric="exact_mass", form=".4f"),
        _Column(head="output error", metric="output_error", form=".4f", best="low"),
    ),
    "passkey": (
        _Column(head="accuracy", metric="accuracy", form=".0%", error="accuracy", best="high"),
        _Column(head="token accuracy", metric="token_accuracy", form=".0%", best="high"),
    ),
    "calibration": (
        _Column(head="rank at 90 %, mean", metric="rank_at_90", form=".1f"),
        _Column(head="lowest layer", metric="rank_at_90_lowest", form=".1f"),
        _Column(head="highest layer", metric="rank_at_90_highest", form=".1f"),
        _Column(head="of head_dim", metric="head_dim", form=".0f"),
    ),
    "generation": (
        _Column(head="decode tokens/s", metric="tokens_per_s", form=".2f"),
        _Column(
            head="KV KiB read per token", metric="read_bytes_per_token", form=",.0f", scale=_KIB
        ),
        _Column(head="of dense", metric="read_bytes_share", form=".1%"),
        _Column(head="selecting calls", metric="selecting_calls", form=",.0f"),
        _Column(head="first tokens as dense", metric="same_tokens", form=".0f"),
    ),
    "quiz": (
        _Column(head="right", metric="correct", form=".0%"),
        _Column(head="answer", metric="answer", form=""),
        _Column(head="selecting calls", metric="selecting_calls", form=",.0f"),
    ),
}
_WITHOUT_BUDGET: Final = {"calibration", "ranks"}
_SIDES: Final = {"post": "after RoPE", "pre": "before RoPE"}
_RANK: Final = re.compile(r"rank(\d+)_(post|pre)(_uncentred)?")
_VARIANCE: Final = re.compile(r"variance_quarter_(post|pre)_on_(.+)")
TITLES: Final = {
    "perplexity": "Perplexity and divergence from dense",
    "fidelity": "What the selection keeps of dense attention",
    "passkey": "Passkey",
    "calibration": "Rank of the keys",
    "ranks": "Rank of the keys, before and after RoPE",
    "generation": "Generation",
    "quiz": "Question",
    "needle": "Needles",
    "ruler": "RULER",
    "longbench": "LongBench",
    "multi-question": "Several questions on one text",
    "agreement": "Agreement with dense generation",
    "lm-eval": "lm-evaluation-harness",
    "spectrum": "Spectra of the keys",
    "tune": "What tuning tried",
    "bench decode": "A decode step, timed",
    "bench generate": "Generation, timed",
}


def section_block(section: Section) -> str:
    """A section's heading, conditions and tables."""
    blocks: list[str] = []
    same: dict[str, str] = {}
    for caption, columns in _groups(section):
        there = tuple(c for c in columns if any(c.metric in r["metrics"] for r in section.rows))
        if there or not blocks:
            header, body, told = _without_same(*_lines(section, there), 1 + len(section.varying))
            same.update(told)
            blocks += [caption, table(header, body)]
    if section.superseded:
        blocks.append(f"{section.superseded} older rows of the same runs are left out.")
    title = f"## {TITLES.get(section.task, section.task.capitalize())} ({cell(section.model)})"
    return "\n\n".join(part for part in (title, _conditions(section, same), *blocks) if part)


def figure_block(figure: FigureFile, link: str) -> str:
    """A figure with its alt text, and its data folded away."""
    alt = figure.alt.replace("[", "(").replace("]", ")")
    return (
        f"![{alt}]({link})\n\n<details><summary>{figure.title}: the data</summary>\n\n"
        f"{table(figure.header, figure.data)}\n\n</details>"
    )


def origin_block(found: Sequence[Section]) -> str:
    """What the figures were measured with, and where."""
    rows = [row for section in found for row in section.rows]
    known = facts(rows)
    lines = [(name, "; ".join(values) or "unknown") for name, values in known.items()]
    parts = ["## Where the figures come from", table(("what", "value"), lines)]
    policies = dict.fromkeys(
        (r["contender"], f"`{policy_text(r)}`", basis_text(r.get("basis")))
        for r in rows
        if r["task"] not in _WITHOUT_BUDGET and r["policy"]
    )
    if policies:
        parts.append(table(("contender", "policy", "basis"), list(policies)))
    return "\n\n".join(parts)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    lines = [[cell(value) for value in line] for line in (header, rule, *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """A text that no table is broken by."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def budget_of(row: Mapping[str, Any]) -> str:
    """How much a contender reads, in a few characters."""
    parts = [f"{name}={amount}" for name, amount in amounts(row).items()]
    return ", ".join(parts) or ("all" if is_dense(row) else MISSING)


def written(value: object, form: str) -> str:
    """A number in a format, or the text itself."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return MISSING
    return format(value, form)


def error_of(row: Mapping[str, Any], metric: str) -> float | None:
    """The standard error of a metric: as stated, or a share's by its n; None if unknown."""
    value = row["metrics"].get(metric)
    if metric == "accuracy" and isinstance(value, int | float):
        return math.sqrt(value * (1 - value) / row["n"]) if 0 <= value <= 1 else None
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _groups(section: Section) -> list[tuple[str, tuple[_Column, ...]]]:
    """The section's tables: a caption and the columns of each."""
    if section.task != "ranks":
        return [("", _COLUMNS.get(section.task) or _any_columns(section))]
    columns = [_rank_column(column) for column in _any_columns(section)]
    variance = tuple(c for c in columns if _VARIANCE.fullmatch(c.metric))
    caption = "Share of the variance in the first quarter of the coordinates, by text it is of."
    return [("", tuple(c for c in columns if c not in variance)), (caption, variance)]


def _rank_column(column: _Column) -> _Column:
    if found := _RANK.fullmatch(column.metric):
        uncentred = ", uncentred" if found[3] else ""
        head = f"rank at {found[1]} %, {_SIDES[found[2]]}{uncentred}"
        return _Column(head=head, metric=column.metric, form=".1f")
    if found := _VARIANCE.fullmatch(column.metric):
        head = f"{found[2]}, {_SIDES[found[1]]}"
        return _Column(head=head, metric=column.metric, form=".1%")
    return column


def _lines(section: Section, columns: Sequence[_Column]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and lines: contender, settings that differ, metrics, budget, n."""
    budget = section.task not in _WITHOUT_BUDGET
    body = []
    for row in section.rows:
        peers = [r for r in section.rows if _setting(r, section) == _setting(row, section)]
        line = [row["contender"], *_setting(row, section), *([budget_of(row)] * budget)]
        for column in columns:
            text = _value(row, column)
            best = text != MISSING and _is_best(row, column, peers)
            line.append(_with_error(row, column, f"**{text}**" if best else text))
        body.append([*line, str(row["n"])])
    heads = (*["budget"] * budget, *(c.head for c in columns), "n")
    return ("contender", *section.varying, *heads), body


def _without_same(
    header: Sequence[str], body: Sequence[Sequence[str]], leading: int
) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Take out the columns that tell no rows apart: what remains, and what they said.

    The leading columns stay, and so does a column if no other would be left beside them.
    """
    same = [
        at
        for at in range(leading, len(header))
        if len(body) > 1 and len({line[at].replace("*", "") for line in body}) == 1
    ]
    if len(same) == len(header) - leading:
        same = [at for at in same if header[at] in {"budget", "n"}]
    kept = [at for at in range(len(header)) if at not in same]
    said = [(header[at], body[0][at].replace("*", "")) for at in same]
    return (
        [header[at] for at in kept],
        [[line[at] for at in kept] for line in body],
        {head: text for head, text in said if text != MISSING},
    )


def _value(row: Mapping[str, Any], column: _Column) -> str:
    value = row["metrics"].get(column.metric)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return written(value * column.scale if number else value, column.form)


def _with_error(row: Mapping[str, Any], column: _Column, text: str) -> str:
    found = estimate(row, column.metric)
    if found is not None and found.how == STATED:
        low, high = (format(end * column.scale, column.form) for end in (found.low, found.high))
        return f"{text} ({low} to {high})"
    error = None if column.error is None else error_of(row, column.error)
    return text if error is None else f"{text} ± {format(error, column.form.lstrip('+'))}"


def _is_best(row: Mapping[str, Any], column: _Column, peers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other sparse contender reads better, as written; alone nobody is best."""
    rivals = [p for p in peers if not is_dense(p) and _value(p, column) != MISSING]
    if column.best is None or is_dense(row) or len(rivals) < 2:
        return False
    pick = min if column.best == "low" else max
    best = pick(rivals, key=lambda r: float(r["metrics"][column.metric]))
    return _value(best, column) == _value(row, column)


def _setting(row: Mapping[str, Any], section: Section) -> list[str]:
    return [cell(row["settings"].get(name, MISSING)) for name in section.varying]


def _conditions(section: Section, same: Mapping[str, str]) -> str:
    """Protocol, settings, and what the table would say alike in every row."""
    protocol = cell(section.protocol).rstrip(".")
    words = [f"{name.replace('_', ' ')} {value}" for name, value in section.common.items()]
    alike = [f"{head} {text}" for head, text in same.items()]
    lines = [
        f"{said}: {cell(', '.join(parts))}."
        for said, parts in (("Settings", words), ("In every row", alike))
        if parts
    ]
    parts = [f"{protocol[:1].upper()}{protocol[1:]}.", " ".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _any_columns(section: Section) -> tuple[_Column, ...]:
    """Columns of a task that is not known here: every number, unjudged."""
    names = dict.fromkeys(
        name
        for row in section.rows
        for name, value in row["metrics"].items()
        if name in measured_names(row) or (isinstance(value, str) and name != "intervals")
    )
    return tuple(_Column(head=n.replace("_", " "), metric=n, form=".4g") for n in names)

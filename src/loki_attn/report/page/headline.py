"""The headline: one sentence and a few numbers, computed from the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.report.intervals import Estimate, estimate, number
from loki_attn.report.page.axes import duration, tokens
from loki_attn.report.page.parts import interval, written
from loki_attn.report.page.quality import pooled
from loki_attn.report.page.speed import is_dense_step
from loki_attn.report.rows import Section, apart, by_setting, differing, is_dense
from loki_attn.report.tables import TITLES

_Row = Mapping[str, Any]

# A divergence that few readers of a text would notice; the sentence states it.
NEAR: Final = 0.05
_FORM: Final = ".1%"


@final
@dataclass(frozen=True, kw_only=True)
class KeyNumber:
    """A number worth knowing: what it is of, how sure it is."""

    value: str
    name: str
    note: str


@final
@dataclass(frozen=True, kw_only=True)
class Headline:
    """The sentence, who it is about if it opens with a contender, and the numbers below it."""

    sentence: str
    subject: str = ""
    numbers: tuple[KeyNumber, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A row, its divergence, whether that is surely small, and on what it was measured."""

    row: _Row
    kl: Estimate
    near: bool
    where: str


def headline_of(model: str, found: Sequence[Section]) -> Headline:
    """Sum up the rows of one model.

    Args:
        model: Its name.
        found: Its sections.

    Returns:
        The cheapest contender that stays near dense attention, or what there is instead.
    """
    choice = _choice(found)
    if choice is None:
        speed = _speed(found)
        if speed is not None:
            return Headline(sentence=speed)
        tasks = ", ".join(dict.fromkeys(section.task for section in found))
        count = len({row["contender"] for section in found for row in section.rows})
        noun = "contender" if count == 1 else "contenders"
        return Headline(sentence=f"{model}, {count} {noun}: {tasks}.")
    row, kl = choice.row, choice.kl
    where = f" ({choice.where})" if choice.where else ""
    share = written(float(row["metrics"]["read_bytes_share"]), ".1%")
    sure = f"KL {written(kl.value, '.3f')} nats, {interval(kl, '.3f')}"
    sentence = (
        f"reads {share} of the KV bytes that dense attention reads on {model}{where}, "
        f"and stays within {NEAR:g} nats of its predictions ({sure}). "
        "No other sparse contender does so with less."
        if choice.near
        else f"No sparse contender stays surely within {NEAR:g} nats of dense attention on "
        f"{model}{where}; {row['contender']} comes closest ({sure}) and reads {share} of its KV "
        "bytes."
    )
    subject = str(row["contender"]) if choice.near else ""
    numbers = tuple(_numbers(row, kl, found))
    return Headline(sentence=sentence, subject=subject, numbers=numbers)


def _choice(found: Sequence[Section]) -> _Choice | None:
    """The contender that reads least among those near dense, else the one nearest to it.

    Contenders are compared on one text and length: that on which most of them were measured.
    """
    parts = [p for s in found if s.task == "perplexity" for p in by_setting(s)]
    measured = [pairs for part in parts if (pairs := _pairs(part))]
    if not measured:
        return None
    pairs = max(measured, key=len)
    names = apart([[row for row, _ in own] for own in measured])
    where = differing(pairs[0][0], names)
    near = [(row, kl) for row, kl in pairs if kl.high <= NEAR]
    if near:
        row, kl = min(near, key=lambda pair: float(pair[0]["metrics"]["read_bytes_share"]))
        return _Choice(row=row, kl=kl, near=True, where=where)
    row, kl = min(pairs, key=lambda pair: pair[1].value)
    return _Choice(row=row, kl=kl, near=False, where=where)


def _pairs(part: Section) -> list[tuple[_Row, Estimate]]:
    return [
        (row, kl)
        for row in part.rows
        if not is_dense(row)
        and (kl := estimate(row, "kl_to_dense"))
        and number(row["metrics"].get("read_bytes_share")) is not None
    ]


def _numbers(row: _Row, kl: Estimate, found: Sequence[Section]) -> list[KeyNumber]:
    numbers = [
        KeyNumber(
            value=written(float(row["metrics"]["read_bytes_share"]), ".1%"),
            name="of the KV bytes read",
            note=str(row["contender"]),
        ),
        KeyNumber(
            value=written(kl.value, ".3f"),
            name="nats of KL to dense",
            note=f"{interval(kl, '.3f')}, n {kl.n:,}",
        ),
    ]
    if top := estimate(row, "top1_agreement"):
        note = f"{interval(top, '.1%')} %, n {top.n:,}"
        value = written(top.value, ".1%")
        numbers.append(KeyNumber(value=value, name="same top token", note=note))
    return numbers + _scores(str(row["contender"]), found)


def _scores(contender: str, found: Sequence[Section]) -> list[KeyNumber]:
    """What the same contender scores in each task, and dense beside it."""
    numbers = []
    for section in found:
        mine = [r for r in section.rows if r["contender"] == contender and "score" in r["metrics"]]
        dense = [r for r in section.rows if is_dense(r) and "score" in r["metrics"]]
        ours, theirs = _mean(mine), _mean(dense)
        if ours is None:
            continue
        note = f"{interval(ours, _FORM)}, n {ours.n:,}"
        if theirs is not None and len(mine) == len(dense):
            value = written(theirs.value, _FORM)
            note += f"; dense {value}, {interval(theirs, _FORM)}"
        name = f"{TITLES.get(section.task, section.task)}, mean score"
        numbers.append(KeyNumber(value=written(ours.value, _FORM), name=name, note=note))
    return numbers


def _mean(rows: Sequence[_Row]) -> Estimate | None:
    found = [one for row in rows if (one := estimate(row, "score"))]
    if not found or len(found) < len(rows):
        return None
    return pooled(found)


def _speed(found: Sequence[Section]) -> str | None:
    """The fastest sparse step beside the fastest dense one, at the longest context of all."""
    timed = [section for section in found if section.task == "bench decode"]
    for section in sorted(timed, key=_longest, reverse=True):
        whole = [row for row in section.rows if row["settings"].get("part") is None]
        longest = _longest(section)
        last = [row for row in whole if row["settings"].get("context") == longest]
        dense = [row for row in last if is_dense_step(row)]
        loki = [row for row in last if row["settings"].get("kind") == "loki"]
        if dense and loki:
            slow, fast = (min(rows, key=_time) for rows in (dense, loki))
            ratio = _time(slow) / _time(fast)
            return (
                f"With {tokens(longest)} tokens in the cache, a decode step of {section.model}, "
                f"one layer, takes {duration(_time(fast))} with {fast['contender']} and "
                f"{ratio:.1f} times as long, {duration(_time(slow))}, with {slow['contender']}, "
                "the fastest dense attention measured."
            )
    return None


def _longest(section: Section) -> float:
    return max(float(row["settings"].get("context", 0)) for row in section.rows)


def _time(row: _Row) -> float:
    return float(row["metrics"]["median_us"])

"""Running the part of a sweep that belongs to one model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from loki_attn.errors import LokiAttnError
from loki_attn.evaluate import suites
from loki_attn.evaluate.agreement import Agreement
from loki_attn.evaluate.fidelity import Fidelity
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import Progress, measure, total_of
from loki_attn.evaluate.perplexity import Perplexity
from loki_attn.evaluate.protocol import Contender, LanguageModel, check_names
from loki_attn.evaluate.results import Row, append_rows, read_rows
from loki_attn.evaluate.sweep.spec import TaskChoice
from loki_attn.evaluate.task import Task

_ON_IDS: Final = {"perplexity": Perplexity, "fidelity": Fidelity, "agreement": Agreement}
_ON_TEXT: Final[Mapping[str, Callable[..., Task]]] = {
    "needle": suites.needle_task,
    "ruler": suites.ruler_task,
    "multi-question": suites.multi_question_task,
}
_IDENTITY: Final = ("task", "protocol", "model", "contender", "policy", "basis", "settings")


@final
@dataclass(frozen=True, kw_only=True)
class Host:
    """What a sweep asks of whoever runs it.

    Attributes:
        contender: From a policy as it is typed to a contender for the model at hand.
        text: From a file's name, or None for the packaged text, to the text's name and content.
        progress: Called with measurements done, to do, and news.
        news: Called with a line of news.
    """

    contender: Callable[[str], Contender]
    text: Callable[[str | None], tuple[str, str]]
    progress: Progress
    news: Callable[[str], None]


def run_model(
    lm: LanguageModel, choices: Sequence[TaskChoice], host: Host, out: Path, journal: Path
) -> list[Row]:
    """Measure all tasks of one model and add the rows that are not there yet.

    Args:
        lm: The model.
        choices: Its tasks, with their policies.
        host: Makes contenders and texts, takes news.
        out: JSON-lines file of rows.
        journal: File of what is measured already; it grows by every measurement.

    Returns:
        The rows that were added.

    Raises:
        InputError: If a task cannot be had, or has a policy twice; nothing was measured then.
    """
    tasks = [build_task(lm, choice, host.text) for choice in choices]
    made: dict[str, Contender] = {}
    for choice in choices:
        for spec in choice.policies:
            if spec not in made:
                made[spec] = host.contender(spec)
    everyone = [[made[spec] for spec in choice.policies] for choice in choices]
    for contenders in everyone:
        check_names(contenders)
    whole = sum(total_of(t, lm, c) for t, c in zip(tasks, everyone, strict=True))
    book, known, before = Journal(journal), _known(out), 0
    added: list[Row] = []
    for task, contenders in zip(tasks, everyone, strict=True):
        done_before = before

        def progress(done: int, _: int, line: str, so_far: int = done_before) -> None:
            host.progress(so_far + done, whole, line)

        rows = measure(
            task,
            lm,
            contenders,
            journal=book,
            progress=progress,
            refused=lambda error: _refused(error, host),
        )
        before += total_of(task, lm, contenders)
        host.progress(before, whole, f"{task.name} done")
        new = [row for row in rows if _identity(asdict(row)) not in known]
        append_rows(out, new)
        known.update(_identity(asdict(row)) for row in new)
        added += new
    return added


def build_task(
    lm: LanguageModel, choice: TaskChoice, load: Callable[[str | None], tuple[str, str]]
) -> Task:
    """Make a task from its name and options.

    Raises:
        InputError: If the options do not fit the task, the text or the model.
    """
    options = dict(choice.options)
    if choice.task == "longbench":
        return suites.longbench_task(lm, Path(options.pop("path")), **options)
    corpus, content = load(options.pop("text", None))
    content = content[int(options.pop("skip_characters", 0)) :]
    if choice.task in _ON_TEXT:
        return _ON_TEXT[choice.task](lm, content, corpus=corpus, **options)
    ids = tuple(lm.encode(content))
    task: Task = _ON_IDS[choice.task](ids=ids, corpus=corpus, **options)
    return task


def _refused(error: LokiAttnError, host: Host) -> None:
    host.news(f"no row: {error}")


def _known(out: Path) -> set[str]:
    return {_identity(row) for row in read_rows(out)} if out.is_file() else set()


def _identity(row: Mapping[str, Any]) -> str:
    """What a row is about, and what was found: all of it but when and where."""
    kept = {name: row.get(name) for name in (*_IDENTITY, "n", "metrics")}
    return json.dumps(kept, sort_keys=True)

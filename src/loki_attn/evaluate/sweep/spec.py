"""What a sweep is asked to do: a YAML file, checked before anything runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, final

from loki_attn.errors import InputError, unknown_name

_TOP: Final = {"models", "policies", "tasks"}
_TEXT: Final = {"text", "skip_characters"}
# By task: the options of `suites`, `Perplexity`, `Fidelity`, `Agreement`. A list is swept, but
# for those that are lists by nature.
OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "perplexity": frozenset({"how", "windows", "window_tokens", "prefix_tokens", *_TEXT}),
    "fidelity": frozenset({"windows", "window_tokens", "queries", *_TEXT}),
    "agreement": frozenset({"prompts", "prompt_tokens", "new_tokens", *_TEXT}),
    "needle": frozenset({"kinds", "lengths", "depths", "per_depth", "seed", "seen", *_TEXT}),
    "ruler": frozenset({"subtasks", "lengths", "count", "answer_tokens", "seed", "seen", *_TEXT}),
    "multi-question": frozenset({"lengths", "count", "questions", "seed", "seen", *_TEXT}),
    "longbench": frozenset({"path", "version", "dataset", "limit", "seen"}),
}
_LISTS: Final = {"kinds", "lengths", "depths", "subtasks"}


@final
@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """One task with its options.

    Attributes:
        task: Its name, one of `OPTIONS`.
        options: By name, plain JSON.
        models: Models that it is for; all of them if empty.
        policies: Policies that it is for, as they are typed; the sweep's if empty.
    """

    task: str
    options: Mapping[str, Any]
    models: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Spec:
    """A checked sweep.

    Attributes:
        models: Names of models, as `loki_attn.models` understands them.
        policies: Policies as they are typed on the command line.
        tasks: What is measured.
    """

    models: tuple[str, ...]
    policies: tuple[str, ...]
    tasks: tuple[TaskChoice, ...]

    def of_model(self, model: str) -> list[TaskChoice]:
        """The tasks of one model, with the policies of each."""
        return [
            TaskChoice(
                task=choice.task,
                options=choice.options,
                models=(model,),
                policies=choice.policies or self.policies,
            )
            for choice in self.tasks
            if not choice.models or model in choice.models
        ]


def read_spec(path: Path) -> Spec:
    """Read a sweep.

    Args:
        path: A YAML file with `models`, `policies` and `tasks`; see docs/how-to/evaluate.md.

    Raises:
        InputError: If the file cannot be read, or says something that is not known.
    """
    import yaml

    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {str(path)!r}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(record, dict):
        raise InputError(
            f"A sweep is a mapping with {', '.join(sorted(_TOP))}; got {record!r:.60}."
        )
    for name in record:
        if name not in _TOP:
            raise unknown_name("part of a sweep", str(name), _TOP)
    policies = tuple(_policies(_list(record, "policies")))
    tasks = tuple(found for one in _list(record, "tasks") for found in _task(one))
    spec = Spec(models=_names(record, "models"), policies=policies, tasks=tasks)
    for choice in tasks:
        for model in choice.models:
            if model not in spec.models:
                raise unknown_name("model of a task", model, spec.models)
    return spec


def _policies(entries: list[Any]) -> Iterator[str]:
    """Policies as typed; an entry that is a mapping of lists stands for all combinations."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("policy"), str):
            raise InputError(
                f"A policy is a text such as loki:top_k=256, or a mapping with 'policy' and lists; "
                f"got {entry!r}."
            )
        axes = {name: _many(value) for name, value in entry.items() if name != "policy"}
        for values in product(*axes.values()):
            changes = ",".join(f"{n}={v}" for n, v in zip(axes, values, strict=True))
            yield f"{entry['policy']}:{changes}" if changes else entry["policy"]


def _task(entry: Any) -> Iterator[TaskChoice]:
    if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
        raise InputError(f"A task is a mapping with 'task: NAME'; got {entry!r}.")
    name = entry["task"]
    if name not in OPTIONS:
        raise unknown_name("task", name, OPTIONS)
    own = {"task", "models", "policies"}
    options = {key: value for key, value in entry.items() if key not in own}
    for key in options:
        if key not in OPTIONS[name]:
            raise unknown_name(f"option of {name}", str(key), OPTIONS[name] | own)
    models = _names(entry, "models") if "models" in entry else ()
    policies = tuple(_policies(_list(entry, "policies"))) if "policies" in entry else ()
    fixed = {k: _many(v) for k, v in options.items() if k in _LISTS}
    axes = {k: _many(v) for k, v in options.items() if k not in _LISTS}
    for values in product(*axes.values()):
        chosen = {**fixed, **dict(zip(axes, values, strict=True))}
        yield TaskChoice(task=name, options=chosen, models=models, policies=policies)


def _names(record: Mapping[str, Any], part: str) -> tuple[str, ...]:
    found = _list(record, part)
    if not all(isinstance(name, str) for name in found):
        raise InputError(f"{part!r} lists names, got {found!r}.")
    return tuple(dict.fromkeys(found))


def _list(record: Mapping[str, Any], part: str) -> list[Any]:
    found = record.get(part)
    if not isinstance(found, list) or not found:
        raise InputError(f"A sweep needs a list under {part!r}, got {found!r}.")
    return found


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

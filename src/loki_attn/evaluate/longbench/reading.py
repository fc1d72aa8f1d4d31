"""Reading LongBench v1 and LongBench-E: one JSON Lines file per data set (arXiv 2308.14508)."""

import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Final

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.longbench.catalogue import DATASETS
from loki_attn.evaluate.longbench.metrics import NUMBERED
from loki_attn.evaluate.longbench.places import located
from loki_attn.evaluate.longbench.prompts import V1_FILE, Prompt, read_v1_prompts
from loki_attn.evaluate.longbench.records import Record, check_limit, read_lines
from loki_attn.evaluate.longbench.words import segmenter
from loki_attn.evaluate.samples import Question, Sample

_HUB_FILE: Final = "data.zip"
_ENDING: Final = "_e"


def read_v1(
    path: str | Path, dataset: str | None = None, *, limit: int | None = None
) -> list[Sample]:
    """Read samples of LongBench v1 or LongBench-E from published files.

    Where the benchmark's ``dataset2prompt.json`` lies beside the data, its prompts are used, else
    ours; the label "prompts" says which.

    Args:
        path: A file of one data set, a folder or zip of such files, or a hub id.
        dataset: Name of the only data set to read; by default that of the file, or all of a folder.
        limit: Samples per data set, the first ones; all by default.

    Returns:
        The samples, named after data set and record. Labels: "subtask" (the data set), "length"
        (as published: words, of Chinese characters), "prompts"; of LongBench-E "length_range"; for
        classification "all_classes"; for Chinese texts cut into words "words".

    Raises:
        InputError: If there is no such file, or a record is not as published.
        ModelError: If the hub does not give the data.
    """
    check_limit(limit)
    if dataset is not None and dataset not in DATASETS:
        raise unknown_name("LongBench data set", dataset, DATASETS)
    place = located(path, _HUB_FILE)
    beside = (place if place.is_dir() else place.parent) / V1_FILE
    given = read_v1_prompts(beside) if beside.is_file() else {}
    samples: list[Sample] = []
    for name, file, member in _sources(place, dataset):
        records = read_lines(file, member, limit)
        samples += _samples(name, records, given)
    if not samples:
        raise InputError(f"{place} holds no records; expected LongBench's published files.")
    return samples


def _sources(place: Path, dataset: str | None) -> list[tuple[str | None, Path, str | None]]:
    """Data set where known, file, and name in the zip, in the order of `DATASETS`."""
    members: dict[str, tuple[Path, str | None]]
    if place.is_dir():
        members = {file.stem: (file, None) for file in sorted(place.glob("*.jsonl"))}
    elif place.suffix == ".zip":
        members = {PurePosixPath(one).stem: (place, one) for one in _zipped(place)}
    else:
        stem = place.stem if place.stem in DATASETS else None
        return [(dataset or stem, place, None)]
    wanted = DATASETS if dataset is None else (dataset,)
    found: list[tuple[str | None, Path, str | None]] = [
        (name, *members[name]) for name in wanted if name in members
    ]
    if not found:
        raise InputError(
            f"{place} has no {' or '.join(f'{name}.jsonl' for name in wanted)}"
            f"; it has {', '.join(sorted(members)) or 'no .jsonl files'}."
        )
    return found


def _zipped(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if name.endswith(".jsonl")]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"Cannot read {path}: {error}.") from error


def _samples(name: str | None, records: list[Record], given: dict[str, Prompt]) -> list[Sample]:
    samples: list[Sample] = []
    seen: Counter[str] = Counter()
    for record in records:
        sample = _sample(name or _named(record), record, given)
        seen[sample.name] += 1
        if seen[sample.name] > 1:
            # Names are unique in a task, but nothing promises that of published ids.
            sample = Sample(
                name=f"{sample.name}#{seen[sample.name]}",
                context=sample.context,
                questions=sample.questions,
                labels=sample.labels,
            )
        samples.append(sample)
    return samples


def _named(record: Record) -> str:
    name = record.text("dataset")
    if name not in DATASETS:
        raise unknown_name(f"LongBench data set in {record.where}:", name, DATASETS)
    return name


def _sample(name: str, record: Record, given: dict[str, Prompt]) -> Sample:
    dataset = DATASETS[name]
    said = record.fields.get("dataset", name)
    if said in DATASETS and _base(said) != _base(name):
        raise record.wrong("dataset", f"{_base(name)!r}, after the file or the choice of data set")
    prompt = given.get(name) or given.get(_base(name))
    length = record.number("length")
    labels: dict[str, Any] = {
        "subtask": name,
        "length": length,
        "prompts": "ours" if prompt is None else V1_FILE,
    }
    if name.endswith(_ENDING):
        labels["length_range"] = "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
    if dataset.metric == "classification":
        labels["all_classes"] = list(record.texts("all_classes"))
    if dataset.metric in ("qa_f1_zh", "rouge_l_zh"):
        labels["words"] = segmenter()
    context, asked = (prompt or dataset.prompt).around(
        record.text("context"), {"input": record.text("input")}
    )
    references = record.texts("answers")
    if dataset.metric in NUMBERED and not all(
        NUMBERED[dataset.metric].search(x) for x in references
    ):
        raise record.wrong("answers", f"texts with {NUMBERED[dataset.metric].pattern}")
    question = Question(text=asked, references=references, max_new_tokens=dataset.max_new_tokens)
    return Sample(
        name=f"{name}/{record.text('_id')}",
        context=context,
        questions=(question,),
        labels=labels,
    )


def _base(name: str) -> str:
    return name.removesuffix(_ENDING)

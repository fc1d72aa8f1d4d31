"""Reading LongBench v2: questions with four choices about long texts (arXiv 2412.15204)."""

from pathlib import Path
from typing import Final

from loki_attn.errors import InputError
from loki_attn.evaluate.longbench.catalogue import V2
from loki_attn.evaluate.longbench.places import located
from loki_attn.evaluate.longbench.prompts import V2_FILE, Prompt, read_v2_prompt
from loki_attn.evaluate.longbench.records import Record, check_limit, read_lines, read_list
from loki_attn.evaluate.samples import Question, Sample

_HUB_FILE: Final = "data.json"
_MAX_NEW_TOKENS: Final = 128
_LETTERS: Final = ("A", "B", "C", "D")
_FIELDS: Final = ("question", *(f"choice_{letter}" for letter in _LETTERS))
# Only the sentence with the letter is the benchmark's: its score looks for it.
_OURS: Final = Prompt(
    before="Here is a text; a question with four choices follows it.\n\n",
    after=(
        "\n\nQuestion: {question}\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}"
        "\n\nOne choice is right. Name it in this form, with its letter in the brackets: "
        '"The correct answer is (...)".\n'
    ),
)


def read_v2(path: str | Path, *, limit: int | None = None) -> list[Sample]:
    """Read samples of LongBench v2 from its published file.

    Where the benchmark's ``0shot.txt`` lies beside the data, its prompt is used, else ours; the
    label "prompts" says which.

    Args:
        path: The file, one JSON list or JSON Lines; a folder with one such file; or a hub id.
        limit: Samples, the first ones; all by default.

    Returns:
        The samples. Labels: "subtask" ("longbench-v2"), "difficulty" ("easy", "hard"), "length"
        ("short", "medium", "long"), "domain", "sub_domain", "prompts".

    Raises:
        InputError: If there is no such file, or a record is not as published.
        ModelError: If the hub does not give the data.
    """
    check_limit(limit)
    file = _file(located(path, _HUB_FILE))
    beside = file.parent / V2_FILE
    prompt = read_v2_prompt(beside) if beside.is_file() else None
    records = read_list(file, limit) if _is_list(file) else read_lines(file, limit=limit)
    if not records:
        raise InputError(f"{file} holds no records; expected LongBench v2's published file.")
    return [_sample(record, prompt) for record in records]


def _file(place: Path) -> Path:
    if not place.is_dir():
        return place
    found = sorted(file for ending in ("json", "jsonl") for file in place.glob(f"*.{ending}"))
    if len(found) != 1:
        raise InputError(
            f"Folder {place} has {len(found)} files that end in .json or .jsonl; expected one, or "
            "the path of the file itself."
        )
    return found[0]


def _is_list(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4096).lstrip().startswith(b"[")
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error}.") from error


def _sample(record: Record, prompt: Prompt | None) -> Sample:
    context, asked = (prompt or _OURS).around(
        record.text("context").strip(), {name: record.text(name).strip() for name in _FIELDS}
    )
    question = Question(
        text=asked,
        references=(record.one_of("answer", _LETTERS),),
        max_new_tokens=_MAX_NEW_TOKENS,
    )
    return Sample(
        name=f"{V2}/{record.text('_id')}",
        context=context,
        questions=(question,),
        labels={
            "subtask": V2,
            "difficulty": record.one_of("difficulty", ("easy", "hard")),
            "length": record.one_of("length", ("short", "medium", "long")),
            "domain": record.text("domain"),
            "sub_domain": record.text("sub_domain"),
            "prompts": "ours" if prompt is None else V2_FILE,
        },
    )

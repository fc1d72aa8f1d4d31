"""Tests of this folder write LongBench's files themselves, with texts of their own."""

import json

import pytest


@pytest.fixture
def record():
    """Make a record of version 1."""

    def make(**changed):
        return {
            "input": "Who kept the light?",
            "context": "Ellen Marsh kept the light {here}.",
            "answers": ["Ellen Marsh", "Ellen"],
            "length": 6,
            "dataset": "hotpotqa",
            "language": "en",
            "all_classes": None,
            "_id": "a1",
        } | changed

    return make


@pytest.fixture
def record_v2():
    """Make a record of version 2."""

    def make(**changed):
        return {
            "_id": "b1",
            "domain": "Single-Document QA",
            "sub_domain": "Literary",
            "difficulty": "easy",
            "length": "short",
            "question": " What shines? ",
            "choice_A": "The sea",
            "choice_B": "The lamp ",
            "choice_C": "The {moon}",
            "choice_D": "Nothing",
            "answer": "B",
            "context": "\nA lamp shines over the sea.\n",
        } | changed

    return make


@pytest.fixture
def write(tmp_path):
    """Write records as JSON Lines, or a text as it is."""

    def file(name, *records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return file

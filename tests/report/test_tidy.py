"""The tidy table: every number once, with its conditions and how sure it is."""

import csv

import pytest
from page_rows import everything, needle, row, step

from loki_attn.errors import InputError
from loki_attn.report import write_csv


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_per_number(tmp_path):
    path = write_csv([needle("mixed top_k=64 rank=16", 0.1, 4096)], tmp_path / "rows.csv")
    score, share = sorted(read(path), key=lambda line: line["metric"], reverse=True)
    expected = {"task": "needle", "model": "tiny", "budget_top_k": "64", "kind": "uuid", "n": "15"}
    assert expected.items() <= score.items()
    assert (score["metric"], score["length_tokens"]) == ("score", "4096")
    assert float(score["low"]) < float(score["value"]) < float(score["high"])
    assert (share["metric"], share["low"], share["interval"]) == ("read_bytes_share", "", "")


def test_all_kinds_of_rows_fit_one_table(tmp_path):
    lines = read(write_csv(everything(), tmp_path / "rows.csv"))
    assert {line["task"] for line in lines} >= {"bench decode", "needle", "ruler", "weather"}
    assert all(line["value"] and line["n"] for line in lines)


def test_settings_never_hide_columns(tmp_path):
    path = write_csv([row("odd", settings={"n": 7, "list": [1, 2]}, score=1)], tmp_path / "a.csv")
    (line,) = read(path)
    assert (line["n"], line["setting_n"], line["list"]) == ("20", "7", "[1, 2]")


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"is a \.csv file; got"):
        write_csv([row("odd")], tmp_path / "rows.txt")
    with pytest.raises(InputError, match="no rows to report"):
        write_csv([], tmp_path / "rows.csv")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write"):
        write_csv([step("sdpa", "torch", 1024, 1.0)], tmp_path / "file" / "rows.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

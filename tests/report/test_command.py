"""`loki-attn report`: the ending of --out says what is written."""

import json

import pytest
from page_rows import everything

pytest.importorskip("typer")
pytest.importorskip("rich")

from loki_attn.cli import main


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in everything()))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["loki-attn", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code


@pytest.mark.parametrize(
    ("ending", "start"),
    [(".html", "<!doctype html>"), (".csv", "task,model,contender"), (".md", "# What was")],
)
def test_each_ending_has_its_form(rows_file, tmp_path, monkeypatch, capsys, ending, start):
    out = tmp_path / f"report{ending}"
    assert not run(monkeypatch, rows_file, "--out", out, "--no-figures")
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text().startswith(start)


def test_other_endings_are_refused(rows_file, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, rows_file, "--out", tmp_path / "report.pdf") == 2
    assert "says what to write: .html, .md or .csv; got" in " ".join(
        capsys.readouterr().err.split()
    )

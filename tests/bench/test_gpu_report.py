"""The run over all cells of a GPU: what is kept, what is passed over, when it stops, its page."""

import json
from pathlib import Path

import pytest

from loki_attn.bench.decode import Outcome
from loki_attn.bench.rows import StepRow

TOOLS = Path(__file__).parents[2] / "tools"
if not (TOOLS / "gpu_report.py").is_file():
    pytest.skip("a source distribution has no tools", allow_module_level=True)

FACTS = {"gpu": "Pretended 1", "gpu_sm_count": 2, "gpu_driver": "1.2", "cuda": "13.0"}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_report

    return gpu_report


@pytest.fixture
def page(report):
    import gpu_page

    return gpu_page


def row(cell, contender, kind, median_us, *, k=None, plane=None, at="2026-01-01T00:00:00Z", **more):
    loki = kind == "loki"
    settings = {
        "task": "bench decode", "contender": contender, "kind": kind, "part": None,
        "shape": cell.shape, "batch": cell.batch, "context": cell.context, "dtype": "bf16",
        "backend": "triton", "threads": 1, "median_us": median_us, "p20_us": median_us,
        "p80_us": median_us, "samples": 3, "gate": {"verdict": "passed"}, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "k": k, "rank": 32 if loki else None, "plane": plane,
        "bytes_touched": 10**6, "gb_per_s": 1000.0, "read_gb_per_s": 4000.0, "read_by": "copy",
        "share_of_bandwidth": 0.25, "layers": 2, "bytes_between_visits": 10**9,
        "last_level_cache_bytes": 60_000_000, "device": "cuda", "timed_by": "graph replay",
        "provenance": {
            "time": at, "commit": "abc", "versions": {"torch": "2.11"}, "command": cell.command,
            **FACTS,
        },
    }  # fmt: skip
    if loki:
        settings |= {"ratio_best_dense": 100 / median_us, "best_dense": "sdpa-flash-hf"}
        settings |= {"share_of_byte_limit": 0.25}
    return StepRow(**(settings | more))


def rows_of(cell, loki_us=20.0, **more):
    found = [row(cell, "sdpa-hf", "torch", 120.0, **more)]
    found.append(row(cell, "sdpa-flash-hf", "torch", 100.0, **more))
    for k in (512, 2048):
        found.append(row(cell, f"exact-topk k={k}", "exact", 80.0, k=k, timed_by="events", **more))
        for plane, us in (("int8", loki_us), ("bf16", 2 * loki_us)):
            found.append(row(cell, f"loki {plane} k={k}", "loki", us, k=k, plane=plane, **more))
    return found


@pytest.fixture
def started(report, monkeypatch, tmp_path):
    """Make a run whose bench is scripted; `script` maps titles to what comes of them."""
    seen = []

    def make(script=None, *, commit="abc", deadline_s=float("inf"), takes_s=10):
        now = [0.0]

        def measure(bench, tell, advancing, place):
            (context,) = bench.contexts
            cell = report.Cell(bench.shape.name, bench.batch, context)
            seen.append(cell)
            now[0] += takes_s
            result = (script or {}).get(cell, Outcome(rows=rows_of(cell)))
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(report, "measure_decode", measure)
        return report.Run(
            None, "pretended-1", tmp_path, commit, deadline_s, {"repeats": 3}, lambda: now[0]
        )

    return make, seen


def kept(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_cells_are_those_of_the_issue_and_begin_with_those_of_the_aims(report):
    cells = report.cells()
    assert len(set(cells)) == len(cells) == 2 * 3 * 3
    assert {cell.batch for cell in cells} == {1, 8, 32}
    assert {cell.context for cell in cells} == {8192, 32768, 131072}
    assert cells[0] == report.Cell("llama-3.1-8b", 8, 32768)
    assert cells[1] == report.Cell("llama-2-7b", 8, 32768)
    assert cells[-1] == report.Cell("llama-2-7b", 32, 131072)


def test_the_command_of_a_cell_is_one_that_the_command_line_knows(report, monkeypatch):
    pytest.importorskip("rich")
    testing = pytest.importorskip("typer.testing")
    from loki_attn.cli.app import app

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = testing.CliRunner().invoke(app, report.cells()[0].command.split()[1:])
    assert "there is no CUDA device here" in done.stderr


def test_rows_are_kept_cell_by_cell_and_a_second_run_passes_over_them(report, started, tmp_path):
    make, seen = started
    first, second, third = report.cells()[:3]
    assert make().measure([first, second]) == report.DONE
    assert len(kept(tmp_path / "gpu-pretended-1.jsonl")) == 2 * len(rows_of(first))
    assert make().measure([first, second, third]) == report.DONE
    assert seen == [first, second, third]
    assert make(commit="def").measure([first]) == report.DONE
    assert seen[-1] == first
    rows = kept(tmp_path / "gpu-pretended-1.jsonl")
    assert [own["provenance"]["commit"] for own in rows][-1] == "def"
    assert (tmp_path / "gpu-pretended-1.md").is_file()


def test_it_stops_before_a_cell_that_may_not_end_in_time(report, started):
    make, seen = started
    cells = report.cells()[:5]
    # Begun at 0, 10, 20 s; a cell that is begun at 30 s may last until 45 s.
    assert make(deadline_s=40).measure(cells) == report.OUT_OF_TIME
    assert seen == cells[:3]
    assert make().measure(cells) == report.DONE
    assert seen == cells


def test_a_cell_that_breaks_is_tried_again_in_another_process_and_then_given_up(report, started):
    make, seen = started
    first, second = report.cells()[:2]
    script = {first: RuntimeError("CUDA error: an illegal memory access\nmore")}
    run = make(script)
    codes = [run.measure([first, second]) for _ in range(3)]
    assert codes == [report.BROKEN, report.BROKEN, report.DONE]
    assert seen == [first, first, second]
    page = (run.folder / "gpu-pretended-1.md").read_text()
    assert f"- {first.title}: RuntimeError: CUDA error: an illegal memory access\n" in page


def test_a_cell_that_was_cut_off_is_not_held_against_it(report, started):
    make, seen = started
    (first,) = report.cells()[:1]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            make({first: KeyboardInterrupt()}).measure([first])
    assert make().measure([first]) == report.DONE
    assert seen == [first] * 4


def test_a_process_that_dies_in_a_cell_has_begun_it(report, started):
    make, _ = started
    (first,) = report.cells()[:1]
    run = make()
    for _ in range(report.ATTEMPTS):
        assert run.journal.wants(first)
        run.journal.note(first, "begun")
    assert not run.journal.wants(first)


def test_who_has_no_row_is_named_with_the_reason(report, started):
    make, _ = started
    first, second = report.cells()[:2]
    script = {
        first: Outcome(rows_of(first), {"loki int4 k=512 at 32,768 tokens": "it is off"}),
        second: Outcome(left_out={"flashinfer": "flashinfer is not installed",
                                  "32,768 tokens, batch 8": "one layer takes 999 GB"}),
    }  # fmt: skip
    run = make(script)
    assert run.measure([first, second]) == report.DONE
    page = (run.folder / "gpu-pretended-1.md").read_text()
    assert "- llama-3.1-8b, loki int4 k=512 at 32,768 tokens: it is off\n" in page
    assert "- flashinfer: flashinfer is not installed\n" in page
    assert "- llama-2-7b, 32,768 tokens, batch 8: one layer takes 999 GB\n" in page


def test_the_page_sets_the_figures_beside_the_aims(report, page):
    gqa, mha = report.cells()[:2]
    made = page.page_of([plain(own) for cell in (gqa, mha) for own in rows_of(cell)])
    assert "# Decode steps on Pretended 1" in made
    said = "llama-3.1-8b, batch 8, 32,768 tokens, k = 2,048 | 5.00 | 2.50 | - | yes |"
    assert f"| 3 x the fastest dense | {said}" in made
    said = "llama-2-7b, batch 8, 32,768 tokens, k = 512 | 5.00 | 2.50 | - | no |"
    assert f"| 7.2 x the fastest dense | {said}" in made
    assert "batch 32, 32,768 tokens, k = 512 | - | - | - | not measured |" in made
    assert "k = 2,048 | 25% | 25% | - | no |" in made
    begin = (
        "| llama-3.1-8b | 8 | 32,768 | 512 | sdpa-flash-hf, 100.0 | 80.0 * | 20.0 | 1,000 | 5.00"
    )
    assert begin in made
    assert "| llama-2-7b | 8 | 32,768 | 120.0, 25% | 100.0, 25% |" in made
    assert gqa.command in made


def test_of_a_cell_that_was_measured_twice_the_last_time_counts(report, page):
    (cell,) = report.cells()[:1]
    old = rows_of(cell, 1.0)
    new = rows_of(cell, 50.0, at="2026-01-02T00:00:00Z")
    for rows in (old + new, new + old):
        made = page.page_of([plain(own) for own in rows])
        assert "k = 2,048 | 2.00 | 1.00 | - | no |" in made


def plain(own):
    return json.loads(json.dumps(vars(own)))


def test_a_process_is_started_again_until_it_ends_by_itself(report):
    codes = iter([report.BROKEN, -6, report.DONE, report.BROKEN])
    assert report.supervise(lambda: next(codes), 10) == report.DONE
    assert next(codes) == report.BROKEN
    for code in (1, report.NO_DEVICE, report.OUT_OF_TIME):
        codes = iter([code, report.DONE])
        assert report.supervise(lambda codes=codes: next(codes), 10) == code
    assert report.supervise(lambda: report.BROKEN, 3) == report.BROKEN


def test_a_device_gives_its_name_to_the_files(report):
    assert report.file_name("NVIDIA H200") == "nvidia-h200"
    assert report.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_without_a_gpu_it_says_so_and_writes_nothing(report, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = ["--folder", str(tmp_path), "--deadline", "1"]
    assert report.main(given) == report.NO_DEVICE
    assert "there is no CUDA device here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

"""bench: rows as JSON and as tables, figures, refusals, and the exit code of a wrong result."""

from dataclasses import replace

import pytest

from loki_attn.bench.gate import Gate, Verdict
from loki_attn.evaluate.results import read_rows

SMALL = ("--heads", 6, "--kv-heads", 2, "--head-dim", 32, "--rank", 8, "--layers", 2)
EVERY_ROW = {
    "task", "contender", "shape", "batch", "context", "dtype", "backend", "threads", "median_us",
    "p20_us", "p80_us", "samples", "gate", "provenance",
}  # fmt: skip
STEP = EVERY_ROW | {
    "kind", "part", "num_heads", "num_kv_heads", "head_dim", "k", "rank", "plane", "bytes_touched",
    "gb_per_s", "read_gb_per_s", "read_by", "share_of_bandwidth", "layers", "bytes_between_visits",
    "last_level_cache_bytes", "ratios", "ratio_best_torch", "ratio_hf", "ratio_dense_native",
    "share_of_byte_limit", "device", "timed_by", "ratio_best_dense", "best_dense", "eager_us",
}  # fmt: skip
SPEECH = EVERY_ROW | {
    "policy", "prefill_s", "prefill_ratio", "tokens_per_s", "ratio_stock_dynamic",
    "ratio_stock_static", "cache_bytes", "peak_cache_bytes", "evicted_rows", "peak_bytes",
    "peak_added_bytes", "sparse_calls", "note",
}  # fmt: skip


@pytest.fixture
def decode(loki):
    def run(*arguments, contexts=96, k="T/8"):
        rest = ("--contexts", contexts, "--k", k, "--repeats", 2, *arguments)
        return loki("bench", "decode", *SMALL, *rest)

    return run


def test_decode_json(decode, tmp_path):
    done = decode("--json", "--parts", "--out", tmp_path / "rows.jsonl", contexts="96,128")
    assert done.code == 0
    rows = done.json
    assert isinstance(rows, list)
    assert all(set(row) == STEP for row in rows)
    assert {row["context"] for row in rows} == {96, 128}
    assert {row["shape"] for row in rows} == {"6x2x32"}
    loki = [row for row in rows if row["kind"] == "loki" and row["part"] is None]
    assert [row["contender"] for row in loki] == ["loki int8 k=12", "loki int8 k=16"]
    for row in loki:
        assert row["gate"]["verdict"] == "passed"
        assert min(row["ratio_best_torch"], row["ratio_hf"], row["share_of_byte_limit"]) > 0
        assert row["provenance"]["device"] == "cpu"
        assert row["provenance"]["command"].startswith("loki-attn")
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    decode("--json", "--out", tmp_path / "rows.jsonl")
    assert len(list(read_rows(tmp_path / "rows.jsonl"))) > len(rows)


def test_decode_table_and_figure(decode, tmp_path):
    pytest.importorskip("matplotlib")
    done = decode("--planes", "int8,bf16", "--figure", tmp_path / "growth.svg", contexts="96,128")
    assert done.code == 0
    for words in ("6x2x32 (6/2 heads of 32), batch 1, 128 tokens, bf16", "sdpa-hf", "loki bf16"):
        assert words in done.stdout
    assert "2 layers in turn" in done.stdout
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_decode_of_several_batches(decode):
    done = decode("--batch", "1,2")
    assert done.code == 0
    for batch in (1, 2):
        assert f"6x2x32 (6/2 heads of 32), batch {batch}, 96 tokens, bf16" in done.stdout
    rows = decode("--batch", "2,1", "--json").json
    assert [row["batch"] for row in rows] == sorted((row["batch"] for row in rows), reverse=True)
    assert {row["batch"] for row in rows} == {1, 2}
    assert {(row["device"], row["timed_by"]) for row in rows} == {("cpu", "steps")}


def test_a_table_of_a_device_names_it_and_marks_what_no_graph_holds(decode, capsys):
    from loki_attn.bench.rows import StepRow
    from loki_attn.cli.bench_tables import show_steps

    rows = [StepRow(**row) for row in decode("--json").json]
    gpu = {"provenance": {"gpu": "Pretended 1"}, "device": "cuda", "best_dense": "sdpa-hf"}
    show_steps(
        [
            replace(row, **gpu, timed_by="events" if row.kind == "exact" else "graph replay")
            for row in rows
        ]
    )
    said = " ".join(capsys.readouterr().out.split())
    for words in ("Pretended 1, backend", "x best dense", "in a graph", "exact-topk k=12 *"):
        assert words in said
    assert "best dense: sdpa-hf" in said
    assert "sdpa-hf *" not in said


def test_growth_measures_the_parts_or_draws_old_rows(loki, tmp_path):
    pytest.importorskip("matplotlib")
    rows, figure = tmp_path / "rows.jsonl", tmp_path / "growth.svg"
    small = [option for option in SMALL if option not in {"--rank", 8}]
    done = loki(
        "bench", "growth", *small, "--contexts", "64,96", "--repeats", 1, "--out", rows,
        "--figure", figure, "--json",
    )  # fmt: skip
    assert {row["part"] for row in done.json} == {None, "score", "choose", "attend"}
    drawn = figure.read_bytes()
    figure.unlink()
    again = loki("bench", "growth", "--rows", rows, "--figure", figure)
    assert (again.code, again.stdout) == (0, "")
    assert figure.read_bytes() == drawn


def test_a_wrong_contender_has_no_timing_and_fails_the_run(decode, monkeypatch):
    judge = Gate.judge

    def spoilt(self, contender, found=None):
        if contender.name == "sdpa-hf":
            return Verdict(passed=False, largest_error=1.0, allowed=0.1, reason="it is off")
        return judge(self, contender, found)

    monkeypatch.setattr(Gate, "judge", spoilt)
    done = decode("--json")
    assert done.code == 1
    assert "sdpa-hf" not in {row["contender"] for row in done.json}
    assert "error: sdpa-hf at 96 tokens has no timing, because it is wrong: it is off." in (
        " ".join(done.stderr.split())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-3.1"], "Unknown shape 'llama-3.1'. Did you mean 'llama-3.1-8b'?"),
        (["--heads", 6], "needs all of --heads, --kv-heads and --head-dim"),
        (["--contexts", "0"], "A context holds at least 1 token, got 0"),
        (["--contexts", "many"], "--contexts takes whole numbers with commas between them"),
        (["--contexts", ""], "There are no contexts"),
        (["--contexts", "128", "--k", "129"], "k=129 reads 129 of 128 tokens"),
        (["--contexts", "128", "--k", "some"], "k is a number of tokens or a part such as T/8"),
        (["--planes", "int3"], "Unknown plane_dtype 'int3'"),
        (["--dtype", "float32"], "Unknown dtype 'float32'"),
        (["--rank", "500"], "rank=500 is above head_dim=128 of llama-3.1-8b"),
        (["--threads", "0"], "threads=0 cannot compute"),
        (["--batch", "1,0"], "batch must be 1 or more, got 0"),
        (["--batch", "8,8"], "--batch takes different numbers"),
        (["--batch", "x"], "--batch takes whole numbers with commas between them"),
        (["--device", "cude"], "Unknown device 'cude'. Did you mean 'cuda'?"),
        (["--memory-gib", "0.0001"], "raise the memory limit or lower the context"),
    ],
)
def test_decode_refusals(loki, arguments, message):
    assert message in loki("bench", "decode", *arguments).error


def test_cuda_is_refused_where_there_is_none(loki, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = loki("bench", "decode", "--device", "cuda")
    assert "there is no CUDA device here" in done.error


@pytest.fixture
def generate(loki, model, bases):
    def run(*arguments, contexts=200, policy="loki:top_k=32,rank=4"):
        return loki(
            "bench", "generate", "--model", model, "--basis", bases["mixed"], "--policy", policy,
            "--contexts", contexts, "--new-tokens", 4, "--repeats", 2, *arguments,
        )  # fmt: skip

    return run


def test_generate_json(generate, tmp_path):
    done = generate("--json", "--out", tmp_path / "rows.jsonl", contexts="100,200")
    assert done.code == 0
    rows = done.json
    assert all(set(row) == SPEECH for row in rows)
    names = ["stock dynamic", "stock static", "attached dense", "attached loki:top_k=32,rank=4"]
    assert [row["contender"] for row in rows] == names * 2
    for row in rows:
        assert row["gate"]["verdict"] == "passed"
        assert row["prefill_s"] > 0
        assert row["samples"] == 2 * 3
        assert row["cache_bytes"] > 0
    loki = rows[-1]
    assert loki["policy"] == "loki"
    assert loki["sparse_calls"] == 2 * 2 * 4
    assert loki["ratio_stock_dynamic"] == pytest.approx(rows[4]["median_us"] / loki["median_us"])
    assert loki["ratio_stock_static"] == pytest.approx(rows[5]["median_us"] / loki["median_us"])
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows


def test_generate_table_and_another_backend(generate):
    done = generate("--backend", "reference")
    assert done.code == 0
    assert "backend reference" in done.stdout
    assert "attached loki:top_k=32,rank=4" in done.stdout


def test_a_budget_that_covers_the_context_is_called_dense(generate):
    (*_, loki) = generate("--json", policy="loki:top_k=256,rank=4").json
    assert (loki["note"], loki["sparse_calls"]) == ("dense", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "2000"], "A context of 2,000 tokens is beyond the 1,024 positions"),
        (["--contexts", "12"], "leaves no prompt before 12 new ones (2 + 1 turns of 4)"),
        (["--backend", "nativ"], "Unknown backend 'nativ'. Did you mean 'native'?"),
        (["--policy", "loki:top_k=32,rank=4"], "is given twice"),
        (["--policy", "loky"], "Unknown policy 'loky'"),
    ],
)
def test_generate_refusals(generate, arguments, message):
    assert message in generate(*arguments).error


@pytest.mark.parametrize("command", ["decode", "growth", "generate"])
def test_every_bench_has_help_with_an_example(loki, command):
    done = loki("bench", command, "--help")
    assert done.code == 0
    assert f"Example: loki-attn bench {command}" in " ".join(done.stdout.split())
    assert "--json" in done.stdout

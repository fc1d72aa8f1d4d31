"""calibrate and inspect: files, resuming to the bit, and every refusal."""

from contextlib import contextmanager

import pytest
import torch

from loki_attn.basis import Basis
from loki_attn.cli import terminal
from loki_attn.key_stats import KeyStats


def rows_of(stats):
    kept, _ = KeyStats.load(stats)
    kinds = ("key", "pre", "query", "sharp")
    return [
        getattr(kept.moments(layer, rows), part)
        for layer in kept.layers
        for rows in kinds
        for part in ("weight", "total", "outer")
    ]


@pytest.fixture
def interrupt_after(monkeypatch):
    """Press Ctrl-C as soon as a number of tokens is done."""

    def arm(tokens):
        @contextmanager
        def progress(*_):
            def advance(done, news=""):
                if done >= tokens:
                    raise KeyboardInterrupt

            yield advance

        monkeypatch.setattr(terminal, "progress", progress)

    yield arm
    monkeypatch.undo()


def test_writes_a_basis_into_the_cache(calibrate, cache):
    done = calibrate()
    path = cache / "bases" / "tiny-mixed.safetensors"
    assert done.code == 0
    assert done.stdout.strip() == str(path)
    assert "512 tokens" in done.stderr
    assert Basis.load(path).kind == "mixed"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_json(calibrate, tmp_path):
    out, stats = tmp_path / "new" / "b.safetensors", tmp_path / "s.safetensors"
    found = calibrate("--json", "--out", out, "--stats-out", stats, "--kind", "pca").json
    assert found.pop("seconds") > 0
    assert 1 <= found.pop("mean_rank_at_90") <= 8
    assert found == {
        "basis": str(out),
        "kind": "pca",
        "side": "post",
        "layers": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "tokens": 512,
        "stats": str(stats),
    }
    provenance = Basis.load(out).provenance
    assert provenance["corpus"]["name"] == "loki-attn:calibration"
    assert provenance["model"]["id"] == "tiny"


def test_stats_give_other_bases_without_a_model(loki, bases, cache, tmp_path):
    done = loki("calibrate", "--stats", bases["stats"], "--kind", "mixed", "--pca-columns", 2)
    assert done.stdout.strip() == str(cache / "bases" / "tiny-mixed.safetensors")
    out = tmp_path / "sharp.safetensors"
    loki("calibrate", "--stats", bases["stats"], "--sharpness", 0.5, "--out", out)
    assert Basis.load(out).provenance["fit"]["sharpness"] == 0.5


def test_interrupted_calibration_resumes_bit_equal(calibrate, interrupt_after, monkeypatch, cache):
    whole = cache / "whole.safetensors"
    calibrate("--stats-out", whole)

    basis = cache / "b.safetensors"
    partial = cache / "b.safetensors.partial"
    interrupt_after(256)
    done = calibrate("--out", basis)
    assert (done.code, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == (
        "interrupted: 256 tokens are kept; the same command continues."
    )
    assert partial.exists()
    assert not basis.exists()

    monkeypatch.undo()
    resumed = cache / "resumed.safetensors"
    done = calibrate("--out", basis, "--stats-out", resumed)
    assert "continuing after 256 tokens" in done.stderr
    assert not partial.exists()
    pairs = zip(rows_of(whole), rows_of(resumed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert KeyStats.load(whole)[1] == KeyStats.load(resumed)[1]


def test_an_interrupt_before_the_first_window_keeps_nothing(calibrate, monkeypatch, cache):
    @contextmanager
    def progress(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(terminal, "progress", progress)
    assert calibrate().code == 130
    assert list((cache / "bases").iterdir()) == []


def test_another_run_is_not_continued(calibrate, interrupt_after, monkeypatch, cache):
    basis = cache / "b.safetensors"
    interrupt_after(128)
    calibrate("--out", basis)
    monkeypatch.undo()

    error = calibrate("--out", basis, "--tokens", 256).error
    assert "the beginning of another calibration" in error
    assert "--no-resume" in error
    assert calibrate("--out", basis, "--tokens", 256, "--no-resume").code == 0


def test_a_damaged_beginning_is_refused(calibrate, cache):
    cache.mkdir(parents=True)
    (cache / "b.safetensors.partial").write_bytes(b"half")
    assert "Run `loki-attn calibrate` again" in calibrate("--out", cache / "b.safetensors").error
    assert calibrate("--out", cache / "b.safetensors", "--no-resume").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "balancd"], "Unknown basis kind 'balancd'. Did you mean 'balanced'? Valid: "),
        (["--side", "mid"], "Unknown side 'mid'."),
        (["--side", "pre"], "use side='post'"),
        (["--sharpness", 2], "sharpness is a share in [0, 1], got 2.0"),
        (["--kind", "pca", "--sharpness", 0.5], "which a pca basis does not use"),
        (["--kind", "balanced", "--pca-columns", 2], "pca_columns belongs to kind 'mixed'"),
        (["--dtype", "float3"], "Unknown dtype 'float3'. Did you mean 'float32'?"),
        (["--model", "smollm2"], "Did you mean 'smollm2-135m'?"),
        (["--text", "none.txt"], "No text file at 'none.txt'"),
        (["--out", "."], "'.' is a folder; give the path of a file."),
        (["--stats", "none"], "There is no calibration statistics file at 'none'"),
        (["--stats", "none", "--text", "x"], "drop --text"),
        (["--window", 2048, "--tokens", 4096], "exceed the model's context of 1024"),
        (["--window", 1000, "--tokens", 999], "at least one window of 1000 tokens"),
    ],
)
def test_refusals(calibrate, arguments, message):
    assert message in calibrate(*arguments).error


def test_texts_that_cannot_be_used(calibrate, write):
    assert "is empty" in calibrate("--text", write("empty.txt", " \n")).error
    latin = calibrate("--text", write("latin.txt", "é".encode("latin-1"))).error
    assert "is not UTF-8" in latin
    short = calibrate("--text", write("short.txt", "A few words.")).error
    assert "give more text or a smaller window" in short


def test_a_place_that_cannot_be_written(calibrate, write):
    blocked = write("file", "") / "b.safetensors"
    assert "error: " in calibrate("--out", blocked).error


def test_inspect(loki, bases):
    done = loki("inspect", bases["mixed"])
    assert "mixed basis, 2 KV heads of 8 per layer, post-RoPE keys" in done.stdout
    assert "rank at 90 %" in done.stdout
    assert "mean-square score" in done.stdout
    assert "id tiny" in done.stdout
    assert "key variance" in loki("inspect", bases["pca"]).stdout


def test_inspect_json(loki, bases):
    found = loki("inspect", bases["pca"], "--json").json
    basis = Basis.load(bases["pca"])
    expected = basis.rank_at(0.9).double().mean(1).tolist()
    assert [row["rank_at_90"] for row in found["layers"]] == expected
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    assert found["mean"].keys() == {"rank_at_80", "rank_at_90", "rank_at_95"}
    assert found["provenance"]["tokens"] == 512
    assert (found["kind"], found["head_dim"], found["orthogonal"]) == ("pca", 8, True)


def test_inspect_refuses_damaged_files(loki, bases, write):
    whole = bases["pca"].read_bytes()
    assert "error: " in loki("inspect", write("cut.safetensors", whole[: len(whole) // 2])).error
    assert "not a basis" in loki("inspect", bases["stats"]).error

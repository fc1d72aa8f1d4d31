"""Rows: written whole, read back equal, and never without their origin."""

import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from loki_attn import Policy, preset
from loki_attn.errors import InputError
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import append_rows, make_row, read_rows
from loki_attn.provenance import provenance
from loki_attn.testing import layer_shape, tiny_basis

LM = SimpleNamespace(identity={"id": "tiny", "hash": "abc", "rope": None}, dtype="float16")


def row(name="one", n=3, **more):
    contender = Contender(name=name, policy=preset("dense"))
    what = {"task": "perplexity", "protocol": "decode: so", "settings": {}, "metrics": {}} | more
    return make_row(LM, contender, n=n, **what)


def test_rows_round_trip(tmp_path):
    rows = [
        row(metrics={"nll_delta": 0.1 + 0.2, "layers": {"index": [0, 2], "mass": [0.5, 1e-300]}}),
        row("zwei \u2028 \x85 Zeilen\n", settings={"corpus": "Grüße", "windows": 2}),
    ]
    append_rows(tmp_path / "deep" / "rows.jsonl", rows)
    assert list(read_rows(tmp_path / "deep" / "rows.jsonl")) == [asdict(r) for r in rows]


def test_rows_are_only_ever_appended(tmp_path):
    file, before = tmp_path / "rows.jsonl", b""
    for count in range(1, 4):
        append_rows(file, [row(str(count))] * count)
        now = file.read_bytes()
        assert now.startswith(before)
        assert now.endswith(b"}\n")
        before = now
    assert [r["contender"] for r in read_rows(file)] == ["1", "2", "2", "3", "3", "3"]


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_line_cut_short_is_passed_over_and_the_next_begins_anew(tmp_path, cut):
    """`cut` bytes are lost of the last line: its newline, its brace, all but its first byte."""
    file = tmp_path / "rows.jsonl"
    append_rows(file, [row("whole"), row("cut")])
    whole = file.read_bytes()
    keep = whole.index(b"\n") + 2 if cut < 0 else len(whole) - cut
    file.write_bytes(whole[:keep])
    left = ["whole", "cut"] if cut == 1 else ["whole"]
    assert [r["contender"] for r in read_rows(file)] == left
    append_rows(file, [row("later")])
    assert [r["contender"] for r in read_rows(file)] == [*left, "later"]
    assert file.read_bytes().startswith(whole[:keep])


def test_a_missing_file_is_an_error_and_an_empty_one_has_no_rows(tmp_path):
    with pytest.raises(InputError, match=r"There is no results file '.*none\.jsonl'\."):
        list(read_rows(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    assert list(read_rows(tmp_path / "empty.jsonl")) == []
    append_rows(tmp_path / "empty.jsonl", [row("first")])
    assert len(list(read_rows(tmp_path / "empty.jsonl"))) == 1


def test_a_row_records_its_policy():
    policy = preset("loki", top_k=99, rank=8, name="mine")
    made = make_row(
        LM,
        Contender(name="label", policy=policy),
        task="needle",
        protocol="how",
        settings={"seed": 1},
        metrics={"accuracy": 0.5},
        n=2,
    )
    assert (made.task, made.protocol, made.contender, made.n) == ("needle", "how", "label", 2)
    assert (made.settings, made.metrics) == ({"seed": 1}, {"accuracy": 0.5})
    assert made.model == {"id": "tiny", "hash": "abc", "rope": None, "dtype": "float16"}
    assert "dtype" not in LM.identity
    assert made.policy["budget"]["top_k"] == 99
    assert made.policy["select"]["rank"] == 8
    assert Policy.from_json(json.dumps(made.policy)) == policy
    assert made.basis is None


def test_a_row_records_its_basis():
    """Kind and side are the basis's own, whatever its provenance calls itself."""
    basis = tiny_basis(layer_shape(), "balanced")
    basis.provenance.update(tokens=77, kind="hearsay", side="hearsay")
    contender = Contender(name="loki", policy=preset("loki"), basis=basis)
    made = make_row(LM, contender, task="t", protocol="p", settings={}, metrics={}, n=1)
    assert (made.basis["kind"], made.basis["side"], made.basis["tokens"]) == (
        "balanced",
        "post",
        77,
    )


def test_a_row_records_when_where_and_with_what_it_was_made():
    import torch

    made = row().provenance
    assert made == {**provenance(), "time": made["time"]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["time"])
    assert made["versions"]["torch"] == torch.__version__
    assert set(made["versions"]) == {"loki-attn", "torch", "transformers"}
    assert made["threads"] == torch.get_num_threads()
    assert made["python"].startswith("3.")
    assert made["machine"]

"""The report: synthetic rows become tables and figures with alt text; broken rows are named."""

import json
import re
import struct
import sys

import pytest

from loki_attn.errors import InputError
from loki_attn.report import sections, write_markdown

LAYERS = [0, 1, 2, 3, 4]


def make_row(task="perplexity", contender="loki", top_k=64, settings=None, n=10, **metrics):
    method = {"dense": "dense", "streaming": "streaming_llm"}.get(contender, "loki")
    return {
        "task": task,
        "protocol": "decode: one token per step.",
        "model": {"id": "tiny|model", "hash": "0123456789abcdef"},
        "contender": contender,
        "policy": {
            "select": {"method": method},
            "budget": {} if method == "dense" else {"top_k": top_k},
            "group_reduce": "softmax_sum",
        },
        "basis": {"kind": "balanced", "tokens": 99, "corpus": {"name": "novel"}},
        "settings": settings or {"corpus": "novel", "windows": 2},
        "metrics": metrics,
        "n": n,
        "provenance": {
            "time": "2026-01-02T03:04:05Z",
            "commit": "abc123",
            "versions": {"torch": "2.99", "loki-attn": None},
            "python": "3.11",
            "machine": "x86_64",
            "processor": "Some CPU",
            "threads": 1,
        },
    }


def perplexity_row(contender, perplexity, kl, share, **options):
    return make_row(
        contender=contender,
        perplexity=perplexity,
        perplexity_dense=20.0,
        nll_delta=0.01,
        nll_delta_standard_error=0.002,
        kl_to_dense=kl,
        kl_standard_error=kl / 10,
        top1_agreement=0.9,
        read_bytes_share=share,
        **options,
    )


def layered(task, contender, values, **metrics):
    layers = {"index": LAYERS, **dict.fromkeys(metrics, values)}
    return make_row(task, contender, **metrics, layers=layers)


ALL = [
    perplexity_row("loki", 20.5, 0.0123, 0.2),
    perplexity_row("streaming", 21.5, 0.2, 0.15),
    layered(
        "fidelity", "loki", [0.9, 0.95, 0.95, 0.95, 0.99], recall=0.9, mass=0.95, exact_mass=0.96
    ),
    layered(
        "fidelity", "streaming", [0.5, 0.6, 0.6, 0.6, 0.7], recall=0.6, mass=0.7, exact_mass=0.96
    ),
    make_row("passkey", "dense", accuracy=1.0, settings={"length_tokens": 1024}),
    make_row("passkey", "loki", accuracy=0.8, settings={"length_tokens": 1024}),
    make_row("passkey", "loki", accuracy=0.5, settings={"length_tokens": 2048}),
    layered("calibration", "pca, after RoPE", [10.0, 20.0, 20.0, 20.0, 30.0], rank_at_90=20.0),
    make_row("generation", "dense", tokens_per_s=10.0, read_bytes_per_token=2048.0),
    make_row("generation", "loki", tokens_per_s=9.0, read_bytes_per_token=512.0),
    make_row("quiz", "loki", correct=1, answer="a | whistle\n<b>"),
]


def tables(page):
    """The page's tables, each a list of lines, each a list of cells."""
    found = [[]]
    for line in page.splitlines():
        if line.startswith("| "):
            found[-1].append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [t for t in found if t]


def test_page_has_tables_with_n_errors_and_the_best_marked(tmp_path):
    page = write_markdown(ALL, tmp_path / "page.md", title="Title").read_text()
    assert page.startswith("# Title\n")
    first = tables(page)[0]
    assert first[0][:4] == ["contender", "budget", "perplexity", "nll - dense"]
    assert first[0][-1] == "n"
    loki, streaming = first[2:]
    assert loki[:5] == ["loki", "top_k=64", "**20.500**", "+0.0100 ± 0.0020", "**0.0123** ± 0.0012"]
    assert streaming[2] == "21.500"
    assert loki[-1] == "10"
    assert all(len({len(line) for line in table}) == 1 for table in tables(page))


def test_settings_that_differ_become_columns_and_are_judged_apart(tmp_path):
    page = write_markdown(ALL, tmp_path / "page.md").read_text()
    passkey = next(t for t in tables(page) if "accuracy" in t[0])
    assert passkey[0][:2] == ["contender", "length_tokens"]
    assert passkey[3][3] == "80% ± 13%"
    assert "**" not in "".join(passkey[2])


def test_every_figure_has_a_file_alt_text_and_its_data(tmp_path):
    page = write_markdown(ALL, tmp_path / "page.md").read_text()
    images = re.findall(r"!\[(.+?)\]\((.+?)\)\n\n<details>", page)
    assert [link.split("-")[-1] for _, link in images] == [
        "perplexity.png",
        "fidelity.png",
        "passkey.png",
        "rank.png",
        "generation.png",
    ]
    for alt, link in images:
        data = (tmp_path / link).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 600
        assert height > 200
        assert len(alt) > 60
    assert "loki: 20.500 at 20.0" in images[0][0]
    assert "loki: 0.900 to 0.990, mean 0.948" in images[1][0]
    assert page.count("<details>") == page.count("</details>") == len(images)
    assert not list(tmp_path.rglob("*.tmp"))


def test_foot_names_model_commit_versions_machine_and_policies(tmp_path):
    page = write_markdown(ALL, tmp_path / "page.md").read_text()
    foot = page[page.index("## Where the figures come from") :]
    for fact in ("0123456789ab", "abc123", "torch 2.99, Python 3.11", "Some CPU, x86_64"):
        assert fact in foot
    assert "tiny\\|model" in foot
    assert '"method": "streaming_llm"' in foot
    assert "balanced, 99 tokens of novel" in foot


def test_texts_break_no_table(tmp_path):
    page = write_markdown(ALL[-1:], tmp_path / "page.md").read_text()
    assert "a \\| whistle &lt;b>" in page


def test_without_figures_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = write_markdown(ALL, tmp_path / "page.md", figures=False)
    assert "![" not in page.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]
    with pytest.raises(InputError, match=r"Figures need matplotlib .*loki-attn\[report\]"):
        write_markdown(ALL, tmp_path / "page.md")


def test_newest_row_of_a_run_counts(tmp_path):
    rows = [perplexity_row("loki", 99.0, 0.5, 0.2), perplexity_row("loki", 20.5, 0.1, 0.2)]
    page = write_markdown(rows, tmp_path / "page.md", figures=False).read_text()
    assert "99.000" not in page
    assert "1 older rows of the same runs are left out." in page


def test_budgets_of_one_method_make_one_curve(tmp_path):
    rows = [perplexity_row(f"loki k={k}", 20 + 9 / k, 1 / k, k / 999, top_k=k) for k in (256, 64)]
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    data = tables(page)[1]
    assert [line[0] for line in data[2:]] == ["loki k", "loki k"]
    assert [line[1] for line in data[2:]] == ["6.4", "25.6"]


@pytest.mark.parametrize("share", [True, False], ids=["same amount", "other amounts"])
def test_without_a_read_share_budgets_or_places_are_drawn(tmp_path, share):
    rows = [perplexity_row("loki", 20.5, 0.1, 0.2), perplexity_row("loki", 20.4, 0.0, 0.2, top_k=9)]
    for row in rows:
        del row["metrics"]["read_bytes_share"]
    if not share:
        rows[1]["policy"]["budget"] = {"fraction": 0.5}
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    assert ("budget, top_k" if share else "row of the table") in page


def test_unknown_tasks_show_all_their_numbers(tmp_path):
    page = write_markdown([make_row("speed", seconds=1.25, note="x")], tmp_path / "page.md")
    assert "| loki | top_k=64 | 1.25 | x | 10 |" in page.read_text()


def test_a_folder_gets_a_report_and_other_names_are_refused(tmp_path):
    assert write_markdown(ALL[:1], tmp_path, figures=False) == tmp_path / "report.md"
    with pytest.raises(InputError, match=r"Markdown file; got .*page\.html"):
        write_markdown(ALL[:1], tmp_path / "page.html")


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write .*page\.md"):
        write_markdown(ALL[:1], tmp_path / "file" / "page.md")


def broken(**changes):
    return {**perplexity_row("loki", 20.5, 0.1, 0.2), **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", r"Row 2 is str; expected an object"),
        (broken(task=None), r"Row 2 .*needs a text under 'task', got None"),
        (
            broken(metrics={"perplexity": 3.0}),
            r"'loki'\) needs a number under 'metrics.kl_to_dense",
        ),
        (
            broken(metrics={"perplexity": "3"}),
            r"needs a number under 'metrics.perplexity', got '3'",
        ),
        (broken(policy="loki"), r"needs an object under 'policy', got 'loki'"),
        (broken(n=True), r"needs a whole number under 'n', got True"),
        (broken(n=0), r"averages over n=0 items"),
        (
            make_row("fidelity", recall=1, mass=1, layers={"index": [0], "mass": [1, 2]}),
            r"lists of different lengths under 'metrics.layers'",
        ),
        (make_row("fidelity", recall=1, mass=1, layers=[1]), r"needs lists under 'metrics.layers'"),
    ],
)
def test_broken_rows_are_refused_by_number_and_field(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        write_markdown([ALL[0], row], tmp_path / "page.md")
    assert not list(tmp_path.iterdir())


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="There are no rows to report"):
        write_markdown([], tmp_path / "page.md")


def test_rows_survive_their_file_format(tmp_path):
    again = json.loads(json.dumps(ALL))
    one, two = (
        write_markdown(r, tmp_path / f"{i}.md", figures=False) for i, r in enumerate((ALL, again))
    )
    assert one.read_text() == two.read_text()
    assert [s.task for s in sections(ALL)][:2] == ["perplexity", "fidelity"]

"""The report: synthetic rows become tables and figures with alt text; broken rows are named."""

import json
import re
import struct
import sys
from itertools import product

import pytest

from loki_attn.errors import InputError
from loki_attn.report import sections, write_markdown
from loki_attn.report.canvas import scale_of, styles
from loki_attn.report.rows import series_name
from loki_attn.report.words import ALT_LIMIT, alt_text

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
    assert first[0] == ["contender", "perplexity", "KL to dense", "KV bytes read"]
    loki, streaming = first[2:]
    assert loki == ["loki", "**20.500**", "**0.0123** ± 0.0012", "20.0%"]
    assert streaming[1] == "21.500"
    same = "budget top_k=64, nll - dense +0.0100 ± 0.0020, same top token 90.0%, n 10."
    assert f"Settings: corpus novel, windows 2. In every row: {same}" in page
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
    names = [link.split("-")[-1].removesuffix(".png") for _, link in images]
    assert names == ["perplexity", "fidelity", "passkey", "rank", "generation"]
    for alt, link in images:
        data = (tmp_path / link).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 600
        assert height > 200
        assert len(alt) > 60
        assert len(alt) < ALT_LIMIT
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


@pytest.mark.parametrize("newest_first", [True, False])
def test_newest_row_of_a_run_counts(tmp_path, newest_first):
    runs = (("loki", 99.0), ("streaming", 30.0), ("loki", 20.5))
    old, other, new = (perplexity_row(name, value, 0.5, 0.2) for name, value in runs)
    old["provenance"]["time"] = "2025-12-31T00:00:00Z"
    old["policy"]["select"]["plane_dtype"] = "spelt out by another version"
    rows = [new, other, old] if newest_first else [old, other, new]
    page = write_markdown(rows, tmp_path / "page.md", figures=False).read_text()
    assert "99.000" not in page
    assert "1 older rows of the same runs are left out." in page
    assert [line[0] for line in tables(page)[0][2:]] == ["loki", "streaming"]


def test_rows_of_other_bases_or_budgets_are_no_re_runs():
    rows = [perplexity_row("loki", 20.5, 0.1, 0.2, top_k=k) for k in (64, 64, 128)]
    rows[1]["basis"] = {"kind": "pca"}
    (section,) = sections(rows)
    assert (len(section.rows), section.superseded) == (3, 0)


def test_budgets_of_one_method_make_one_curve(tmp_path):
    rows = [perplexity_row(f"loki k={k}", 20 + 9 / k, 1 / k, k / 999, top_k=k) for k in (256, 64)]
    rows.append(perplexity_row("loki k=64 int8", 21, 0.1, 0.3, top_k=64))
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    data = tables(page)[1]
    assert [line[0] for line in data[2:]] == ["loki", "loki", "loki int8"]
    assert [line[1] for line in data[2:4]] == ["6.4", "25.6"]


SERIES = {
    "mixed top_k=64 rank=16 int8": "mixed rank=16 int8",
    "balanced fraction=0.25 rank=8": "balanced rank=8",
    "exact fraction=0.125": "exact",
    "pca:side=pre fraction=0.5 rank=32": "pca:side=pre rank=32",
    "loki:top_k=64,rank=16": "loki:rank=16",
    "loki:rank=16,mass=9e-1": "loki:rank=16",
    "loki min_k=1": "loki min_k=1",
    "top_k=64": "top_k=64",
}


def test_a_series_is_named_without_its_budget():
    assert {name: series_name(name) for name in SERIES} == SERIES


def every_query_rows(count):
    rows = [
        perplexity_row(f"pca fraction={n}.5 rank=8", 20 + n, 0.01 * n + 0.01, 0, top_k=n)
        for n in range(count)
    ]
    for n, row in enumerate(rows):
        row["metrics"] |= {"nll_delta": 0.01 * (n + 1)}
        del row["metrics"]["read_bytes_share"]
    return rows


def height_of(path):
    return struct.unpack(">II", path.read_bytes()[16:24])[1]


def test_without_a_read_share_every_contender_has_a_line_of_dots(tmp_path):
    heights = []
    for count in (5, 40):
        page = write_markdown(every_query_rows(count), tmp_path / f"{count}.md").read_text()
        data = tables(page)[1]
        assert data[0] == ["contender", "nll - dense, nats", "KL to dense, nats"]
        assert [line[0] for line in data[2:]] == [
            f"pca fraction={n}.5 rank=8" for n in range(count)
        ]
        assert data[2][1:] == ["+0.0100 ± 0.0020", "0.0100 ± 0.0010"]
        heights.append(height_of(tmp_path / str(count) / "1-perplexity.png"))
    assert "best pca fraction=0.5 rank=8 (+0.0100), worst pca fraction=39.5 rank=8" in page
    assert heights[1] > 2 * heights[0]


def test_wide_ranges_are_drawn_by_their_logarithm():
    values = ([1, 30], [1, 31], [-0.01, 1], [0, 0])
    assert [scale_of(v)[0] for v in values] == ["linear", "log", "symlog", "linear"]
    assert [scale_of(v, log=True)[0] for v in ([1, 2], [0, 1, 2])] == ["log", "symlog"]


def test_a_method_has_one_colour_and_a_variant_one_marker():
    looks = styles(["pca rank=8", "pca rank=16 int8", "mixed rank=8", "exact"])
    colours, markers, _ = zip(*looks, strict=True)
    assert colours[0] == colours[1]
    assert len(set(colours)) == 3
    assert markers[0] == markers[2] != markers[1]
    assert len(set(styles([f"method {n}" for n in range(30)]))) == 30


KINDS = ("pca", "pca:side=pre", "balanced", "shuffled-balanced")


def fidelity_rows(corpora, budgets=(64, 1024)):
    rows = []
    for corpus, kind, rank, k in product(corpora, KINDS, (8, 32), budgets):
        row = layered("fidelity", f"{kind} rank={rank} top_k={k}", [0.5] * 5, recall=0.5, mass=0.5)
        row["metrics"] |= {"recall": rank / 64, "mass": rank / 40, "exact_mass": 0.9 + k / 20480}
        row["policy"]["budget"] = {"top_k": k}
        row["settings"] = {"corpus": corpus}
        rows.append(row)
    return rows


def test_many_contenders_are_drawn_over_their_budget_for_each_text(tmp_path):
    page = write_markdown(fidelity_rows(["novel", "code"]), tmp_path / "page.md").read_text()
    names = {p.name for p in (tmp_path / "page").iterdir()}
    assert names == {"1-fidelity-1.png", "1-fidelity-2.png"}
    _, first, second, *_ = tables(page)
    assert first == second
    heads = ["budget, top_k", "captured attention mass", "recall of the exact top-k"]
    assert first[0] == ["contender", *heads]
    assert first[2:4] == [["pca rank=8", k, "0.2000", "0.125"] for k in ("64", "1024")]
    for corpus in ("novel", "code"):
        assert f"What the selection keeps by budget (tiny|model; corpus {corpus})" in page
    assert "best pca rank=32 (0.8000 at 64), worst pca rank=8 (0.2000 at 64)" in page


def test_many_contenders_of_one_budget_are_drawn_as_dots(tmp_path):
    rows = fidelity_rows(["novel"], budgets=(64,))
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    assert "![Dot plot. What the selection keeps" in page
    assert [line[0] for line in tables(page)[1][2:]] == [row["contender"] for row in rows]


def test_alt_texts_stay_short():
    assert alt_text("Dot plot", "Title", ["all"], ["brief"]) == "Dot plot. Title. all"
    assert alt_text("Dot plot", "Title", ["all " * 200], ["brief"]) == "Dot plot. Title. brief"
    cut = alt_text("Dot plot", "Title", ["all " * 200], ["brief " * 200])
    assert len(cut) < ALT_LIMIT
    assert cut.endswith("brief...")


def test_passkeys_are_cells_of_contender_and_length(tmp_path):
    page = write_markdown(ALL[4:7], tmp_path / "page.md").read_text()
    header, _, *lines = tables(page)[1]
    assert header == ["contender", "at 1,024 tokens", "at 2,048 tokens"]
    assert lines == [["dense", "10/10", "-"], ["loki", "8/10", "5/10"]]
    assert "![Heat map. Passkeys found" in page
    assert "loki: 5/10 at 2,048 tokens" in page


def test_passkeys_of_one_name_and_two_budgets_are_both_shown(tmp_path):
    length = {"length_tokens": 9}
    rows = [make_row("passkey", top_k=k, accuracy=k / 99, settings=length) for k in (10, 50)]
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    assert [line[1] for line in tables(page)[1][2:]] == ["1/10", "5/10"]


def test_ranks_have_two_tables_and_a_figure_per_layer(tmp_path):
    rows = [
        make_row(
            "ranks",
            f"pca on {corpus}",
            settings={"tokens": 99},
            rank90_post=rank,
            rank90_post_layers=[rank - 1, rank + 1],
            rank90_pre=rank / 2,
            rank90_pre_layers=[rank / 2, rank / 2],
            variance_quarter_post_on_novel=rank / 100,
        )
        for corpus, rank in (("novel", 40.0), ("code", 20.0))
    ]
    page = write_markdown(rows, tmp_path / "page.md").read_text()
    ranks, variance, data, *_ = tables(page)
    assert ranks[0] == ["contender", "rank at 90 %, after RoPE", "rank at 90 %, before RoPE"]
    assert ranks[2] == ["pca on novel", "40.0", "20.0"]
    assert variance[0] == ["contender", "novel, after RoPE"]
    assert variance[2] == ["pca on novel", "40.0%"]
    assert data[0] == [
        "layer",
        *(
            f"rank at 90 %, {s} RoPE, pca on {c}"
            for s in ("before", "after")
            for c in ("novel", "code")
        ),
    ]
    assert data[2] == ["0", "20.0", "10.0", "39.0", "19.0"]
    assert "Settings: tokens 99. In every row: n 10." in page


def test_stated_intervals_are_printed_instead_of_their_ends(tmp_path):
    rows = [
        make_row("needle", name, score=score, score_low=score - 0.1, score_high=score + 0.1)
        for name, score in (("loki", 0.5), ("streaming", 0.25))
    ]
    (table, *_) = tables(write_markdown(rows, tmp_path / "page.md").read_text())
    assert table[0] == ["contender", "score"]
    assert [line[1] for line in table[2:]] == ["0.5 (0.4 to 0.6)", "0.25 (0.15 to 0.35)"]


def test_rows_of_the_bench_have_a_table(tmp_path):
    row = {
        "task": "bench decode",
        "contender": "sdpa-hf",
        "shape": "small",
        "context": 1024,
        "kind": "torch",
        "median_us": 12.5,
        "samples": 30,
        "provenance": ALL[0]["provenance"],
    }
    page = write_markdown([row], tmp_path / "page.md").read_text()
    assert "## A decode step, timed (small)" in page
    assert "| sdpa-hf | - | 12.5 | 30 |" in page


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
        (broken(metrics={"perplexity": 3.0}), r"'loki'\) needs a number under 'metrics.kl_to"),
        (broken(metrics={"perplexity": "3"}), r"number under 'metrics.perplexity', got '3'"),
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

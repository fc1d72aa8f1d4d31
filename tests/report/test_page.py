"""The page: one file that loads nothing, says only what is sure, and survives odd rows."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_rows import FIGURES, RIVALS, bounded, everything, perplexity, row, ruler, step

from loki_attn.errors import InputError
from loki_attn.evaluate.results import read_rows
from loki_attn.report import write_html

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Reader(HTMLParser):
    """Every element with its attributes and path; fails where tags do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        if self.seen and self.seen[-1][0] == "wbr":
            self.texts[-1] += data
        else:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.seen if name == tag]


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    reader.text = re.sub(r"\s+", " ", " ".join(reader.texts)).replace("\N{NO-BREAK SPACE}", " ")
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(write_html(everything(), tmp_path_factory.mktemp("page") / "page.html"))


def test_the_file_stands_alone(page):
    assert not {"link", "img", "iframe", "object"} & {tag for tag, *_ in page.seen}
    assert all("src" not in attributes for attributes in page.all("script"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")


def test_every_figure_is_there_with_a_name_a_caption_and_its_data(page):
    figures = page.all("figure")
    assert len(figures) == len(FIGURES)
    assert all(len(figure["aria-label"]) > 40 for figure in figures)
    inside = [tag for tag, _, path in page.seen if "figure" in path]
    assert inside.count("figcaption") == inside.count("details") == len(FIGURES)
    for title in FIGURES:
        assert title in page.text
    pictures = [a for tag, a, _ in page.seen if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) >= len(FIGURES)
    assert all(len(picture["aria-label"]) > 20 for picture in pictures)


def test_contents_lead_to_places_that_are_there_once(page):
    places = [a["id"] for _, a, _ in page.seen if "id" in a]
    assert len(places) == len(set(places))
    assert {a["href"][1:] for a in page.all("a")} <= set(places)


def test_headline_is_computed_from_the_rows(page):
    said = "mixed top_k=64 rank=16 int8 reads 10.0 % of the KV bytes that dense attention reads"
    assert said in page.text
    assert "stays within 0.05 nats of its predictions (KL 0.040 nats, 0.032 to 0.048)" in page.text


def test_without_a_near_contender_the_headline_says_so(tmp_path):
    rows = [perplexity(name, share, 5 * kl) for name, share, kl in RIVALS]
    text = read(write_html(rows, tmp_path / "page.html")).text
    assert "No sparse contender stays surely within 0.05 nats of dense attention on tiny" in text
    assert "exact top_k=64 comes closest (KL 0.100 nats, 0.080 to 0.120)" in text


def test_the_front_is_named_in_order(page):
    listed = page.text[page.text.index("The front, cheapest first") :]
    assert listed.index("mixed top_k=64 rank=16 int8") < listed.index("exact top_k=64")
    assert "0.0400 (0.0320 to 0.0480) at 10.0 %" in listed


def test_provenance_names_what_it_takes_to_measure_again(page):
    foot = page.text[page.text.index("Where the figures come from", 3000) :]
    for fact in ("0123456789ab", "abc123", "torch 2.99", "Some CPU", "loki-attn eval sweep"):
        assert fact in foot


def test_figures_without_an_interval_are_not_shown(tmp_path):
    rows = [row("needle", settings={"kind": "a"}, score=0.123, **bounded("other", 0.5, 0.1))]
    rows.append(row("needle", settings={"kind": "b"}, score=0.456, **bounded("other", 0.5, 0.1)))
    text = read(write_html(rows, tmp_path / "page.html")).text
    assert "2 figures without an interval are not shown." in text
    assert "12.3" not in text
    assert "0.4 to 0.6" in text


def test_a_lone_figure_without_an_interval_leaves_no_table(tmp_path):
    text = read(write_html([row("odd", value=0.123)], tmp_path / "page.html")).text
    assert "1 figure without an interval is not shown." in text
    assert "0.123" not in text


def test_texts_of_rows_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    rows = [perplexity(f"{evil} top_k=64", 0.1, 0.01), perplexity("b top_k=64", 0.2, 0.001)]
    rows += [ruler(f"{evil} top_k=64", 0.1, "</td>", 0.5), row("odd", evil, note=evil)]
    page = read(write_html(rows, tmp_path / "page.html"))
    assert len(page.all("script")) == 1
    assert evil in page.text


def test_long_names_may_break_where_a_setting_begins(tmp_path):
    path = write_html([row("odd", "loki:top_k=64,rank=8, a&amp,b", counts=1)], tmp_path / "a.html")
    assert "loki:<wbr>top_k=64,<wbr>rank=8, a&amp;amp,<wbr>b<" in path.read_text()


def test_models_get_a_chapter_each(tmp_path):
    rows = [perplexity(*rival, model=model) for model in ("one", "two") for rival in RIVALS]
    rows.append(step("sdpa-hf", "torch", 1024, 5.0))
    page = read(write_html(rows, tmp_path / "page.html"))
    ids = [a["id"] for a in page.all("section") if a.get("class") == "chapter"]
    assert ids == ["one", "two", "speed"]
    assert (
        read(write_html(rows, tmp_path / "b.html", title="Mine")).text.lstrip().startswith("Mine")
    )


def test_lm_eval_rows_share_a_matrix(tmp_path):
    rows = [
        row(f"lm-eval:{task}", name, **bounded(metric, 0.7, 0.1))
        for task, metric in (("piqa", "acc"), ("arc_easy", "acc"), ("ruler_vt", "recall"))
        for name in ("dense", "a top_k=64", "b top_k=64")
    ]
    text = read(write_html(rows, tmp_path / "page.html")).text
    assert "piqa (n 20)" in text
    assert "Recall, and below it the 95 % interval." in text


@pytest.mark.parametrize(
    "metrics",
    [
        {"rank_at_90": [[1, 2], [3]], "cumulative": []},
        {"rank_at_90": 7, "cumulative": [[]]},
        {"rank_at_90": [["x"]], "head_dim": None},
        {"by_depth": [{"depth": "deep"}, 5, {"depth": 0, "score": 7, "n": 1}]},
        {"score": float("nan"), "score_low": 1, "score_high": 2},
    ],
)
@pytest.mark.parametrize("task", ["spectrum", "needle", "ruler", "ranks", "tune", "fidelity_x"])
def test_odd_rows_leave_a_page_without_their_figure(tmp_path, task, metrics):
    page = read(write_html([row(task, **metrics)], tmp_path / "page.html"))
    assert page.all("figure") == []


def test_many_rows_are_fine(tmp_path):
    rows = [perplexity(f"p{at} top_k={at + 1}", (at + 1) / 999, 1 / (at + 1)) for at in range(900)]
    assert len(read(write_html(rows, tmp_path / "page.html")).all("tr")) > 1800


def test_equal_rows_give_an_equal_file(tmp_path):
    rows = everything()
    one = write_html(rows, tmp_path / "a.html").read_bytes()
    assert one == write_html(json.loads(json.dumps(rows)), tmp_path / "b.html").read_bytes()


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no recorded rows beside these tests")
def test_recorded_rows_make_a_page(tmp_path):
    rows = [row for file in sorted(RESULTS.glob("*.jsonl")) for row in read_rows(file)]
    page = read(write_html(rows, tmp_path / "page.html"))
    assert len(page.all("figure")) >= 8
    assert not re.search(r"\b(nan|None|Undefined)\b", page.text)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"is an HTML file; got .*page\.md"):
        write_html(everything(), tmp_path / "page.md")
    with pytest.raises(InputError, match="There are no rows to report"):
        write_html([], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"Row 2 is str; expected an object"):
        write_html([row("odd"), "text"], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"needs an object under 'provenance', got None"):
        write_html([{"task": "bench decode", "contender": "a"}], tmp_path / "page.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"needs jinja2 .*loki-attn\[report\]"):
        write_html(everything(), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []

"""Speed: a curve per contender, whatever its k, and nothing for what was timed once."""

from page_rows import step

from loki_attn.report.forms import unify
from loki_attn.report.page.headline import headline_of
from loki_attn.report.page.speed import curve_names, speed_figures
from loki_attn.report.rows import sections


def loki(context, k, us=5.0):
    return step(f"loki int8 k={k}", "loki", context, us, k=k, plane="int8")


def names(rows):
    rows = unify(rows)
    found = curve_names(rows)
    return [found[id(row)] for row in rows]


def test_a_k_that_grows_with_the_context_is_one_curve():
    assert names([loki(1024, 128), loki(4096, 512)]) == ["loki int8", "loki int8"]


def test_a_k_that_tells_something_stays():
    assert names([loki(1024, 64), loki(4096, 64)]) == ["loki int8 k=64"] * 2
    several = [loki(1024, 64), loki(4096, 64), loki(4096, 512)]
    assert names(several) == ["loki int8 k=64", "loki int8 k=64", "loki int8 k=512"]


def drawn(rows):
    return speed_figures(sections(unify(rows)))


def test_parts_and_single_contexts_are_left_to_the_table():
    part = [step("loki: score", "loki", n, 1.0, part="score", k=64) for n in (1024, 4096)]
    rows = [step("sdpa-hf", "torch", n, n / 2) for n in (1024, 4096)]
    (figure,) = drawn([*rows, *part, loki(4096, 64)])
    assert {line[0].text for line in figure.data.lines} == {"sdpa-hf"}
    assert "Contenders timed at one context are in the table only." in figure.caption
    assert drawn(rows[:1]) == []


def test_threads_get_panels_of_their_own():
    rows = [step("sdpa-hf", "torch", n, 9.0, threads=t) for t in (1, 2) for n in (1024, 4096)]
    (figure,) = drawn(rows)
    said = ["batch 1, bf16, 1 threads", "batch 1, bf16, 2 threads"]
    assert [panel.title for panel in figure.panels] == said


def test_newest_of_two_runs_is_drawn():
    rows = [step("sdpa-hf", "torch", n, 9.0) for n in (1024, 4096)]
    again = [{**row, "median_us": 7.0} for row in rows]
    (figure,) = drawn([*rows, *again])
    assert [line[2].text for line in figure.data.lines] == ["7.0", "7.0"]


def test_headline_compares_with_the_fastest_dense():
    rows = [step("slow", "torch", 4096, 900.0), step("quick", "dense", 4096, 100.0)]
    rows += [loki(4096, 64, 50.0), loki(1024, 64, 1.0)]
    said = headline_of("Speed", sections(unify(rows))).sentence
    assert "takes 50 µs with loki int8 k=64 and 2.0 times as long, 100 µs, with quick" in said

"""The growth figure: a file for rows that belong together, a reason for others."""

import pytest

pytest.importorskip("matplotlib")

from loki_attn.errors import InputError
from loki_attn.report.growth import draw_growth


def row(contender, kind, context, median_us, **more):
    settings = {"shape": "small", "batch": 1, "dtype": "bf16", "threads": 1, "part": None}
    spread = {"p20_us": median_us * 0.9, "p80_us": median_us * 1.2}
    what = {"contender": contender, "kind": kind, "context": context, "median_us": median_us}
    return {**settings, **spread, **what, **more}


def rows():
    found = []
    for context in (1024, 4096, 16384):
        k = context // 8
        found.append(row("sdpa-hf", "torch", context, context / 2, k=None))
        found.append(row(f"loki int8 k={k}", "loki", context, context / 10, k=k, plane="int8"))
        found += [
            row(f"loki int8 k={k}: {part}", "loki", context, 5.0, k=k, plane="int8", part=part)
            for part in ("score", "choose", "attend")
        ]
    return found


def test_a_curve_per_contender_whose_k_grows_with_the_context(tmp_path):
    text = draw_growth(rows(), tmp_path / "deep" / "growth.svg").read_text()
    for label in ("sdpa-hf", "loki int8", "loki int8: score", "loki int8: attend"):
        assert f">{label}<" in text
    for tick in ("1k", "4k", "16k"):
        assert f">{tick}<" in text
    assert "k=128" not in text
    assert "A decode step of small, batch 1, bf16, 1 thread<" in text


def test_several_amounts_per_context_are_told_apart(tmp_path):
    more = [row("loki int8 k=64", "loki", 1024, 9.0, k=64, plane="int8")]
    text = draw_growth(rows() + more, tmp_path / "growth.svg").read_text()
    assert ">loki int8 k=64<" in text
    assert ">loki int8 k=128<" in text


def test_equal_rows_give_an_equal_file(tmp_path):
    one, other = (draw_growth(rows(), tmp_path / name) for name in ("a.svg", "b.svg"))
    assert one.read_bytes() == other.read_bytes()


def test_a_png_is_one(tmp_path):
    drawn = draw_growth(rows(), tmp_path / "growth.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (lambda found: [], "a.svg", "There are no rows to draw"),
        (lambda found: [{"task": "perplexity"}], "a.svg", "Row 1 lacks contender, kind"),
        (lambda found: [*found[1:], {**found[0], "dtype": "fp32"}], "a.svg", "got 2"),
        (lambda found: found, "a.pdf", "is a .svg or a .png file"),
    ],
    ids=["none", "others", "mixed", "pdf"],
)
def test_refusals(tmp_path, spoil, name, message):
    with pytest.raises(InputError, match=message):
        draw_growth(spoil(rows()), tmp_path / name)

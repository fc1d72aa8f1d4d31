"""Pictures: heat maps and charts keep their cells, their order and their names."""

from page_rows import bounded, needle, row, spectrum

from loki_attn.report.page.heat import HeatMap, Tile, heat_map, step_of
from loki_attn.report.page.keys import key_figures
from loki_attn.report.page.needles import needle_figures
from loki_attn.report.page.parts import written
from loki_attn.report.page.plot import looks
from loki_attn.report.page.sheets import sheet_of
from loki_attn.report.page.svg import MARKS, mark
from loki_attn.report.rows import sections


def test_heat_map_has_a_cell_for_everything_and_marks_what_is_missing():
    tiles = [[Tile(level=0.0, told="<low>"), None, Tile(level=1.0, words="9")]]
    text = heat_map(
        HeatMap(columns=["a", "b", "c"], lines=["x"], tiles=tiles, x_name="n", y_name="d"), "alt"
    )
    assert [text.count(f'"tile {kind}"') for kind in ("q0", "q10", "none")] == [1, 1, 1]
    assert "&lt;low&gt;" in text or "&lt;low>" in text
    assert 'role="img" aria-label="alt"' in text


def test_steps_of_a_ramp_end_at_its_ends():
    assert [step_of(level) for level in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0, 0, 5, 10, 10]


def test_marks_differ():
    assert len({mark(kind, 5.0, 5.0) for kind in range(len(MARKS))}) == len(MARKS)


def test_a_method_has_one_colour_and_its_variants_different_marks():
    found = looks(["pca rank=8", "pca rank=16 int8", "mixed rank=8", "exact"])
    assert found["pca rank=8"].colour == found["pca rank=16 int8"].colour
    assert len({look.colour for look in found.values()}) == 3
    assert found["pca rank=8"].mark != found["pca rank=16 int8"].mark
    assert len(set(looks([f"method {n}" for n in range(25)]).values())) == 25


def test_rank_map_and_spectra_show_every_layer():
    ranks, spectra = key_figures(sections([spectrum("post"), spectrum("pre")]))
    assert [panel.title for panel in ranks.panels] == ["after RoPE", "before RoPE"]
    assert "4 layers by 2 KV heads; mean 4.0, lowest 2 in layer 0 head 0" in ranks.panels[0].svg
    assert len(ranks.data.lines) == len(spectra.data.lines) == 8
    # 7 coordinates of 8 hold everything, so half of it takes 4.
    assert [cell.text for cell in spectra.data.lines[0][2:]] == ["4", "7", "7"]


def test_needle_cells_say_how_many_of_how_many():
    rows = [needle("a top_k=64", 0.1, n, kind) for n in (4096, 8192) for kind in ("uuid", "words")]
    figures = needle_figures(sections(rows))
    assert [figure.title for figure in figures] == ["Needles: uuid", "Needles: words"]
    (panel,) = figures[0].panels
    assert panel.svg.count(">3/5<") == 2
    assert panel.note == "87\N{NO-BREAK SPACE}% (83 to 90, n 30)"
    middle = figures[0].data.lines[1]
    assert (middle[3].text, middle[3].note, middle[4].text) == (
        "60 %".replace(" ", "\xa0"),
        "23 to 88",
        "5",
    )


def test_best_is_marked_among_the_sparse_and_only_if_it_stands_out():
    def bests(*scores):
        names = ["dense", "a top_k=1", "b top_k=1", "c top_k=1"]
        rows = [
            row("odd", name, read_bytes_share=0.5, **bounded("score", score, 0.1))
            for name, score in zip(names, scores, strict=True)
        ]
        (section,) = sections(rows)
        return [line[2].best for line in sheet_of(section).table.lines]

    assert bests(1.0, 0.5, 0.7, 0.6) == [False, False, True, False]
    assert bests(1.0, 0.7, 0.7, 0.6) == [False] * 4


def test_numbers_are_set_with_signs_of_their_own():
    (section,) = sections([row("odd", **bounded("score", -0.25, 0.5))])
    cell = sheet_of(section).table.lines[0][2]
    assert (cell.text, cell.note) == ("\N{MINUS SIGN}25.0\xa0%", "\N{MINUS SIGN}75.0 to 25.0")
    assert written(-1.5, "+.1f") == "\N{MINUS SIGN}1.5"

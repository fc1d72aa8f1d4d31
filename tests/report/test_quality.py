"""Quality against bytes: means of several items, and who may be compared with whom."""

import pytest
from page_rows import DENSE, RIVALS, bounded, perplexity, row, ruler

from loki_attn.report.intervals import Estimate
from loki_attn.report.page.quality import divergence_figures, pooled, score_figures
from loki_attn.report.rows import sections


def test_independent_estimates_pool_as_squares_do():
    found = pooled([Estimate(value=v, low=v - 0.3, high=v + 0.4, n=10, how="") for v in (0.2, 0.6)])
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - 0.3 / 2**0.5)
    assert found.high == pytest.approx(0.4 + 0.4 / 2**0.5)
    assert found.n == 20


def shown(figure):
    return [line[0].text for line in figure.data.lines]


def test_who_lacks_an_item_is_not_averaged():
    rows = [ruler(n, s, task, 0.5 - k) for n, s, k in RIVALS for task in ("vt", "cwe")]
    rows += [ruler("half top_k=64", 0.3, "vt", 0.9), ruler(DENSE, 1.0, "vt", 0.9)]
    rows += [ruler(DENSE, 1.0, "cwe", 0.9)]
    (figure,) = score_figures(sections(rows))
    assert shown(figure) == ["exact top_k=64", "mixed top_k=64 rank=16 int8", "dense"]
    (listing,) = figure.listings
    assert [name for name, _ in listing.items] == ["mixed top_k=64 rank=16 int8", "exact top_k=64"]


def test_texts_and_lengths_get_panels_of_their_own_and_one_scale():
    rows = [
        perplexity(name, share, scale * kl, settings={"corpus": "novel", "prefix_tokens": prefix})
        for prefix, scale in ((1000, 1), (4096, 100))
        for name, share, kl in RIVALS
    ]
    (figure,) = divergence_figures(sections(rows))
    assert [panel.title for panel in figure.panels] == [
        "1,000 prefix tokens",
        "4,096 prefix tokens",
    ]
    ticks = [panel.svg.count(">0.1<") for panel in figure.panels]
    assert ticks == [1, 1]


def test_without_bytes_or_intervals_there_is_no_figure():
    bare = [row("perplexity", name, perplexity=9.0, kl_to_dense=0.1) for name, *_ in RIVALS]
    no_bytes = [
        row("perplexity", name, perplexity=9.0, **bounded("kl_to_dense", 0.1, 0.01))
        for name, *_ in RIVALS
    ]
    for rows in (bare, no_bytes, [perplexity(*RIVALS[0])]):
        assert divergence_figures(sections(rows)) == []


@pytest.mark.parametrize("values", [(0.0, 0.0), (-0.01, 0.02), (1e-9, 5.0)])
def test_divergences_around_nothing_are_drawn(values):
    rows = [perplexity(n, s, v) for (n, s, _), v in zip(RIVALS, values, strict=True)]
    (figure,) = divergence_figures(sections(rows))
    assert "nan" not in figure.panels[0].svg


def test_a_long_front_is_cut_in_the_list_only():
    rows = [perplexity(f"p top_k={k}", k / 100, 1 / k) for k in range(1, 60)]
    (figure,) = divergence_figures(sections(rows))
    assert len(figure.listings[0].items) == 24
    assert figure.listings[0].title.endswith("the first 24 of 59")
    assert sum(line[4].text == "yes" for line in figure.data.lines) == 59

"""The page in a real browser: it loads alone, sorts, fits a phone, reads in the dark, prints."""

from functools import cache

import pytest
from page_rows import FIGURES, everything

from loki_attn.report import write_html

pytestmark = pytest.mark.browser

WIDTHS = (360, 1280)
# Relative luminance and contrast as WCAG 2.2 defines them, of the colours the page really has.
CONTRAST = """(selector) => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const luminance = (colour) => {
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const parts = Array.from(pen.getImageData(0, 0, 1, 1).data.slice(0, 3)).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' && element.parentElement
      ? behind(element.parentElement) : colour;
  };
  return Array.from(document.querySelectorAll(selector), (element) => {
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const pair = [luminance(ink), luminance(behind(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""
BODY_TEXT = "p, h1, h2, h3, h4, figcaption, td, td small, th, a, dt, dd, summary, svg text.tick"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_html(everything(), tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def opened(browser, file):
    """Open a page; whatever it complains of or asks for is kept in `troubles` and `asked`."""
    contexts = []

    def open_new(width=1280, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.troubles, page.asked = [], []
        page.on("console", lambda message: page.troubles.append(message.text))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_new
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def look_at(opened):
    """A page that is only looked at, opened once for each width and scheme."""
    return cache(opened)


def column(page, at):
    return page.evaluate(
        """(at) => Array.from(document.querySelectorAll('#sorted tbody tr'),
            (line) => line.cells[at].dataset.order)""",
        at,
    )


def head(page, at):
    return page.locator("#sorted thead th").nth(at)


@pytest.fixture
def sortable(opened):
    """A page whose table of perplexities is called #sorted."""
    page = opened()
    page.evaluate(
        """document.querySelector('.sheet[id$="table-perplexity"] table').id = 'sorted'"""
    )
    return page


def test_page_loads_alone_and_without_a_complaint(opened, file):
    page = opened()
    page.mouse.wheel(0, 20000)
    assert page.troubles == []
    assert page.asked == [file.as_uri()]


def test_every_figure_has_a_name_and_a_table_of_its_data(opened):
    page = opened()
    titles = page.locator("figure > figcaption > strong").all_inner_texts()
    assert titles == list(FIGURES)
    figures = page.get_by_role("figure").all()
    assert len(figures) == len(FIGURES)
    for figure in figures:
        assert figure.get_attribute("aria-label")
        data = figure.locator("details")
        assert not data.locator("table").is_visible()
        data.locator("summary").click()
        assert data.locator("table").is_visible()
        assert data.locator("tbody tr").count() >= 2
    pictures = page.get_by_role("img").all()
    assert len(pictures) >= len(FIGURES)
    assert all(picture.get_attribute("aria-label") for picture in pictures)


def test_pictures_have_room_and_their_texts_stay_inside(look_at):
    outside = look_at().evaluate(
        """() => Array.from(document.querySelectorAll('svg.plot'), (picture) => {
          const frame = picture.getBoundingClientRect();
          return Array.from(picture.querySelectorAll('text')).filter((text) => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 8 || box.right > frame.right + 8
              || box.top < frame.top - 4 || box.bottom > frame.bottom + 4;
          }).map((text) => text.textContent);
        }).flat()"""
    )
    assert outside == []


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
def test_numbers_sort_by_size_in_both_directions(sortable, press):
    button = head(sortable, 2).get_by_role("button")

    def act():
        button.click() if press == "click" else button.press(press)

    act()
    values = [float(value) for value in column(sortable, 2)]
    assert values == sorted(values)
    assert len(set(values)) == 3
    assert head(sortable, 2).get_attribute("aria-sort") == "ascending"
    act()
    assert [float(value) for value in column(sortable, 2)] == values[::-1]
    assert head(sortable, 2).get_attribute("aria-sort") == "descending"


def test_texts_sort_by_letter_and_one_column_leads(sortable):
    head(sortable, 2).get_by_role("button").click()
    button = head(sortable, 0).get_by_role("button")
    button.click()
    names = column(sortable, 0)
    assert [name.split()[0] for name in names] == ["exact", "mixed", "streaming"]
    assert sortable.locator("#sorted th[aria-sort]").count() == 1
    button.click()
    assert column(sortable, 0) == names[::-1]


def test_what_was_not_measured_stays_last(opened):
    page = opened()
    page.evaluate(
        "document.querySelector('.sheet[id*=\"table-bench-decode\"] table').id = 'sorted'"
    )
    heads = page.locator("#sorted thead th").all_inner_texts()
    at = next(i for i, text in enumerate(heads) if text.split()[0] == "k")
    for _ in range(2):
        head(page, at).get_by_role("button").click()
        values = column(page, at)
        assert values[-2:] == ["", ""]
        assert values[0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unfolded", [False, True])
def test_nothing_sticks_out_sideways(opened, width, unfolded):
    page = opened(width)
    if unfolded:
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    wide = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(wide) <= width


def test_letters_in_pictures_stay_readable_on_a_phone(look_at):
    sizes = look_at(360).evaluate(
        """() => Array.from(document.querySelectorAll('svg.plot'), (picture) => {
          const scale = picture.getBoundingClientRect().width / picture.viewBox.baseVal.width;
          return Array.from(picture.querySelectorAll('text'),
            (text) => scale * parseFloat(getComputedStyle(text).fontSize));
        }).flat()"""
    )
    assert len(sizes) > 50
    assert min(sizes) >= 8


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(look_at, scheme, width):
    found = look_at(width, scheme).evaluate(CONTRAST, BODY_TEXT)
    assert len(found) > 100
    assert min(found) >= 4.5


def test_dark_and_light_follow_the_reader_and_the_button(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(scheme=scheme).evaluate(ground) for scheme in ("light", "dark"))
    assert light != dark
    page = opened()
    button = page.get_by_role("button", name="Colours")
    seen = []
    for _ in range(3):
        button.click()
        seen.append(page.evaluate(ground))
    assert seen == [light, dark, light]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_is_light_and_shows_tables_whole(opened, scheme):
    page = opened(720, scheme)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tables = page.locator(".sheet table").all()
    assert tables
    assert all(table.is_visible() for table in tables)
    cut = page.evaluate(
        """() => Array.from(document.querySelectorAll('.sheet .scroll'))
          .filter((box) => getComputedStyle(box).overflowY !== 'visible').length"""
    )
    assert cut == 0
    assert not page.get_by_role("button", name="Colours").is_visible()
    assert not page.locator("figure > details").first.is_visible()


def test_page_is_whole_without_scripts(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("figure").count() == len(FIGURES)
    assert page.locator("table button").count() == 0
    assert page.locator(".sheet table").first.is_visible()
    summary = page.locator("figure details > summary").first
    summary.click()
    assert page.locator("figure details table").first.is_visible()


def test_contents_lead_there(opened):
    page = opened()
    page.get_by_role("navigation").get_by_role("link", name="Spectra of the keys").click()
    place = page.locator("figure", has_text="Spectra of the keys").first
    assert place.evaluate("(element) => Math.abs(element.getBoundingClientRect().top) < 40")

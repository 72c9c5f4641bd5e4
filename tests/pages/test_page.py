"""Pages in a real browser: whatever text is in them stays text, nothing comes from elsewhere, and they can be used."""

import base64
import re
from pathlib import Path

import pytest
import torch

from browser import opened
from onestill.pages.gallery import MOST_BYTES, gallery_of
from onestill.pages.page import Code, Page, PageTable
from onestill.pages.plots import Curve, Plot

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"' onmouseover=document.title='owned' x='",
    "{{ 7 * 7 }} {% raw %} ${document.title='owned'}",
    "]]><svg onload=document.title='owned'> \u2028 & &amp; $\\frac{1}{2}$ _",
    "javascript:document.title='owned'",
)


def noise(num: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def page_of(words: str, *, num: int = 4) -> Page:
    rows = {f"teacher {words}": noise(num, 8), f"student {words}": noise(num, 8, 1)}
    curves = [Curve(words, [1, 2, 4], [3.0, 2.0, 1.0], dots=True), Curve("_other", [1, 2], [1.0, 2.0])]
    return Page(
        title=words,
        lead=[words],
        facts=[(words, words)],
        warnings=[words],
        tables=[PageTable(words, (words, "b"), [(words, "1"), ("c", "2")], [1], [words])],
        plots=[Plot("one", words, words, words, curves, caption=words, levels={words: 1.5})],
        gallery=gallery_of(rows, [words], students=[f"student {words}"]),
        sheets=[(words, "data:image/png;base64,")],
        codes=[Code(words, words)],
        settings=PageTable(words, (words,), [(words,)]),
        made=words,
    )


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_stay_words(words: str, tmp_path: Path) -> None:
    page_of(words).write(path := tmp_path / "report.html")
    with opened(path) as page:
        title = page.title()
        page.click('button[data-open="1"]')
        page.hover("#what")
        page.mouse.move(300, 300)
        shown = page.inner_text("#what")
        assert page.title() == title and "owned" not in {title} and page.heard == []
        plain = " ".join(words.split())
        assert " ".join(page.inner_text("h1").split()) == " ".join(title.split()) == plain
        assert plain[:20] in " ".join(shown.split()) and page.locator("script").count() == 1
        assert page.locator("img[src=x]").count() == 0


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    text = page_of("digits").html()
    assert not re.search(r"""(?:src|href)=["'](?!data:)[^#]""", re.sub(r"xmlns(:\w+)?=\S+", "", text))
    page_of("digits").write(path := tmp_path / "report.html")
    with opened(path) as page:
        assert page.heard == []
        policy = page.get_attribute("meta[http-equiv]", "content")
        assert policy.startswith("default-src 'none'")


def test_pictures_are_stepped_through_and_filtered(tmp_path: Path) -> None:
    rows = {"teacher": noise(6, 8), "student": noise(6, 8, 1)}
    gallery = gallery_of(rows, ["a red cat", "a blue dog", "a red dog"], students=["student"], first=40)
    Page("cats", gallery=gallery).write(path := tmp_path / "report.html")
    with opened(path) as page:
        page.click('tbody tr:nth-child(2) button[data-open="1"]')
        assert page.inner_text("#what") == "seed 41 a blue dog (2 of 6)"
        assert page.locator("#all img").count() == 2
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#what").startswith("seed 42 a red dog")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#what") == "seed 45 a red dog (6 of 6)"
        page.keyboard.press("Escape")
        page.fill("#filter", "RED dog")
        assert page.inner_text("#count") == "2 of 6" and page.locator("thead th[data-column]:visible").count() == 2
        page.click('button[data-open="5"]')
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#what") == "seed 42 a red dog (1 of 2)"
        assert page.heard == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_hangs_over_and_text_can_be_read(width: int, dark: bool, tmp_path: Path) -> None:
    page_of("a teacher of a rather long name " * 3, num=64).write(path := tmp_path / "report.html")
    with opened(path, width=width, dark=dark) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        light, dim = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper))
        assert (light > dim) is dark and abs(light - dim) > 450
        # A plot is in the ink of the page.
        assert page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == ink


def test_large_pictures_are_made_to_fit(tmp_path: Path) -> None:
    rows = {f"row {i}": noise(64, 256, i) for i in range(10)}
    gallery = gallery_of(rows, [])
    assert gallery is not None and gallery.num_columns >= 8
    size = sum(len(text) for made in gallery.rows.values() for text in made)
    assert size <= MOST_BYTES
    Page("noise", gallery=gallery).write(path := tmp_path / "report.html")
    assert path.stat().st_size < 5e6


def test_small_pictures_are_kept_to_the_pixel() -> None:
    gallery = gallery_of({"a": (images := noise(2, 8))}, [])
    assert gallery is not None and gallery.is_small
    import io

    from PIL import Image

    data = base64.b64decode(gallery.rows["a"][0].partition("base64,")[2])
    found = torch.tensor(list(Image.open(io.BytesIO(data)).getdata())).view(8, 8, 3).permute(2, 0, 1)
    assert (found / 127.5 - 1 - images[0]).abs().max() < 0.01


def test_what_is_no_picture_has_no_gallery() -> None:
    assert gallery_of({"points": torch.zeros(3, 2)}, []) is None and gallery_of({}, []) is None


def test_a_plot_leaves_out_what_cannot_be_drawn(tmp_path: Path) -> None:
    curve = Curve("a", [1, 2, 3, 4, 5], [0.0, float("nan"), None, float("inf"), 2.0])
    plot = Plot("a", "A", "x", "y", [curve], log=(True, True))
    assert curve.points(positive=plot.log) == ([5], [2.0]) and plot.has_points
    assert not Plot("b", "B", "x", "y", [Curve("b", [1], [-1.0])], log=(False, True)).has_points
    plot.save(tmp_path)
    assert (tmp_path / "a.png").stat().st_size > 1000 and (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert plot.svg() == plot.svg(), "the same plot is the same text"

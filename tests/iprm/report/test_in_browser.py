"""The report in a real browser, headless and without a network: it renders without errors and fits at both widths."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import iprm
from run_folders import write_comparison, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
if not BROWSER:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
matplotlib_image = pytest.importorskip("matplotlib.image")

pytestmark = pytest.mark.slow

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (1280, 400)
SMALLEST = 11  # pixels of a letter's height


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=[*FLAGS])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reports")


def _unfinished(folder: Path) -> Path:
    run = write_run(folder, method="iprm-no-ema", epochs=1)
    (run / "diagnostics.json").unlink()
    return run


def _runs(folder: Path, name: str) -> list[Path]:
    place = folder / name
    if name == "three modalities":
        return [write_run(place / "version_0", modalities=("video", "audio", "text"), classes=10)]
    if name == "many classes":
        return [write_run(place / "version_0", classes=1000, epochs=100)]
    if name == "unfinished":
        return [_unfinished(place / "version_0")]
    if name == "hostile":
        word = "<script>console.error('run')</script><img src=x onerror=console.error('run')>" + "wide" * 40
        return [write_run(place / f"version_{k}", method=f"iprm{word}", data=word, seed=k) for k in range(2)]
    if name == "comparison":
        methods = [
            "unimodal-video",
            "unimodal-a_rather_long_name_of_a_modality",
            "concat",
            "joint",
            *(f"iprm-{k}" for k in range(15)),
        ]
        return [write_comparison(place, methods)]
    several = [write_run(place / f"version_{k}", seed=k, classes=31, epochs=40) for k in range(8)]
    other = write_run(place / "concat", method="concat", modalities=("image", "strip"), data="iprm.data.datasets.digits.Digits")
    return [*several, other, _unfinished(place / "unfinished")]


REPORTS = ("three modalities", "many classes", "unfinished", "hostile", "several", "comparison")


@pytest.fixture(scope="module", params=[(name, width) for name in REPORTS for width in WIDTHS], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request, browser, folder) -> Iterator[sync_api.Page]:
    """A report, opened at a width. `page.complaints` lists messages, errors and requests of the browser."""
    name, width = request.param
    report = folder / f"{name}.html"
    if not report.exists():
        outcome = iprm(folder, "report", *map(str, _runs(folder, name)), "--output", str(report))
        assert outcome.code == 0, outcome.err
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.complaints.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(report.as_uri())
    yield page
    context.close()


def colours(page: sync_api.Page) -> int:
    """The number of colours in a picture of the window."""
    picture = matplotlib_image.imread(io.BytesIO(page.screenshot()), format="png")
    return len(np.unique(np.rint(255 * picture[..., :3]).astype(int) @ [1, 256, 65536]))


def open_all(page: sync_api.Page) -> None:
    for summary in page.locator("summary").all():
        summary.click()


def test_it_renders_without_a_complaint_and_no_wider_than_the_window(page):
    assert colours(page) > 50, "a blank page has one"
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "with the settings unfolded"
    assert page.complaints == []


def test_every_picture_has_a_size_and_lies_inside_its_card(page):
    boxes = page.evaluate(
        """[...document.querySelectorAll('svg')].map(svg => {
            const box = svg.getBoundingClientRect(), card = (svg.closest('.card') ?? document.body).getBoundingClientRect()
            const scrolls = svg.closest('.scroll') !== null
            return [box.width, box.height, scrolls || (box.left >= card.left && box.right <= card.right + 0.5)]
        })"""
    )
    assert boxes
    assert all(width >= 10 and height >= 5 and inside for width, height, inside in boxes)


def test_the_letters_of_charts_are_large_enough_and_lie_inside_the_window(page):
    letters = page.evaluate(
        """[...document.querySelectorAll('figure > svg text')].map(text => {
            const svg = text.ownerSVGElement, box = text.getBoundingClientRect()
            const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
            return [parseFloat(getComputedStyle(text).fontSize) * scale, box.left, box.right, text.textContent]
        })"""
    )
    width = page.viewport_size["width"]
    assert [text for size, left, right, text in letters if size < SMALLEST or left < 0 or right > width] == []


def test_labels_of_an_axis_do_not_touch_each_other(page):
    touching = page.evaluate(
        """[...document.querySelectorAll('figure > svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent])
            return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b]) =>
                a.left < b.right && b.left < a.right && a.top + 3 < b.bottom - 3 && b.top + 3 < a.bottom - 3
            ).map(([, other]) => `${one} and ${other}`))
        })"""
    )
    assert touching == []

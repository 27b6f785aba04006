"""The report in a browser: nothing fails, nothing is fetched, figures show on wide and narrow screens."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives a browser, is not installed")

ARGUMENTS = ["--headless=shell", "--no-sandbox", "--no-zygote", "--single-process", "--disable-gpu"]
"""Of a Chromium of one's own."""
FIGURES = """() => [...document.images].map(image => {
    image.closest("details")?.setAttribute("open", "");
    const box = image.getBoundingClientRect();
    return [image.complete && image.naturalWidth > 0, box.left, box.right];
})"""


@pytest.fixture
def browser() -> Iterator[Any]:
    """That of playwright, or the Chromium that CHROMIUM names."""
    own = os.environ.get("CHROMIUM")
    with playwright.sync_playwright() as driver:
        if own is None and not os.path.exists(driver.chromium.executable_path):
            pytest.skip("No browser: run `playwright install chromium`, or set CHROMIUM to the path of one.")
        options = {"executable_path": own, "args": ARGUMENTS} if own else {}
        browser = driver.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_figures_show_and_nothing_fails(made: dict[str, Any], browser: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(made["report"].to_html(), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(path.as_uri())
    figures = page.evaluate(FIGURES)
    assert len(figures) == 8
    for shows, left, right in figures:
        assert shows and left >= 0 and right <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert page.inner_text("h1")
    assert not said
    assert {url for url in fetched if not url.startswith("data:")} == {path.as_uri()}

"""Pages in a real browser: nothing on the console, nothing asked for, every figure drawn, on a desk, a phone and paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from test_report import actions, classification, curves, edited, moving, pictures, segmentation

from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import Pictures

pytestmark = pytest.mark.skipif(browser.found() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module", params=["segmentation", "classification", "films"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "segmentation":
        return write_report(segmentation(subjects=12), pictures(), curves(), out)
    if request.param == "films":
        results = actions(3)
        return write_report(results, moving(results), [], out)
    return write_report(edited(classification(n=60, classes=3), lambda c: c if c.labels == 20 else None), Pictures(), [], out)


@pytest.mark.parametrize("width", [1200, 360])
def test_every_figure_is_drawn_in_silence_and_nothing_is_asked_for(window: browser.Browser, page: Path, width: int) -> None:
    window.said.clear()
    window.asked.clear()
    shown = window.show(page, width)
    assert window.said == []
    assert [url for url in window.asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert len(shown["images"]) == page.read_text().count("<img ") > 4
    for image in shown["images"]:
        assert image["drawn"] and image["width"] > 40, image["alt"]
    assert shown["wide"] == 0  # tables scroll in their own frame
    assert "does pretraining help?" in shown["text"]


def test_the_browser_would_have_noticed(window: browser.Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<html><body>x<script>console.error("oh")</script><img alt="none" src="data:image/png;base64,AAAA">'
                   '<img alt="far" src="http://127.0.0.1:9/x.png"></body></html>')
    window.said.clear()
    window.asked.clear()
    shown = window.show(bad)
    assert any("oh" in said for said in window.said) and "http://127.0.0.1:9/x.png" in window.asked
    assert not any(image["drawn"] for image in shown["images"])


def test_a_screen_reader_is_told_of_parts_tables_and_figures(window: browser.Browser, page: Path) -> None:
    shown = window.show(page)
    heard = window.heard()
    roles = [role for role, _ in heard]
    assert roles.count("main") == roles.count("banner") == 1 and ("region", "Verdict") in heard
    assert all(name for role, name in heard if role in ("image", "heading", "region"))
    assert roles.count("image") == len(shown["images"])
    assert roles.count("caption") == roles.count("table") > 3  # those in closed details are not told of until opened
    assert {"columnheader", "rowheader"} <= set(roles)


def test_on_paper_nothing_is_folded_away(window: browser.Browser, page: Path) -> None:
    window.show(page)
    paper = window.paper()
    assert paper.startswith(b"%PDF") and len(re.findall(rb"/Type ?/Page\b", paper)) >= 3
    window.call("Emulation.setEmulatedMedia", media="print")
    try:
        seen = window.call("Runtime.evaluate", returnByValue=True, expression="""
            [...document.querySelectorAll('details > :not(summary)')].map(e => e.checkVisibility({contentVisibilityAuto: true})
                && e.getBoundingClientRect().height > 0)""")["result"]["value"]
    finally:
        window.call("Emulation.setEmulatedMedia", media="")
    assert seen and all(seen)

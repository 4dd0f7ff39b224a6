"""The X-ray's page in a real browser, headless: cells lead to sheets, and nothing overflows."""

import pytest
import torch
from torch import nn

from fullrank.spectra import model_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    def model(seed):
        torch.manual_seed(seed)
        net = nn.Module()
        net.layer = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(24, 24), "up": nn.Linear(24, 40)}) for _ in range(12)
        )
        net.words = nn.Embedding(60, 24)
        return net

    report = model_report(model(0), model(1), name="before", against_name="after")
    return report.to_html(tmp_path_factory.mktemp("page") / "page.html").as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_cell_shows_its_sheet(browser, address, width):
    complaints, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    sheets = page.locator(".sheet")
    assert page.locator(".hint").is_visible()
    assert not any(sheets.nth(i).is_visible() for i in range(sheets.count()))
    page.locator('svg a[href="#m3"]').first.click()
    shown = [i for i in range(sheets.count()) if sheets.nth(i).is_visible()]
    assert shown == [3]
    assert not page.locator(".hint").is_visible()
    assert page.locator(".sheet h3").nth(0).text_content() != ""
    assert sheets.nth(3).locator("h3").first.inner_text() == "layer.1.up"
    box = sheets.nth(3).bounding_box()
    assert 0 <= box["y"] < 800, "the sheet is not in view"
    # Wide maps scroll inside the page; the page itself does not scroll sideways.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    assert [r for r in requests if not r.startswith(("file:", "data:"))] == []
    page.close()


def test_both_colour_schemes_can_be_read(browser, address):
    shades = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(address)
        shades[scheme] = page.evaluate(
            "[getComputedStyle(document.body).color, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        page.close()
    assert shades["light"] != shades["dark"]
    assert all(ink != paper for ink, paper in shades.values())

"""The page on a shrunk model: what stands on it, and how it looks in a real browser."""

import re

import pytest
import torch
from torch import nn

from fullrank.compress import (
    FractionOfBreakEven,
    factorize,
    make_plan,
    measured_speed,
    shrink,
    write_page,
)
from fullrank.compress.layers_record import factorised
from fullrank.spectra.heatmap import heatmap_svg


def network(layers=6):
    torch.manual_seed(0)
    model = nn.Module()
    model.layer = nn.ModuleList(
        nn.ModuleDict({"query": nn.Linear(24, 24), "up": nn.Linear(24, 40)}) for _ in range(layers)
    )

    def forward(x):
        for block in model.layer:
            x = x + block["query"](x) + block["up"](x)[..., :24].tanh()
        return x

    model.forward = forward
    return model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model = network()
    data = [torch.randn(64, 24) for _ in range(4)]
    with torch.no_grad():
        wanted = model(data[0])

    def metric(candidate):
        with torch.no_grad():
            return (1 / (1 + (candidate(data[0]) - wanted).square().sum(1))).numpy()

    how = {"recover": False, "progress": False, "faster_on": data[0]}
    with pytest.MonkeyPatch.context() as patch:
        # A clock that finds the first projection slower, so that both kinds are on the page.
        patch.setattr(measured_speed, "_measured", {})
        patch.setattr(
            measured_speed,
            "_clock",
            lambda layer, x, n: 0.5 if hasattr(layer, "first") and layer.out_features > 24 else 1.0,
        )
        curves = {}
        for method in ("gauss_newton", "svd"):
            found = shrink(model, metric, 0.05, calibration=data, method=method, **how)
            curves[method] = found.curve
        green = shrink(model, metric, 0.02, method="greenformers", **how)
        curves["greenformers"] = green.curve
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(
        found.model, found.plan, path, name="<b>tiny</b>", found=found, curves=curves,
        metric="closeness",
    )  # fmt: skip
    return found, curves, path


def test_every_plan_of_every_method_and_every_layer_is_on_it(page):
    found, curves, path = page
    text = path.read_text()
    dots = re.findall(r"<circle[^>]*><title>(\S+): ", text)
    assert dots == [method for method, curve in curves.items() for _ in curve]
    for name, entry in found.plan.items():
        what = f"rank {entry.rank} of" if entry.rank else "dense, rank"
        assert f"{name}: {what} {min(entry.shape)}" in text
    for name, _ in factorised(found.model):
        assert re.search(rf"{re.escape(name)}: [\d.]+%", text)
    assert "1000 ms dense, 500 ms factorised" in text.replace("1e+03", "1000")
    assert "left dense" in text
    assert "<b>tiny</b>" not in text
    assert "<script" not in text


def test_without_a_search_there_is_no_curve(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    plan = make_plan(model, FractionOfBreakEven(0.5))
    text = write_page(factorize(model, plan), plan, tmp_path / "page.html").read_text()
    assert "Size against quality" not in text
    assert "speed-up" not in text
    assert "Rank of each layer" in text


def test_small_errors_are_told_apart_and_a_small_map_fits(tmp_path):
    model = network(3)
    plan = make_plan(model, FractionOfBreakEven(0.5))
    small = factorize(model, plan)
    errors = [0.00121, 0.0000412, 0.00031, 0.0, 0.254, 0.0312]
    for (_, layer), error in zip(factorised(small), errors, strict=True):
        layer.error = error
    text = write_page(small, plan, tmp_path / "page.html").read_text()
    shown = text[text.index("Relative error of each layer") :]
    for cell in ("0.12%", "4e-05", "0.03%", "0%", "25%", "3.1%"):
        assert f">{cell}</text>" in shown
    assert shown.count('figure class="fit"') == 1
    assert "as a share of their variance" in shown


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows_and_nothing_is_loaded(browser, page, width):
    complaints, requests = [], []
    view = browser.new_page(viewport={"width": width, "height": 800})
    view.on("console", lambda message: complaints.append(message.text))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(page[2].as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") == width
    picture = view.locator('svg[aria-label="Size against quality"]')
    assert picture.bounding_box()["width"] <= width
    assert picture.locator("circle").count() == sum(len(curve) for curve in page[1].values())
    tables = view.locator("details")
    assert tables.count() == 3
    tables.first.locator("summary").click()
    assert tables.first.locator("td").first.is_visible()
    assert view.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    assert [r for r in requests if not r.startswith(("file:", "data:"))] == []
    view.close()


def test_errors_that_are_no_numbers_do_not_stop_the_page():
    svg = heatmap_svg({"layer.0.fc": float("nan"), "layer.1.fc": 0.5}, title="errors")
    assert svg.count("<title>") == 2
    assert "nan" in heatmap_svg({"fc": float("nan")}, title="errors")

"""The search page in a real browser, headless."""

import re
import time

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url():
    from conftest import running_server

    with running_server() as (_, address):
        yield address


class Watch:
    """What a page complains about, and where it sends requests."""

    def __init__(self, page):
        self.complaints, self.requests = [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def visit(browser, url):
    """Open a page at some width; every page must end without a complaint or a request elsewhere."""
    opened = []

    def open_page(path="/", width=1100, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        page = context.new_page()
        page.set_default_timeout(10_000)
        watch = Watch(page)
        opened.append((context, watch))
        page.goto(url + path)
        return page

    yield open_page
    for context, watch in opened:
        context.close()
        assert watch.complaints == []
        assert [r for r in watch.requests if not r.startswith((f"{url}/", "data:"))] == []


def titles(page):
    return page.locator("#results .title").all_inner_texts()


def until(condition):
    """Wait for a condition in Python: the page's policy allows no evaluated script of ours."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_results_appear_as_one_types(visit, url):
    page = visit()
    page.locator("#systems label").first.wait_for()
    assert page.locator("#status").inner_text() == "38 documents to search."
    assert page.locator("#q").evaluate("box => box === document.activeElement")
    page.locator("#q").press_sequentially("sparse matrix", delay=15)
    page.locator("#results li").first.wait_for()
    until(lambda: titles(page)[0] == "scipy.sparse.linalg.svds")
    assert re.match(r"\d results by both in ", page.locator("#status").inner_text())
    assert page.locator("#results li").first.locator("mark").all_inner_texts() == [
        "sparse",
        "matrix",
    ]
    scores = page.locator("#results li").first.locator(".scores li").all_inner_texts()
    assert [" ".join(s.split()) for s in scores] == ["bm25 6", "dense 0.3", "both 6.3"]
    assert page.locator("#legend li").count() == 4
    assert "bm25 0.3 ms" in page.locator("#legend").inner_text()
    assert page.url == f"{url}/?q=sparse+matrix"
    assert page.title() == "sparse matrix – fullrank search"


def test_switch_between_systems_and_back(visit, url):
    page = visit("/?q=matrix")
    page.locator("#results li").first.wait_for()
    assert page.get_by_role("radio", name="both").is_checked()
    page.get_by_role("radio", name="bm25").check()
    until(lambda: "by bm25" in page.locator("#status").inner_text())
    assert page.url == f"{url}/?q=matrix&system=bm25"
    assert page.locator("#results li").first.locator(".scores li").count() == 1
    page.go_back()
    until(lambda: "by both" in page.locator("#status").inner_text())
    assert page.get_by_role("radio", name="both").is_checked()


def test_an_encoder_is_chosen_beside_the_kind(browser):
    from conftest import running_server

    with running_server("0", "encoders") as (_, address):
        page = browser.new_page()
        page.goto(f"{address}/?q=matrix")
        page.locator("#results li").first.wait_for()
        assert page.locator("#kinds label").all_inner_texts() == ["bm25", "dense"]
        assert page.get_by_role("radio", name="tuned").is_disabled(), "bm25 uses no encoder"
        page.get_by_role("radio", name="dense").check()
        until(lambda: "by dense in" in page.locator("#status").inner_text())
        page.get_by_role("radio", name="tuned").check()
        until(lambda: "by dense:tuned" in page.locator("#status").inner_text())
        assert page.url.endswith("system=dense%3Atuned")
        page.reload()
        until(lambda: "by dense:tuned" in page.locator("#status").inner_text())
        assert page.get_by_role("radio", name="tuned").is_checked()
        page.context.close()


def test_address_says_what_is_shown(visit):
    page = visit("/?q=assignment&system=dense")
    page.locator("#results li").first.wait_for()
    assert page.locator("#q").input_value() == "assignment"
    assert page.get_by_role("radio", name="dense").is_checked()
    other = visit("/?q=assignment&system=nonsense")
    other.locator("#results li").first.wait_for()
    assert other.get_by_role("radio", name="both").is_checked()


def test_documents_and_queries_are_inert(visit):
    page = visit("/?q=evil+%3Cimg+src%3Dx+onerror%3D%22window.attacked%3D1%22%3E")
    page.locator("#results li").first.wait_for()
    assert "<script>" in titles(page)[0], "shown as text"
    page.locator("#results .title").first.click()
    until(lambda: "evil <script>" in page.locator("#results .document").first.inner_text())
    assert page.locator("#results script, #results img").count() == 0
    assert page.evaluate("() => window.attacked") is None


def test_keyboard(visit):
    page = visit("/?q=matrix")
    page.locator("#results li").first.wait_for()
    focused = "() => document.activeElement.textContent || document.activeElement.id"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == titles(page)[1]
    page.keyboard.press("Enter")
    assert page.locator("#results .title").nth(1).get_attribute("aria-expanded") == "true"
    until(lambda: "matrix" in page.locator("#results .document").nth(1).inner_text())
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == "q"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "q"
    page.locator("#results .title").first.focus()
    page.keyboard.press("/")
    assert page.evaluate(focused) == "q"
    assert page.locator("#q").input_value() == "matrix", "the key itself is not typed"


def test_nothing_found_an_emptied_box_and_more_results(visit, url):
    page = visit()
    page.locator("#systems label").first.wait_for()
    page.fill("#q", "zzzz")
    until(lambda: page.locator("#status").inner_text().startswith("Nothing found"))
    page.fill("#q", "")
    until(lambda: page.locator("#status").inner_text() == "38 documents to search.")
    assert page.url == f"{url}/"
    page.fill("#q", "filler")
    until(lambda: len(titles(page)) == 10)
    page.get_by_role("button", name="Show more").click()
    until(lambda: len(titles(page)) == 20)
    page.get_by_role("button", name="Show more").click()
    until(lambda: len(titles(page)) == 30)


def test_a_server_that_refuses_or_is_gone_is_said(browser, url):
    page = browser.new_page()
    page.route("**/search?*busy*", lambda route: route.fulfill(
        status=422, json={"error": "invalid_request", "detail": "<b>not</b> today"}
    ))  # fmt: skip
    page.route("**/search?*gone*", lambda route: route.abort())
    page.goto(url)
    page.locator("#systems label").first.wait_for()
    page.fill("#q", "busy")
    until(lambda: page.locator("#status").inner_text() == "Not searched: <b>not</b> today")
    page.fill("#q", "gone")
    until(lambda: "does not answer" in page.locator("#status").inner_text())
    page.fill("#q", "matrix")
    until(lambda: "results by both" in page.locator("#status").inner_text())
    page.route("**/document?*", lambda route: route.fulfill(
        status=404, json={"error": "not_found", "detail": "it went"}
    ))  # fmt: skip
    page.locator("#results .title").first.click()
    document = page.locator("#results .document").first
    until(lambda: document.inner_text() == "Not shown: it went")
    # Folded and unfolded, it is asked for again.
    page.unroute("**/document?*")
    for _ in range(2):
        page.locator("#results .title").first.click()
    until(lambda: "matrix" in document.inner_text())
    page.context.close()


def test_a_busy_server_is_asked_again(browser, url):
    page = browser.new_page()
    asked = []

    def busy_once(route):
        asked.append(route.request.url)
        if len(asked) == 1:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": "too_busy"})
        else:
            route.continue_()

    page.route("**/search?*", busy_once)
    page.goto(f"{url}/?q=matrix")
    until(lambda: "busy" in page.locator("#status").inner_text())
    until(lambda: "results by both" in page.locator("#status").inner_text())
    assert len(asked) == 2
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/?q=matrix", "/?q=evil", "/docs", "/xray"])
def test_a_phone_s_width_does_not_scroll_sideways(visit, path, scheme):
    page = visit(path, width=360, color_scheme=scheme)
    if "q=" in path:
        page.locator("#results li").first.wait_for()
        page.locator("#results .title").first.click()
    elif path == "/docs":
        page.locator("#docs section").first.wait_for()
    width, seen = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert (width, seen) == (360, 360)


def test_xray_and_api_pages(visit):
    page = visit()
    page.get_by_role("link", name="X-ray").click()
    heading = page.locator("h1")
    assert heading.inner_text() == "X-ray of a model"
    assert heading.evaluate("h => getComputedStyle(h).color") == "rgb(1, 2, 3)"
    page.go_back()
    assert page.get_by_role("link", name="Report").count() == 0
    page.get_by_role("link", name="API").click()
    page.locator("#docs section").first.wait_for()
    text = page.locator("#docs").inner_text()
    assert "GET /search" in text
    assert "integer, 1 to 100" in text


def test_every_control_has_a_name(visit):
    page = visit("/?q=matrix")
    page.locator("#results li").first.wait_for()
    assert page.get_by_role("searchbox", name="Search the documents").count() == 1
    assert page.get_by_role("search").count() == 1
    assert page.get_by_role("group", name="System to search with").count() == 1
    assert page.get_by_role("status").count() == 1
    assert page.get_by_role("list", name="Results").count() == 1
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, a, input')]"
        ".filter(e => !(e.textContent || e.labels?.length || e.ariaLabel)).length"
    )
    assert unnamed == 0

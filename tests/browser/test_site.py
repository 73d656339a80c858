"""Every page of the built site in Chromium, on a desktop and on a phone, light and dark; ``make test-site`` runs this.

Look at the screenshots that it leaves in runs/site.
"""

import functools
import http.server
import os
import re
import threading

import pytest

from tools.address import PLACEHOLDER, ROOT, repository

SITE = ROOT / "site"
SCREENSHOTS = ROOT / "runs" / "site"
AXE = ROOT / "runs" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.glob("**/*.html")
    if not path.relative_to(SITE).as_posix().startswith(("_static", "genindex", "py-modindex", "search", "index"))
)
WINDOWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
# what a page says of itself: how far it reaches beyond the window, its images, its headings
LOOK = """() => ({
  beyond: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  unseen: [...document.querySelectorAll("article img")].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
  unnamed: [...document.querySelectorAll("article img")].filter(i => !/\\s/.test(i.alt)).map(i => i.src),
  levels: [...document.querySelectorAll("article :is(h1, h2, h3, h4, h5)")].map(h => +h.tagName[1]),
})"""

pytestmark = pytest.mark.skipif(not os.environ.get("VITLIB_BROWSER"), reason="make test-site runs it")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def address():
    """The address of a server of the site's files."""
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page_name", PAGES)
def test_a_page_is_whole_readable_and_accessible(page_name, window, scheme, browser, address):
    page = browser.new_page(viewport=WINDOWS[window], color_scheme=scheme)
    errors, foreign = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: foreign.append(request.url) if address not in request.url else None)
    page.goto(f"{address}/{page_name}", wait_until="networkidle")
    page.add_style_tag(content="* { animation: none !important; transition: none !important; }")  # no half-faded words
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    look = page.evaluate(LOOK)
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [
        f"{finding['id']}: {node['target'][0]} {node['html'][:120]}"
        for finding in found
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]
    stem = SCREENSHOTS / f"{page_name.removesuffix('.html').replace('/', '_')}-{window}-{scheme}.png"
    stem.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=stem, full_page=True)
    page.close()
    assert not errors and not [url for url in foreign if not url.startswith(("data:", "blob:"))]
    assert look["beyond"] <= 0, "wider than the window"
    assert not look["unseen"] and not look["unnamed"]
    levels = look["levels"]
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), levels
    assert not serious, "\n".join(serious)


def test_search_finds_a_term(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q=position+embedding")
    page.locator("#search-results li a").first.wait_for()
    assert any("01_patching" in link.get_attribute("href") for link in page.locator("#search-results li a").all())


def test_launch_buttons_lead_to_the_page(browser, address):
    """Without an address there are none; README's badges are then missing too."""
    page = browser.new_page()
    page.goto(f"{address}/notebooks/02_attention.html")
    links = [link.get_attribute("href") for link in page.locator(".dropdown-launch-buttons a").all()]
    if repository() == PLACEHOLDER:
        assert not links
    else:
        name = re.escape(repository())
        assert any(
            re.search(rf"mybinder\.org/v2/gh/{name}/main\?.*notebooks.*02_attention\.ipynb", link) for link in links
        )
        assert any(re.search(rf"github/{name}/blob/main/notebooks/02_attention\.ipynb", link) for link in links)


def test_the_run_sheet_prints_on_one_page(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/docs/run-sheet.html", wait_until="networkidle")
    pdf = page.pdf(path=SCREENSHOTS / "run-sheet.pdf", format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1

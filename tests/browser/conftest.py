"""What both tests in a browser need."""

import pytest

from . import lab


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=lab.find_browser())
        yield browser
        browser.close()

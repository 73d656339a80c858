"""What both tests in a browser need."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """The first Chromium of the usual names on the path, else Playwright's own."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        yield browser
        browser.close()

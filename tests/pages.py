"""Pages in a real browser, and what a page that stands alone may hold."""

import shutil
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
VOID = {"meta", "link", "img", "br"}

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@contextmanager
def chromium():
    """A browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visit(browser, url, *, width=1280, height=900):
    """A page; what it asks for elsewhere is in its `foreign`, what it complains of in its `complaints`."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.foreign, page.complaints = [], []
    page.on("request", lambda r: page.foreign.append(r.url) if not r.url.startswith((url, "data:")) else None)
    page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(url)
    yield page
    context.close()


def fits(page):
    """Whether nothing is wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


class Checker(HTMLParser):
    """Collects the tags of a page that stands alone; fails on a script, a link to elsewhere, a wrong closing tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == [] and "script" not in self.tags
        assert "default-src 'none'" in text and "@import" not in text and "url(http" not in text

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        links = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        assert all(link.startswith(("data:", "#")) for link in links)
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

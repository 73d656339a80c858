"""Check the built site in site/: links, anchors and images of every page."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.address import ROOT

SITE = ROOT / "site"


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors = path, set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])
        if tag in ("img", "source", "script", "link") and attributes.get("rel") != "canonical":
            self.loaded |= {attributes[name] for name in ("src", "srcset", "href") if attributes.get(name)}


def target_of(page: Page, link: str) -> tuple[Path, str] | None:
    """Return the file and the anchor that a link leads to; None if it leads elsewhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    return path, unquote(parts.fragment)


def main() -> None:
    pages = {path.resolve(): Page(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}
    faults = []
    for path, page in pages.items():
        name = path.relative_to(SITE)
        faults += [f"{name} loads {link}" for link in page.loaded if urlsplit(link).netloc]
        for link in page.links | page.loaded:
            target, anchor = target_of(page, link) or (path, "")
            known = pages[target].anchors if target in pages else ()
            if not target.exists() or anchor and target.suffix == ".html" and anchor not in known:
                faults.append(f"{name} links to {link}")
    sys.exit("\n".join(sorted(faults)) or 0)


if __name__ == "__main__":
    main()

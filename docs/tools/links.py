"""A check of the finished site: every link inside it has its target, and nothing loads from elsewhere.

MkDocs checks the links in Markdown. This check reads the HTML, so it includes the links of docstrings,
of pictures and of the theme.
"""

from __future__ import annotations

import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

log = logging.getLogger("mkdocs.hooks.links")  # a warning fails a strict build


class Page(HTMLParser):
    """The links, the identifiers and the loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if named.get("id"):
            self.ids.add(str(named["id"]))
        link = named.get("href") or named.get("xlink:href")
        if link and (tag in ("a", "use") or named.get("rel") in ("stylesheet", "icon")):
            (self.links if tag == "a" else self.loads).append(link)
        if named.get("src"):
            self.loads.append(str(named["src"]))


def on_post_build(config: Any) -> None:
    site = Path(config.site_dir)
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in (*page.links, *page.loads):
            address, anchor = urldefrag(link)
            scheme = urlsplit(address).scheme
            if scheme in ("http", "https") or address.startswith("//"):
                if link in page.loads:
                    log.warning("%s loads %s from another host", name, link)
                continue
            if scheme:
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                log.warning("%s: the target of the link %s does not exist", name, link)
            elif anchor and target in pages and anchor not in pages[target].ids:
                log.warning("%s: the page of the link %s has no such anchor", name, link)

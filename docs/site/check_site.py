"""Looks over the built site: `python docs/site/check_site.py FOLDER` prints what is wrong.

No page may ask another host for anything (fonts, scripts, pictures), and every link within the site
leads somewhere.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself; a link is followed by a reader alone.
FETCHED = {"script": "src", "img": "src", "source": "src", "video": "src", "iframe": "src"}
_IN_STYLE = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Page(HTMLParser):
    """What a page fetches, where it leads, and which places it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.fetched.append(values.get("href", ""))
        if FETCHED.get(tag, "") in values:
            self.fetched.append(values[FETCHED[tag]])


def problems(folder: Path) -> list[str]:
    """One line for each request to another host and each link that leads nowhere."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    return [*_requests(folder, pages), *_dead_links(folder, pages)]


def _requests(folder: Path, pages: dict[Path, Page]) -> Iterator[str]:
    fetched = {path: page.fetched for path, page in pages.items()}
    for path in folder.rglob("*.css"):
        fetched[path] = [one or other for one, other in _IN_STYLE.findall(path.read_text())]
    for path, addresses in fetched.items():
        for address in addresses:
            if urlsplit(address).netloc:
                yield f"{path.relative_to(folder)}: asks {address}"


def _dead_links(folder: Path, pages: dict[Path, Page]) -> Iterator[str]:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_place = not parts.fragment or unquote(parts.fragment) in getattr(
                pages.get(target), "ids", ()
            )
            if not target.exists() or not is_place:
                yield f"{path.relative_to(folder)}: leads to {link}, which is not there"


def main() -> None:
    """Exits with 1 if anything is wrong."""
    found = problems(Path(sys.argv[1]).resolve())
    print("\n".join(found) or f"{sys.argv[1]}: asks no other host, every link leads somewhere")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

"""HTML pages as element trees, to ask what a reader sees and what a browser would fetch."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder

_VOID = ("meta", "img", "input", "br", "link", "hr")


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tree = TreeBuilder()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        if tag in _VOID:
            self.tree.end(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        self.tree.end(tag)

    def handle_endtag(self, tag: str) -> None:
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        self.tree.data(data)


def read_page(path: Path) -> Element:
    """The tree of a page; an element that is not closed, or closed twice, is an error."""
    builder = _Builder()
    builder.tree.start("page", {})
    builder.feed(path.read_text(encoding="utf-8").removeprefix("<!doctype html>"))
    builder.tree.end("page")
    return builder.tree.close()


def of_class(element: Element, name: str) -> list[Element]:
    """Elements inside one that have a class, in order."""
    return [inner for inner in element.iter() if name in inner.get("class", "").split()]


def text_of(element: Element) -> str:
    """What is written inside an element, without styles and scripts, blanks made single."""
    return " ".join("".join(_texts(element)).split())


def _texts(element: Element) -> Iterator[str]:
    if element.tag in ("style", "script"):
        return
    yield element.text or ""
    for inner in element:
        yield from _texts(inner)
        yield inner.tail or ""


def addresses(page: Element) -> list[str]:
    """Every address that a page names, in links, pictures or elsewhere."""
    return [value for element in page.iter() for name, value in element.items() if name in ("src", "href", "action")]

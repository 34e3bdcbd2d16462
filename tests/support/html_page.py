"""Parses the file that `iprm report` writes."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from command import iprm


def report(folder: Path, *runs: Path) -> str:
    """The file that `iprm report RUNS` writes in `folder`."""
    code, out, err = iprm(folder, "report", *map(str, runs))
    assert (code, err) == (0, "")
    assert out.endswith("report: report.html\n")
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def cards(page: str) -> list[tuple[str, str]]:
    """Title and content of every card with a title, in order."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL)
    return [(html.unescape(title), content) for title, content in found]


def card(page: str, title: str) -> str:
    (content,) = [content for name, content in cards(page) if name == title]
    return content


def titles(page: str) -> list[str]:
    return [title for title, _ in cards(page)]


def pictures(content: str) -> list[ElementTree.Element]:
    """The SVG figures of a card or a page, parsed."""
    svgs = re.findall(r"<svg viewBox[^>]*role.*?</svg>", content, re.DOTALL)
    return [ElementTree.fromstring(svg.replace("xlink:href", "href")) for svg in svgs]


def said(content: str) -> tuple[str, str]:
    """Title and description of the figure of a card."""
    (picture,) = pictures(content)
    return picture.findtext("title"), picture.findtext("desc")


def rows(content: str) -> list[list[str]]:
    """The cells of the rows of all tables."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", content, re.DOTALL)
    return [[html.unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found]


def figures(page: str) -> dict[str, str]:
    """The figures at the head of a report of one run."""
    return {html.unescape(name): value for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)}

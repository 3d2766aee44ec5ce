"""The report: one file that needs nothing else and holds every chapter, figure, table and claim."""

import csv
import itertools
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from prunelib.apps import report
from prunelib.figures.save import figure_suffixes

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / report.OUT
STEMS = sorted(path.stem for path in (ROOT / "figures").glob("*.json"))
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
VOID = {"meta", "link", "img", "br", "hr", "input", "source", "base", "col", "wbr"}


class Node:
    """An element of a parsed page."""

    def __init__(self, tag: str, attributes: dict, parent: "Node | None") -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Node | str] = []

    def all(self, *tags: str) -> list["Node"]:
        found = [self] if not tags or self.tag in tags else []
        return found + [one for child in self.children if isinstance(child, Node) for one in child.all(*tags)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """A strict parser: every element must be closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.place = Node("root", {}, None)
        self.feed(text)
        self.close()
        assert self.place is self.root, f"<{self.place.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), f"an attribute twice in <{tag}>"
        node = Node(tag, {name: value or "" for name, value in attributes}, self.place)
        self.place.children.append(node)
        if tag not in VOID:
            self.place = node

    def handle_endtag(self, tag):
        assert tag == self.place.tag, f"</{tag}> closes <{self.place.tag}>"
        self.place = self.place.parent

    def handle_data(self, text):
        self.place.children.append(text)


@pytest.fixture(scope="module")
def text():
    return report.page()


@pytest.fixture(scope="module")
def tree(text):
    return Tree(text).root


# ---------------------------------------------------------------------------------------------------------- self-contained


def test_nothing_is_loaded(text, tree):
    assert not tree.all("script", "link", "iframe", "object", "embed", "video", "audio", "source", "base", "form")
    for node in tree.all("img"):
        assert node.attributes["src"].startswith("data:image/png;base64,")
    for node in tree.all():
        for name in ("src", "srcset", "poster", "background", "data", "action", "style"):
            assert name not in node.attributes or (node.tag == "img" and name == "src"), f"{name} of <{node.tag}>"
        assert not any(name.startswith("on") for name in node.attributes)
    (style,) = tree.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    policy = [node.attributes["content"] for node in tree.all("meta") if "http-equiv" in node.attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"], "the browser refuses what we overlooked"


def test_links_lead_to_files_of_the_clone_or_to_the_page(tree):
    names = [node.attributes["id"] for node in tree.all() if "id" in node.attributes]
    assert len(names) == len(set(names)), "an id twice"
    links = [node.attributes["href"] for node in tree.all("a")]
    assert len(links) > 300
    for link in set(links):
        if link.startswith("#"):
            assert link[1:] in names, link
        else:
            assert "://" not in link, link
            place = (OUT.parent / unquote(link.partition("#")[0])).resolve()
            assert place.exists(), link
            assert place.is_relative_to(ROOT), link


def test_a_clone_anywhere_gives_the_same_page_without_dates_or_machine_paths(text):
    assert report.page(ROOT / "report.html") == text.replace('href="../../', 'href="'), "only links differ"
    assert str(ROOT) not in text


def test_every_figure_and_table_has_caption_picture_and_record(tree):
    shown = {node.attributes["data-stem"]: node for node in tree.all("figure")}
    assert sorted(shown) == STEMS
    for stem, node in shown.items():
        pictures = node.all("img")
        assert len(pictures) == (".png" in figure_suffixes(stem)), stem
        assert all(len(one.attributes["alt"]) > 30 for one in pictures), stem
        (made,) = [one for one in node.all("details") if one.attributes.get("class") == "made"]
        assert f"--forceall figures/{stem}{figure_suffixes(stem)[0]}" in made.text


def test_headings_are_an_outline(tree):
    levels = [int(node.tag[1]) for node in tree.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(other <= one + 1 for one, other in itertools.pairwise(levels))
    assert all(node.text.strip() for node in tree.all("h1", "h2", "h3", "h4", "a", "summary", "figcaption"))


def test_every_claim_with_the_numbers_and_verdicts_of_its_table(tree):
    with open(ROOT / "figures/own_table_claims.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    cards = {node.attributes["data-claim"]: node for node in tree.all("article")}
    assert list(cards) == list(dict.fromkeys(line["id"] for line in lines))
    for name, card in cards.items():
        mine = [line for line in lines if line["id"] == name]
        assert mine[0]["verdict"] in card.all("h4")[0].text
        assert mine[0]["claim"] in card.text
        rows = [[cell.text for cell in row.all("th", "td")] for row in card.all("tr")][1:]
        measured = [line for line in mine if line["measured"]]
        assert len(rows) == len(measured)
        for row, line in zip(rows, measured, strict=True):
            assert row[0] == line["model"]
            assert line["verdict_of_model"] in row[3]
            printed = row[1].replace(",", "").replace("−", "-")
            assert abs(float(printed) - float(line["measured"])) <= 0.5000001 * 10 ** -int(line["digits"])


def test_a_chapter_without_a_title_is_refused(tmp_path):
    path = tmp_path / "00_none.ipynb"
    path.write_text('{"cells": [{"cell_type": "markdown", "source": ["no title"]}]}')
    with pytest.raises(report.ReportError, match="begins with a line `# title`"):
        report.chapter(path)

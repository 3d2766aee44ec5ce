"""The report: one file that needs nothing else, holds everything, and says of every number where it is from."""

import csv
import itertools
import json
import re
import shutil
import subprocess
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from prunelib.apps import report
from prunelib.claims import claims
from prunelib.lab import costs, prose
from prunelib.lab import profile as grid

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

    def within(self, wanted) -> bool:
        return wanted(self) or (self.parent is not None and self.parent.within(wanted))

    @property
    def source(self) -> str | None:
        """`data-source` of the element or the nearest around it."""
        return self.attributes.get("data-source") or (self.parent.source if self.parent else None)


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
    assert len(links) > 500
    for link in set(links):
        if link.startswith("#"):
            assert link[1:] in names, link
        else:
            assert "://" not in link, link
            place = (OUT.parent / unquote(link.partition("#")[0])).resolve()
            assert place.exists(), link
            assert place.is_relative_to(ROOT), link


def test_the_same_files_give_the_same_page_wherever_it_lies(text, tmp_path):
    assert report.page() == text
    elsewhere = report.page(ROOT / "report.html")
    assert elsewhere == text.replace('href="../../', 'href="'), "only links differ"
    assert str(ROOT) not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d", text), "no date"


def test_a_clone_without_run_files_is_enough(tmp_path, monkeypatch):
    """Everything that is not in git is out of reach, and so are the run files that are."""
    seen = []
    real = open

    def watched(file, *arguments, **options):
        seen.append(Path(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: watched(self, encoding=encoding).read())
    monkeypatch.setattr(Path, "read_bytes", lambda self: watched(self, "rb").read())
    report.costs.cache_clear()
    report.page()
    read = {path.resolve().relative_to(ROOT).parts[0:2] for path in seen if path.resolve().is_relative_to(ROOT)}
    assert {one[0] for one in read} <= {"data", "figures", "notebooks", "profiles", "prunelib"}
    assert {one[1] for one in read if one[0] == "data"} == {"claims.yaml", "chapter_numbers.yaml", "costs.csv", "published"}


# ---------------------------------------------------------------------------------------------------------------- complete


def test_every_figure_and_table_has_caption_picture_and_record(tree):
    shown = {node.attributes["data-stem"]: node for node in tree.all("figure")}
    assert sorted(shown) == STEMS
    for stem, node in shown.items():
        pictures = node.all("img")
        assert len(pictures) == (".png" in grid.figure_suffixes(stem)), stem
        for one in pictures:
            assert len(one.attributes["alt"]) > 40, stem
            assert int(one.attributes["width"]) > 200
        (made,) = [one for one in node.all("details") if one.attributes.get("class") == "made"]
        record = json.loads((ROOT / "figures" / f"{stem}.json").read_text())
        assert f"--forceall figures/{stem}{grid.figure_suffixes(stem)[0]}" in made.text
        for part in (record["notebook"]["path"], record["notebook"]["source_sha256"][:12], *record.get("runs", [])):
            assert part in made.text, stem
        assert "Time and hardware" in made.text
        (caption,) = node.all("figcaption")
        assert f"figures/{stem}.csv" in " ".join(one.attributes["href"] for one in caption.all("a"))
    alone = [stem for stem in STEMS if len(shown[stem].all("figcaption")[0].text.split()) < 25]
    assert len(alone) < 20, f"captions are the words of the chapter: {alone}"


def test_headings_are_an_outline(tree):
    levels = [int(node.tag[1]) for node in tree.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    skipped = [(one, other) for one, other in itertools.pairwise(levels) if other > one + 1]
    assert skipped == []
    assert all(node.text.strip() for node in tree.all("h1", "h2", "h3", "h4", "a", "summary", "figcaption"))
    for node in tree.all("table"):
        assert all(cell.attributes.get("scope") for cell in node.all("th")) or node.source == report.ERRORS


def test_every_chapter_with_its_question_and_answer(tree):
    sections = {node.attributes["id"]: node for node in tree.all("section") if node.attributes.get("class") == "chapter"}
    assert sorted(sections) == [f"chapter-{path.stem[:2]}" for path in CHAPTERS]
    for path in CHAPTERS:
        section = sections[f"chapter-{path.stem[:2]}"]
        told = " ".join(section.text.split())
        for cell in prose.cells(path):  # no paragraph is lost: its longest run of plain words is there
            for paragraph in re.split(r"\n\s*\n", cell):
                plain = max(re.split(r"[*`\[\]()#|<>&_\"]|^[-\d]+\.?", " ".join(paragraph.split())), key=len).strip()
                assert plain in told, (path.stem, plain)
        if "In plain words" in told:
            (answer,) = [node for node in section.all("div") if node.attributes.get("class") == "answer"]
            assert answer.attributes["id"] == f"chapter-{path.stem[:2]}-answer"


def test_every_claim_with_its_verdict(tree):
    cards = {node.attributes["data-claim"]: node for node in tree.all("article")}
    listed = claims.read()
    assert list(cards) == [one.id for one in listed]
    with open(ROOT / "figures/own_table_claims.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for one in listed:
        mine = [line for line in lines if line["id"] == one.id]
        (head,) = cards[one.id].all("h4")
        assert mine[0]["verdict"] in head.text
        assert mine[0]["verdict"].replace(" ", "-") in cards[one.id].attributes["class"]
        assert one.claim in cards[one.id].text
        assert (mine[0]["reason"] in cards[one.id].text) if mine[0]["reason"] else cards[one.id].all("table")


def test_published_errors_are_there(tree):
    (section,) = [node for node in tree.all("section") if node.attributes.get("id") == "errors"]
    source = (ROOT / report.ERRORS).read_text(encoding="utf-8").split("## Known errors and doubts")[1]
    listed = [line for line in source.splitlines() if line.startswith("| ")]
    assert len(section.all("tr")) == len(listed) - 1 + ("| --- |" not in source)
    for line in listed[2:]:
        assert line.split("|")[2].strip().replace("`", "")[:60] in section.text


# ----------------------------------------------------------------------------------------------------------------- numbers


def same(printed: str, cell: str) -> bool:
    """Whether what is printed is the cell, or the number rounded to four significant digits or more."""
    if printed == cell:
        return True
    number = Decimal(printed.replace("−", "-"))
    exact = Decimal(cell)
    digits = len(number.normalize().as_tuple().digits) if number == exact else len(number.as_tuple().digits)
    enough = number == exact or digits >= 4
    return enough and abs(number - exact) <= Decimal("0.5000001").scaleb(number.as_tuple().exponent)


def test_every_cell_of_a_table_is_that_of_its_csv(tree):
    checked = 0
    for table in tree.all("table"):
        source = table.source
        assert source, "a table without data-source"
        assert (ROOT / source).is_file(), source
        if not table.attributes.get("data-source", "").endswith(".csv") or table.attributes.get("data-kind") == "count":
            continue
        with open(ROOT / source, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        head, *body = [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]
        assert head == lines[0]
        assert len(body) == len(lines) - 1, source
        for row, line in zip(body, lines[1:], strict=True):
            for printed, cell in zip(row, line, strict=True):
                assert same(printed, cell), (source, printed, cell)
                checked += 1
    assert checked > 10_000


def test_numbers_of_claims_are_those_of_the_table_of_claims(tree):
    with open(ROOT / "figures/own_table_claims.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for card in tree.all("article"):
        assert card.attributes["data-source"] == "figures/own_table_claims.csv"
        mine = [line for line in lines if line["id"] == card.attributes["data-claim"]]
        rows = [[cell.text for cell in row.all("th", "td")] for row in card.all("tr")][1:]
        measured = [line for line in mine if line["measured"]]
        assert len(rows) == len(measured)
        for row, line in zip(rows, measured, strict=True):
            assert row[0] == line["model"]
            texts = re.findall(prose.FIGURE, f"{row[1]} {row[2].replace(', ', ' ')}")
            found = [one.replace(",", "").replace("−", "-") for one in texts]
            for printed, name in zip(found, ("measured", "low", "high"), strict=False):
                assert abs(float(printed) - float(line[name])) <= 0.5000001 * 10 ** -len(printed.partition(".")[2])
            assert len(found) == (3 if line["low"] else 1)
            assert line["verdict_of_model"] in row[3]
            assert (line["runs"] or "own numbers") in card.text


def test_counts_and_times_are_recomputed(tree):
    took = {(run, code): seconds for run, code, seconds in costs.read()[["run", "code", "seconds"]].itertuples(index=False)}
    times = [node for node in tree.all("data") if node.attributes.get("class") == "seconds"]
    assert len(times) > len(STEMS)
    for node in times:
        assert node.attributes["data-source"] == "data/costs.csv"
        if "data-runs" in node.attributes:
            total = sum(took[tuple(pair.split("@"))] for pair in node.attributes["data-runs"].split())
            assert node.attributes["value"] == f"{total:.1f}"
        assert node.text == report.minutes(float(node.attributes["value"]))
    verdicts = {}
    with open(ROOT / "figures/own_table_claims.csv", newline="") as file:
        for line in csv.DictReader(file):
            verdicts[line["id"]] = line["verdict"]
    (tally,) = [node for node in tree.all("table") if node.attributes.get("class") == "tally"]
    counts = [[int(cell.text) for cell in row.all("td")] for row in tally.all("tr")[1:]]
    assert [sum(column) for column in zip(*counts, strict=True)] == [
        list(verdicts.values()).count(verdict) for verdict in claims.VERDICTS
    ]


def test_every_run_of_a_figure_has_a_known_time(tree):
    """Or the report says of how many it is not known: then make data/costs.csv anew."""
    assert "not known of" not in tree.text, "run: python -m prunelib.lab.costs (where the run files are)"


def test_every_number_of_the_page_names_its_source(tree):
    """Text outside any `data-source` has no digits but names (Figure 5a, chapter 01, Llama-2-7B) and settings."""

    def free(node) -> str:
        name = node.tag in ("code", "h2", "h3", "h4") or (node.tag == "a" and (ROOT / node.text).is_file())
        if name or "data-source" in node.attributes:
            return " … "
        return "".join(child if isinstance(child, str) else free(child) for child in node.children)

    rest = "\n".join(free(node) for node in tree.all("main"))
    for pattern in (*prose.SETTINGS, *prose.NAMES):
        rest = pattern.sub(" ", rest)
    found = [f"{rest[max(0, one.start() - 40) : one.end() + 20]!r}" for one in re.finditer(r"\d+", rest)]
    assert found == []
    for node in tree.all():
        if "data-source" in node.attributes:
            for source in node.attributes["data-source"].split(", "):
                assert source in prose.BY or (ROOT / source).exists(), source


# -------------------------------------------------------------------------------------------------------- chapters' numbers


@pytest.fixture(scope="module")
def tables():
    return prose.tables()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_numbers_in_the_sentences_of_a_chapter(path, tables, tables_as_committed):
    """Computed ones are those of the tables, found ones are in their csv."""
    ledger = prose.ledger(path)
    whole = "\n\n".join(prose.cells(path))
    assert prose.wrong(whole, ledger.sentences, tables) == [], f"run: python -m prunelib.lab.prose notebooks/{path.name}"
    assert prose.missing(whole, ledger.stated) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_number_in_the_sentences_of_a_chapter_has_an_origin(path):
    ledger = prose.ledger(path)
    cells = prose.cells(path)
    for one in (*ledger.sentences, *ledger.stated):
        assert sum(bool(prose._pattern(one.text).search(cell)) for cell in cells) >= 1, f"the chapter does not say: {one.text}"
    for one in ledger.stated:
        assert one.source in prose.BY or (ROOT / one.source).exists(), one.source
    untraced = [
        one.around
        for cell in cells
        for one in prose.numbers(cell, ledger.sentences, ledger.stated)
        if one.kind == prose.UNTRACED
    ]
    assert untraced == [], "say in data/chapter_numbers.yaml how it is computed, or what made it"


def test_the_ledger_names_chapters_that_are_there():
    import yaml

    listed = yaml.safe_load((ROOT / prose.CHAPTER_NUMBERS).read_text(encoding="utf-8"))
    assert set(listed) <= {path.stem for path in CHAPTERS}


# ------------------------------------------------------------------------------------------------------------------- parts


def test_numbers_are_printed_one_way():
    printed = ["0.03822", "−1.5", "12345", "2629", "0", "3e-07", "1.000", "−0.9996", "ref-llama-32l", "", "0.5"]
    given = ["0.038221626", "-1.5", "12345", "2629.309536", "0.0", "3e-07", "0.99998", "-0.99956", "ref-llama-32l", "", "0.5"]
    assert [report.shown(text) for text in given] == printed
    assert [report.minutes(seconds) for seconds in (3.2, 119.0, 120.0, 3661.0)] == ["3 s", "119 s", "2 min", "61 min"]


def test_words_keep_their_markup_and_marked_numbers():
    page = report.Page(OUT)
    said = "**It** costs 0.3 nats in [chapter](02_layer_search.ipynb#x) & `a<b`, <b>raw</b>."
    number = prose.Number(said.index("0.3"), said.index("0.3") + 3, prose.COMPUTED, "results", "s-1-low", "")
    made = report.words(said, page, folder="notebooks", numbers=[number])
    assert (
        '<data class="computed" id="s-1-low" value="0.3" data-source="results" title="computed from results">0.3</data>' in made
    )
    assert 'href="../../notebooks/02_layer_search.ipynb#x"' in made
    assert "<strong>It</strong>" in made
    assert "<code>a&lt;b</code>" in made
    assert "&lt;b&gt;raw" in made


def test_a_chapter_without_a_title_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    path = tmp_path / "09_x.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "no title"}]}))
    with pytest.raises(report.ReportError, match="begins with a line `# title`"):
        report.chapter(path)


def test_the_command_writes_a_page_and_says_when_there_is_no_browser(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "browser", lambda: None)
    assert report.main([str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "no PDF: no Chromium or Chrome found" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pdf"))
    assert report.main(["--help"]) == 2
    monkeypatch.setattr(report, "browser", lambda: str(tmp_path / "none"))
    monkeypatch.setattr(report, "page", lambda out: "<p>")
    assert report.main(["--no-pdf", str(tmp_path / "r.html")]) == 0
    assert report.main([str(tmp_path / "r.html")]) == 1
    assert "did not print the page" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- browser

MEASURE = """<script>addEventListener("load", () => {
const root = document.documentElement, wide = [];
for (const one of document.querySelectorAll("main *, nav *")) {
  const right = one.getClientRects().length ? one.getBoundingClientRect().right : 0;
  if (right > root.clientWidth + 1 && !one.closest(".scroll, pre, .skip"))
    wide.push(one.tagName + "." + one.className + " " + one.textContent.slice(0, 40));
}
const style = getComputedStyle(document.body);
const broken = [...document.images].filter(one => !one.complete || !one.naturalWidth).length;
parent.postMessage(JSON.stringify({client: root.clientWidth, scroll: root.scrollWidth, wide: wide.slice(0, 5),
  color: style.color, background: style.backgroundColor, images: document.images.length, broken}), "*");
});</script>"""
RECEIVE = """<script>addEventListener("message", one => document.documentElement.setAttribute("data-measured", one.data));
</script>"""


@pytest.fixture(scope="module")
def chromium():
    program = report.browser()
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    return program


def light(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen(text, tmp_path, chromium, width, scheme):
    """Measured in the browser: an inline frame is as narrow as a phone, which a headless window cannot be."""
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]  # would refuse the measuring too
    query = "(prefers-color-scheme:dark)"
    assert query in text
    inner = (
        text.replace(policy, "")
        .replace(query, "all" if scheme == "dark" else "not all")
        .replace("</body>", f"{MEASURE}</body>")
    )
    frame = f'<iframe src="inner.html" style="border:0;width:{width}px;height:900px"></iframe>'
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    (tmp_path / "outer.html").write_text(f'<!DOCTYPE html><body style="margin:0">{frame}{RECEIVE}', encoding="utf-8")
    base = [
        *report.command(chromium, tmp_path / "profile"),
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        f"--window-size={max(width, 800)},900",
    ]
    done = subprocess.run(
        [*base, "--dump-dom", (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, done.stderr[-500:]
    result = json.loads(found[1].replace("&quot;", '"'))
    assert result["client"] == width
    assert result["scroll"] <= width, result["wide"]
    assert result["wide"] == []
    assert (result["images"], result["broken"]) == (sum(".png" in grid.figure_suffixes(stem) for stem in STEMS), 0)
    dark = light(result["background"]) < 0.2
    assert dark == (scheme == "dark")
    assert abs(light(result["background"]) - light(result["color"])) > 0.7, "text stands out"
    picture = tmp_path / f"{width}_{scheme}.png"
    subprocess.run([*base, f"--screenshot={picture}", (tmp_path / "outer.html").as_uri()], capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000


def test_the_pdf_is_printed_without_a_date(text, tmp_path, chromium):
    small = re.sub(r'(<section id="chapter-02".*)(<section id="errors">)', r"\2", text, flags=re.DOTALL)
    small = re.sub(r"<section id=\"chapter-01\".*?</section>", "", small, flags=re.DOTALL)
    first = report.pdf(small, tmp_path / "a.pdf", chromium).read_bytes()
    assert first.startswith(b"%PDF")
    assert b"(D:00000000000000" in first
    assert len(re.findall(rb"/Type\s*/Page\b", first)) > 3
    assert first == report.pdf(small, tmp_path / "b.pdf", chromium).read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.pdf", "b.pdf"], "nothing is left behind"
    with pytest.raises(report.ReportError, match="did not print the page"):
        report.pdf(small, tmp_path / "c.pdf", chromium, seconds=0.01)


def test_colors_of_words_stand_out():
    """Contrast of text on its background, as WCAG 2 counts it, at least 4.5 in both schemes."""
    css = Path(report.__file__).with_suffix(".css").read_text(encoding="utf-8")
    schemes = re.findall(r":root\{([^}]*)\}", css)
    assert len(schemes) == 2

    def luminance(color: str) -> float:
        color = color if len(color) == 6 else "".join(2 * one for one in color)
        parts = [int(color[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return sum(one * weight for one, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+):#([0-9a-f]+)", scheme))
        for ground in ("bg", "box"):
            for name in set(colors) - {"bg", "box", "line"}:
                bright, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_browser_is_looked_for_by_name(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "google-chrome" else None)
    assert report.browser() == "/bin/google-chrome"

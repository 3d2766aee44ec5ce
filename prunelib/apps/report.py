"""Everything on one page: chapters, figures, tables, claims and how each was made, in one file without a network.

`python -m prunelib.apps.report [OUT.html]` reads what is committed (chapters and figures/); a clone
without any run file is enough. Chapters are their Markdown cells: the heading of a figure and the words below it are its
caption. The same files give the same bytes. Pictures are data URIs, links lead to files of the clone, nothing is loaded.
"""

import base64
import csv
import html
import json
import math
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mistune

from prunelib.claims import CLAIMS, MARKS, number
from prunelib.figures.save import STEM, figure_suffixes
from prunelib.io import at_root, project_root, write_text
from prunelib.lab.runs import PAPERS

OUT = "build/report/report.html"
FIGURES = "figures"
LONGEST = 200  # rows of a csv that are shown; more are in the file
WIDEST = 12  # columns of a table that fits an upright sheet of paper


class ReportError(RuntimeError):
    """A report that cannot be made of what is there."""


# ----------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Part:
    """A heading of a chapter with the words below it. `stems`: the figures and tables that the heading names."""

    level: int
    title: str
    stems: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Chapter:
    """A chapter: `path` from the root, the words below its title, its parts."""

    path: str
    title: str
    lead: str
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return Path(self.path).stem


def chapters() -> list[Chapter]:
    """All chapters, in their order."""
    return [chapter(path) for path in sorted(at_root("notebooks").glob("[0-9][0-9]_*.ipynb"))]


def chapter(path: Path) -> Chapter:
    """One chapter from its Markdown cells. Raises ReportError when it does not begin with a title."""
    parts: list[Part] = []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for text in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"):
        for block in re.split(r"^(?=#{1,6} )", text, flags=re.MULTILINE):
            head = re.match(r"(#+) (.*)(?:\n|$)", block)
            if head is None:
                if not block.strip():
                    continue
                level, title, body = 0, "", block
            else:
                level, title, body = len(head[1]), head[2], block[head.end() :]
            stems = tuple(name for name in re.findall(r"`([^`]+)`", title) if STEM.fullmatch(name))
            for stem in stems:
                title = re.sub(rf"\s*\(?`{stem}`\)?", "", title)
            parts.append(Part(level, title.strip(), stems, body.strip()))
    if not parts or parts[0].level != 1:
        raise ReportError(f"{path}: a chapter begins with a line `# title`")
    return Chapter(path.relative_to(project_root()).as_posix(), parts[0].title, parts[0].text, tuple(parts[1:]))


def rows(path: str) -> list[dict[str, str]]:
    """The lines of a csv, all cells as text."""
    with open(at_root(path), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------------- words


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shown(text: str) -> str:
    """A cell of a csv as it is printed: a number with four significant digits, whole ones and words as they are."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value) or re.fullmatch(r"[+-]?\d+", text):
        return text
    return (f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


class Words(mistune.HTMLRenderer):
    """Markdown as HTML: headings below those of the page, links as seen from it."""

    def __init__(self, page: "Page", folder: str, below: int) -> None:
        super().__init__(escape=True)
        self.page, self.folder, self.below = page, folder, below

    def heading(self, text: str, level: int, **attributes: object) -> str:
        level = min(6, level + self.below)
        return f"<h{level}>{text}</h{level}>\n"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if "://" not in url and not url.startswith("#"):
            path, _, fragment = url.partition("#")
            url = self.page.link(os.path.normpath(os.path.join(self.folder, path))) + (f"#{fragment}" if fragment else "")
        return f'<a href="{esc(url)}">{text}</a>'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return esc(text)  # the figures stand in their own places


def words(text: str, page: "Page", *, folder: str = "", below: int = 1) -> str:
    """Markdown as HTML."""
    return mistune.create_markdown(renderer=Words(page, folder, below), plugins=["table"])(text)


# ------------------------------------------------------------------------------------------------------------------ blocks


class Page:
    """Where the page will lie, which decides what its links look like, and the names that are taken."""

    def __init__(self, out: Path) -> None:
        self.folder = out.absolute().parent
        self.taken: set[str] = set()

    def link(self, path: str) -> str:
        """A file of the clone as seen from the page."""
        return Path(os.path.relpath(project_root() / path, self.folder)).as_posix()

    def file(self, path: str, text: str | None = None) -> str:
        return f'<a href="{esc(self.link(path))}">{esc(text or path)}</a>'

    def unique(self, name: str) -> str:
        """`name`, or with a number behind it when it is taken."""
        again, count = name, 1
        while again in self.taken:
            count += 1
            again = f"{name}-{count}"
        self.taken.add(again)
        return again


def table(path: str, label: str) -> str:
    """A csv as a table; the cells are those of the file, in its order."""
    lines = rows(path)
    numeric = [all(re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|", one[name]) for one in lines) for name in lines[0]]
    cells = [[esc(shown(cell)) for cell in one.values()] for one in lines]
    return grid([esc(name) for name in lines[0]], cells, numeric, label)


def grid(
    head: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[bool], label: str, *, named: bool = False
) -> str:
    """A table of HTML cells in a box that scrolls where it is wider than the page; `named`: the first cell is a heading."""
    kinds = [' class="n"' if number else "" for number in numeric]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = ""
    for line in lines:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(line, kinds, strict=True)]
        if named:
            cells[0] = f'<th scope="row">{line[0]}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    wide = ' data-wide=""' if len(head) > WIDEST else ""
    inner = f"<table{wide}><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}">{inner}</div>'


def picture(stem: str, alt: str) -> str:
    content = at_root(f"{FIGURES}/{stem}.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{esc(alt)}" width="{width // 2}" height="{height // 2}">'


def figure(stem: str, part: Part, caption: str, page: Page) -> str:
    """A figure or a table with its caption, its numbers and how it was made."""
    if not at_root(f"{FIGURES}/{stem}.json").is_file():
        absent = f"{stem} is not drawn here: <code>make figures</code> draws it."
        return f'<div id="{page.unique(f"figure-{stem}")}">{caption}<p><em>{absent}</em></p></div>\n'
    record = json.loads(at_root(f"{FIGURES}/{stem}.json").read_text(encoding="utf-8"))
    path = f"{FIGURES}/{stem}.csv"
    lines = f"{len(rows(path))} rows"
    files = ", ".join(page.file(f"{FIGURES}/{stem}{suffix}", suffix[1:]) for suffix in figure_suffixes(stem))
    body = table(path, part.title) if len(rows(path)) <= LONGEST else f'<p class="small">{lines} in {page.file(path)}.</p>'
    if ".png" in figure_suffixes(stem):
        body = f"<details><summary>The plotted numbers, {lines}</summary>{body}</details>"
        body = f'<div class="picture">{picture(stem, f"{part.title}. The plotted numbers are in {path}.")}</div>\n{body}'
    origin = record["paper"] or "ours, without a counterpart in a paper"
    about = f'<p class="small"><code>{stem}</code>: {esc(origin)}; {files}</p>'
    return (
        f'<figure id="{page.unique(f"figure-{stem}")}" data-stem="{stem}">\n{body}\n<figcaption>{caption}{about}</figcaption>\n'
        f"{made(stem, record, page)}</figure>\n"
    )


def made(stem: str, record: Mapping, page: Page) -> str:
    """How a figure was made: command, function, code, runs, inputs."""
    target = f"figures/{stem}{figure_suffixes(stem)[0]}"
    lines = [
        ("Command", f"<code>snakemake --forceall {target}</code>"),
        ("Function", f"<code>{esc(record['function'])}</code>, code <code>{record['drawing_code_sha256'][:12]}</code>"),
        (f"Runs ({len(record['runs'])})", esc(", ".join(record["runs"])) or "none: drawn from the published numbers alone"),
        ("Parameters", esc(", ".join(f"{name} = {value}" for name, value in record["parameters"].items())) or "–"),
        ("Published numbers", ", ".join(page.file(path) for path in record["inputs"]) or "none"),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in lines)
    return f'<details class="made"><summary>How this was made</summary><dl>\n{body}</dl></details>\n'


# ------------------------------------------------------------------------------------------------------------------ claims


def claim_cards(page: Page) -> str:
    """Every claim with its values and verdict, from figures/own_table_claims.csv."""
    path = f"{FIGURES}/own_table_claims.csv"
    groups: dict[str, list[dict[str, str]]] = {}
    for one in rows(path):
        groups.setdefault(one["id"], []).append(one)
    parts, paper = [], None
    for name, lines in groups.items():
        first = lines[0]
        if first["paper"] != paper:
            paper = first["paper"]
            parts.append(f'<h3 id="claims-{slug(paper)}">{esc(PAPERS.get(paper, paper))}</h3>')
        parts.append(_claim(name, lines, page))
    return "\n".join(parts)


def _value(text: str, digits: int) -> str:
    return number(float(text), digits) if text else "–"


def _claim(name: str, lines: Sequence[Mapping[str, str]], page: Page) -> str:
    first = lines[0]
    digits, verdict = int(first["digits"]), first["verdict"] or "no rows in this profile"
    unit = f" {esc(first['unit'])}" if first["unit"] else ""
    about = [esc(first["source"])]
    if first["figure"]:
        about.append(f'<a href="#figure-{first["figure"]}">{esc(first["figure"])}</a>')
    if first["published"]:
        about.append(f"published {_value(first['published'], digits)}{unit}")
    measured = [one for one in lines if one["measured"]]
    inner = f"<p>{esc(first['reason'] or 'The profile has no such rows.')}</p>"
    if measured:
        about.append(f"tested: {esc(first['tested'])}; holds if {esc(first['holds_if'])}{unit}")
        values, trace = [], ""
        for one in measured:
            interval = f"[{_value(one['low'], digits)}, {_value(one['high'], digits)}]" if one["low"] else ""
            judged = f"{MARKS[one['verdict_of_model']]} {esc(one['verdict_of_model'])}"
            values.append([esc(one["model"]), _value(one["measured"], digits), interval, judged])
            kind = ", ".join(esc(word) for word in (one["interval"], f"n = {one['n']}") if word)
            trace += f"<dt>{esc(one['model'])}</dt><dd>{kind}; runs: {esc(one['runs'] or 'none, published numbers')}</dd>"
        head = ["model", "measured", "interval", "verdict"]
        inner = grid(head, values, [False, True, True, False], f"values of {name}", named=True)
        inner += f"<details><summary>Interval and runs</summary><dl>{trace}</dl></details>"
    mark = MARKS.get(first["verdict"] or None, "–")
    return (
        f'<article class="claim {slug(verdict)}" id="{page.unique(f"claim-{name}")}" data-claim="{name}">\n'
        f'<h4><span class="badge">{mark} {esc(verdict)}</span> <code>{esc(name)}</code></h4>\n<p>{esc(first["claim"])}</p>\n'
        f'<p class="small">{" · ".join(about)}</p>\n{inner}\n</article>'
    )


# ------------------------------------------------------------------------------------------------------------------- parts


def chapter_section(one: Chapter, page: Page) -> tuple[str, list[tuple[str, str]]]:
    """A chapter as HTML, and the entries of its table of contents."""
    anchor, entries = f"chapter-{one.name[:2]}", []

    def told(text: str, below: int = 2) -> str:
        return words(text, page, folder="notebooks", below=below)

    parts = [
        f'<section id="{anchor}" class="chapter">\n<h2><span class="small">{one.name[:2]}</span> {_inline(one.title)}</h2>'
    ]
    answer = next((part for part in one.parts if re.match(r"In plain words|Answer", part.title)), None)
    jump = f' · <a href="#{anchor}-answer">the answer</a>' if answer else ""
    parts.append(f'<p class="small">Notebook: {page.file(one.path)}{jump}</p>')
    parts.append(f'<div class="lead">{told(one.lead)}</div>')
    for part in one.parts:
        level = min(6, max(3, part.level + 1))
        if part is answer:
            parts.append(f'<div class="answer" id="{anchor}-answer"><h3>{_inline(part.title)}</h3>\n{told(part.text)}</div>')
            entries.append((f"{anchor}-answer", part.title))
            continue
        if part.title:
            name = page.unique(f"{anchor}-{slug(part.title)}")
            parts.append(f'<h{level} id="{name}">{_inline(part.title)}</h{level}>')
            entries += [(name, part.title)] if level == 3 else []
        body = told(part.text)
        if part.stems:
            parts += [figure(stem, part, body if place == 0 else "", page) for place, stem in enumerate(part.stems)]
        else:
            parts.append(body)
    parts.append("</section>")
    return "\n".join(parts), entries


def _inline(text: str) -> str:
    """The Markdown of a heading."""
    made = mistune.create_markdown(escape=True)(re.sub(r"^(\d+)\.", r"\1\\.", text)).strip()
    return re.sub(r"^<p>|</p>$", "", made)


def contents(entries: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    lines = []
    for anchor, title, below in entries:
        inner = "".join(f'<li><a href="#{name}">{_inline(words)}</a></li>' for name, words in below)
        lines.append(f'<li><a href="#{anchor}">{_inline(title)}</a>{f"<ol>{inner}</ol>" if inner else ""}</li>')
    return f'<nav class="toc" aria-label="Contents"><p class="title">Contents</p><ol>{"".join(lines)}</ol></nav>'


def page(out: str | os.PathLike = OUT) -> str:
    """The whole page as text. `out` is where it will lie: links to files of the clone start there."""
    here = Page(at_root(out))
    listed = chapters()
    told = [(one, *chapter_section(one, here)) for one in listed]
    cards = claim_cards(here)
    papers = re.findall(r'<h3 id="(claims-[^"]+)">([^<]+)</h3>', cards)
    nav = contents(
        [
            ("overview", "Overview", []),
            ("claims", "Claims", papers),
            *((f"chapter-{one.name[:2]}", f"{one.name[:2]} {one.title}", entries) for one, _, entries in told),
        ]
    )
    readme, claims_file, license_file = here.file("README.md"), here.file(CLAIMS), here.file("LICENSE")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>prunelib: report</title>
<style>
{Path(__file__).with_suffix(".css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#overview">Skip the contents</a>
{nav}
<main>
<header id="overview">
<h1>Shallower and thinner language models, without retraining</h1>
<p>Which layers of a language model can go, and at what price? This page holds every chapter, figure, table and claim of the
repository, with how each was made. It is written by <code>make report</code> from the committed files and loads nothing; links
lead to files of the clone it was made in ({readme}, {license_file}).</p>
<p>Every table is the csv that is linked beside it, numbers rounded to four digits.</p>
</header>
<section id="claims">
<h2>Claims</h2>
<p>What the papers say, and what the tables of the chapters say to it. {claims_file} says when a claim holds; one function of
<code>prunelib.claims</code> for each says how its value is computed. Values and verdicts are those of
<a href="#figure-own_table_claims">own_table_claims</a>. A claim
<strong>holds</strong> when on every model the whole interval obeys its rule, <strong>fails</strong> when on none any of it
does, and <strong>differs</strong> otherwise.</p>
{cards}
</section>
{"".join(text for _, text, _ in told)}
</main>
</body>
</html>
"""


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.apps.report [OUT.html]`."""
    out = at_root(arguments[0] if arguments else OUT)
    try:
        text = page(out)
        write_text(out, text)
    except (ReportError, ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

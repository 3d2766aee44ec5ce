"""Everything on one page: chapters, figures, tables, claims and how each was made, in one file without a network.

`python -m prunelib.apps.report [--no-pdf] [OUT.html]` reads what is committed (chapters, figures/, data/claims.yaml, data/costs.csv,
the list of published errors) and computes nothing but sums of times; a clone without any run file is enough. Chapters are their
Markdown cells: the heading of a figure and the words below it are its caption. Beside the page lies the same as PDF where a
browser is installed (Chromium or Chrome).

The same files give the same bytes. Every number of the page stands in an element that says where it is from: `data-source` is a
file of the repository, of a table for every cell, of a number in a sentence as `data/chapter_numbers.yaml` traces it
(`prunelib/lab/prose.py`). Pictures are data URIs, links lead to files of the clone, nothing is loaded. Nothing here imports torch.
"""

import base64
import csv
import functools
import html
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mistune

from prunelib.claims import claims
from prunelib.figures.save import STEM, figure_suffixes
from prunelib.io import at_root, project_root, write_text
from prunelib.lab import prose

OUT = "build/report/report.html"
FIGURES = "figures"
COSTS = "data/costs.csv"
ERRORS = "data/published/README.md"
LONGEST = 200  # rows of plotted numbers that are shown below a figure; more are in its csv
WIDEST = 12  # columns of a table that fits an upright sheet of paper
LARGEST = 50_000  # characters of a table that is shown without being asked for
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

PAPERS = {  # as in prunelib.figures.style, which would load matplotlib
    "simdiff": "SimDiff, arXiv 2604.19520",
    "dynamic_slicing": "Dynamic LLM Slicing, arXiv 2411.03513",
    "deeper_layers": "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887",
    "slicegpt": "SliceGPT, arXiv 2401.15024",
}


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

    @property
    def question(self) -> str | None:
        """The first sentence in asterisks that asks something."""
        found = re.search(r"(?<!\*)\*([^*]+\?)\*(?!\*)", self.lead)
        return " ".join(found[1].split()) if found else None


def chapters() -> list[Chapter]:
    """All chapters, in their order."""
    return [chapter(path) for path in sorted(at_root("notebooks").glob("[0-9][0-9]_*.ipynb"))]


def chapter(path: Path) -> Chapter:
    """One chapter from its Markdown cells. Raises ReportError when it does not begin with a title."""
    parts: list[Part] = []
    for text in prose.cells(path):
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


@functools.cache
def costs() -> dict[tuple[str, str], dict[str, str]]:
    """Run and code → its line of data/costs.csv; empty where there is no such file."""
    return {(one["run"], one["code"]): one for one in rows(COSTS)} if at_root(COSTS).is_file() else {}


def behind(record: Mapping) -> tuple[list[dict[str, str]], list[str]]:
    """Lines of data/costs.csv of the runs behind a figure, and the runs whose time is not known."""
    found, unknown = [], []
    for run in record.get("runs", []):
        mine = [costs()[run, code] for code in record.get("run_code", []) if (run, code) in costs()]
        found += mine
        unknown += [] if mine else [run]
    return found, unknown


# ------------------------------------------------------------------------------------------------------------------- words


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def shown(text: str) -> str:
    """A cell of a csv as it is printed: a number with four significant digits, fewer where it has fewer; others as they are."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value) or re.fullmatch(r"[+-]?\d+", text):
        return text
    short = f"{value:.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"
    if float(short) == value:
        short = f"{value:.4g}" if abs(value) < 999.95 else short
    return re.sub("^-", "−", short.removesuffix("."))


def minutes(seconds: float) -> str:
    """Times as a reader wants them: seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Words(mistune.HTMLRenderer):
    """Markdown as HTML: headings below those of the page, links as seen from it, numbers with their origin."""

    def __init__(self, page: "Page", folder: str, below: int, source: str | None = None) -> None:
        super().__init__(escape=True)
        self.page, self.folder, self.below, self.source = page, folder, below, source

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


OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a marked number and its own


def words(text: str, page: "Page", *, folder: str = "", below: int = 1, numbers: Sequence[prose.Number] = ()) -> str:
    """Markdown as HTML; every number of `numbers`, places in this text, becomes an element that names its origin."""
    marked, end = "", 0
    for place, one in enumerate(numbers):
        marked += f"{text[end : one.start]}{OPEN}{place}{CLOSE}{text[one.start : one.end]}{OPEN}{CLOSE}"
        end = one.end
    renderer = Words(page, folder, below)
    made = mistune.create_markdown(renderer=renderer, plugins=["table"])(marked + text[end:])

    def element(found: re.Match) -> str:
        one = numbers[int(found[1])]
        hint = {
            prose.COMPUTED: f"computed from {one.source}",
            prose.FOUND: f"in {one.source}",
            prose.STATED: f"made by {one.source}" if "/" in one.source else one.source,
            prose.UNTRACED: "not traced to a result by a test",
        }[one.kind]
        name = f' id="{esc(page.unique(one.id))}"' if one.id else ""
        origin = f'data-source="{esc(one.source)}" title="{esc(hint)}"'
        return f'<data class="{one.kind}"{name} value="{esc(found[2])}" {origin}>{found[2]}</data>'

    return re.sub(f"{OPEN}(\\d+){CLOSE}(.*?){OPEN}{CLOSE}", element, made, flags=re.DOTALL)


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


def box(inner: str, label: str) -> str:
    """A box of its own for what is wider than a phone; reached by the keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}">{inner}</div>'


def table(path: str, label: str, lines: Sequence[Mapping[str, str]] | None = None) -> str:
    """A csv as a table; the cells are those of the file, in its order."""
    lines = rows(path) if lines is None else lines
    columns = list(lines[0])
    numeric = [all(re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|", one[name]) for one in lines) for name in columns]
    cells = [[esc(shown(one[name])) for name in columns] for one in lines]
    return grid([esc(name) for name in columns], cells, numeric, label, f' data-source="{esc(path)}"')


def grid(
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    numeric: Sequence[bool],
    label: str,
    attributes: str = "",
    *,
    named: bool = False,
) -> str:
    """A table in a box of its own, for what is wider than a phone. The cells are HTML; `named`: the first is a heading."""
    kinds = [' class="n"' if number else "" for number in numeric]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = ""
    for line in lines:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(line, kinds, strict=True)]
        if named:
            cells[0] = f'<th scope="row">{line[0]}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    attributes += ' data-wide=""' if len(head) > WIDEST else ""
    return box(f"<table{attributes}><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>", label)


def picture(stem: str, alt: str) -> str:
    content = at_root(f"{FIGURES}/{stem}.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{esc(alt)}" width="{width // 2}" height="{height // 2}">'


def plain(text: str) -> str:
    """The words of Markdown without its signs, on one line."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`]", "", text).split())


def figure(stem: str, part: Part, caption: str, page: Page) -> str:
    """A figure or a table with its caption, its numbers and how it was made."""
    if not at_root(f"{FIGURES}/{stem}.json").is_file():
        absent = f"{stem} is not drawn here: <code>make figures</code> draws it."
        return f'<div id="{page.unique(f"figure-{stem}")}">{caption}<p><em>{absent}</em></p></div>\n'
    record = json.loads(at_root(f"{FIGURES}/{stem}.json").read_text(encoding="utf-8"))
    path = f"{FIGURES}/{stem}.csv"
    count = len(rows(path))
    files = ", ".join(page.file(f"{FIGURES}/{stem}{suffix}", suffix[1:]) for suffix in figure_suffixes(stem))
    origin = record["paper"] if record["paper"] else "ours, without a counterpart in a paper"
    lines = f'<data value="{count}" data-source="{esc(path)}">{count}</data> rows'
    if ".png" in figure_suffixes(stem):
        question = re.match(r"\*([^*]+\?)\*", part.text)
        alt = f"{part.title}. {plain(question[1]) + ' ' if question else ''}The plotted numbers are in {path}."
        body = f'<div class="picture">{picture(stem, alt)}</div>'
        if count <= LONGEST:
            numbers = f"<details><summary>The plotted numbers, {lines}</summary>{table(path, part.title)}</details>"
        else:
            numbers = f'<p class="small">The plotted numbers: {lines} in {page.file(path)}.</p>'
    else:
        body, numbers = table(path, part.title), f'<p class="small">{lines}.</p>'
        if len(body) > LARGEST:
            body = f"<details><summary>The table, {lines}</summary>{body}</details>"
    about = f'<p class="small"><code>{stem}</code>: {esc(origin)}; {files}</p>'
    return (
        f'<figure id="{page.unique(f"figure-{stem}")}" data-stem="{stem}">\n{body}\n<figcaption>{caption}{about}</figcaption>\n'
        f"{numbers}\n{made(stem, record, page)}</figure>\n"
    )


def made(stem: str, record: Mapping, page: Page) -> str:
    """How a figure was made: command, notebook, time and hardware, code, runs, inputs."""
    notebook = record["notebook"]["path"]
    suffix = figure_suffixes(stem)[0]
    found, unknown = behind(record)
    source = f"{FIGURES}/{stem}.json"
    lines = [
        ("From nothing", f"<code>snakemake --cores 2 --forceall figures/{stem}{suffix}</code>"),
        (
            "From the tables",
            f"<code>python -m prunelib.lab.run_notebook {notebook} build/{Path(notebook).stem}.json</code>{_drawing(notebook)}",
        ),
        ("Notebook", f"{page.file(notebook)}, code <code>{record['notebook']['source_sha256'][:12]}</code>"),
        ("Time and hardware", _times(found, unknown, record)),
    ]
    if record.get("runs"):
        links = ", ".join(_run(run, record) for run in record["runs"])
        count = len(record["runs"])
        lines.append((f"Runs ({count})", f'<span class="runs">{links}</span>'))
        hashes = ", ".join(f"<code>{one}</code>" for one in record["run_code"])
        lines.append(("Library behind the runs", hashes))
    if record.get("parameters"):
        values = ", ".join(f"{esc(name)} = {esc(value)}" for name, value in record["parameters"].items())
        lines.append(("Parameters", f"<code>{values}</code>"))
    inputs = ", ".join(
        f'{page.file(path)} <code title="{digest}">{digest[:12]}</code>' for path, digest in record["inputs"].items()
    )
    lines.append(("Read, by sha256", inputs or "nothing"))
    libraries = ", ".join(f"{name} {version}" for name, version in record["libraries"].items())
    lines.append(("Drawn with", f"{libraries}; drawing code <code>{record['drawing_code_sha256'][:12]}</code>"))
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in lines)
    return f'<details class="made" data-source="{source}"><summary>How this was made</summary><dl>\n{body}</dl></details>\n'


def _drawing(notebook: str) -> str:
    mine = [one["seconds"] for (run, _), one in costs().items() if run == f"chapters/{Path(notebook).stem}"]
    return f" (the whole chapter, {_seconds(mine[-1])})" if mine else ""


def _seconds(value: str, runs: str = "") -> str:
    """A time of data/costs.csv, or the sum of several."""
    return f'<data class="seconds" value="{value}" data-source="{COSTS}"{runs}>{minutes(float(value))}</data>'


def _run(run: str, record: Mapping) -> str:
    known = [code for code in record.get("run_code", []) if (run, code) in costs()]
    return f'<a href="#{run_name(run, known[0])}">{esc(run)}</a>' if known else esc(run)


def run_name(run: str, code: str) -> str:
    return f"run-{slug(run)}-{code}"


def hardware(one: Mapping[str, str]) -> str:
    """A device as it is named to a reader: the accelerator, or the processor with the threads of the run."""
    accelerator = re.search(r"\((.*)\)", one["device"])
    return f"one {accelerator[1]}" if accelerator else f"{one['cpu'] or 'a processor'}, {one['threads'] or '?'} thread"


def _times(found: Sequence[Mapping[str, str]], unknown: Sequence[str], record: Mapping) -> str:
    if not record.get("runs"):
        return "no run: drawn from the published numbers alone, or made by the notebook itself"
    groups: dict[str, list[Mapping[str, str]]] = {}
    for one in found:
        groups.setdefault(hardware(one), []).append(one)
    parts = []
    for name, group in groups.items():
        total = sum(float(one["seconds"]) for one in group)
        runs = " ".join(f"{one['run']}@{one['code']}" for one in group)
        number = _seconds(f"{total:.1f}", f' data-runs="{esc(runs)}"')
        parts.append(f"{number} in {len(group)} runs on {esc(name)}")
    text = "; ".join(parts) + (", run times added up; other figures share these runs" if parts else "")
    if unknown:
        text += f"{'; ' if parts else ''}not known of {len(unknown)} runs (made by a version whose times were not kept)"
    return text


# ------------------------------------------------------------------------------------------------------------------ claims


def claim_cards(page: Page) -> str:
    """Every claim with its values and verdict, from figures/own_table_claims.csv."""
    path = f"{FIGURES}/own_table_claims.csv"
    digits = {one.id: one.digits for one in claims.read()}
    groups: dict[str, list[dict[str, str]]] = {}
    for one in rows(path):
        groups.setdefault(one["id"], []).append(one)
    parts, paper = [_tally(groups, path)], None
    for name, lines in groups.items():
        first = lines[0]
        if first["paper"] != paper:
            paper = first["paper"]
            parts.append(f'<h3 id="claims-{slug(paper)}">{esc(PAPERS.get(paper, paper))}</h3>')
        parts.append(_claim(name, lines, digits.get(name, 2), path, page))
    return "\n".join(parts)


def _tally(groups: Mapping[str, Sequence[Mapping[str, str]]], path: str) -> str:
    lines = []
    for paper in dict.fromkeys(lines[0]["paper"] for lines in groups.values()):
        verdicts = [lines[0]["verdict"] for lines in groups.values() if lines[0]["paper"] == paper]
        title = esc(PAPERS.get(paper, paper).split(",")[0])
        counts = [str(verdicts.count(verdict)) for verdict in claims.VERDICTS]
        lines.append([f'<a href="#claims-{slug(paper)}">{title}</a>', *counts])
    head = ["paper", *(f"{claims.MARKS[verdict]} {esc(verdict)}" for verdict in claims.VERDICTS)]
    attributes = f' class="tally" data-source="{path}" data-kind="count"'
    return grid(head, lines, [False] + 4 * [True], "claims by paper and verdict", attributes, named=True)


def _value(text: str, digits: int) -> str:
    return claims.number(float(text), digits) if text else "–"


def _claim(name: str, lines: Sequence[Mapping[str, str]], digits: int, path: str, page: Page) -> str:
    first = lines[0]
    verdict = first["verdict"] or "no rows in this profile"
    mark = claims.MARKS.get(first["verdict"] or None, "–")
    unit = f" {esc(first['unit'])}" if first["unit"] else ""
    shows = f' · <a href="#figure-{first["figure"]}">{esc(first["figure"])}</a>' if first["figure"] else ""
    about = [f"{esc(first['source'])}{shows}"]
    if first["published"]:
        about.append(
            f'published <data class="published" value="{first["published"]}">{_value(first["published"], digits)}</data>{unit}'
        )
    measured = [one for one in lines if one["measured"]]
    if measured:
        about.append(f"tested: {esc(first['tested'])}; holds if {esc(first['holds_if'])}{unit}")
    if measured:
        values = []
        for one in measured:
            interval = f"[{_value(one['low'], digits)}, {_value(one['high'], digits)}]" if one["low"] else ""
            judged = f"{claims.MARKS[one['verdict_of_model']]} {esc(one['verdict_of_model'])}"
            values.append([esc(one["model"]), _value(one["measured"], digits), interval, judged])
        head = ["model", "measured", "interval", "verdict"]
        inner = grid(head, values, [False, True, True, False], f"values of {name}", named=True)
        trace = ""
        for one in measured:
            runs = esc(one["runs"]) if one["runs"] else "none: the paper's own numbers"
            kind = f"{esc(one['interval'])}, n = {esc(one['n'])}" if one["interval"] else f"n = {esc(one['n'])}"
            trace += f"<dt>{esc(one['model'])}</dt><dd>{kind}; runs: {runs}; from {esc(one['tables'])}</dd>"
        inner += f"<details><summary>Interval and runs</summary><dl>{trace}</dl></details>"
    else:
        inner = f"<p>{esc(first['reason'] or 'The profile has no such rows.')}</p>"
    attributes = f'class="claim {slug(verdict)}" id="{page.unique(f"claim-{name}")}" data-source="{path}" data-claim="{name}"'
    return (
        f"<article {attributes}>\n"
        f'<h4><span class="badge">{mark} {esc(verdict)}</span> <code>{esc(name)}</code></h4>\n<p>{esc(first["claim"])}</p>\n'
        f'<p class="small">{" · ".join(about)}</p>\n{inner}\n</article>'
    )


# ------------------------------------------------------------------------------------------------------------------- parts


def errors(page: Page) -> str:
    """The published errors: a section of data/published/README.md."""
    text = at_root(ERRORS).read_text(encoding="utf-8")
    found = re.search(r"^## Known errors and doubts\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ReportError(f"{ERRORS} has no section `## Known errors and doubts`")
    body = words(found[1], page, folder=str(Path(ERRORS).parent))
    body = re.sub(r"<table>.*?</table>", lambda one: box(one[0], "published errors"), body, flags=re.DOTALL)
    return f'<div data-source="{ERRORS}">{body}</div>'


def chapter_section(
    one: Chapter, ledger: prose.Ledger, files: Mapping, page: Page
) -> tuple[str, list[tuple[str, str]], list[prose.Number]]:
    """A chapter as HTML, the entries of its table of contents, and the numbers of its sentences. files: table → its file."""
    anchor, entries, numbers = f"chapter-{one.name[:2]}", [], []

    def told(text: str, below: int = 2) -> str:
        mine = prose.numbers(text, ledger.sentences, ledger.stated, files)
        numbers.extend(mine)
        return words(text, page, folder="notebooks", below=below, numbers=mine)

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
    return "\n".join(parts), entries, numbers


def _inline(text: str) -> str:
    """The Markdown of a heading."""
    made = mistune.create_markdown(escape=True)(re.sub(r"^(\d+)\.", r"\1\\.", text)).strip()
    return re.sub(r"^<p>|</p>$", "", made)


def runs_table() -> str:
    """Every run with its time, memory and hardware."""
    lines = list(costs().values())
    if not lines:
        return f"<p>There is no {COSTS} here: times are not known.</p>"
    found = table(COSTS, "runs and their costs", lines)
    names = iter([run_name(one["run"], one["code"]) for one in lines])
    head, body = found.split("<tbody>", 1)
    return head + "<tbody>" + re.sub(r"<tr>", lambda _: f'<tr id="{next(names)}">', body)


def traced(per_chapter: Iterable[tuple[Chapter, Sequence[prose.Number]]]) -> str:
    """How the numbers in the sentences of the chapters are traced: counts, and what is behind every one that no csv holds."""
    kinds = (prose.COMPUTED, prose.FOUND, prose.STATED, prose.UNTRACED)
    lines, listed = [], ""
    for one, numbers in per_chapter:
        counts = [str(sum(number.kind == kind for number in numbers)) for kind in kinds]
        lines.append([f'<a href="#chapter-{one.name[:2]}">{esc(one.name)}</a>', *counts])
        lost = [number.around for number in numbers if number.kind == prose.UNTRACED]
        listed += "".join(f"<li>{esc(one.name)}: «{esc(around)}»</li>" for around in lost)
    source = f'data-source="{prose.CHAPTER_NUMBERS}"'
    attributes = f' {source} data-kind="count"'
    text = grid(["chapter", *kinds], lines, [False] + 4 * [True], "numbers in sentences", attributes, named=True)
    return text + (f"<details {source}><summary>The untraced ones</summary><ul>{listed}</ul></details>" if listed else "")


def contents(entries: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    lines = []
    for anchor, title, below in entries:
        inner = "".join(f'<li><a href="#{name}">{_inline(words)}</a></li>' for name, words in below)
        lines.append(f'<li><a href="#{anchor}">{_inline(title)}</a>{f"<ol>{inner}</ol>" if inner else ""}</li>')
    return f'<nav class="toc" aria-label="Contents"><p class="title">Contents</p><ol>{"".join(lines)}</ol></nav>'


def page(out: str | os.PathLike = OUT) -> str:
    """The whole page as text. `out` is where it will lie: links to files of the clone start there."""
    here = Page(at_root(out))
    told, found, listed = [], [], chapters()
    printed = {path.stem: f"data/published/{path.name}" for path in at_root("data/published").glob("*.csv")}
    files = {**printed, **prose.tables().places}
    for one in listed:
        text, entries, numbers = chapter_section(one, prose.ledger(one.path), files, here)
        told.append((one, text, entries))
        found.append((one, numbers))
    overview = "".join(
        f'<li><a href="#chapter-{one.name[:2]}">{_inline(one.title)}</a>'
        + (f"<br><em>{esc(one.question)}</em>" if one.question else "")
        + "</li>"
        for one in listed
    )
    cards = claim_cards(here)
    papers = re.findall(r'<h3 id="(claims-[^"]+)">([^<]+)</h3>', cards)
    nav = contents(
        [
            ("overview", "Overview", []),
            ("claims", "Claims", papers),
            *((f"chapter-{one.name[:2]}", f"{one.name[:2]} {one.title}", entries) for one, _, entries in told),
            ("errors", "Known errors of the papers", []),
            ("runs", "Runs", []),
            ("numbers", "Numbers in sentences", []),
        ]
    )
    readme, claims_file, license_file = here.file("README.md"), here.file(claims.CLAIMS), here.file("LICENSE")
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
<p>A dotted line below a number in a sentence says that its origin is known (hover, or see <a href="#numbers">numbers in
sentences</a>). Every table is the csv that is linked beside it, numbers rounded to four digits.</p>
<ol class="overview" start="0">{overview}</ol>
</header>
<section id="claims">
<h2>Claims</h2>
<p>What the papers say, and what the tables of the chapters say to it. {claims_file} holds how each value is computed and when
a claim holds; values and verdicts are those of <a href="#figure-own_table_claims">own_table_claims</a>. A claim
<strong>holds</strong> when on every model the whole interval obeys its rule, <strong>fails</strong> when on none any of it
does, and <strong>differs</strong> otherwise.</p>
{cards}
</section>
{"".join(text for _, text, _ in told)}
<section id="errors">
<h2>Known errors of the papers</h2>
<p>From {here.file(ERRORS)}. Those with a tick are recomputed from the published numbers by
{here.file("tests/test_published.py")}, most also in cells that anyone can run in {here.file("notebooks/08_claims.ipynb")}.</p>
{errors(here)}
</section>
<section id="runs">
<h2>Runs</h2>
<p>Every run behind a figure: its time, its peak of memory, and the machine ({here.file(COSTS)}). Runs of the profile share two
cores with one another, and sometimes with other work. <code>code</code> is the hash of the library that made a run; the run
files of the profile are made by <code>make figures</code> and are not in git.</p>
<details><summary>All runs</summary>{runs_table()}</details>
</section>
<section id="numbers">
<h2>Numbers in sentences</h2>
<p>How the numbers in the sentences above are traced ({here.file(prose.CHAPTER_NUMBERS)}). Computed: a test computes it from the
tables, or reads it from the result file that its origin names, and compares. Found: a test finds it, rounded as printed, in the
csv that its origin names. Stated: what made it is named, no test computes it. Settings and coordinates (K, alpha, an arXiv
number) are no results and are not counted.</p>
{traced(found)}
</section>
</main>
</body>
</html>
"""


# -------------------------------------------------------------------------------------------------------------------- pdf


def browser() -> str | None:
    """A browser of the Chromium family on this machine, or None."""
    found = (shutil.which(name) for name in BROWSERS)
    return next((path for path in found if path), MAC if Path(MAC).is_file() else None)


def command(program: str, profile: str | os.PathLike) -> list[str]:
    """A headless browser that keeps its files in `profile` and asks no network for anything."""
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    quiet = [
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    return [program, "--headless", *sandbox, *quiet, f"--user-data-dir={profile}"]


def pdf(text: str, out: str | os.PathLike, program: str, *, seconds: float | int = 120) -> Path:
    """Print a page, with how each figure was made, to `out`; without dates, so that the same page gives the same file.

    Raises ReportError when the browser fails or takes longer than `seconds`.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report-") as folder:
        source, printed = Path(folder, "print.html"), Path(folder, "print.pdf")
        source.write_text(text.replace('<details class="made"', '<details open class="made"'), encoding="utf-8")
        options = [f"--print-to-pdf={printed}", "--no-pdf-header-footer", source.as_uri()]
        try:
            done = subprocess.run(
                [*command(program, Path(folder, "profile")), *options],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReportError(f"{program} did not print the page: {error}") from error
        if not printed.is_file():
            raise ReportError(f"{program} printed nothing: {done.stderr.strip()[-300:]}")
        dated = re.compile(rb"/(CreationDate|ModDate) \(D:[^)]*\)")
        content = dated.sub(lambda one: re.sub(rb"\d", b"0", one[0]), printed.read_bytes())
        printed.write_bytes(content)
        os.replace(printed, out)
    return out


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.apps.report [--no-pdf] [OUT.html]`: the page, and the PDF beside it where there is a browser."""
    places = [one for one in arguments if one != "--no-pdf"]
    if len(places) > 1 or any(one.startswith("-") for one in places):
        print("usage: python -m prunelib.apps.report [--no-pdf] [OUT.html]", file=sys.stderr)
        return 2
    out = at_root(places[0] if places else OUT)
    try:
        text = page(out)
        write_text(out, text)
        print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")
        if "--no-pdf" in arguments:
            return 0
        program = browser()
        if program is None:
            print("no PDF: no Chromium or Chrome found on this machine")
        else:
            print(pdf(text, out.with_suffix(".pdf"), program))
    except (ReportError, ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Numbers in running text, traceable: `data/numbers.yaml` says which rows or file a sentence's numbers are computed from.

    sentences:
      - id: readme-healing
        text: the cut costs {least} to {greatest} nats        as it stands in the document, line breaks apart
        numbers:
          least: {model: ref-llama-32l, digits: 1, table: …}        a measure of prunelib.claims.claims, of one model (`by: null`: of all)
      - id: readme-search
        text: "1/{times} of the naive loop's time, {minutes} min"
        numbers:
          times:                                              a number of a JSON file
            file: data/benchmarks/search_8b_long.json
            at: [variants, {variant: naive}, seconds]         the way to it: keys, places in a list, or what one element holds
            over: [variants, {variant: shared}, seconds]      the way to what divides it, if anything does (`times`: multiplies)
            digits: 1
          minutes: {file: …, at: […], then: minutes, digits: 0}    `then`: as in a measure, or one of `SCALES`
    stated:
      - text: "{times} times a plain forward pass"            numbers that no run of a profile makes, any in their places,
        from: benchmarks/statistics_cost.py                   and what made them: a file, or a few words (`BY`)

`python -m prunelib.lab.prose README.md` writes the computed numbers into the sentences; with `--trace` it prints instead where
every number comes from: its place, kind, id and file. A number of the document that is in neither list is untraced
(`untraced`), and a test says so; so is one in words that measures something (`IN_WORDS`; a stated text needs no place for it).
`data/chapter_numbers.yaml` does the same for the Markdown of the chapters, with such a pair of lists below the name of each;
there `from` may be the csv of a figure, in which a test then looks for the number (`missing`). Nothing here imports torch.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from prunelib.claims import claims
from prunelib.io import at_root, write_text
from prunelib.lab import costs
from prunelib.lab import runs as results

NUMBERS = "data/numbers.yaml"
CHAPTER_NUMBERS = "data/chapter_numbers.yaml"
PLACE = re.compile(r"\{(\w+)\}")
BY = ("timed by hand", "arithmetic", "the paper", "chosen")
FILE_KEYS = {"file", "at", "times", "over", "then", "digits"}
FIGURE = r"[−-]?\d(?:[\d,]*\d)?(?:\.\d+)?"

GENERATED = (  # code, and what a command or another test writes
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(f"{re.escape(claims.BEGIN)}.*?{re.escape(claims.END)}", re.DOTALL),
    re.compile(r"^\| model \| method \| protocol \|.*?\n\n", re.DOTALL | re.MULTILINE),  # figures/own_table_what_held.csv
)
NAMES = (  # digits that are no measurement: links, Figure 5a, chapter 01, Llama-2-7B, 70B, 32-layer
    re.compile(r"`[^`]*`"),
    re.compile(r"(?<=\])\([^)]*\)"),
    re.compile(r"\b(?:[Cc]hapters?|Figures?|Tables?|Python)\s\d+\w*(?:\.\d+)*(?:(?:, | and )\d+\w?)*"),
    re.compile(r"(?!\d+(?:\.\d+)?e[+-]?\d)[\w.+-]*[A-Za-z][\w.+-]*\d[\w.]*"),  # 4e-7 is none: its 4 is a number
    re.compile(r"\b\d+(?:[A-Z]\b|-layer)"),
)


AMOUNT = r"\d+(?:\.\d+)?"
AMOUNTS = rf"{AMOUNT}(?:(?:, | and | or | to |–){AMOUNT})*"
SETTINGS = (  # of chapters: what was set or names a place, not what came out
    re.compile(r"^#+ \d+\.", re.MULTILINE),
    re.compile(r"arXiv \d{4}\.\d{5}"),
    re.compile(r"\b(?:Fig(?:ures?|s?\.?)|chapters?) \d+\w?(?:(?:, | and | to )\d+\w?)*"),
    re.compile(rf"\b(?:K|alpha|S_[PB]) (?:=|<|>|≤|≥) {AMOUNTS}"),
    re.compile(r"\blayer 0\b|\brank \d+|\ba cut of \d+ layers"),
    re.compile(r"[Ww]ithout \d+ of (?:its )?\d+ layers|\bprompts of \d+ tokens|\b\d+ × [\d,]*\d\b"),
    re.compile(r"\bin 20\d\d\b|\b\d+ billion\b"),
    re.compile(r"\[0, 1\]|\b0–1\b"),
    re.compile(r"\b95 % (?:bootstrap )?intervals?"),
)

COUNT = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand"
PART = "half|third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|twentieth|hundredth|thousandth"
UNIT = "times|seconds|minutes|hours|days|nats|points|percent|per cent|tokens|parameters|GiB"
IN_WORDS = (
    re.compile(  # what measures: twice, half a minute, a hundredth of, eight times, an hour; not: two models, a second call
        rf"\b(?:twice|double[ds]?|half (?:an?|of|the|as)|(?:an?|one|its) (?:\w+ )?(?:{PART})|(?:{COUNT}) (?:{PART})s"
        rf"|(?:an?|one|the) (?:minute|hour)|(?<!per )(?:{COUNT}) (?:{UNIT}))\b",
        re.IGNORECASE,
    )
)

COMPUTED, FOUND, STATED, UNTRACED = "computed", "found", "stated", "untraced"


SCALES: dict[str, Callable[[float], float]] = {
    "minutes": lambda seconds: seconds / 60,
    "gib": lambda mebibytes: mebibytes / 1024,
    "e-7": lambda share: share * 1e7,  # as in "4e-7"
}
"""What `then` may say of a number besides `claims.TRANSFORMS`: other units, which a statistic commutes with."""


class ProseError(ValueError):
    """A sentence that a document does not hold, or whose numbers cannot be computed."""


@dataclass(frozen=True)
class Sentence:
    """Words with places for numbers, and how each is computed: a measure of `prunelib.claims.claims` with `model` and `digits`, or a
    place in a JSON file.
    """

    id: str
    text: str
    numbers: Mapping[str, Mapping]


@dataclass(frozen=True)
class Stated:
    """Words with places for numbers that no run of a profile makes, and what made them."""

    text: str
    source: str


@dataclass(frozen=True)
class Ledger:
    """Sentences and stated numbers of one document."""

    sentences: Sequence[Sentence] = ()
    stated: Sequence[Stated] = ()


@dataclass(frozen=True)
class Number:
    """A number in a text, from character `start` to `end`.

    kind: computed (a sentence computes it), found (in the csv `source`), stated (`source` made it) or untraced. around: the
    words about it.
    """

    start: int
    end: int
    kind: str
    source: str
    id: str | None
    around: str


def read(path: str | Path = NUMBERS, part: str | None = None) -> tuple[list[Sentence], list[Stated]]:
    """Sentences and stated numbers, of a file or what stands below the name `part`. Raises ProseError when the places of a
    sentence are not its numbers.
    """
    content = yaml.safe_load(at_root(path).read_text(encoding="utf-8"))
    content = content if part is None else content.get(part) or {}
    sentences = [Sentence(one["id"], one["text"], one["numbers"]) for one in content.get("sentences") or []]
    for one in sentences:
        if set(PLACE.findall(one.text)) != set(one.numbers):
            raise ProseError(f"{one.id}: the places in the text are not the names below `numbers`")
    return sentences, [Stated(one["text"], one["from"]) for one in content.get("stated") or []]


def tables() -> claims.Tables:
    """The tables of the reference profile, what every figure plots by its stem, and what every run took as `costs`."""
    profile = claims.of_profile()
    drawn = {path.stem: f"figures/{path.name}" for path in sorted(at_root("figures").glob("*.csv"))}
    return claims.Tables({"costs": costs.COSTS, **drawn, **profile.places}, profile.settings)


def ledger(notebook: str | Path) -> Ledger:
    """What data/chapter_numbers.yaml says of a chapter."""
    return Ledger(*read(CHAPTER_NUMBERS, Path(notebook).stem))


def cells(notebook: str | Path) -> list[str]:
    """The Markdown cells of a notebook."""
    found = json.loads(at_root(notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "markdown"]


def values(sentence: Sentence, tables: claims.Tables) -> dict[str, str]:
    """The printed number of every place. Raises ProseError naming the sentence and the place when there is none."""
    found = {}
    for name, spec in sentence.numbers.items():
        try:
            value = _in_file(spec) if "file" in spec else _measured(spec, tables)
        except (claims.ClaimError, ProseError) as error:
            raise ProseError(f"{sentence.id}: {name}: {error}") from error
        found[name] = claims.number(value, spec["digits"])
    return found


def _measured(spec: Mapping, tables: claims.Tables) -> float:
    """The value of a measure for its model."""
    then = spec.get("then")
    ours = ("model", "digits", *(("then",) if then in SCALES else ()))
    parts = claims.measure({key: value for key, value in spec.items() if key not in ours}, tables, tables.settings)
    model = spec.get("model", claims.PRINTED)  # of tables whose rows are not told apart by model (`by: null`)
    one = next((part for part in parts if part.model == model), None)
    if one is None:
        raise ProseError(f"no rows of {model}")
    return SCALES[then](one.value) if then in SCALES else one.value


def _in_file(spec: Mapping) -> float:
    """The number at a place of a JSON file, multiplied and divided by others there and scaled, as far as the spec says so.

    Raises ProseError for a key that nothing reads, a file or place that is not there, and what is no number.
    """
    file, then = spec["file"], spec.get("then", "none")
    unknown = sorted(set(spec) - FILE_KEYS)
    if unknown:
        raise ProseError(f"unknown key `{unknown[0]}` of a number of a file; there are {', '.join(sorted(FILE_KEYS))}")
    absent = sorted({"at", "digits"} - set(spec))
    if absent:
        raise ProseError(f"a number of a file needs `{absent[0]}`")
    scales = {**claims.TRANSFORMS, **SCALES}
    if then not in scales:
        raise ProseError(f"there is no then {then!r}; there are {', '.join(scales)}")
    try:
        content = json.loads(at_root(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ProseError(f"{file} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ProseError(f"{file} is no JSON: {error}") from error
    value = _at(content, spec["at"], file)
    if "times" in spec:
        value = value * _at(content, spec["times"], file)
    if "over" in spec:
        divisor = _at(content, spec["over"], file)
        if divisor == 0:
            raise ProseError(f"{file}: {_way(spec['over'])} is zero and divides nothing")
        value = value / divisor
    return float(scales[then](value))


def _at(content: object, steps: Sequence[str | int | Mapping], file: str) -> float:
    """The number that a path of keys, places and chosen elements leads to."""
    here = content
    for depth, step in enumerate(steps, start=1):
        way = _way(steps[:depth])
        if isinstance(step, Mapping):
            elements = here if isinstance(here, list) else []
            fits = [one for one in elements if isinstance(one, Mapping) and all(_same(one, *pair) for pair in step.items())]
            if len(fits) != 1:
                raise ProseError(f"{file} has {len(fits) or 'no'} elements at {way}, where one is to be")
            here = fits[0]
            continue
        try:
            if isinstance(here, list) != (isinstance(step, int) and not isinstance(step, bool)):
                raise KeyError(step)
            here = here[step]
        except (KeyError, IndexError, TypeError) as error:
            known = f"; there are {', '.join(map(str, here))}" if isinstance(here, Mapping) else ""
            raise ProseError(f"{file} has no {way}{known}") from error
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise ProseError(f"{file}: {_way(steps)} is no number")
    return float(here)


def _same(element: Mapping, key: str, value: object) -> bool:
    return key in element and element[key] == value


def _way(steps: Sequence[str | int | Mapping]) -> str:
    """A path in words: `variants / {variant: naive} / seconds`."""
    parts = [f"{{{', '.join(f'{k}: {v}' for k, v in step.items())}}}" if isinstance(step, Mapping) else step for step in steps]
    return "«" + " / ".join(map(str, parts)) + "»"


def _pattern(text: str, numbers: Mapping[str, str] | None = None) -> re.Pattern:
    """The words with any numbers, or with these, and any spaces between them."""
    parts = PLACE.split(text)
    made = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in parts[::2]]
    places = [f"({FIGURE if numbers is None else re.escape(numbers[name])})" for name in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(made, [*places, ""], strict=True)))


def wrong(document: str, sentences: Sequence[Sentence], tables: claims.Tables) -> list[str]:
    """What is to be changed: sentences that are not in the document with the numbers computed now."""
    found = []
    for one in sentences:
        numbers = values(one, tables)
        if not _pattern(one.text, numbers).search(document):
            found.append(f"{one.id}: {PLACE.sub(lambda place, now=numbers: now[place[1]], one.text)}")
    return found


def corrected(document: str, sentences: Sequence[Sentence], tables: claims.Tables) -> str:
    """The document with the numbers computed now. Raises ProseError for a sentence that is not in it, or twice."""
    for one in sentences:
        places = list(_pattern(one.text).finditer(document))
        if len(places) != 1:
            raise ProseError(f"{one.id}: the document holds «{one.text}» {len(places)} times, not once")
        now = values(one, tables)
        written, end = "", places[0].start()
        for number, name in enumerate(PLACE.findall(one.text), start=1):  # the words as the document breaks them
            start, after = places[0].span(number)
            written, end = written + document[end:start] + now[name], after
        document = document[: places[0].start()] + written + document[end:]
    return document


def corrected_notebook(content: str, sentences: Sequence[Sentence], tables: claims.Tables) -> str:
    """`corrected` in the Markdown cells of a notebook, given and returned as the text of its file."""
    notebook = json.loads(content)
    for one in sentences:
        mine = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
        mine = [cell for cell in mine if _pattern(one.text).search("".join(cell["source"]))]
        if len(mine) != 1:
            raise ProseError(f"{one.id}: «{one.text}» is in {len(mine)} cells, not in one")
        text = corrected("".join(mine[0]["source"]), [one], tables)
        mine[0]["source"] = text if isinstance(mine[0]["source"], str) else text.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def untraced(document: str, sentences: Sequence[Sentence], stated: Sequence[Stated]) -> list[str]:
    """Numbers of the document, each with the words around it, that no sentence computes and no list states."""
    return _left(re.compile(FIGURE), document, sentences, stated)


def untraced_words(document: str, sentences: Sequence[Sentence], stated: Sequence[Stated]) -> list[str]:
    """The same for measured numbers that are written in words (`IN_WORDS`)."""
    return _left(IN_WORDS, document, sentences, stated)


def _left(wanted: re.Pattern, document: str, sentences: Sequence[Sentence], stated: Sequence[Stated]) -> list[str]:
    known = [_pattern(one.text) for one in (*sentences, *stated)]
    for pattern in (*GENERATED, *known, *NAMES):
        document = pattern.sub(" ", document)
    document = " ".join(document.split())
    lines = []
    for match in wanted.finditer(document):
        around = document[max(0, match.start() - 30) : match.end() + 30]
        lines.append(f"{match[0]} in «{around.strip()}»")
    return lines


def numbers(
    document: str, sentences: Sequence[Sentence], stated: Sequence[Stated], files: Mapping[str, str | None] | None = None
) -> list[Number]:
    """Every number of a text that is no name and no setting, in order, with its origin. files: table → its file."""
    found = []

    def number(start: int, end: int, kind: str, source: str, name: str | None = None) -> Number:
        around = " ".join(document[max(0, start - 30) : end + 30].split())
        return Number(start, end, kind, source, name, around)

    rest = document
    for pattern in GENERATED:
        rest = _masked(pattern, rest)
    for one in sentences:
        places = PLACE.findall(one.text)
        for match in _pattern(one.text).finditer(rest):
            for group, name in enumerate(places, start=1):
                source = ", ".join((files or {}).get(table) or table for table in _sources(one.numbers[name]))
                found.append(number(*match.span(group), COMPUTED, source, f"{one.id}-{name}"))
        rest = _masked(_pattern(one.text), rest)
    for one in stated:
        kind = FOUND if one.source.endswith(".csv") else STATED
        for match in _pattern(one.text).finditer(rest):
            found += [number(*match.span(group), kind, one.source) for group in range(1, match.re.groups + 1)]
        rest = _masked(_pattern(one.text), rest)
    for pattern in (*SETTINGS, *NAMES):
        rest = _masked(pattern, rest)
    found += [number(*match.span(), UNTRACED, CHAPTER_NUMBERS) for match in re.finditer(FIGURE, rest)]
    return sorted(found, key=lambda one: one.start)


def _masked(pattern: re.Pattern, text: str) -> str:
    return pattern.sub(lambda match: " " * len(match[0]), text)


def _sources(spec: Mapping) -> Iterator[str]:
    """The file that a number is read from, or the names of the tables that its measure reads."""
    if "file" in spec:
        return iter((spec["file"],))
    other = [spec["x"]] if isinstance(spec.get("x"), Mapping) else []
    parts = [spec, *spec.get("terms", ()), *spec.get("over", ()), *other]
    return iter(dict.fromkeys(part["table"] for part in parts if "table" in part))


def missing(document: str, stated: Sequence[Stated]) -> list[str]:
    """Numbers that are said to be in a csv, and are no cell of it, rounded as printed; as they are, or in percent."""
    lines = []
    for one in stated:
        if not one.source.endswith(".csv"):
            continue
        held = _held(one.source)
        for match in _pattern(one.text).finditer(document):
            for text in match.groups():
                digits = len(text.partition(".")[2])
                value = float(text.replace(",", "").replace("−", "-"))
                half = 0.5000001 * 10**-digits
                if not any(abs(abs(cell) * scale - abs(value)) <= half for cell in held for scale in (1, 100)):
                    lines.append(f"{text} of «{' '.join(one.text.split())}» is not in {one.source}")
    return lines


def _held(path: str | os.PathLike) -> set[float]:
    """The numbers of a csv, and of the table of its runs where one lies beside it."""
    held = set()
    beside = at_root(results.runs_table(path))
    for place in (at_root(path), *([beside] if beside.is_file() else [])):
        with open(place, encoding="utf-8", newline="") as file:
            texts = [cell for line in csv.reader(file) for cell in line]
        held |= {float(text) for cell in texts for text in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", cell)}
    return held


def trace(document: str | os.PathLike) -> list[str]:
    """A line for every number in the sentences of a document: place, number, kind, id and what it is computed from or made by.

    The place is a line of a text, a cell (from 0) of a notebook.
    """
    path = at_root(document)
    if path.suffix == ".ipynb":
        listed = ledger(path)
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = [(place, "".join(cell["source"])) for place, cell in enumerate(found) if cell["cell_type"] == "markdown"]
    else:
        listed = Ledger(*read())
        parts = [(None, path.read_text(encoding="utf-8"))]
    files = {**{one.stem: f"data/published/{one.name}" for one in at_root("data/published").glob("*.csv")}, **tables().places}
    lines = []
    for place, text in parts:
        for one in numbers(text, listed.sentences, listed.stated, files):
            at = text.count("\n", 0, one.start) + 1 if place is None else f"cell {place}"
            lines.append(f"{document}:{at}: {text[one.start : one.end]}  {one.kind}  {one.id or '–'}  {one.source}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.lab.prose [--trace] DOCUMENT`: its sentences get the numbers of the reference profile, or are traced."""
    names = [one for one in arguments if one != "--trace"]
    if len(names) != 1 or names[0].startswith("-"):
        print("usage: python -m prunelib.lab.prose [--trace] DOCUMENT", file=sys.stderr)
        return 2
    document = at_root(names[0])
    try:
        if "--trace" in arguments:
            for line in trace(names[0]):
                print(line)
            return 0
        before = document.read_text(encoding="utf-8")
        if document.suffix == ".ipynb":
            found = ledger(document)
            sentences, stated = found.sentences, found.stated
            write_text(document, corrected_notebook(before, sentences, tables()))
            lost = [one.around for text in cells(document) for one in numbers(text, sentences, stated) if one.kind == UNTRACED]
        else:
            sentences, stated = read()
            write_text(document, corrected(before, sentences, tables()))
            lost = [*untraced(before, sentences, stated), *untraced_words(before, sentences, stated)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in lost:
        print(f"untraced: {line}")
    print(f"{names[0]}: {sum(len(one.numbers) for one in sentences)} numbers of {len(sentences)} sentences")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

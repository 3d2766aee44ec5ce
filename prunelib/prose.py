"""Numbers in running text, traceable: `data/numbers.yaml` says which rows a sentence's numbers are computed from.

    sentences:
      - id: readme-healing
        text: the cut costs {least} to {greatest} nats        as it stands in the document, line breaks apart
        numbers:
          least: {model: llama32, digits: 1, table: …}        a measure of prunelib.claims, of one model
    stated:
      - text: "{times} times a plain forward pass"            numbers that no run of a profile makes, any in their places,
        from: benchmarks/statistics_cost.py                   and what made them: a file, or a few words (`BY`)

`python -m prunelib.prose README.md` writes the computed numbers into the sentences. A number of the document that is in neither
list is untraced (`untraced`), and a test says so. Nothing here imports torch.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from prunelib import claims
from prunelib.provenance import at_root, write_text

NUMBERS = "data/numbers.yaml"
PLACE = re.compile(r"\{(\w+)\}")
BY = ("timed by hand", "arithmetic")
FIGURE = r"[−-]?\d[\d,]*(?:\.\d+)?"

GENERATED = (  # code, and what a command or another test writes
    re.compile(r"```.*?```", re.DOTALL),
    re.compile(f"{re.escape(claims.BEGIN)}.*?{re.escape(claims.END)}", re.DOTALL),
    re.compile(r"^\| model \| method \| protocol \|.*?\n\n", re.DOTALL | re.MULTILINE),  # figures/own_table_what_held.csv
)
NAMES = (  # digits that are no measurement: links, Figure 5a, chapter 01, Llama-2-7B, 70B, 32-layer
    re.compile(r"`[^`]*`"),
    re.compile(r"(?<=\])\([^)]*\)"),
    re.compile(r"\b(?:[Cc]hapters?|Figures?|Tables?|Python)\s\d+\w*(?:\.\d+)*(?:(?:, | and )\d+\w?)*"),
    re.compile(r"[\w.+-]*[A-Za-z][\w.+-]*\d[\w.]*"),
    re.compile(r"\b\d+(?:[A-Z]\b|-layer)"),
)


class ProseError(ValueError):
    """A sentence that a document does not hold, or whose numbers cannot be computed."""


@dataclass(frozen=True)
class Sentence:
    """Words with places for numbers, and how each is computed: a measure of `prunelib.claims`, with `model` and `digits`."""

    id: str
    text: str
    numbers: Mapping[str, Mapping]


@dataclass(frozen=True)
class Stated:
    """Words with places for numbers that no run of a profile makes, and what made them."""

    text: str
    source: str


def read(path: str | Path = NUMBERS) -> tuple[list[Sentence], list[Stated]]:
    """Sentences and stated numbers. Raises ProseError when the places of a sentence are not its numbers."""
    content = yaml.safe_load(at_root(path).read_text(encoding="utf-8"))
    sentences = [Sentence(one["id"], one["text"], one["numbers"]) for one in content["sentences"]]
    for one in sentences:
        if set(PLACE.findall(one.text)) != set(one.numbers):
            raise ProseError(f"{one.id}: the places in the text are not the names below `numbers`")
    return sentences, [Stated(one["text"], one["from"]) for one in content["stated"]]


def values(sentence: Sentence, tables: claims.Tables) -> dict[str, str]:
    """The printed number of every place. Raises ProseError naming the sentence and the place when there is none."""
    found = {}
    for name, spec in sentence.numbers.items():
        measure = {key: value for key, value in spec.items() if key not in ("model", "digits")}
        try:
            parts = claims.measure(measure, tables, tables.settings)
        except claims.ClaimError as error:
            raise ProseError(f"{sentence.id}: {name}: {error}") from error
        one = next((part for part in parts if part.model == spec["model"]), None)
        if one is None:
            raise ProseError(f"{sentence.id}: no rows for `{name}` of {spec['model']}")
        found[name] = claims.number(one.value, spec["digits"])
    return found


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


def untraced(document: str, sentences: Sequence[Sentence], stated: Sequence[Stated]) -> list[str]:
    """Numbers of the document, each with the words around it, that no sentence computes and no list states."""
    known = [_pattern(one.text) for one in (*sentences, *stated)]
    for pattern in (*GENERATED, *known, *NAMES):
        document = pattern.sub(" ", document)
    lines = []
    for match in re.finditer(FIGURE, document):
        around = document[max(0, match.start() - 30) : match.end() + 30]
        lines.append(f"{match[0]} in «{' '.join(around.split())}»")
    return lines


def main(arguments: Sequence[str]) -> int:
    """`python -m prunelib.prose DOCUMENT`: the numbers of the reference profile in its sentences."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m prunelib.prose DOCUMENT", file=sys.stderr)
        return 2
    document = at_root(arguments[0])
    try:
        before = document.read_text(encoding="utf-8")
        sentences, stated = read()
        write_text(document, corrected(before, sentences, claims.of_profile()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in untraced(before, sentences, stated):
        print(f"untraced: {line}")
    print(f"{arguments[0]}: {sum(len(one.numbers) for one in sentences)} numbers of {len(sentences)} sentences")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

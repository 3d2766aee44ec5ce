"""Multiple-choice items from held-out docstrings: the tasks that run where there is no hub.

All come from the ``evaluation`` split of the embedded corpus ``pydocs``, which no reference model was trained on; few-shot
examples from its ``calibration`` split. They were fixed before any pruned model was run on them. Everything follows from names
and texts by sha256: the same corpus gives the same items in the same order.

- ``pydocs_next_line``: some lines of a docstring → its true next line. The other choices are lines of the same docstring that
  meet the same conditions, so neither the topic nor the form of a line gives the answer away.
- ``pydocs_summary``: which of four one-line summaries stood before this paragraph? The others come from the nearest modules.
- ``pydocs_parameter``: which of four parameters (``name : type``) of one docstring is described here?

In the last two the scored text is the same for every choice: neither the length nor the commonness of a choice can decide. Two
more ask in a prompt: ``pydocs_letters`` lists the choices of ``pydocs_summary`` as A to D and scores the letter, as MMLU does;
``pydocs_yes_no`` asks whether a summary belongs to a paragraph (yes is right for exactly half of them).
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from prunelib.text import embedded as pydocs

CHOICES = 4
ITEMS = 500  # per task: a standard error of about two points
PER_DOCUMENT = 2  # parameters asked for in one docstring; the other tasks ask once

CONTEXT, PARAGRAPH, DESCRIPTION, SUMMARY = 180, 130, 110, 100  # characters, some 75 tokens of the reference models at most


@dataclass(frozen=True)
class Item:
    """One question: ``query`` precedes each of ``choices``, or each of them precedes the same ``continuation``.

    ``document`` names the docstring: items of one docstring are not independent.
    """

    document: str
    query: str
    choices: tuple[str, ...]
    continuation: str
    label: int


@cache
def items(task: str, split: str = "evaluation") -> tuple[Item, ...]:
    """The items of one task, built once from the embedded corpus on this machine; `split` "calibration" for few-shot examples.

    Raises ValueError for an unknown task or split, and a corpus that yields fewer than 500 items.
    """
    if task not in BUILDERS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(BUILDERS)}")
    found = build(task, pydocs.records("pydocs", split))
    if len(found) < ITEMS:
        raise ValueError(
            f"{task}: {len(found)} items of the {split} split instead of {ITEMS}; the docstrings on this machine are not those "
            "of the lock: pip install -r requirements.lock and delete data/corpora/pydocs.jsonl"
        )
    return found


def build(task: str, documents: Sequence[pydocs.Document]) -> tuple[Item, ...]:
    """At most `ITEMS` items of one task from the given documents, those whose hash is lowest."""
    return tuple(sorted(BUILDERS[task](documents), key=lambda item: _hash(task, item.document, *item.choices))[:ITEMS])


def _hash(*parts: str) -> int:
    return int(hashlib.sha256("\0".join(parts).encode()).hexdigest(), 16)


def _placed(answer: str, distractors: Sequence[str], *key: str) -> tuple[tuple[str, ...], int]:
    """The choices in an order that the hash of `key` decides, and where the answer is."""
    label = _hash("place", *key) % CHOICES
    others = sorted(distractors, key=lambda text: _hash("order", *key, text))
    return (*others[:label], answer, *others[label:]), label


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _cut(text: str, limit: int) -> str:
    """The beginning of a text, whole words, at most `limit` characters."""
    return text if len(text) <= limit else text[: limit + 1].rsplit(None, 1)[0]


_MARKUP = re.compile(r"^\s*(>>>|\.\.|[-=~^*#:|+]|\d+[.)]|\[)|::$|\S {2,}\S")


def _is_prose(line: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", line)) >= 5 and not _MARKUP.search(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def next_line(documents: Sequence[pydocs.Document]) -> Iterator[Item]:
    for document in documents:
        lines = [line.rstrip() for line in document.text.splitlines()]
        # A line in mid-paragraph: its predecessor is prose at the same indentation. Answer and distractors alike.
        inner = [
            i
            for i in range(1, len(lines))
            if 35 <= len(lines[i].strip()) <= 80
            and _is_prose(lines[i])
            and _is_prose(lines[i - 1])
            and _indent(lines[i]) == _indent(lines[i - 1])
        ]
        for answer in sorted(inner, key=lambda i: _hash("next_line", document.name, str(i))):
            first = answer
            while first > 0 and len("\n".join(lines[first - 1 : answer])) <= CONTEXT:
                first -= 1
            query = "\n".join(lines[first:answer])
            others: dict[str, int] = {}
            for i in inner:
                same = _plain(lines[i]) == _plain(lines[answer]) or _plain(lines[i]) in _plain(query)
                if not first <= i <= answer and not same and _indent(lines[i]) == _indent(lines[answer]):
                    others.setdefault(_plain(lines[i]), i)
            if len(others) < CHOICES - 1 or len(query) < CONTEXT // 3:
                continue
            length = len(lines[answer])
            nearest = sorted(others.values(), key=lambda i: (abs(len(lines[i]) - length), _hash("near", document.name, str(i))))
            choices, label = _placed(lines[answer], [lines[i] for i in nearest[: CHOICES - 1]], document.name)
            yield Item(document.name, query, choices, "", label)
            break


def _summary_and_paragraph(document: pydocs.Document) -> tuple[str, str] | None:
    """The one-line summary, and the beginning of the paragraph of prose behind it; None where there is no such pair."""
    parts = re.split(r"\n\s*\n", document.text.strip())
    if len(parts) < 2 or "\n" in parts[0] or not 20 <= len(parts[0]) <= SUMMARY:
        return None
    lines = parts[1].splitlines()
    if len(parts[1]) < 60 or not all(_is_prose(line) for line in lines[:2]):
        return None
    return parts[0], _cut(parts[1], PARAGRAPH)


def _summaries(documents: Sequence[pydocs.Document]) -> Iterator[tuple[str, str, str, list[str]]]:
    """(document, summary, paragraph, summaries of others: those of the nearest modules of the package first)."""
    packages: dict[str, list[tuple]] = {}
    for document in documents:
        pair = _summary_and_paragraph(document)
        if pair is not None:
            module = re.split(r"[/:]", document.name)
            packages.setdefault(module[0], []).append((document.name, module, *pair, *map(_plain, pair)))
    for package in packages.values():
        for name, module, answer, paragraph, plain, plain_paragraph in package:
            others: dict[str, tuple] = {}
            for other, place, text, _, plain_text, behind in package:
                if plain_text == plain or behind == plain_paragraph:
                    continue
                shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(module, place, strict=False)))
                rank = (-shared, abs(len(text) - len(answer)), _hash("near", name, other), text)
                if plain_text not in others or rank < others[plain_text]:
                    others[plain_text] = rank
            if len(others) >= CHOICES - 1:
                yield name, answer, paragraph, [rank[-1] for rank in sorted(others.values())][: CHOICES - 1]


def summary(documents: Sequence[pydocs.Document]) -> Iterator[Item]:
    for name, answer, paragraph, others in _summaries(documents):
        choices, label = _placed(answer, others, name)
        yield Item(name, "", choices, f"\n\n{paragraph}", label)


LETTERS = ("A", "B", "C", "D")
NO_YES = ("no", "yes")  # the order of BoolQ in lm-eval


def letters(documents: Sequence[pydocs.Document]) -> Iterator[Item]:
    for item in build("pydocs_summary", documents):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=True))
        query = f"{item.continuation.strip()}\n\nWhich summary belongs to this text?\n{listed}\nAnswer:"
        yield Item(item.document, query, LETTERS, "", item.label)


def yes_no(documents: Sequence[pydocs.Document]) -> Iterator[Item]:
    found = sorted(_summaries(documents), key=lambda entry: _hash("yes_no", entry[0]))
    for rank, (name, answer, paragraph, others) in enumerate(found[:ITEMS]):
        label = rank % 2
        told = answer if label else others[0]
        yield Item(name, f"{paragraph}\n\nQuestion: Is this its summary? {told}\nAnswer:", NO_YES, "", label)


_SECTION = re.compile(r"^(Parameters|Other Parameters|Attributes)\n-{3,}\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\S[^\n]*)\n((?: +\S[^\n]*(?:\n|\Z))+)", re.MULTILINE)
_FIELD = re.compile(r"^(:(?:param|keyword|attr|ivar)[^:\n]+:)((?: [^\n]+)(?:\n {2,}\S[^\n]*)*)", re.MULTILINE)


def _entries(text: str) -> dict[str, str]:
    """``name : type`` → the beginning of its description, layout kept (numpydoc sections and Sphinx fields)."""
    found: dict[str, str] = {}
    for section in _SECTION.finditer(text):
        body = re.split(r"^\S[^\n]*\n[-=]{3,}$", text[section.end() :], maxsplit=1, flags=re.MULTILINE)[0]
        for head, description in _ENTRY.findall(body):
            found.setdefault(head, "\n" + _cut(description.rstrip(), DESCRIPTION))
    for head, description in _FIELD.findall(text):
        found.setdefault(head, _cut(description.rstrip(), DESCRIPTION))
    told: dict[str, str] = {}
    for head, description in found.items():
        if len(head) <= 60 and len(re.findall(r"[A-Za-z]{2,}", description)) >= 4:
            told.setdefault(_plain(description), head)  # of two parameters with one description, neither can be the answer
    shared = {text for text in told if sum(_plain(d) == text for d in found.values()) > 1}
    return {head: found[head] for text, head in told.items() if text not in shared}


def parameter(documents: Sequence[pydocs.Document]) -> Iterator[Item]:
    for document in documents:
        entries = _entries(document.text)
        if len(entries) < CHOICES:
            continue
        title = _cut(document.text.strip().splitlines()[0], SUMMARY)
        for answer in sorted(entries, key=lambda head: _hash("parameter", document.name, head))[:PER_DOCUMENT]:
            others = sorted(
                (head for head in entries if _plain(head) != _plain(answer)),
                key=lambda head: _hash("distractor", document.name, answer, head),
            )
            if len({_plain(head) for head in others[: CHOICES - 1]}) < CHOICES - 1:
                continue
            choices, label = _placed(answer, others[: CHOICES - 1], document.name, answer)
            headed = tuple(f"{title}\n\nParameters\n----------\n{choice}" for choice in choices)
            yield Item(document.name, "", headed, entries[answer], label)


BUILDERS: dict[str, Callable[[Sequence[pydocs.Document]], Iterator[Item]]] = {
    "pydocs_next_line": next_line,
    "pydocs_summary": summary,
    "pydocs_parameter": parameter,
    "pydocs_letters": letters,
    "pydocs_yes_no": yes_no,
}

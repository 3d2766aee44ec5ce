"""The embedded corpora: human-written English that every installation of the lock already holds.

They are read from the installed packages (never imported, only parsed): ``pydocs``, docstrings of ten scientific packages;
``pycomments``, comment paragraphs of their source; ``pyreadmes``, the descriptions of the installed distributions. Short texts
and near-duplicates are left out. ``pyraw`` keeps both: all docstrings and comment paragraphs, generated ones included.

The same lock gives the same bytes: `check` compares with ``data/corpora/manifest.json``. `build` takes about a minute, once.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import io
import json
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from prunelib.io import project_root, write_json, write_text

SPLITS = ("train", "calibration", "evaluation")
PACKAGES = ("matplotlib", "networkx", "nltk", "numpy", "pandas", "scikit-learn", "scipy", "seaborn", "sqlalchemy", "sympy")
SKIPPED_FOLDERS = {"tests", "testing", "_vendor", "vendored", "externals", "_externals", "extern"}
SHORTEST = 200  # characters; shorter texts ("Return self+value.") are mostly boilerplate
SHINGLE = 5  # words
SIMILAR = 0.7  # share of common shingles from which two texts are near-duplicates
IMPORT_NAMES = {"scikit-learn": "sklearn"}
NOT_INSTALLED = "not installed; pip install -r requirements.lock"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from: ``package/module.py:qualified.name``, ``…:line`` or the distribution's name."""

    name: str
    text: str


class ManifestMismatch(RuntimeWarning):
    """The text on this machine differs from the text behind the committed results."""


def _sources(package: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every module of an installed package, tests and vendored code left out."""
    spec = find_spec(IMPORT_NAMES.get(package, package))
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the embedded corpora read {package!r}: {NOT_INSTALLED}")
    folder = Path(spec.submodule_search_locations[0])
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts[:-1]):
            yield f"{package}/{inside.as_posix()}", path.read_text(encoding="utf-8", errors="replace")


def _docstrings(packages: Iterable[str] = PACKAGES) -> Iterator[Document]:
    def walk(node: ast.AST, qualified: str) -> Iterator[tuple[str, str | None]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{qualified}.{child.name}".lstrip(".")
                yield name, ast.get_docstring(child)
                yield from walk(child, name)
            elif isinstance(child, ast.If | ast.Try | ast.With):
                yield from walk(child, qualified)

    for name, source in chain.from_iterable(map(_sources, packages)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            try:
                tree = ast.parse(source)
            except SyntaxError:  # templates that only look like modules
                continue
        for qualified, text in [("", ast.get_docstring(tree)), *walk(tree, "")]:
            if text:
                yield Document(f"{name}:{qualified}", text)


def _comments(packages: Iterable[str] = PACKAGES) -> Iterator[Document]:
    candidate = re.compile(r"^\s*# .*\n\s*# ", re.MULTILINE)
    for name, source in chain.from_iterable(map(_sources, packages)):
        if not candidate.search(source):
            continue
        comments: list[tuple[int, str]] = []  # those on lines of their own
        with contextlib.suppress(tokenize.TokenError, SyntaxError):
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                    comments.append((token.start[0], token.string.lstrip("#:")))
        for _, block in groupby(enumerate(comments), lambda place: place[1][0] - place[0]):  # consecutive lines
            numbers, lines = zip(*(comment for _, comment in block), strict=True)
            yield Document(f"{name}:{numbers[0]}", inspect.cleandoc("\n" + "\n".join(lines)))


def _readmes() -> Iterator[Document]:
    # Those of the manifest, so that a package which the lock gains later changes no text.
    for name in sorted(_manifest("pyreadmes")["packages"]):
        if _installed_version(name) is None:
            raise RuntimeError(f"the embedded corpora read {name!r}: {NOT_INSTALLED}")
        message = metadata.metadata(name)
        payload = message.get_payload()
        # An old METADATA file carries the text as a header with continuation lines.
        text = payload if isinstance(payload, str) and payload.strip() else message.get("Description", "")
        yield Document(name, text.replace("\r\n", "\n").strip())


@dataclass(frozen=True)
class Recipe:
    """How an embedded corpus is read, and the per-mille borders between its splits."""

    read: Callable[[], Iterator[Document]]
    calibration_from: int
    evaluation_from: int
    raw: bool = False  # short texts and near-duplicates stay


RECIPES = {
    # Reference models are trained on the train split of pydocs alone, so the other two need none.
    "pydocs": Recipe(_docstrings, 800, 900),
    "pycomments": Recipe(_comments, 0, 500),
    "pyreadmes": Recipe(_readmes, 0, 500),
    # Its train split holds nothing that is in the evaluation split of pydocs or of pycomments, near-duplicates apart.
    "pyraw": Recipe(lambda: chain(_docstrings(), _comments()), 500, 900, raw=True),
}
EMBEDDED = tuple(RECIPES)


def split_of(corpus: str, name: str) -> str:
    """The split a document belongs to: a function of its qualified name alone, so that no text ever changes sides."""
    recipe = RECIPES[corpus]
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000
    return SPLITS[(bucket >= recipe.calibration_from) + (bucket >= recipe.evaluation_from)]


def without_near_duplicates(documents: list[Document]) -> list[Document]:
    """Keep the first document of every group whose word 5-grams overlap by about 70 % or more (MinHash, banding)."""
    index, kept = MinHashLSH(threshold=SIMILAR, num_perm=128), []
    words = (document.text.lower().split() for document in documents)
    shingles = ({" ".join(w[i : i + SHINGLE]).encode() for i in range(max(1, len(w) - SHINGLE + 1))} for w in words)
    signatures = MinHash.generator(shingles, num_perm=128, seed=1)
    for document, signature in zip(documents, signatures, strict=True):
        if not index.query(signature):
            index.insert(len(kept), signature)
            kept.append(document)
    return kept


def extract(corpus: str) -> list[Document]:
    """Read one embedded corpus from the installed packages: long enough, distinct (unless raw), in the order of names.

    All splits together, so that no near-copy of an evaluation text is left in the training text.
    """
    recipe = RECIPES[corpus]
    shortest = 1 if recipe.raw else SHORTEST
    found = {document.name: document for document in recipe.read() if len(document.text) >= shortest}
    documents = [found[name] for name in sorted(found)]
    return documents if recipe.raw else without_near_duplicates(documents)


def manifest_path() -> Path:
    return project_root() / "data" / "corpora" / "manifest.json"


def _manifest(corpus: str) -> dict:
    return json.loads(manifest_path().read_text())[corpus]


def corpus_path(corpus: str) -> Path:
    return manifest_path().with_name(f"{corpus}.jsonl")


def build(corpus: str, *, force: bool = False) -> Path:
    """Write ``data/corpora/<corpus>.jsonl`` (one ``{"name", "split", "text"}`` a line) unless it is there; return its path."""
    if corpus not in RECIPES:
        raise ValueError(f"unknown embedded corpus {corpus!r}: choose one of {', '.join(EMBEDDED)}")
    path = corpus_path(corpus)
    if force or not path.exists():
        found = [{"name": d.name, "split": split_of(corpus, d.name), "text": d.text} for d in extract(corpus)]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))
    return path


def records(corpus: str, split: str) -> tuple[Document, ...]:
    """The documents of one split with their names; builds the corpus on first use. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {corpus}: choose one of {', '.join(SPLITS)}")
    found = []
    path = build(corpus)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if record["split"] == split:
                found.append(Document(record["name"], record["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: damaged ({error!r}); delete the file, it is rebuilt") from None
    if not found:
        raise ValueError(f"{corpus} has no {split} split: only pydocs and pyraw have a train split, take another one")
    return tuple(found)


def texts_sha256(texts: Iterable[str]) -> str:
    """sha256 over UTF-8 texts, each preceded by its length in bytes (8 bytes, little-endian)."""
    encoded = map(str.encode, texts)
    return hashlib.sha256(b"".join(part for text in encoded for part in (len(text).to_bytes(8, "little"), text))).hexdigest()


def digest(found: Iterable[Document]) -> str:
    """`texts_sha256` over names and texts."""
    return texts_sha256(part for document in found for part in (document.name, document.text))


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name).split("+")[0]  # "2.13.0+cpu" and "2.13.0" are the same sources
    except metadata.PackageNotFoundError:
        return None


def describe(corpus: str) -> dict:
    """The manifest's entry for one corpus as it is on this machine."""
    splits = {}
    for split in SPLITS if RECIPES[corpus].calibration_from else SPLITS[1:]:
        found = records(corpus, split)
        characters = sum(len(document.text) for document in found)
        splits[split] = {"documents": len(found), "characters": characters, "sha256": digest(found)}
    return {"packages": {name: _installed_version(name) for name in _manifest(corpus)["packages"]}, "splits": splits}


def check(corpus: str, split: str) -> bool:
    """Whether one split is that of the committed manifest; where it is not, warn (`ManifestMismatch`) of what differs."""
    actual, entry = digest(records(corpus, split)), _manifest(corpus)
    expected = entry["splits"][split]["sha256"]
    if actual != expected:
        moved = [f"{name} is not {it}" for name, it in entry["packages"].items() if _installed_version(name) != it]
        warnings.warn(
            f"corpus {corpus}/{split} has sha256 {actual[:12]}…, the manifest says {expected[:12]}…: "
            f"{', '.join(moved) or f'{corpus_path(corpus)} was altered'}. Numbers will differ from the committed ones; "
            f"pip install -r requirements.lock and delete {corpus_path(corpus)}.",
            ManifestMismatch,
            stacklevel=2,
        )
    return actual == expected


def main() -> int:
    """``python -m prunelib.text``: build every corpus and check it; ``--write-manifest`` records what is here."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write-manifest", action="store_true")
    if parser.parse_args().write_manifest:
        for corpus in EMBEDDED:
            build(corpus, force=True)
        write_json(manifest_path(), {corpus: describe(corpus) for corpus in EMBEDDED})
    same = [check(corpus, split) for corpus in EMBEDDED for split in _manifest(corpus)["splits"]]
    return 0 if all(same) else 1

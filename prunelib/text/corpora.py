"""Corpora: the documents of one split of a named data set or of a local file.

The embedded corpora come from `prunelib.text.embedded`, the papers' data sets from the hub at a fixed revision or from an
offline copy (``data_dir``).
"""

import codecs
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, product
from pathlib import Path
from typing import TextIO

import yaml

from prunelib import io
from prunelib.text import embedded

DOCUMENT_END = "<|endoftext|>"  # on a line of its own, ends a document of a .txt file
BLANK_LINE = "\n\n"
COMPRESSIONS: Mapping[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".parquet")
# Largest shares of a reported text that a text in use may have; unrelated ones have many a line of markup in common.
SHARED = {"documents": 0.02, "lines": 0.5}
SPLITS = {"train", "validation", "test", "calibration", "evaluation"}  # words that name files of a folder
DAMAGED = (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Corpus:
    """The documents of one split: ``source`` says where they came from."""

    name: str
    split: str
    documents: tuple[str, ...] = field(repr=False)
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 documents, each preceded by its length in bytes (8 bytes, little-endian)."""
        return embedded.texts_sha256(self.documents)

    @property
    def label(self) -> str:
        return f"corpus {self.name!r} ({self.split})"


def load(
    name: str | Path, split: str = "train", *, data_dir: str | Path | None = None, max_documents: int | None = None
) -> Corpus:
    """Load one split of a corpus.

    Args:
        name: an embedded corpus, a key of `HUB`, or the path of a local file, which holds one split. ``.txt`` holds documents
            that end with a line ``<|endoftext|>``; ``.jsonl``, ``.json`` and ``.parquet`` hold records with the field ``text``
            or Alpaca's ``instruction``, ``input``, ``output``; ``wiki.*.raw`` is WikiText. A folder stands for its files.
        split: ``train``, ``calibration``, ``evaluation`` or a word of the source (see `HUB`), which `Corpus.split` holds.
        data_dir: folder (below the project root) with a copy of the named data set: as ``hf download --local-dir`` lays it out,
            or a file named after the split (``test.jsonl``; ``sample.jsonl`` is train), there or in ``wikitext``, ``c4`` …
        max_documents: keep the first so many documents.

    Raises ValueError for an unknown corpus or split, a malformed file or no text, FileNotFoundError for an absent file or copy,
    RuntimeError when the hub cannot be reached and no ``data_dir`` was given.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents}: keep at least 1 document, or None for all")
    if data_dir is not None and not (data_dir := io.found(data_dir)).is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} is no folder; to read one file, give its path as the corpus name")
    name, path = str(name), io.found(name)
    if name in embedded.EMBEDDED:
        texts: Iterable[str] = [document.text for document in embedded.records(name, split)]
        embedded.check(name, split)  # warns where the text is not the one behind the committed results
        source = "installed packages, see data/corpora/manifest.json"
    elif name in HUB:
        dataset = HUB[name]
        if split not in dataset.splits:
            raise ValueError(f"corpus {name!r} has no split {split!r}: choose one of {', '.join(dataset.splits)}")
        split = dataset.splits[split]
        texts, source = dataset.read(name, split, data_dir, max_documents)
    elif path.is_dir():
        texts, source, name = chain.from_iterable(map(read_file, _files(path, split))), f"folder {path.name}", path.name
    else:
        if _suffix(path) not in SUFFIXES:
            known = ", ".join((*embedded.EMBEDDED, *HUB))
            raise ValueError(f"unknown corpus {name!r}: choose one of {known}, or a file {', '.join(SUFFIXES)} (also .gz, .xz)")
        if not path.is_file():
            raise FileNotFoundError(f"corpus file {name!r} does not exist")
        texts, source, name = read_file(path), path.name, path.name
    documents = tuple(islice((text for text in texts if text.strip()), max_documents))
    if not documents:
        raise ValueError(f"corpus {name!r} ({split}) is empty: no document with text in {source}")
    return Corpus(name, split, documents, source)


def named(name: str) -> tuple[str, str]:
    """Corpus and split of ``NAME:SPLIT``; a path, which may hold colons, is a corpus of one split, train."""
    corpus, colon, split = name.rpartition(":")
    return (corpus, split) if colon and not io.found(name).exists() and _suffix(Path(name)) not in SUFFIXES else (name, "train")


def _files(folder: Path, split: str) -> list[Path]:
    """The text files of a folder, in order: those named after `split`, all where none is named after any split."""
    files = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and _suffix(path) in SUFFIXES)
    names = {path: path.name.split(".")[0].split("-")[0] for path in files}
    if not SPLITS & {*names.values()}:
        return files
    if split not in names.values():
        known = ", ".join(sorted({*names.values()}))
        raise FileNotFoundError(f"{str(folder)!r} has no file of the split {split!r}, only of {known}")
    return [path for path in files if names[path] == split]


def check_held_out(reported: Mapping[str, Corpus], used: Mapping[str, Corpus]) -> None:
    """Raise ValueError when a reported text, by its name, is one that is used, by its role, in whole or in a good part."""
    for (name, one), (role, other) in product(reported.items(), used.items()):
        if {one.name, other.name} <= {*embedded.EMBEDDED} and (one.name, one.split) != (other.name, other.split):
            continue  # made without documents in common
        for unit, most in SHARED.items():
            share = _shared(one, other, unit)
            if share > most:
                raise ValueError(
                    f"{share:.0%} of the reported text {name} are {unit} of the text of {role}: report another text or split"
                )


def _shared(one: Corpus, other: Corpus, unit: str) -> float:
    """The share of the characters of a text that are in documents, or in lines, that another text has as well."""

    def pieces(corpus: Corpus) -> list[str]:
        whole = corpus.documents if unit == "documents" else "\n".join(corpus.documents).splitlines()
        return [" ".join(piece.split()) for piece in whole]

    known, mine = set(pieces(other)), pieces(one)
    return sum(len(piece) for piece in mine if piece in known) / max(1, sum(map(len, mine)))


def _suffix(path: Path) -> str:
    """The suffix that says what is inside, without the compression's."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, with or without a byte order mark, which says the encoding where it is another than UTF-8."""
    opener = COMPRESSIONS.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            head = file.read(4096)
        marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in head and not marked:
            raise ValueError(f"{path.name} holds NUL bytes (UTF-16 without a byte order mark?): convert it to UTF-8")
        with opener(path, "rt", encoding="utf-16" if marked else "utf-8-sig") as file:
            yield file
    except DAMAGED as error:
        raise ValueError(f"{path.name} is damaged or not UTF-8 text ({error}): fetch or convert it again") from None


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """The records of a ``.jsonl``, ``.json`` (a list, or one record a line) or ``.parquet`` file, in order, after their places.

    Raises ValueError, naming the file and the line or record, for malformed JSON or a record that is no object.
    """
    if _suffix(path) == ".parquet":
        import pyarrow.parquet

        try:
            with COMPRESSIONS.get(path.suffix, open)(path, "rb") as file:
                rows = (row for batch in pyarrow.parquet.ParquetFile(file).iter_batches() for row in batch.to_pylist())
                yield from ((f"record {number} of {path.name}", row) for number, row in enumerate(rows, 1))
        except (*DAMAGED, pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path.name} is damaged or not Parquet ({error}): fetch it again") from None
        return
    with _opened(path) as file:
        whole = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        # Lines one by one: the first C4 documents must not cost reading a whole shard.
        for number, part in enumerate([file.read()] if whole else file, 1):
            where = path.name if whole else f"line {number} of {path.name}"
            try:
                parsed = json.loads(part) if part.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from None
            for place, record in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
                here = f"record {place} of {where}" if isinstance(parsed, list) else where
                if not isinstance(record, dict):
                    raise ValueError(f"{here} holds a {type(record).__name__}, not an object with fields")
                yield here, record


def record_text(record: Mapping) -> str:
    """The text of a record: its field ``text``, else Alpaca's prompt (Taori et al. 2023) followed by the answer.

    Raises ValueError where there is neither ``text`` nor ``instruction`` and ``output``.
    """
    # The hub's Alpaca has both: its `text` is this very prompt and answer, made once by its authors.
    if isinstance(record.get("text"), str):
        return record["text"]
    if not (isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)):
        raise ValueError(f"needs the field 'text', or 'instruction' and 'output', as strings; it has {', '.join(record)}")
    more, context = "", ""
    if record.get("input"):
        more, context = ", paired with an input that provides further context", f"### Input:\n{record['input']}\n\n"
    return (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{record['instruction']}\n\n{context}### Response:\n{record['output']}"
    )


def read_file(path: Path) -> Iterator[str]:
    """The documents of one local file, see `load`."""
    if _suffix(path) == ".raw":
        yield BLANK_LINE.join(wikitext_rows(path))
    elif _suffix(path) == ".txt":
        with _opened(path) as file:
            lines = file.read().split("\n")
        ends = groupby(lines, lambda line: line.strip() == DOCUMENT_END)
        yield from ("\n".join(document) for end, document in ends if not end)
    else:
        for where, record in read_records(path):
            try:
                yield record_text(record)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub at a fixed revision.

    ``splits`` maps every accepted word to the source's own split; ``files`` (split → path or pattern) says what is read of it,
    ``first`` how many documents by default. The rows of ``one_document`` are joined by blank lines.
    """

    repository: str
    revision: str
    splits: Mapping[str, str]
    files: Mapping[str, str]
    first: Mapping[str, int] = field(default_factory=dict)
    one_document: bool = False

    def read(self, name: str, split: str, data_dir: Path | None, max_documents: int | None) -> tuple[Iterable[str], str]:
        """The documents of one of the source's splits, and where they came from. Raises as `load`."""
        pattern, source = self.files[split], f"{self.repository}@{self.revision[:12]} {self.files[split]}"
        remedy = (
            f"give an offline copy by data_dir=FOLDER: hf download --repo-type dataset {self.repository} "
            f"--revision {self.revision} --include '{pattern}' --local-dir FOLDER"
        )
        if data_dir is None:
            require_hub(f"corpus {name!r} ({self.repository})", f"{remedy}.")
            texts = self._rows(split, remedy)
        elif files := sorted(data_dir.glob(pattern)):
            texts, source = chain.from_iterable(map(read_file, files)), f"offline copy {pattern}"
        else:
            file = self._plain_copy(split, data_dir)
            if file is None:
                said = f"{str(data_dir)!r} has neither {pattern} nor {split}.jsonl"
                raise FileNotFoundError(f"no offline copy of {name!r} ({split}): {said}; {remedy}")
            texts, source = read_file(file), f"offline copy {file.name}"
        if self.one_document:
            return [BLANK_LINE.join(texts)], source
        count = max_documents or self.first.get(split)
        return islice(texts, count), f"{source}, at most the first {count} documents" if count else source

    def _plain_copy(self, split: str, data_dir: Path) -> Path | None:
        places = (data_dir, data_dir / self.repository.split("/")[1])
        patterns = (f"wiki.{split.removesuffix('ation')}.raw", f"{split}.*", *(("sample.*",) if split == "train" else ()))
        found = (path for place in places for name in patterns for path in sorted(place.glob(name)))
        return next((path for path in found if _suffix(path) in SUFFIXES), None)

    def _rows(self, split: str, remedy: str) -> Iterator[str]:
        import datasets

        try:
            # Streamed: the first C4 documents must not cost a whole shard.
            files = {split: self.files[split]}
            rows = datasets.load_dataset(self.repository, revision=self.revision, data_files=files, split=split, streaming=True)
            yield from map(record_text, rows)
        except Exception as error:  # the client's own errors have many unrelated types
            reason = f"{type(error).__name__}: {io.first_line(error)}"
            raise RuntimeError(f"{self.repository} could not be read ({reason}): {remedy}") from error


def require_hub(what: str, remedy: str) -> None:
    """Raise RuntimeError with `what` and `remedy` when the hub does not answer."""
    silent = io.hub_unreachable()
    if silent is not None:
        cached = "If it was downloaded here before, HF_HUB_OFFLINE=1 reads the hub client's cache."
        raise RuntimeError(f"{what} is on the hub, which cannot be reached ({silent}): {remedy} {cached}")


def wikitext_rows(path: Path) -> list[str]:
    """The rows of the hub's WikiText from a ``wiki.*.raw`` file: every line with its end, blank lines as empty rows."""
    with _opened(path) as file:
        return [line if line.strip() else "" for line in file if line.endswith("\n")]


_SETS = yaml.safe_load(Path(__file__).with_name("hub.yaml").read_text(encoding="utf-8"))
HUB: Mapping[str, HubDataset] = {name: HubDataset(**settings) for name, settings in _SETS.items()}
"""The papers' data sets by name."""

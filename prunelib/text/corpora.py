"""Corpora: the documents of one split of a named data set or of a local file.

The embedded corpora come from `prunelib.text.embedded`. The papers' data sets come from the hub at a fixed revision, or from an
offline copy (``data_dir``). Text and JSON files are read with the standard library alone.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from prunelib import io
from prunelib.text import embedded

DOCUMENT_END = "<|endoftext|>"  # on a line of its own, ends a document of a .txt file
BLANK_LINE = "\n\n"
TEXT_SUFFIXES = (".txt", ".raw")
JSON_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS: Mapping[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
DAMAGED = (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)
READABLE = ".txt, .raw, .jsonl, .json (each also as .gz or .xz) or .parquet"


@dataclass(frozen=True)
class Corpus:
    """The documents of one split: ``source`` says where they came from, ``licence`` under which terms."""

    name: str
    split: str
    documents: tuple[str, ...] = field(repr=False)
    source: str
    licence: str

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
        name: a key of `LOADERS`, or the path of a local file. A file holds one split, whatever ``split`` is called. ``.txt``
            holds documents that end with a line ``<|endoftext|>``, or one document; ``.jsonl``/``.json`` hold records with the
            field ``text`` or Alpaca's ``instruction``, ``input``, ``output``.
        split: ``train``, ``calibration``, ``evaluation`` or a split of the source (``validation``, ``test``). For WikiText-2
            and C4, calibration is train, and evaluation is test (WikiText-2) or validation (C4). `Corpus.split` holds the
            source's word.
        data_dir: folder with an offline copy of the named data set, as ``hf download`` lays it out or as simple files.
        max_documents: keep the first so many documents.

    Raises:
        ValueError: unknown corpus or split, unreadable or malformed file, no text, ``max_documents`` below 1.
        FileNotFoundError: the file, or nothing usable in ``data_dir`` (the message lists what was looked for).
        RuntimeError: the hub cannot be reached and no ``data_dir`` was given.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents}: keep at least 1 document, or None for all")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} is no folder; to read one file, give its path as the corpus name")
    if str(name) in LOADERS:
        loader = LOADERS[str(name)]
        if split not in loader.splits:
            raise ValueError(f"corpus {name!r} has no split {split!r}: choose one of {', '.join(loader.splits)}")
        split = loader.splits[split]
        texts, source = loader.read(split, None if data_dir is None else Path(data_dir), max_documents)
        label, licence = str(name), loader.licence
    else:
        path = Path(name)
        if _suffix(path) not in (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet"):
            raise ValueError(f"unknown corpus {str(name)!r}: choose one of {', '.join(LOADERS)}, or a file {READABLE}")
        if not path.is_file():
            raise FileNotFoundError(f"corpus file {str(name)!r} does not exist")
        texts, source, label, licence = read_file(path), path.name, path.name, "as stated by whoever provides the file"
    documents = tuple(islice((text for text in texts if text.strip()), max_documents))
    if not documents:
        raise ValueError(f"corpus {str(name)!r} ({split}) is empty: no document with text in {source}")
    return Corpus(label, split, documents, source, licence)


# --- files ---------------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    """The suffix that says what is inside, without the compression's."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _open(path: Path):
    return COMPRESSIONS.get(path.suffix, open)(path, "rt", encoding="utf-8")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path.name} is damaged or not UTF-8 text ({error}): fetch or convert it again")


def _read_text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read()
    except DAMAGED as error:
        raise _damaged(path, error) from None


def read_records(path: Path) -> Iterator[dict]:
    """The records of a ``.jsonl``, ``.json`` (a list, or one record a line) or ``.parquet`` file, in order.

    Raises:
        ValueError: malformed JSON or a record that is no object, naming the file and the line or record.
    """
    if path.suffix == ".parquet":
        from datasets import load_dataset

        try:
            yield from load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        except Exception as error:  # those of the library have many unrelated types
            raise ValueError(f"{path.name} is damaged or not Parquet ({error}): fetch it again") from None
        return
    try:
        with _open(path) as file:
            whole = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            # Lines one by one: the first C4 documents must not cost reading a whole shard.
            for number, record in enumerate(json.load(file), 1) if whole else _parsed_lines(file, path):
                if not isinstance(record, dict):
                    raise ValueError(f"record {number} of {path.name} is a {type(record).__name__}, not an object with fields")
                yield record
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    except DAMAGED as error:
        raise _damaged(path, error) from None


def _parsed_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path.name} is not valid JSON: {error}") from None


def record_text(record: Mapping) -> str:
    """The text of a record: its field ``text``, else Alpaca's prompt (Taori et al. 2023) followed by the answer.

    Raises:
        ValueError: neither ``text`` nor ``instruction`` and ``output``.
    """
    # The hub's Alpaca has both: its `text` is this very prompt and answer, made once by its authors.
    if isinstance(record.get("text"), str):
        return record["text"]
    if not (isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)):
        raise ValueError(
            f"needs the field 'text', or 'instruction' and 'output', as strings; it has {', '.join(record) or 'none'}"
        )
    context = record.get("input") or ""
    more = ", paired with an input that provides further context" if context else ""
    parts = [
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.",
        f"### Instruction:\n{record['instruction']}",
        *([f"### Input:\n{context}"] if context else []),
        f"### Response:\n{record['output']}",
    ]
    return BLANK_LINE.join(parts)


def read_file(path: Path) -> Iterator[str]:
    """The documents of one local file, see `load`."""
    if _suffix(path) in TEXT_SUFFIXES:
        documents: list[list[str]] = [[]]  # without a line that ends a document the text is one
        for line in _read_text(path).split("\n"):
            if line == DOCUMENT_END:
                documents.append([])
            else:
                documents[-1].append(line)
        yield from map("\n".join, documents)
        return
    for number, record in enumerate(read_records(path), 1):
        try:
            yield record_text(record)
        except ValueError as error:
            raise ValueError(f"record {number} of {path.name}: {error}") from None


# --- named corpora -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A corpus of `prunelib.text.embedded`."""

    name: str
    licence: str = "those of the packages (BSD, MIT, PSF and alike)"
    splits: Mapping[str, str] = field(default_factory=lambda: {split: split for split in embedded.SPLITS})

    def read(self, split: str, data_dir: Path | None, max_documents: int | None) -> tuple[Sequence[str], str]:
        embedded.check(self.name, split)  # warns where the text is not the one behind the committed results
        return embedded.documents(self.name, split), "installed packages, see data/corpora/manifest.json"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub at a fixed revision.

    ``splits`` maps every accepted word to the source's own split. ``config`` and ``file`` (split → path) say what is read;
    ``local`` (split → glob patterns, best first) what an offline copy may look like; ``first`` (split → count) how many
    documents are read by default. The rows of ``one_document`` are joined by blank lines.
    """

    name: str
    repository: str
    revision: str
    licence: str
    splits: Mapping[str, str]
    local: Mapping[str, tuple[str, ...]]
    config: str | None = None
    file: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, int] = field(default_factory=dict)
    one_document: bool = False

    def read(self, split: str, data_dir: Path | None, max_documents: int | None) -> tuple[Iterable[str], str]:
        """The documents of one of the source's splits, and where they came from. Raises as `load`."""
        if data_dir is None:
            texts = map(record_text, self._rows(split))
            what = self.file.get(split) or f"{self.config or 'default'}/{split}"
            source = f"{self.repository}@{self.revision[:12]} {what}"
        else:
            paths = self._find(split, data_dir)
            texts = (text for path in paths for text in (wikitext_rows(path) if path.suffix == ".raw" else read_file(path)))
            source = "offline copy: " + ", ".join(path.name for path in paths)  # no folder of one machine in a result
        if self.one_document:
            return [BLANK_LINE.join(texts)], source
        count = max_documents or self.first.get(split)
        return islice(texts, count), f"{source}, at most the first {count} documents" if count else source

    def _find(self, split: str, data_dir: Path) -> list[Path]:
        """The files of a split in an offline copy: all shards that the first matching pattern names."""
        owner, short = self.repository.split("/")
        snapshot = f"datasets--{owner}--{short}/snapshots/{self.revision}"  # the hub client's own cache
        folders = tuple(dict.fromkeys(("", self.name, short, self.repository, snapshot)))
        for pattern in self.local[split]:
            for folder in folders:
                found = sorted(path for path in (data_dir / folder).glob(pattern) if path.is_file())
                if found:
                    return found
        raise FileNotFoundError(
            f"no offline copy of {self.name!r} ({split}) in data_dir={str(data_dir)!r}: looked for "
            f"{', '.join(self.local[split])}, there and in its folders {', '.join(folders[1:])}"
        )

    def _rows(self, split: str) -> Iterator[dict]:
        import datasets

        remedy = (
            f"Give an offline copy: load({self.name!r}, {split!r}, data_dir=FOLDER), where FOLDER holds "
            f"{' or '.join(self.local[split])} (hf download --repo-type dataset {self.repository} --revision {self.revision} "
            f"--include '{self.local[split][0]}' --local-dir FOLDER makes one)."
        )
        require_hub(f"corpus {self.name!r} is on the hub ({self.repository})", remedy)
        files = {"data_files": {split: self.file[split]}, "streaming": True} if self.file else {}
        try:
            yield from datasets.load_dataset(self.repository, self.config, split=split, revision=self.revision, **files)
        except Exception as error:  # the client's own errors have many unrelated types
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise RuntimeError(f"corpus {self.name!r} could not be read from {self.repository} ({reason}). {remedy}") from error


def require_hub(what: str, remedy: str) -> None:
    """Raise RuntimeError with `what` and `remedy` when the hub does not answer."""
    silent = io.hub_unreachable()
    if silent is not None:
        raise RuntimeError(
            f"{what}, which cannot be reached ({silent}). {remedy} "
            "If it was downloaded here before, HF_HUB_OFFLINE=1 reads the hub client's cache."
        )


def wikitext_rows(path: Path) -> list[str]:
    """The rows of the hub's WikiText from a ``wiki.*.raw`` file: every line with its end, blank lines as empty rows."""
    return [line + "\n" if line.strip() else "" for line in _read_text(path).split("\n")[:-1]]


WIKITEXT2 = HubDataset(
    name="wikitext2",
    repository="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    licence="CC BY-SA 3.0, GFDL",
    config="wikitext-2-raw-v1",
    splits={"train": "train", "validation": "validation", "test": "test", "calibration": "train", "evaluation": "test"},
    # The <unk> version (wiki.*.tokens) is left out on purpose: its perplexity is not comparable.
    local={
        split: (
            f"wikitext-2-raw-v1/{split}-*-of-*.parquet",
            f"{split}-*-of-*.parquet",
            f"wikitext-2-raw/wiki.{raw}.raw",
            f"wiki.{raw}.raw",
            f"{split}.parquet",
            f"{split}.jsonl",
        )
        for split, raw in {"train": "train", "validation": "valid", "test": "test"}.items()
    },
    one_document=True,  # as the perplexity tables use it
)

# One shard, as the papers that calibrate on C4 or report it do (revision as pinned by SLEB and EvoPress).
C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
C4 = HubDataset(
    name="c4",
    repository="allenai/c4",
    revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
    licence="ODC-BY",
    file=C4_SHARDS,
    splits={"train": "train", "validation": "validation", "calibration": "train", "evaluation": "validation"},
    # A file called `sample` has no splits: it stands for train alone, so that nobody evaluates on calibration text.
    local={
        split: (
            shard,
            Path(shard).name,
            *(f"{word}{end}" for word in words for end in (".jsonl", ".json.gz", ".json", ".parquet")),
        )
        for (split, shard), words in zip(C4_SHARDS.items(), (("train", "sample"), ("validation",)), strict=True)
    },
    # The first 1,100 validation documents are the usual excerpt (peers' C4 perplexity); 10,000 training documents hold about
    # five million tokens, ten times the largest calibration set of the papers.
    first={"train": 10_000, "validation": 1_100},
)

ALPACA_FILES = ("train-*-of-*.parquet", "train.parquet", "train.jsonl", "train.json", "alpaca_data.json", "sample.jsonl")
ALPACA = HubDataset(
    name="alpaca",
    repository="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    licence="CC BY-NC 4.0",
    splits={"train": "train", "calibration": "train"},
    local={"train": ("data/train-*-of-*.parquet", *ALPACA_FILES)},
)

LOADERS: Mapping[str, EmbeddedCorpus | HubDataset] = {
    loader.name: loader for loader in (*map(EmbeddedCorpus, embedded.EMBEDDED), WIKITEXT2, C4, ALPACA)
}

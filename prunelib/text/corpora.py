"""Text → documents → deterministic token windows.

`load` gives the documents of one split of a named corpus or of a local file, `sample_windows` draws calibration windows from
them, `consecutive_windows` cuts the windows that perplexity is measured on. Both join the documents to one stream of tokens
first (`token_stream`), so that no position is ever padded.

The embedded corpora come from `prunelib.text.embedded`. The papers' data sets come from the hub through ``datasets``, at a fixed
revision, or from an offline copy (``data_dir``). Text and JSON files are read with the standard library alone.
"""

import gzip
import hashlib
import importlib
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from prunelib import io

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
        state = hashlib.sha256()
        for document in self.documents:
            encoded = document.encode()
            state.update(len(encoded).to_bytes(8, "little"))
            state.update(encoded)
        return state.hexdigest()

    @property
    def label(self) -> str:
        return f"corpus {self.name!r} ({self.split})"


@dataclass(frozen=True)
class Loader:
    """How a named corpus is read.

    ``splits`` maps every accepted word to the source's own split, so that ``calibration`` and ``evaluation`` mean something
    for each corpus; ``read(split, data_dir, max_documents)`` gives the documents and says where they came from.
    """

    splits: Mapping[str, str]
    licence: str
    read: Callable[[str, Path | None, int | None], tuple[Iterable[str], str]]


LOADERS: dict[str, Loader] = {}


def load(
    name: str | Path, split: str = "train", *, data_dir: str | Path | None = None, max_documents: int | None = None
) -> Corpus:
    """Load one split of a corpus.

    Args:
        name: a key of `LOADERS`, or the path of a local file. A file holds one split, whatever ``split`` is called: give
            calibration and evaluation two different files. ``.txt`` holds documents that end with a line
            ``<|endoftext|>``, or one document where there is no such line; ``.jsonl``/``.json`` hold records with the field
            ``text`` or Alpaca's ``instruction``, ``input``, ``output``.
        split: ``train``, ``calibration``, ``evaluation`` or a split of the source (``validation``, ``test``). For WikiText-2
            and C4, calibration is train, and evaluation is test (WikiText-2) or validation (C4). `Corpus.split` holds the
            source's word.
        data_dir: folder with an offline copy of the named data set, as ``hf download`` lays it out or as simple files; not
            used by the embedded corpora and by files.
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
        if not _is_readable(path):
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


def _is_readable(path: Path) -> bool:
    return _suffix(path) in (*TEXT_SUFFIXES, *JSON_SUFFIXES) or path.suffix == ".parquet"


def _read_text(path: Path) -> str:
    try:
        with COMPRESSIONS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            return file.read()
    except DAMAGED as error:
        raise ValueError(f"{path.name} is damaged or not UTF-8 text ({error}): fetch or convert it again") from None


def read_records(path: Path) -> Iterator[dict]:
    """The records of a ``.jsonl``, ``.json`` (a list, or one record a line) or ``.parquet`` file, in order.

    Raises:
        ValueError: malformed JSON or a record that is no object, naming the file and the line or record.
    """
    if path.suffix == ".parquet":
        try:
            yield from _datasets(path.name).load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        except RuntimeError:  # without the library
            raise
        except Exception as error:  # those of the library have many unrelated types
            raise ValueError(f"{path.name} is damaged or not Parquet ({error}): fetch it again") from None
        return
    try:
        with COMPRESSIONS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            whole = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            # Lines one by one: the first C4 documents must not cost reading a whole shard.
            numbered = enumerate(json.load(file), 1) if whole else _parsed_lines(file, path)
            for number, record in numbered:
                if not isinstance(record, dict):
                    raise ValueError(f"record {number} of {path.name} is a {type(record).__name__}, not an object with fields")
                yield record
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    except DAMAGED as error:
        raise ValueError(f"{path.name} is damaged or not UTF-8 text ({error}): fetch or convert it again") from None


def _parsed_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path.name} is not valid JSON: {error}") from None


def record_text(record: Mapping) -> str:
    """The text of a record: its field ``text``, else Alpaca's prompt followed by the answer.

    The prompt is the one that Alpaca was trained with (Taori et al. 2023), in its two forms, with and without an input.

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
        yield from _split_documents(_read_text(path))
        return
    for number, record in enumerate(read_records(path), 1):
        try:
            yield record_text(record)
        except ValueError as error:
            raise ValueError(f"record {number} of {path.name}: {error}") from None


def _split_documents(text: str) -> list[str]:
    """Cut at the lines ``<|endoftext|>``; without one the text is one document, as blank lines are part of a text."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line == DOCUMENT_END:
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines) for lines in documents]


# --- the papers' data sets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub at a fixed revision.

    ``config`` and ``file`` (split → path) say what is read; ``local`` (split → glob patterns, best first) what an offline
    copy may look like.
    """

    name: str
    repository: str
    revision: str
    local: Mapping[str, tuple[str, ...]]
    config: str | None = None
    file: Mapping[str, str] = field(default_factory=dict)

    def find(self, split: str, data_dir: Path) -> list[Path]:
        """The files of a split in an offline copy: all shards that the first matching pattern names.

        Raises:
            FileNotFoundError: no file; the message lists the patterns.
        """
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

    def rows(self, split: str) -> Iterator[dict]:
        """The rows of a split from the hub.

        Raises:
            RuntimeError: the hub cannot be reached, or the data set cannot be read; names the remedy.
        """
        remedy = (
            f"Give an offline copy: load({self.name!r}, {split!r}, data_dir=FOLDER), where FOLDER holds "
            f"{' or '.join(self.local[split])} (hf download --repo-type dataset {self.repository} --revision {self.revision} "
            f"--include '{self.local[split][0]}' --local-dir FOLDER makes one)."
        )
        datasets = _datasets(self.name)
        _require_hub(f"corpus {self.name!r} is on the hub ({self.repository})", remedy)
        files = {"data_files": {split: self.file[split]}, "streaming": True} if self.file else {}
        try:
            rows = datasets.load_dataset(self.repository, self.config, split=split, revision=self.revision, **files)
            yield from rows
        except Exception as error:  # the client's own errors have many unrelated types
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise RuntimeError(f"corpus {self.name!r} could not be read from {self.repository} ({reason}). {remedy}") from error

    def source(self, split: str) -> str:
        what = self.file.get(split) or f"{self.config or 'default'}/{split}"
        return f"{self.repository}@{self.revision[:12]} {what}"


def _datasets(what: str):
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise RuntimeError(f"reading {what} needs the library datasets: pip install datasets") from None


def _require_hub(what: str, remedy: str) -> None:
    """Raise RuntimeError with `what` and `remedy` when the hub does not answer."""
    silent = io.hub_unreachable()
    if silent is not None:
        raise RuntimeError(
            f"{what}, which cannot be reached ({silent}). {remedy} "
            "If it was downloaded here before, HF_HUB_OFFLINE=1 reads the hub client's cache."
        )


WIKITEXT2 = HubDataset(
    name="wikitext2",
    repository="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    config="wikitext-2-raw-v1",
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
)

# One shard, as the papers that calibrate on C4 or report it do (revision as pinned by SLEB and EvoPress).
C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
# The first 1,100 validation documents are the usual excerpt (peers' C4 perplexity); 10,000 training documents hold about five
# million tokens, ten times the largest calibration set of the papers.
C4_DOCUMENTS = {"train": 10_000, "validation": 1_100}
C4 = HubDataset(
    name="c4",
    repository="allenai/c4",
    revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
    file=C4_SHARDS,
    # A file called `sample` has no splits: it stands for train alone, so that nobody evaluates on calibration text.
    local={
        split: (
            shard,
            Path(shard).name,
            *(f"{word}{suffix}" for word in words for suffix in (".jsonl", ".json.gz", ".json", ".parquet")),
        )
        for (split, shard), words in zip(C4_SHARDS.items(), (("train", "sample"), ("validation",)), strict=True)
    },
)

ALPACA = HubDataset(
    name="alpaca",
    repository="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    local={
        "train": (
            "data/train-*-of-*.parquet",
            "train-*-of-*.parquet",
            "train.parquet",
            "train.jsonl",
            "train.json",
            "alpaca_data.json",
            "sample.jsonl",
        )
    },
)


def wikitext_rows(text: str) -> list[str]:
    """The rows of the hub's WikiText from a ``wiki.*.raw`` file: every line with its end, blank lines as empty rows."""
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def _wikitext2(split: str, data_dir: Path | None, max_documents: int | None) -> tuple[list[str], str]:
    """WikiText-2 as the perplexity tables use it: the rows joined by blank lines, one document."""
    if data_dir is None:
        return [BLANK_LINE.join(row["text"] for row in WIKITEXT2.rows(split))], WIKITEXT2.source(split)
    paths = WIKITEXT2.find(split, data_dir)
    rows: list[str] = []
    for path in paths:
        rows += wikitext_rows(_read_text(path)) if path.suffix == ".raw" else _wikitext_records(path)
    return [BLANK_LINE.join(rows)], _local_source(paths)


def _wikitext_records(path: Path) -> list[str]:
    records = list(read_records(path))
    if records and all("page" in record for record in records):
        # The page form loses the blank line that opens the file and the line end between two pages, nothing else.
        return wikitext_rows(" \n" + "\n".join(record["page"] for record in records))
    return [record_text(record) for record in records]


def _documents_of(dataset: HubDataset, default_documents: Mapping[str, int]) -> Callable:
    def read(split: str, data_dir: Path | None, max_documents: int | None) -> tuple[Iterator[str], str]:
        count = max_documents or default_documents.get(split)
        if data_dir is None:
            texts, source = (record_text(row) for row in dataset.rows(split)), dataset.source(split)
        else:
            paths = dataset.find(split, data_dir)
            texts, source = (text for path in paths for text in read_file(path)), _local_source(paths)
        return islice(texts, count), f"{source}, at most the first {count} documents" if count else source

    return read


def _local_source(paths: Sequence[Path]) -> str:
    """File names alone: a folder of one machine has no place in a result."""
    return "offline copy: " + ", ".join(path.name for path in paths)


def _embedded(name: str) -> Loader:
    def read(split: str, data_dir: Path | None, max_documents: int | None) -> tuple[Sequence[str], str]:
        from prunelib.text import embedded as pydocs

        pydocs.check(name, split)  # warns where the text is not the one behind the committed results
        return pydocs.documents(name, split), "installed packages, see data/corpora/manifest.json"

    return Loader(
        {split: split for split in ("train", "calibration", "evaluation")},
        "those of the packages (BSD, MIT, PSF and alike)",
        read,
    )


LOADERS.update(
    {name: _embedded(name) for name in ("pydocs", "pycomments", "pyreadmes", "pyraw")},
    wikitext2=Loader(
        {"train": "train", "validation": "validation", "test": "test", "calibration": "train", "evaluation": "test"},
        "CC BY-SA 3.0, GFDL",
        _wikitext2,
    ),
    c4=Loader(
        {"train": "train", "validation": "validation", "calibration": "train", "evaluation": "validation"},
        "ODC-BY",
        _documents_of(C4, C4_DOCUMENTS),
    ),
    alpaca=Loader({"train": "train", "calibration": "train"}, "CC BY-NC 4.0", _documents_of(ALPACA, {})),
)


# --- windows -------------------------------------------------------------------------------------------------------------


def token_stream(corpus: Corpus, tokenizer, *, join: str | None = None, progress: bool = True) -> Int64[np.ndarray, " token"]:
    """All documents as one stream of token ids, without the special tokens that the tokenizer would add.

    Args:
        join: text put between two documents before tokenizing. None puts the tokenizer's end-of-text token between them, or a
            blank line where it has none.
    """
    between = tokenizer.eos_token_id if join is None else None
    if between is None:
        texts: Sequence[str] = [(BLANK_LINE if join is None else join).join(corpus.documents)]
    else:
        texts = corpus.documents
    pieces: list[np.ndarray] = []
    batch = 64
    with tqdm(total=len(texts), desc=f"tokenize {corpus.name}", unit="document", disable=not progress, delay=3) as bar:
        for start in range(0, len(texts), batch):
            encoded = tokenizer(
                list(texts[start : start + batch]), add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for ids in encoded["input_ids"]:
                if pieces:
                    pieces.append(np.array([between], dtype=np.int64))
                pieces.append(np.asarray(ids, dtype=np.int64))
                bar.update()
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def _content_length(seq_len: int, tokenizer, bos: bool) -> int:
    """Text tokens per window: ``seq_len``, less one when position 0 is the beginning-of-text token."""
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: a window needs at least 2 tokens")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token: take bos=False, or set tokenizer.bos_token")
    return seq_len - int(bos)


def _windows(
    stream: Int64[np.ndarray, " token"], offsets: Int64[np.ndarray, " window"], content: int, tokenizer, bos: bool
) -> Int64[Tensor, "window position"]:
    windows = torch.from_numpy(stream[offsets[:, None] + np.arange(content)])
    if bos:
        windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id, dtype=torch.int64), windows], dim=1)
    return windows


def sample_windows(
    corpus: Corpus,
    tokenizer,
    n_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
    *,
    join: str | None = None,
    progress: bool = True,
) -> Int64[Tensor, "sample position"]:
    """Draw calibration windows of exactly ``seq_len`` tokens at random places of the joined documents.

    Every placement of ``n_samples`` windows that do not overlap is equally likely, and their order is random. A corpus that is
    too short for that gives independent offsets, so that windows overlap, and a warning. The generator is local: the same seed
    gives the same bytes.

    Args:
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).
        join: see `token_stream`.

    Raises:
        ValueError: fewer tokens than one window needs (both numbers are named), no bos token, ``n_samples`` or ``seq_len`` too
            small, a negative seed.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: draw at least 1 window")
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is 0 or a positive integer")
    content = _content_length(seq_len, tokenizer, bos)
    stream = token_stream(corpus, tokenizer, join=join, progress=progress)
    _require_tokens(corpus, len(stream), content, seq_len)
    generator = np.random.default_rng(seed)
    slack = len(stream) - n_samples * content
    if slack >= 0:
        # Choosing n of slack + n slots, then widening each chosen slot to a window, is uniform over all such placements.
        slots = np.sort(generator.choice(slack + n_samples, size=n_samples, replace=False))
        offsets = generator.permutation(slots + np.arange(n_samples) * (content - 1))
    else:
        warnings.warn(
            f"{corpus.label} has {len(stream)} tokens, {n_samples} separate windows need {n_samples * content}: they overlap",
            stacklevel=2,
        )
        offsets = generator.integers(0, len(stream) - content + 1, size=n_samples)
    return _windows(stream, offsets, content, tokenizer, bos)


def consecutive_windows(
    corpus: Corpus,
    tokenizer,
    seq_len: int,
    limit: int | None = None,
    bos: bool = False,
    *,
    stride: int | None = None,
    join: str | None = None,
    progress: bool = True,
) -> Int64[Tensor, "window position"]:
    """Cut the joined documents into windows from their beginning; the tail that fills no window is dropped.

    Args:
        limit: keep at most so many windows, evenly spaced over the whole text (None: all). The first ones alone would stand
            for one source: a corpus is often sorted.
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).
        stride: text tokens from one window to the next; None means windows that do not overlap.
        join: see `token_stream`.

    Raises:
        ValueError: fewer tokens than one window needs (both numbers are named), no bos token, ``seq_len``, ``limit`` or
            ``stride`` out of range.
    """
    content = _content_length(seq_len, tokenizer, bos)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: keep at least 1 window, or None for all")
    step = content if stride is None else stride
    if not 1 <= step <= content:
        raise ValueError(f"stride={stride}: between 1 and the {content} text tokens of a window, else text would be skipped")
    stream = token_stream(corpus, tokenizer, join=join, progress=progress)
    _require_tokens(corpus, len(stream), content, seq_len)
    offsets = np.arange(0, len(stream) - content + 1, step)
    if limit is not None and limit < len(offsets):
        offsets = offsets[np.arange(limit) * len(offsets) // limit]
    return _windows(stream, offsets, content, tokenizer, bos)


def _require_tokens(corpus: Corpus, available: int, needed: int, seq_len: int) -> None:
    if available < needed:
        raise ValueError(
            f"{corpus.label} has {available} tokens; a window of {seq_len} needs {needed}: take more text or shorter windows"
        )


def windows_sha256(windows: Int64[Tensor, "window position"]) -> str:
    """Hash of a tensor of windows: its shape and its ids as little-endian 64-bit integers."""
    array = windows.cpu().numpy()
    state = hashlib.sha256(repr(array.shape).encode())
    state.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return state.hexdigest()

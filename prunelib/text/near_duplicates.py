"""Near-duplicates in the text that models are healed and calibrated on: clusters, what is left of a corpus, overlap, quality.

Documents are compared as sets of character 25-grams. MinHash (Broder 1997; the datasketch library) with 128 permutations and
banding proposes pairs, exact Jaccard similarity decides about them, connected components are the clusters; the same three
steps as in Lee et al. 2021 (arXiv 2107.06499), who compare words. Everything is deterministic: hashes do not depend on
the process, the permutations come from a fixed seed, and a cluster is named after its first document.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt32, UInt64
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.text.corpora import Corpus

BATCH = 50_000  # shingles that meet all permutations at once: 25 MB for 128 of them
RECALL_WEIGHTS = (0.1, 0.9)  # of false positives and false negatives, where the exact comparison removes the former


@dataclass(frozen=True)
class Settings:
    """What a near-duplicate is.

    Attributes:
        ngram: characters of a shingle. A document that is shorter is one shingle by itself.
        permutations: length of a MinHash signature.
        threshold: Jaccard similarity of shingle sets from which two documents are near-duplicates.
        bands, rows: two documents are compared when all ``rows`` values of at least one of ``bands`` bands agree. None for both
            takes datasketch's choice for ``threshold``, which balances missed and needless comparisons.
        verify: keep a proposed pair only when its exact Jaccard similarity reaches ``threshold``. Without it, whatever
            the bands propose is a near-duplicate, as in most published pipelines.
        seed: of the permutations.
    """

    ngram: int = 25
    permutations: int = 128
    threshold: float | int = 0.85
    bands: int | None = None
    rows: int | None = None
    verify: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram}: a shingle has at least 1 character")
        if self.permutations < 2:
            raise ValueError(f"permutations={self.permutations}: a signature needs at least 2 values, 128 are usual")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a Jaccard similarity above 0, at most 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: a seed is 0 or a positive integer")
        if (self.bands is None) != (self.rows is None):
            raise ValueError(f"bands={self.bands}, rows={self.rows}: give both, or neither for datasketch's choice")
        if self.bands is None:
            bands, rows = banding(self.threshold, self.permutations)
            object.__setattr__(self, "bands", bands)
            object.__setattr__(self, "rows", rows)
        if min(self.bands, self.rows) < 1 or self.bands * self.rows > self.permutations:
            raise ValueError(
                f"{self.bands} bands of {self.rows} rows need {self.bands * self.rows} permutations, not {self.permutations}"
            )

    def probability(self, similarity: float | int) -> float:
        """The S-curve: 1 - (1 - s^rows)^bands, the chance that two documents of Jaccard similarity s are compared.

        Raises:
            ValueError: a similarity outside 0 to 1.
        """
        if not 0 <= similarity <= 1:
            raise ValueError(f"similarity={similarity}: a Jaccard similarity lies between 0 and 1")
        return 1 - (1 - float(similarity) ** self.rows) ** self.bands

    @property
    def midpoint(self) -> float:
        """The similarity at which that chance is one half."""
        return (1 - 0.5 ** (1 / self.bands)) ** (1 / self.rows)

    def describe(self) -> dict:
        """Every setting, and where the S-curve passes one half."""
        return asdict(self) | {"midpoint": self.midpoint}


def banding(threshold: float | int, permutations: int = 128, weights: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int]:
    """Bands and rows that minimize the weighted areas of false positives and false negatives around ``threshold`` (datasketch).

    `RECALL_WEIGHTS` suit an exact comparison afterwards: it removes the false positives, nothing brings back the others.
    """
    return _banding(threshold, permutations, weights)


@lru_cache(maxsize=32)
def _banding(threshold: float | int, permutations: int, weights: tuple[float, float]) -> tuple[int, int]:
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=weights)
    return int(index.b), int(index.r)


# --- shingles and signatures ---------------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Lower case, every run of white space one blank: the layout of a text is not what makes it another text."""
    return " ".join(text.lower().split())


def shingles(text: str, ngram: int = 25) -> UInt64[np.ndarray, " shingle"]:
    """The distinct character n-grams of the normalized text, as sorted 64-bit hashes.

    A text shorter than ``ngram`` is one shingle. Two different n-grams share a hash with a probability of about 2⁻⁶⁴: set
    operations on these arrays are exact for every practical purpose.
    """
    codes = np.frombuffer(normalize(text).encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
    width = max(1, min(ngram, len(codes)))
    hashes = np.full(max(1, len(codes) - width + 1), width, dtype=np.uint64)
    for offset in range(min(width, len(codes))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : len(codes) - width + offset + 1] + np.uint64(1)
    # The finaliser of splitmix64: the top bits, which MinHash uses, depend on all bits of the sum above.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _distinct(hashes ^ (hashes >> np.uint64(31)))


def _distinct(values: UInt64[np.ndarray, " value"]) -> UInt64[np.ndarray, " distinct"]:
    """Sorted and each once: as `np.unique`, whose hash table takes a hundred times as long on millions of random numbers."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])]


def jaccard(first: UInt64[np.ndarray, " a"], second: UInt64[np.ndarray, " b"]) -> float:
    """Size of the intersection over size of the union of two results of `shingles`."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def signatures(
    documents: Sequence[str], settings: Settings | None = None, *, progress: bool = False
) -> UInt32[np.ndarray, "document permutation"]:
    """MinHash signatures by datasketch, over the upper half of the shingles' hashes.

    Raises:
        ValueError: no document.
    """
    from datasketch import MinHash

    settings = settings or Settings()
    _require(documents)
    empty = MinHash(num_perm=settings.permutations, seed=settings.seed, hashfunc=int)
    values = np.empty((len(documents), settings.permutations), dtype=np.uint32)
    for number, document in enumerate(tqdm(documents, desc="MinHash", unit="document", disable=not progress, delay=3)):
        upper = shingles(document, settings.ngram) >> np.uint64(32)
        signature = empty.copy()
        for start in range(0, len(upper), BATCH):
            signature.update_batch(upper[start : start + BATCH].tolist())
        values[number] = signature.hashvalues
    return values


def _signed(
    documents: Sequence[str],
    settings: Settings,
    signed: UInt32[np.ndarray, "document permutation"] | None,
    progress: bool,
) -> UInt32[np.ndarray, "document permutation"]:
    if signed is None:
        return signatures(documents, settings, progress=progress)
    wanted = (len(documents), settings.permutations)
    if signed.shape != wanted:
        raise ValueError(
            f"signatures of shape {signed.shape}, but documents and permutations make {wanted}: of another corpus?"
        )
    return signed


def _require(documents: Sequence[str], what: str = "the corpus") -> None:
    if isinstance(documents, str):
        raise ValueError(f"{what} is one text, not a list of documents: put it in a list")
    if not len(documents):
        raise ValueError(f"{what} is empty: near-duplicates need at least 1 document")


# --- clusters ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which documents are near-duplicates of each other.

    ``labels`` holds, for every document, the index of the first document of its cluster: a document without near-duplicates
    is its own. ``compared`` pairs were compared exactly, ``rejected`` of them were below the threshold (both 0 without
    `Settings.verify`).
    """

    labels: Int64[np.ndarray, " document"] = field(repr=False)
    settings: Settings
    compared: int
    rejected: int

    def __len__(self) -> int:
        """How many clusters there are, those of one document included."""
        return len(self.sizes)

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """First document → number of documents, in the order of the corpus."""
        firsts, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(firsts.tolist(), counts.tolist(), strict=True))

    @property
    def histogram(self) -> Mapping[int, int]:
        """Cluster size → number of clusters of that size, growing."""
        return dict(sorted(Counter(self.sizes.values()).items()))

    @property
    def size_of(self) -> Int64[np.ndarray, " document"]:
        """For every document, how many documents its cluster has."""
        return np.array([self.sizes[label] for label in self.labels.tolist()], dtype=np.int64)

    def members(self, label: int) -> tuple[int, ...]:
        """The documents of the cluster whose first document is ``label``. Raises ValueError for any other number."""
        found = np.flatnonzero(self.labels == label)
        if not len(found):
            raise ValueError(f"no cluster begins with document {label}")
        return tuple(found.tolist())

    def largest(self, count: int) -> tuple[int, ...]:
        """First documents of the ``count`` largest clusters of two documents or more, the largest first."""
        several = [(-size, first) for first, size in self.sizes.items() if size > 1]
        return tuple(first for _, first in sorted(several)[:count])

    def deduplicated(self, indices: Sequence[int] | None = None) -> tuple[int, ...]:
        """One document of every cluster, the first one, in the given order; without ``indices``, of the whole corpus.

        Raises:
            ValueError: an index outside the corpus.
        """
        chosen = range(len(self.labels)) if indices is None else indices
        wrong = [index for index in chosen if not 0 <= index < len(self.labels)]
        if wrong:
            raise ValueError(f"there is no document {wrong[0]}: the corpus has {len(self.labels)}")
        kept: dict[int, int] = {}
        for index in chosen:
            kept.setdefault(int(self.labels[index]), int(index))
        return tuple(kept.values())


def clusters(
    documents: Sequence[str],
    settings: Settings | None = None,
    *,
    signed: UInt32[np.ndarray, "document permutation"] | None = None,
    progress: bool = False,
) -> Clusters:
    """Near-duplicate clusters: connected components of the pairs that the bands propose and, with `Settings.verify`, of those
    among them whose exact Jaccard similarity reaches the threshold.

    Args:
        signed: `signatures` of the same documents, for several clusterings of one corpus.

    Raises:
        ValueError: no document, or signatures of another number of documents or permutations.
    """
    settings = settings or Settings()
    _require(documents)
    signed = _signed(documents, settings, signed, progress)
    root = list(range(len(documents)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    similarity = _Similarity(documents, settings.ngram)
    seen: set[tuple[int, int]] = set()
    rejected = 0
    for group in tqdm(_proposed(signed, settings), desc="compare", unit="group", disable=not progress, delay=3):
        for place, second in enumerate(group):
            for first in group[:place]:
                # A pair that is already connected adds nothing to the components, however similar it is.
                one, other = find(first), find(second)
                if one == other or (first, second) in seen:
                    continue
                if settings.verify:
                    seen.add((first, second))
                    if similarity(first, second) < settings.threshold:
                        rejected += 1
                        continue
                root[max(one, other)] = min(one, other)
    labels = np.array([find(index) for index in range(len(documents))], dtype=np.int64)
    return Clusters(labels, settings, len(seen), rejected)


class _Similarity:
    """Exact Jaccard similarity of two documents by index; keeps the shingles of those that were asked for, few of a corpus."""

    def __init__(self, documents: Sequence[str], ngram: int):
        self.documents, self.ngram = documents, ngram
        self.sets: dict[int, np.ndarray] = {}

    def __call__(self, first: int, second: int) -> float:
        for index in (first, second):
            if index not in self.sets:
                self.sets[index] = shingles(self.documents[index], self.ngram)
        return jaccard(self.sets[first], self.sets[second])


def _proposed(signed: UInt32[np.ndarray, "document permutation"], settings: Settings) -> Iterator[list[int]]:
    """Groups of two or more documents that agree in one band, band after band."""
    for band in range(settings.bands):
        rows = np.ascontiguousarray(signed[:, band * settings.rows : (band + 1) * settings.rows])
        _, group = np.unique(rows.view(f"V{rows.shape[1] * rows.itemsize}").ravel(), return_inverse=True)
        order = np.argsort(group, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            if len(members) > 1:
                yield members.tolist()


def deduplicate(corpus: Corpus, settings: Settings | None = None, *, progress: bool = False) -> Corpus:
    """The corpus with one document of every near-duplicate cluster, the first one, in the old order.

    Its name says so, and its hash is that of the documents that are left. Raises as `clusters`.
    """
    settings = settings or Settings()
    found = clusters(corpus.documents, settings, progress=progress)
    kept = found.deduplicated()
    said = (
        f"{len(kept)} of {len(corpus.documents)} documents, one of every cluster of near-duplicates "
        f"(Jaccard {settings.threshold:g} of character {settings.ngram}-grams, {settings.bands} bands of {settings.rows})"
    )
    return Corpus(
        f"{corpus.name}_deduplicated",
        corpus.split,
        tuple(corpus.documents[index] for index in kept),
        f"{corpus.source}; {said}",
        corpus.licence,
    )


# --- overlap -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Overlap:
    """How much of some texts occurs in a corpus.

    ``containment`` is, for every text, the share of its distinct character n-grams that occur anywhere in the corpus;
    ``near_duplicates`` says which texts are near-duplicates of a document of the corpus.
    """

    containment: Float64[np.ndarray, " text"] = field(repr=False)
    near_duplicates: Bool[np.ndarray, " text"] = field(repr=False)
    settings: Settings

    def share(self, least: float | int) -> float:
        """Fraction of the texts of which at least the part ``least`` occurs in the corpus."""
        return float(np.mean(self.containment >= least))


def overlap(
    texts: Sequence[str],
    corpus: Sequence[str],
    settings: Settings | None = None,
    *,
    signed: UInt32[np.ndarray, "document permutation"] | None = None,
    progress: bool = False,
) -> Overlap:
    """Containment of ``texts`` in ``corpus``, and near-duplicates across the two.

    Containment finds what Jaccard similarity cannot: a short text inside a long document. It also counts common phrases, so
    that a text which nobody copied is not at 0.

    Args:
        signed: `signatures` of the corpus, where they are known.

    Raises:
        ValueError: no text, no document, or signatures of another corpus.
    """
    settings = settings or Settings()
    _require(texts, "the list of texts")
    _require(corpus)
    signed = _signed(corpus, settings, signed, progress)
    bar = tqdm(corpus, desc="shingles", unit="document", disable=not progress, delay=3)
    known = _distinct(np.concatenate([shingles(document, settings.ngram) for document in bar]))

    def contained(text: str) -> float:
        own = shingles(text, settings.ngram)
        return float(np.mean(known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own))

    documents = [*corpus, *texts]
    similarity = _Similarity(documents, settings.ngram)
    near = np.zeros(len(texts), dtype=bool)
    seen: set[tuple[int, int]] = set()
    for group in _proposed(np.concatenate([signed, signatures(texts, settings)]), settings):
        inside = [index for index in group if index < len(corpus)]
        for text in group[len(inside) :]:
            for document in inside:
                if near[text - len(corpus)]:
                    break
                if (document, text) not in seen:
                    seen.add((document, text))
                    near[text - len(corpus)] = not settings.verify or similarity(document, text) >= settings.threshold
    return Overlap(np.array([contained(text) for text in texts], dtype=np.float64), near, settings)


# --- quality -------------------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # as Rae et al. list them
BULLETS = ("•", "‣", "-", "*", "·")
ELLIPSES = ("...", "…")
TERMINALS = (".", "!", "?", '"', "”")


@dataclass(frozen=True)
class Heuristics:
    """What cheap filters look at in one document; shares are of its words or of its lines that are not blank.

    All but ``punctuated_lines`` are those of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1); the share of lines
    that end in a terminal punctuation mark is C4's (Raffel et al. 2020, arXiv 1910.10683, section 2.2).
    """

    words: int
    word_length: float
    symbols_per_word: float
    alphabetic_words: float
    stop_words: int
    bullet_lines: float
    ellipsis_lines: float
    duplicate_lines: float
    punctuated_lines: float

    @property
    def rules(self) -> Mapping[str, bool]:
        """Which of Gopher's rules the document passes."""
        return {
            "words": 50 <= self.words <= 100_000,
            "word_length": 3 <= self.word_length <= 10,
            "symbols_per_word": self.symbols_per_word <= 0.1,
            "alphabetic_words": self.alphabetic_words >= 0.8,
            "stop_words": self.stop_words >= 2,
            "bullet_lines": self.bullet_lines <= 0.9,
            "ellipsis_lines": self.ellipsis_lines <= 0.3,
            "duplicate_lines": self.duplicate_lines <= 0.3,
        }

    @property
    def passed(self) -> float:
        """Share of Gopher's rules that the document passes: one number for its form, 1 is the best."""
        return sum(self.rules.values()) / len(self.rules)


def heuristics(document: str) -> Heuristics:
    """The measures of one document.

    Raises:
        ValueError: a document without a word.
    """
    words = document.split()
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    if not words:
        raise ValueError("a blank document has no quality: leave it out")
    symbols = document.count("#") + sum(document.count(dots) for dots in ELLIPSES)
    repeated = len(lines) - len(set(lines))
    plain = {re.sub(r"\W", "", word.lower()) for word in words}

    def share(found: Iterable[bool], of: Sequence[str]) -> float:
        return sum(found) / len(of)

    return Heuristics(
        words=len(words),
        word_length=sum(map(len, words)) / len(words),
        symbols_per_word=symbols / len(words),
        alphabetic_words=share((any(map(str.isalpha, word)) for word in words), words),
        stop_words=len(STOP_WORDS & plain),
        bullet_lines=share((line.startswith(BULLETS) for line in lines), lines),
        ellipsis_lines=share((line.endswith(ELLIPSES) for line in lines), lines),
        duplicate_lines=repeated / len(lines),
        punctuated_lines=share((line.endswith(TERMINALS) for line in lines), lines),
    )


@torch.inference_mode()
def document_nats(
    model: PreTrainedModel,
    tokenizer,
    documents: Sequence[str],
    *,
    max_tokens: int = 256,
    batch_size: int = 8,
    progress: bool = False,
) -> Float64[np.ndarray, " document"]:
    """Mean loss of every document by itself, in nats per token, over its first ``max_tokens`` tokens.

    The quality of a text as a language model sees it (CCNet, Wenzek et al. 2020, arXiv 1911.00359): a low loss is
    fluent, and a very low one predictable. Every document begins behind the beginning-of-text token, or the end-of-text token
    where there is none, so that its first token counts too. Few tokens have little context: compare texts of one length.

    Raises:
        ValueError: no document, one without a token, a tokenizer with neither token, a model in training mode, or more tokens
            than its positions.
    """
    _require(documents)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token: set tokenizer.bos_token, documents begin behind it")
    if model.training:
        raise ValueError("the model is in training mode (dropout would blur the result): call model.eval() first")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if max_tokens < 1 or batch_size < 1 or (positions is not None and max_tokens + 1 > positions):
        raise ValueError(
            f"max_tokens={max_tokens}, batch_size={batch_size}: at least 1, and below the model's {positions} positions"
        )
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids = [[start, *tokens[:max_tokens]] for tokens in encoded]
    empty = [number for number, tokens in enumerate(ids) if len(tokens) < 2]
    if empty:
        raise ValueError(f"document {empty[0]} has no token ({documents[empty[0]][:40]!r}): leave it out")
    nats = np.empty(len(ids), dtype=np.float64)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # batches of equal length waste nothing
    bar = tqdm(range(0, len(order), batch_size), desc="loss of documents", unit="batch", disable=not progress, delay=3)
    for begin in bar:
        batch = order[begin : begin + batch_size]
        longest = max(len(ids[number]) for number in batch)
        # Padding stands on the right: under a causal mask no scored token sees it.
        padded = torch.tensor([ids[number] + [start] * (longest - len(ids[number])) for number in batch], device=model.device)
        logits = model(input_ids=padded, use_cache=False).logits
        for row, number in enumerate(batch):
            scored = len(ids[number]) - 1
            loss = functional.cross_entropy(logits[row, :scored].float(), padded[row, 1 : scored + 1], reduction="none")
            nats[number] = loss.double().mean().item()
    return nats


def size_bins(largest: int) -> tuple[tuple[int, int], ...]:
    """Bins of cluster sizes that double: (1, 1), (2, 2), (3, 4), (5, 8), … up to ``largest``, ends included."""
    if largest < 1:
        raise ValueError(f"largest={largest}: a cluster has at least 1 document")
    return tuple((2 ** (power - 1) + 1 if power else 1, 2**power) for power in range(math.ceil(math.log2(largest)) + 1))


def length_matched(lengths: Sequence[int], pool: Sequence[int]) -> tuple[int, ...]:
    """For every length the place in ``pool`` of the nearest length that is not taken yet: a control group of equal lengths.

    Raises:
        ValueError: more lengths than the pool has.
    """
    if len(lengths) > len(pool):
        raise ValueError(f"{len(lengths)} lengths, but a pool of {len(pool)}: draw fewer")
    order = sorted(range(len(pool)), key=lambda place: (pool[place], place))
    sizes = [pool[place] for place in order]
    taken: list[int] = []
    for length in lengths:
        right = bisect_left(sizes, length)
        left = right - 1
        nearer = left >= 0 and (right == len(sizes) or length - sizes[left] <= sizes[right] - length)
        index = left if nearer else right
        sizes.pop(index)
        taken.append(order.pop(index))
    return tuple(taken)

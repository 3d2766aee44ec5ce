"""Near-duplicates in the text that models are healed and calibrated on: clusters, what is left of a corpus, overlap, quality.

Documents are compared as sets of character 25-grams. MinHash (Broder 1997; the datasketch library) with 128 permutations and
banding proposes pairs, exact Jaccard similarity decides about them, connected components are the clusters; Lee et al. 2021
(arXiv 2107.06499) cluster training text in the same way. Everything is deterministic: the shingles are hashed without Python's salt,
the permutations come from a fixed seed, and a cluster is named after its first document.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt32, UInt64
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.corpora import Corpus

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
    threshold: float = 0.85
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
                f"{self.bands} bands of {self.rows} rows need {self.bands * self.rows} permutations, there are {self.permutations}"
            )

    def probability(self, similarity: float) -> float:
        """The S-curve: 1 - (1 - s^rows)^bands, the chance that two documents of Jaccard similarity s are compared.

        Raises:
            ValueError: a similarity outside 0 to 1.
        """
        if not 0 <= similarity <= 1:
            raise ValueError(f"similarity={similarity}: a Jaccard similarity lies between 0 and 1")
        return 1 - (1 - similarity**self.rows) ** self.bands

    @property
    def midpoint(self) -> float:
        """The similarity at which that chance is one half."""
        return (1 - 0.5 ** (1 / self.bands)) ** (1 / self.rows)

    def describe(self) -> dict:
        """Every setting, and where the S-curve passes one half."""
        return asdict(self) | {"midpoint": self.midpoint}


def banding(threshold: float, permutations: int = 128, weights: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int]:
    """Bands and rows that minimise the weighted areas of false positives and false negatives around ``threshold`` (datasketch).

    `RECALL_WEIGHTS` suit an exact comparison afterwards: it removes the false positives, nothing brings back the others.
    """
    return _banding(threshold, permutations, weights)


@lru_cache(maxsize=32)
def _banding(threshold: float, permutations: int, weights: tuple[float, float]) -> tuple[int, int]:
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=weights)
    return int(index.b), int(index.r)


# --- shingles and signatures ---------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, every run of white space one blank: the layout of a text is not what makes it another text."""
    return " ".join(text.lower().split())


def shingles(text: str, ngram: int = 25) -> UInt64[np.ndarray, " shingle"]:
    """The distinct character n-grams of the normalised text, as sorted 64-bit hashes.

    A text shorter than ``ngram`` is one shingle. Two different n-grams share a hash with probability 2⁻⁶⁴, so that set operations on these
    arrays are exact for every practical purpose.
    """
    codes = np.frombuffer(normalise(text).encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
    width = max(1, min(ngram, len(codes)))
    hashes = np.full(max(1, len(codes) - width + 1), width, dtype=np.uint64)
    for offset in range(min(width, len(codes))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : len(codes) - width + offset + 1] + np.uint64(1)
    # The finaliser of splitmix64: the top bits, which MinHash uses, depend on all bits of the sum above.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.unique(hashes ^ (hashes >> np.uint64(31)))


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
        upper = np.unique(shingles(document, settings.ngram) >> np.uint64(32))
        signature = empty.copy()
        for start in range(0, len(upper), BATCH):
            signature.update_batch(upper[start : start + BATCH].tolist())
        values[number] = signature.hashvalues
    return values


def _require(documents: Sequence[str], what: str = "the corpus") -> None:
    if isinstance(documents, str):
        raise ValueError(f"{what} is one text, not a list of documents: put it in a list")
    if not len(documents):
        raise ValueError(f"{what} is empty: near-duplicates need at least 1 document")


# --- clusters ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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
    signed = signatures(documents, settings, progress=progress) if signed is None else signed
    if signed.shape != (len(documents), settings.permutations):
        raise ValueError(
            f"signatures of shape {signed.shape}: {len(documents)} documents and {settings.permutations} permutations are asked for"
        )
    root = list(range(len(documents)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    sets: dict[int, np.ndarray] = {}  # of the documents that are compared: few, so that a large corpus fits into memory

    def similarity(first: int, second: int) -> float:
        for index in (first, second):
            if index not in sets:
                sets[index] = shingles(documents[index], settings.ngram)
        return jaccard(sets[first], sets[second])

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


@dataclass(frozen=True)
class Overlap:
    """How much of some texts occurs in a corpus.

    ``containment`` is, for every text, the share of its distinct character n-grams that occur anywhere in the corpus;
    ``near_duplicates`` the texts that are in one cluster with a document of the corpus.
    """

    containment: Float64[np.ndarray, " text"] = field(repr=False)
    near_duplicates: tuple[int, ...] = field(repr=False)
    settings: Settings

    def share(self, least: float) -> float:
        """Fraction of the texts of which at least the part ``least`` occurs in the corpus."""
        return float(np.mean(self.containment >= least))


def overlap(
    texts: Sequence[str], corpus: Sequence[str], settings: Settings | None = None, *, progress: bool = False
) -> Overlap:
    """Containment of ``texts`` in ``corpus``, and near-duplicates across the two.

    Containment finds what Jaccard similarity cannot: a short text inside a long document. It also counts common phrases.

    Raises:
        ValueError: no text, or no document.
    """
    settings = settings or Settings()
    _require(texts, "the list of texts")
    _require(corpus)
    known = _known(corpus, settings.ngram, progress)
    contained = np.array([np.mean(_among(shingles(text, settings.ngram), known)) for text in texts], dtype=np.float64)
    both = clusters([*corpus, *texts], settings, progress=progress)
    inside = set(both.labels[: len(corpus)].tolist())
    near = tuple(index for index, label in enumerate(both.labels[len(corpus) :].tolist()) if label in inside)
    return Overlap(contained, near, settings)


def _known(corpus: Sequence[str], ngram: int, progress: bool) -> UInt64[np.ndarray, " shingle"]:
    """Sorted distinct shingles of all documents."""
    bar = tqdm(corpus, desc="shingles", unit="document", disable=not progress, delay=3)
    return np.unique(np.concatenate([shingles(document, ngram) for document in bar]))


def _among(some: UInt64[np.ndarray, " some"], known: UInt64[np.ndarray, " known"]) -> np.ndarray:
    places = np.minimum(np.searchsorted(known, some), len(known) - 1)
    return known[places] == some

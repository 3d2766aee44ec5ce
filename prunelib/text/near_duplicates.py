"""Near-duplicates: clusters in a corpus, what is left without them, and how much of other texts it contains.

Documents are compared as sets of character 25-grams. MinHash (Broder 1997; the datasketch library) with banding proposes pairs,
exact Jaccard similarity decides about them, connected components are the clusters: the steps of Lee et al. 2021
(arXiv 2107.06499), who compare words. Everything is deterministic, and a cluster is named after its first document.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import Bool, Float64, Int64, UInt32, UInt64
from tqdm.auto import tqdm

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
            takes datasketch's choice for ``threshold``.
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
        if self.ngram < 1 or self.permutations < 2 or not 0 < self.threshold <= 1 or self.seed < 0:
            raise ValueError(
                f"ngram={self.ngram}, permutations={self.permutations}, threshold={self.threshold}, seed={self.seed}: "
                "ngram from 1, permutations from 2, a threshold above 0 and at most 1, seed from 0"
            )
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
        """The S-curve: 1 - (1 - s^rows)^bands, the chance that two documents of Jaccard similarity s are compared."""
        return 1 - (1 - float(similarity) ** self.rows) ** self.bands

    def describe(self) -> dict:
        """Every setting, and the similarity at which the S-curve passes one half."""
        return asdict(self) | {"midpoint": (1 - 0.5 ** (1 / self.bands)) ** (1 / self.rows)}


@cache
def banding(threshold: float | int, permutations: int = 128, weights: tuple[float, float] = (0.5, 0.5)) -> tuple[int, int]:
    """Bands and rows that minimize the weighted areas of false positives and false negatives around ``threshold`` (datasketch).

    `RECALL_WEIGHTS` suit an exact comparison afterwards: it removes the false positives, nothing brings back the others.
    """
    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=weights)
    return int(index.b), int(index.r)


# --- shingles and signatures ---------------------------------------------------------------------------------------------


def shingles(text: str, ngram: int = 25) -> UInt64[np.ndarray, " shingle"]:
    """The distinct character n-grams of a text, as sorted 64-bit hashes; case and layout do not count.

    Two different n-grams share a hash with a probability of about 2⁻⁶⁴: set operations are exact for every practical purpose.
    """
    plain = " ".join(text.lower().split())
    codes = np.frombuffer(plain.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
    width = max(1, min(ngram, len(codes)))
    hashes = np.full(max(1, len(codes) - width + 1), width, dtype=np.uint64)
    for offset in range(min(width, len(codes))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : len(codes) - width + offset + 1] + np.uint64(1)
    # The finalizer of splitmix64: the top bits, which MinHash uses, depend on all bits of the sum above.
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
    documents: Sequence[str], settings: Settings, *, progress: bool = False
) -> UInt32[np.ndarray, "document permutation"]:
    """MinHash signatures, over the upper half of the shingles' hashes. Raises ValueError when there is no document."""
    if isinstance(documents, str) or not len(documents):
        raise ValueError("near-duplicates need a list of at least 1 document")
    bar = tqdm(documents, desc="MinHash", unit="document", disable=not progress, delay=3)
    return sign((shingles(document, settings.ngram) >> np.uint64(32) for document in bar), settings)


def sign(
    shingle_sets: Iterable[UInt64[np.ndarray, " shingle"]], settings: Settings
) -> UInt32[np.ndarray, "document permutation"]:
    """MinHash signatures by datasketch of sets of 32-bit hashes."""
    empty = MinHash(num_perm=settings.permutations, seed=settings.seed, hashfunc=int)
    values = []
    for hashes in shingle_sets:
        signature = empty.copy()
        for start in range(0, len(hashes), BATCH):
            signature.update_batch(hashes[start : start + BATCH].tolist())
        values.append(signature.hashvalues.astype(np.uint32))
    return np.stack(values)


def _bands(signed: UInt32[np.ndarray, "document permutation"], settings: Settings) -> Iterator[Int64[np.ndarray, " document"]]:
    """For every band the group of each document: those that agree in the band have one number."""
    for band in range(settings.bands):
        rows = np.ascontiguousarray(signed[:, band * settings.rows : (band + 1) * settings.rows])
        yield np.unique(rows.view(f"V{rows.shape[1] * rows.itemsize}").ravel(), return_inverse=True)[1]


def _proposed(signed: UInt32[np.ndarray, "document permutation"], settings: Settings) -> Iterator[list[int]]:
    """Groups of two or more documents that agree in one band, band after band."""
    for group in _bands(signed, settings):
        order = np.argsort(group, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            if len(members) > 1:
                yield members.tolist()


def first_of_each(signed: UInt32[np.ndarray, "document permutation"], settings: Settings) -> list[int]:
    """The documents that agree in no band with one kept before them, in order; pairs are not compared exactly."""
    kept: list[int] = []
    seen: list[set[int]] = [set() for _ in range(settings.bands)]
    for index, groups in enumerate(np.stack(list(_bands(signed, settings)), axis=1).tolist()):
        if not any(group in known for group, known in zip(groups, seen, strict=True)):
            kept.append(index)
            for group, known in zip(groups, seen, strict=True):
                known.add(group)
    return kept


# --- clusters ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which documents are near-duplicates of each other.

    ``labels`` holds, for every document, the index of the first document of its cluster: a document without near-duplicates
    is its own. ``compared`` pairs were compared exactly, ``rejected`` of them were below the threshold.
    """

    labels: Int64[np.ndarray, " document"] = field(repr=False)
    compared: int
    rejected: int

    def __len__(self) -> int:
        """How many clusters there are, those of one document included."""
        return len(self.sizes)

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """First document → number of documents, in the order of the corpus."""
        return dict(sorted(Counter(self.labels.tolist()).items()))

    def members(self, first: int) -> list[int]:
        """The documents of the cluster that begins with ``first``."""
        return np.flatnonzero(self.labels == first).tolist()

    def largest(self, count: int) -> list[int]:
        """First documents of the ``count`` largest clusters of two documents or more, the largest first."""
        return sorted((first for first, size in self.sizes.items() if size > 1), key=lambda first: -self.sizes[first])[:count]


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
        ValueError: no document.
    """
    settings = settings or Settings()
    signed = signatures(documents, settings, progress=progress) if signed is None else signed
    root = list(range(len(documents)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    shingles_of = cache(lambda index: shingles(documents[index], settings.ngram))
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
                    if jaccard(shingles_of(first), shingles_of(second)) < settings.threshold:
                        rejected += 1
                        continue
                root[max(one, other)] = min(one, other)
    return Clusters(np.array([find(index) for index in range(len(documents))], dtype=np.int64), len(seen), rejected)


def deduplicate(corpus, settings: Settings | None = None, *, progress: bool = False):
    """A `corpora.Corpus` with one document of every near-duplicate cluster, the first one, in the old order.

    Its name says so, and its hash is that of the documents that are left. Raises as `clusters`.
    """
    settings = settings or Settings()
    kept = list(clusters(corpus.documents, settings, progress=progress).sizes)
    said = (
        f"{len(kept)} of {len(corpus.documents)} documents, one of every cluster of near-duplicates "
        f"(Jaccard {settings.threshold:g} of character {settings.ngram}-grams, {settings.bands} bands of {settings.rows})"
    )
    documents = tuple(corpus.documents[index] for index in kept)
    return replace(corpus, name=f"{corpus.name}_deduplicated", documents=documents, source=f"{corpus.source}; {said}")


def overlap(
    texts: Sequence[str], corpus: Sequence[str], settings: Settings | None = None, *, progress: bool = False
) -> tuple[Float64[np.ndarray, " text"], Bool[np.ndarray, " text"]]:
    """For every text, which share of it the corpus contains, and whether it is a near-duplicate of a document of the corpus.

    The share is that of its distinct character n-grams that occur anywhere in the corpus. It finds a short text inside a long
    document, which Jaccard similarity cannot, and also counts common phrases: a text which nobody copied is not at 0.

    Raises:
        ValueError: no text, or no document.
    """
    settings = settings or Settings()
    signed = np.concatenate([signatures(corpus, settings, progress=progress), signatures(texts, settings)])
    own = [shingles(text, settings.ngram) for text in texts]
    known = _distinct(np.concatenate([shingles(document, settings.ngram) for document in corpus]))
    contained = [float(np.mean(known[np.minimum(np.searchsorted(known, one), len(known) - 1)] == one)) for one in own]

    shingles_of = cache(lambda index: shingles(corpus[index], settings.ngram))
    near = np.zeros(len(texts), dtype=bool)
    for group in _proposed(signed, settings):
        documents = [index for index in group if index < len(corpus)]
        for text in (index - len(corpus) for index in group[len(documents) :]):
            near[text] = near[text] or any(
                not settings.verify or jaccard(shingles_of(document), own[text]) >= settings.threshold for document in documents
            )
    return np.array(contained, dtype=np.float64), near


# --- quality -------------------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # as Rae et al. list them


def gopher_rules_passed(document: str) -> float:
    """Share of Gopher's rules of quality that a document passes (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).

    Raises:
        ValueError: a document without a word.
    """
    words = document.split()
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    if not words:
        raise ValueError("a blank document has no quality: leave it out")
    plain = {re.sub(r"\W", "", word.lower()) for word in words}
    rules = (
        50 <= len(words) <= 100_000,
        3 <= sum(map(len, words)) / len(words) <= 10,
        sum(map(document.count, ("#", "...", "…"))) / len(words) <= 0.1,
        sum(any(map(str.isalpha, word)) for word in words) / len(words) >= 0.8,
        len(STOP_WORDS & plain) >= 2,
        sum(line.startswith(("•", "‣", "-", "*", "·")) for line in lines) / len(lines) <= 0.9,
        sum(line.endswith(("...", "…")) for line in lines) / len(lines) <= 0.3,
        1 - len(set(lines)) / len(lines) <= 0.3,
    )
    return sum(rules) / len(rules)

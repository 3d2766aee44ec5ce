"""Near-duplicates: clusters in a corpus, what is left without them, and how much of other texts it contains.

Documents are compared as sets of character n-grams. MinHash (Broder 1997; the datasketch library) with banding proposes pairs,
exact Jaccard similarity decides about them, connected components are the clusters: the steps of Lee et al. 2021
(arXiv 2107.06499), who compare words. Everything is deterministic.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import Bool, Float64, Int64, UInt64
from scipy.cluster.hierarchy import DisjointSet
from tqdm.auto import tqdm

NGRAM = 25  # characters of a shingle
PERMUTATIONS = 128  # length of a MinHash signature
THRESHOLD = 0.85  # Jaccard similarity from which two documents are near-duplicates
SEED = 1  # of the permutations
BATCH = 50_000  # shingles that meet all permutations at once: 25 MB for 128 of them
THOROUGH = (0.1, 0.9)  # weights for which few near-duplicates are missed, at many more exact comparisons


def index(weights: tuple[float, float] = (0.5, 0.5)) -> MinHashLSH:
    """An empty index: it proposes documents of which all rows of at least one band of the signatures agree.

    weights: of the false positives and false negatives that datasketch's choice of bands minimizes; the exact comparison
    removes the former, nothing brings back the latter.
    """
    return MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, weights=weights)


def shingles(text: str) -> UInt64[np.ndarray, " shingle"]:
    """The distinct character n-grams of a text, as sorted 64-bit hashes; case and layout do not count."""
    plain = " ".join(text.lower().split())
    codes = np.frombuffer(plain.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
    width = max(1, min(NGRAM, len(codes)))
    hashes = np.full(max(1, len(codes) - width + 1), width, dtype=np.uint64)
    for offset in range(min(width, len(codes))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : len(codes) - width + offset + 1] + np.uint64(1)
    # The finalizer of splitmix64: the top bits, which MinHash uses, depend on all bits of the sum above.
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _distinct(hashes ^ (hashes >> np.uint64(31)))


def _distinct(values: UInt64[np.ndarray, " value"]) -> UInt64[np.ndarray, " distinct"]:
    """As `np.unique`, whose hash table takes a hundred times as long on millions of random numbers."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])]


def jaccard(first: UInt64[np.ndarray, " a"], second: UInt64[np.ndarray, " b"]) -> float:
    """Size of the intersection over size of the union of two results of `shingles`."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def signatures(documents: Sequence[str]) -> list[MinHash]:
    """MinHash signatures, over the upper half of the shingles' hashes. Raises ValueError when there is no document."""
    if isinstance(documents, str) or not len(documents):
        raise ValueError("near-duplicates need a list of at least 1 document")
    found = MinHash.bulk([[]] * len(documents), num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
    for document, signature in zip(tqdm(documents, desc="MinHash", unit="document", delay=3), found, strict=True):
        hashes = shingles(document) >> np.uint64(32)
        for start in range(0, len(hashes), BATCH):
            signature.update_batch(hashes[start : start + BATCH].tolist())
    return found


def clusters(
    documents: Sequence[str], proposed: MinHashLSH | None = None, *, signed: Sequence[MinHash] | None = None
) -> Int64[np.ndarray, " document"]:
    """For every document the index of the first one of its cluster.

    proposed: an empty `index`, another one than the default. signed: `signatures` of the documents, for several clusterings.
    """
    signed = signatures(documents) if signed is None else signed
    proposed = index() if proposed is None else proposed
    shingles_of, joined = cache(lambda place: shingles(documents[place])), DisjointSet(range(len(documents)))
    for second, signature in enumerate(signed):
        for first in proposed.query(signature):
            # A pair that is already connected adds nothing to the components, however similar it is.
            if joined.connected(first, second):
                continue
            if jaccard(shingles_of(first), shingles_of(second)) >= THRESHOLD:
                joined.merge(first, second)
        proposed.insert(second, signature)
    labels = np.empty(len(documents), dtype=np.int64)
    for members in joined.subsets():
        labels[list(members)] = min(members)
    return labels


def deduplicate(corpus):
    """A `corpora.Corpus` with the first document of every near-duplicate cluster, in the old order; its name says so."""
    kept = np.unique(clusters(corpus.documents)).tolist()
    bands = index()
    said = (
        f"{len(kept)} of {len(corpus.documents)} documents, one of every cluster of near-duplicates "
        f"(Jaccard {THRESHOLD:g} of character {NGRAM}-grams, {bands.b} bands of {bands.r})"
    )
    documents = tuple(corpus.documents[place] for place in kept)
    return replace(corpus, name=f"{corpus.name}_deduplicated", documents=documents, source=f"{corpus.source}; {said}")


def overlap(texts: Sequence[str], corpus: Sequence[str]) -> tuple[Float64[np.ndarray, " text"], Bool[np.ndarray, " text"]]:
    """For every text, which share of it the corpus contains, and whether it is a near-duplicate of a document of the corpus.

    The share is that of its distinct character n-grams that occur anywhere in the corpus. It finds a short text inside a long
    document, which Jaccard similarity cannot, and also counts common phrases: a text which nobody copied is not at 0.
    """
    proposed = index()
    for place, signature in enumerate(signatures(corpus)):
        proposed.insert(place, signature)
    known = _distinct(np.concatenate([shingles(document) for document in corpus]))
    shingles_of = cache(lambda place: shingles(corpus[place]))
    contained, near = [], []
    for text, signature in zip(texts, signatures(texts), strict=True):
        own = shingles(text)
        contained.append(float(np.mean(known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own)))
        near.append(any(jaccard(shingles_of(place), own) >= THRESHOLD for place in proposed.query(signature)))
    return np.array(contained, dtype=np.float64), np.array(near)


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # as Rae et al. list them


def gopher_rules_passed(document: str) -> float:
    """Share of Gopher's rules of quality that a document passes (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1)."""
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

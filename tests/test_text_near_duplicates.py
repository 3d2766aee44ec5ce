"""Near-duplicates: clusters against brute force, deduplication, overlap, quality."""

import json
from itertools import combinations

import numpy as np
import pytest
from word_model import write_project

from prunelib.lab import runs
from prunelib.lab.run_notebook import run_notebook
from prunelib.text import corpora, embedded
from prunelib.text import near_duplicates as duplicates
from prunelib.text.near_duplicates import clusters, deduplicate, gopher_rules_passed, overlap

THRESHOLD = 0.85


def words(generator, count):
    return ["".join(generator.choice(list("abcdefghijklmnopqrst"), size=generator.integers(3, 9))) for _ in range(count)]


def text(generator, count=120):
    return " ".join(words(generator, count))


def grams(document):
    """The definition, word for word: the set of character 25-grams of the normalized text."""
    plain = " ".join(document.lower().split())
    return {plain[i : i + 25] for i in range(max(1, len(plain) - 24))}


def brute_force(documents):
    """Label of every document: connected components of all pairs whose exact Jaccard similarity is 0.85 or more."""
    sets = [grams(document) for document in documents]
    label = list(range(len(documents)))
    for first, second in combinations(range(len(documents)), 2):
        if len(sets[first] & sets[second]) >= THRESHOLD * len(sets[first] | sets[second]):
            old, new = sorted((label[first], label[second]), reverse=True)
            label = [new if one == old else one for one in label]
    return label


@pytest.fixture(scope="module")
def documents():
    """100 texts, some in clusters of 2 to 20; related texts below the threshold are among them."""
    generator = np.random.default_rng(7)
    found = [text(generator) for _ in range(31)]
    for size in (2, 2, 3, 4, 8, 20):
        base = words(generator, 240)
        # One word in 240 is another one: a similarity near 0.96 between any two copies.
        found += [" ".join([*base[:place], f"copy{place:03d}", *base[place + 1 :]]) for place in range(10, 10 + size)]
    for _ in range(15):
        base = words(generator, 120)
        found += [" ".join(base), " ".join([*base[:60], *words(generator, 60)])]  # half in common: a third of the shingles
    return [found[i] for i in generator.permutation(100)]


def test_clusters_are_those_of_a_brute_force_computation(documents):
    expected = brute_force(documents)
    assert max(map(expected.count, expected)) == 20
    assert clusters(documents).tolist() == clusters(documents, duplicates.index(duplicates.THOROUGH)).tolist() == expected


def test_a_deduplicated_corpus_keeps_the_first_of_every_cluster_and_says_so():
    a, b = (text(np.random.default_rng(seed)) for seed in (2, 3))
    corpus = corpora.Corpus("mine", "train", (a, b, a + "  ", b + "!"), "a file")
    found = deduplicate(corpus)
    assert found.documents == (a, b) and found.sha256 != corpus.sha256
    assert found.name == "mine_deduplicated" and found.source.startswith("a file; 2 of 4 documents")


def test_shingle_hashes_stand_for_the_shingles(documents):
    for first, second in [(0, 1), (3, 3), (5, 90)]:
        exact = grams(documents[first]), grams(documents[second])
        hashed = duplicates.shingles(documents[first]), duplicates.shingles(documents[second])
        assert list(map(len, hashed)) == list(map(len, exact))
        assert duplicates.jaccard(*hashed) == len(exact[0] & exact[1]) / len(exact[0] | exact[1])


def test_golden_signature_and_short_documents():
    """Hashes depend neither on the process nor on the machine; short documents are one shingle, and blank ones alike."""
    assert duplicates.shingles("short")[0] == duplicates.shingles("  SHORT\n")[0] == np.uint64(16904923497112142642)
    short = ["Returns self.", "returns   self.", "Returns self!", "", " \n", "x" * 24, "x" * 25, "x" * 26]
    assert [len(duplicates.shingles(document)) for document in short] == [1] * 8
    assert clusters(short).tolist() == [0, 0, 2, 3, 3, 5, 6, 6]


def test_bands():
    found, thorough = duplicates.index(), duplicates.index(duplicates.THOROUGH)
    assert (found.b, found.r) == (8, 16)  # datasketch, 128 permutations, 0.85
    assert 1 - (1 - 0.85**thorough.r) ** thorough.b > 0.8  # of the pairs at the threshold are compared


def test_overlap_of_planted_texts():
    generator = np.random.default_rng(9)
    corpus = [text(generator) for _ in range(40)]
    inside = corpus[3][50:300]
    foreign = text(generator)
    half = corpus[7][:400] + " " + foreign[:399]
    containment, near = overlap([corpus[5].upper(), inside, foreign, half], corpus)
    assert containment[:3].tolist() == [1.0, 1.0, 0.0]
    assert abs(containment[3] - 0.5) < 0.05
    assert near.tolist() == [True, False, False, False]  # the cut is contained, but no near-copy
    assert not overlap([foreign, foreign], corpus)[1].any()  # two similar texts are none of the corpus


def test_the_raw_corpus_holds_nothing_of_the_evaluation_splits():
    clean = {document.name for name in ("pydocs", "pycomments") for document in embedded.records(name, "evaluation")}
    assert clean.isdisjoint(document.name for document in embedded.records("pyraw", "train"))


@pytest.mark.slow
def test_the_notebook_runs_on_another_model_and_text(tmp_path):
    """A text with planted copies and one without."""
    generator = np.random.default_rng(0)
    write_project(tmp_path, n_layers=2, words=[1])

    def document():
        return " ".join(f"w{i}" for i in generator.integers(1, 60, size=60))

    one, other = [document() for _ in range(30)], [document() for _ in range(20)]
    copied = [*one, *[one[0]] * 5, *[one[1] + " w1"] * 2]
    for name, found in {"copied": copied, "plain": other, "test": other[:3] + one[2:9]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in found))
    values = {"corpora": [f"{tmp_path}/copied.jsonl:train", f"{tmp_path}/plain.jsonl:train"], "items": [], "quality_tokens": 30}
    values |= {"model": str(tmp_path / "model"), "evaluation_corpus": str(tmp_path / "test.jsonl")}
    run = runs.read_run(run_notebook("notebooks/experiments/duplicates.ipynb", tmp_path / "dup.json", **values))

    def value(metric, **where):
        return [row["value"] for row in run["rows"] if row["metric"] == metric and where.items() <= row.items()]

    copied = {"corpus": "copied.jsonl"}
    assert [value("clusters_of_size", size=size, **copied) for size in (1, 3, 6)] == [[28], [1], [1]]
    assert (value("documents", **copied), value("clusters", **copied)) == ([37], [30])
    assert value("near_duplicates", state="raw", **copied) == [7]
    assert value("near_duplicates", corpus="plain.jsonl") == [3]
    assert value("nll", size_low=5, role="same_length", **copied) != []


def test_gopher_rules_of_a_text_counted_by_hand_and_what_is_refused():
    # 17 words: too few; too many symbols per word; two of five lines repeat another.
    found = gopher_rules_passed("The end of it.\n\n- one # two\nwait...\nThe end of it.\n  The end of it.")
    assert found == 4 / 8
    assert gopher_rules_passed("The model is fitted to the data, and that is all there is to it. " * 5) == 1.0
    with pytest.raises(ValueError, match="blank document"):
        gopher_rules_passed(" \n")
    for call in (lambda: clusters([]), lambda: overlap(["a"], [])):
        with pytest.raises(ValueError, match="at least 1 document"):
            call()

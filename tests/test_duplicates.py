"""Near-duplicates: clusters against brute force, deduplication, overlap, quality."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from prunelib.text import corpora
from prunelib.text import near_duplicates as duplicates
from prunelib.text.near_duplicates import (
    Settings,
    clusters,
    deduplicate,
    document_nats,
    heuristics,
    overlap,
    signatures,
    size_bins,
)

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
    """300 texts: 160 alone, the others in clusters of 2 to 20; related texts below the threshold are among them."""
    generator = np.random.default_rng(7)
    found = [text(generator) for _ in range(130)]
    for size in (2, 2, 2, 3, 3, 4, 5, 8, 11, 20, 40, 40):
        base = words(generator, 240)
        # One word in 240 is another one: a similarity near 0.96 between any two copies.
        copies = [" ".join([*base[:place], f"copy{place:03d}", *base[place + 1 :]]) for place in range(10, 10 + size)]
        found += copies
    for _ in range(15):
        base = words(generator, 120)
        found += [" ".join(base), " ".join([*base[:60], *words(generator, 60)])]  # half in common: a third of the shingles
    order = generator.permutation(len(found))
    assert len(found) == 300
    return [found[i] for i in order]


def test_clusters_are_those_of_a_brute_force_computation(documents):
    expected = brute_force(documents)
    found = clusters(documents)
    assert found.labels.tolist() == expected
    assert found.sizes == {label: expected.count(label) for label in sorted(set(expected))}
    assert found.histogram == {1: 160, 2: 3, 3: 2, 4: 1, 5: 1, 8: 1, 11: 1, 20: 1, 40: 2}
    assert len(found) == len(set(expected))
    assert found.size_of.tolist() == [expected.count(label) for label in expected]


def test_shingle_hashes_stand_for_the_shingles(documents):
    for first, second in [(0, 1), (3, 3), (5, 250)]:
        exact = grams(documents[first]), grams(documents[second])
        hashed = duplicates.shingles(documents[first]), duplicates.shingles(documents[second])
        assert list(map(len, hashed)) == list(map(len, exact))
        assert duplicates.jaccard(*hashed) == len(exact[0] & exact[1]) / len(exact[0] | exact[1])


def test_signatures_estimate_the_similarity():
    base = words(np.random.default_rng(3), 300)
    related = " ".join(base), " ".join([*base[:270], *words(np.random.default_rng(4), 30)])
    settings = Settings(permutations=512, bands=8, rows=16)
    signed = signatures(related, settings)
    exact = duplicates.jaccard(*map(duplicates.shingles, related))
    assert abs(float(np.mean(signed[0] == signed[1])) - exact) < 4 * np.sqrt(exact * (1 - exact) / 512)


def test_a_planted_cluster_of_a_hundred_near_copies_is_found():
    generator = np.random.default_rng(11)
    base = words(generator, 200)
    copies = []
    for number in range(100):
        changed = list(base)
        changed[int(generator.integers(200))] = f"changed{number}"
        copies.append("  ".join(changed).title() if number % 2 else "\n".join(changed))  # layout and case do not matter
    planted = [text(generator) for _ in range(50)] + copies + [text(generator) for _ in range(50)]
    found = clusters(planted)
    assert found.histogram == {1: 100, 100: 1}
    assert found.largest(3) == (50,)
    assert found.members(50) == tuple(range(50, 150))
    with pytest.raises(ValueError, match="no cluster begins with document 51"):
        found.members(51)


def test_the_same_text_gives_the_same_clusters_and_another_seed_other_signatures(documents):
    one, other = signatures(documents[:50]), signatures(documents[:50])
    assert np.array_equal(one, other)
    assert not np.array_equal(one, signatures(documents[:50], Settings(seed=2)))
    assert clusters(documents, signed=signatures(documents)).labels.tolist() == clusters(documents).labels.tolist()
    assert clusters(documents, Settings(seed=2)).sizes == clusters(documents).sizes


def test_golden_signature():
    """Hashes depend neither on the process nor on the machine."""
    assert duplicates.shingles("short")[0] == duplicates.shingles("  SHORT\n")[0] == np.uint64(16904923497112142642)


def test_banding_alone_joins_more_and_exact_comparison_takes_it_back(documents):
    loose = Settings(bands=64, rows=2)
    alone = clusters(documents, replace(loose, verify=False))
    exact = clusters(documents, loose)
    assert len(alone) < len(exact) and alone.compared == 0
    assert exact.sizes == clusters(documents).sizes
    assert exact.rejected > 0 and exact.compared > exact.rejected


def test_short_documents_are_one_shingle_and_blank_ones_alike():
    short = ["Returns self.", "returns   self.", "Returns self!", "", " \n", "x" * 24, "x" * 25, "x" * 26]
    assert [len(duplicates.shingles(document)) for document in short] == [1] * 8
    assert duplicates.shingles("x" * 25).tolist() == duplicates.shingles("x" * 26).tolist()
    assert clusters(short).labels.tolist() == [0, 0, 2, 3, 3, 5, 6, 6]


def test_the_s_curve_is_that_of_the_bands():
    settings = Settings()
    assert (settings.bands, settings.rows) == (8, 16)  # datasketch, 128 permutations, 0.85
    assert settings.probability(1) == 1 and settings.probability(0) == 0
    assert settings.probability(0.85) == pytest.approx(1 - (1 - 0.85**16) ** 8)
    assert settings.probability(settings.midpoint) == pytest.approx(0.5)
    assert abs(settings.midpoint - 0.85) < 0.02
    bands, rows = duplicates.banding(0.85, weights=duplicates.RECALL_WEIGHTS)
    assert Settings(bands=bands, rows=rows).probability(0.85) > 0.8
    # Measured: of pairs with a known similarity, so many agree in a band.
    generator = np.random.default_rng(5)
    pairs = []
    for _ in range(200):
        base = words(generator, 150)
        pairs += [" ".join(base), " ".join([*base[:137], *words(generator, 13)])]
    alone = clusters(pairs, Settings(verify=False))
    expected = np.mean(
        [settings.probability(duplicates.jaccard(*map(duplicates.shingles, pairs[i : i + 2]))) for i in range(0, 400, 2)]
    )
    assert abs(alone.histogram.get(2, 0) / 200 - expected) < 4 * np.sqrt(expected * (1 - expected) / 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram": 0}, "ngram=0"),
        ({"permutations": 1}, "permutations=1"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"bands": 8}, "bands=8, rows=None: give both"),
        ({"bands": 20, "rows": 13}, "20 bands of 13 rows need 260 permutations, not 128"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


def test_empty_input_is_refused():
    for call in (clusters, signatures):
        with pytest.raises(ValueError, match="the corpus is empty"):
            call([])
        with pytest.raises(ValueError, match="one text, not a list"):
            call("one text")
    with pytest.raises(ValueError, match="the list of texts is empty"):
        overlap([], ["a"])
    with pytest.raises(ValueError, match="the corpus is empty"):
        overlap(["a"], [])
    with pytest.raises(ValueError, match="of another corpus"):
        clusters(["a", "b"], signed=signatures(["a"]))
    with pytest.raises(ValueError, match="similarity=2"):
        Settings().probability(2)


def test_deduplicated_keeps_the_first_of_every_cluster():
    generator = np.random.default_rng(1)
    a, b, c = (text(generator) for _ in range(3))
    found = clusters([a, b, a + " x", c, b, a])
    assert found.labels.tolist() == [0, 1, 0, 3, 1, 0]
    assert found.deduplicated() == (0, 1, 3)
    assert found.deduplicated([5, 4, 2, 3]) == (5, 4, 3)
    assert found.deduplicated([]) == ()
    with pytest.raises(ValueError, match="there is no document 6: the corpus has 6"):
        found.deduplicated([0, 6])


def test_a_deduplicated_corpus_says_so():
    generator = np.random.default_rng(2)
    a, b = text(generator), text(generator)
    corpus = corpora.Corpus("mine", "train", (a, b, a + "  ", b + "!"), "a file", "free")
    found = deduplicate(corpus)
    assert found.documents == (a, b)
    assert found.name == "mine_deduplicated" and found.split == "train" and found.licence == "free"
    assert found.source.startswith("a file; 2 of 4 documents") and "0.85" in found.source
    assert found.sha256 != corpus.sha256
    assert deduplicate(found).documents == found.documents


def test_overlap_of_planted_texts():
    generator = np.random.default_rng(9)
    corpus = [text(generator) for _ in range(40)]
    inside = corpus[3][50:300]
    foreign = text(generator)
    half = corpus[7][:400] + " " + foreign[:399]
    found = overlap([corpus[5].upper(), inside, foreign, half], corpus)
    assert found.containment[:3].tolist() == [1.0, 1.0, 0.0]
    assert abs(found.containment[3] - 0.5) < 0.05
    assert found.near_duplicates.tolist() == [True, False, False, False]  # the cut is contained, but no near-copy
    assert found.share(0.9) == 0.5 and found.share(0.4) == 0.75
    assert overlap([inside], corpus, signed=signatures(corpus)).containment.tolist() == [1.0]
    with pytest.raises(ValueError, match="of another corpus"):
        overlap([inside], corpus, signed=signatures(corpus[:3]))


def test_two_similar_texts_do_not_make_each_other_near_duplicates_of_the_corpus():
    generator = np.random.default_rng(10)
    twice = text(generator)
    assert not overlap([twice, twice], [text(generator)]).near_duplicates.any()


def test_heuristics_of_a_text_counted_by_hand():
    found = heuristics("The end of it.\n\n- one # two\nwait...\nThe end of it.\n  The end of it.")
    assert found.words == 17
    assert found.word_length == pytest.approx((3 * 11 + 8 + 7) / 17)
    assert found.symbols_per_word == pytest.approx(2 / 17)
    assert found.alphabetic_words == pytest.approx(15 / 17)
    assert found.stop_words == 2
    assert found.bullet_lines == found.ellipsis_lines == pytest.approx(1 / 5)
    assert found.duplicate_lines == pytest.approx(2 / 5)
    assert found.punctuated_lines == pytest.approx(4 / 5)
    failed = {name for name, passes in found.rules.items() if not passes}
    assert failed == {"words", "word_length", "symbols_per_word", "duplicate_lines"}
    assert found.passed == 0.5
    assert heuristics("The model is fitted to the data, and that is all there is to it. " * 5).passed == 1.0
    with pytest.raises(ValueError, match="blank document"):
        heuristics(" \n")


def test_loss_of_documents_is_that_of_each_alone(tiny_llama):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {f"w{i}": i for i in range(1, 97)} | {"<end>": 0}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in generator.integers(1, 97, size=length)) for length in (1, 30, 7, 12, 3)]
    found = document_nats(tiny_llama, tokenizer, texts, max_tokens=12, batch_size=2)
    for document, nats in zip(texts, found, strict=True):
        ids = torch.tensor([[0, *(int(word[1:]) for word in document.split())][:13]])
        with torch.no_grad():
            expected = tiny_llama(input_ids=ids, labels=ids).loss.item()
        assert nats == pytest.approx(expected, rel=1e-5)
    assert np.allclose(document_nats(tiny_llama, tokenizer, texts, max_tokens=12, batch_size=5), found, rtol=1e-5)
    with pytest.raises(ValueError, match="document 1 has no token"):
        document_nats(tiny_llama, tokenizer, ["w1", ""], max_tokens=8)
    with pytest.raises(ValueError, match=r"max_tokens=128.*128 positions"):
        document_nats(tiny_llama, tokenizer, ["w1"], max_tokens=128)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        document_nats(tiny_llama, tokenizer, ["w1"], max_tokens=8)
    with pytest.raises(ValueError, match="training mode"):
        tokenizer.eos_token = "<end>"
        document_nats(tiny_llama.train(), tokenizer, ["w1"], max_tokens=8)


def test_bins_of_sizes_double_and_hold_every_size_once():
    assert size_bins(1) == ((1, 1),)
    assert size_bins(9) == ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16))
    for size in range(1, 300):
        assert sum(low <= size <= high for low, high in size_bins(300)) == 1
    with pytest.raises(ValueError, match="largest=0"):
        size_bins(0)


def test_the_raw_corpus_holds_what_the_others_leave_out():
    from prunelib.text import embedded as pydocs

    raw = {document.name: document.text for document in pydocs.records("pyraw", "train")}
    clean = {document.name for document in pydocs.records("pydocs", "evaluation")}
    clean |= {document.name for document in pydocs.records("pycomments", "evaluation")}
    assert not clean & raw.keys()
    licence = [
        text for text in raw.values() if text == "Authors: The scikit-learn developers\nSPDX-License-Identifier: BSD-3-Clause"
    ]
    assert len(licence) > 100


def test_the_control_group_has_the_nearest_lengths_each_once():
    pool = [10, 50, 11, 30, 12, 31]
    assert duplicates.length_matched([11, 11, 40, 29], pool) == (2, 0, 5, 3)
    assert duplicates.length_matched([1000], pool) == (1,)
    assert sorted(duplicates.length_matched([0] * 6, pool)) == list(range(6))
    with pytest.raises(ValueError, match="2 lengths, but a pool of 1"):
        duplicates.length_matched([1, 2], [1])


def test_the_notebook_and_its_chapter_run_on_another_model_and_text(tmp_path):
    """A text with planted copies and one without; no healing runs, then some."""
    import json

    import pandas
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    from prunelib import models
    from prunelib.lab import runs as results
    from prunelib.lab.run_notebook import run_notebook

    vocabulary = {f"w{i}": i for i in range(1, 60)} | {"<|endoftext|>": 0}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    models.save(LlamaForCausalLM(config).eval(), fast, tmp_path / "model")
    generator = np.random.default_rng(0)

    def document():
        return " ".join(f"w{i}" for i in generator.integers(1, 60, size=60))

    one, other = [document() for _ in range(30)], [document() for _ in range(20)]
    for name, found in {
        "copied": [*one, *[one[0]] * 5, *[one[1] + " w1"] * 2],
        "plain": other,
        "test": other[:3] + one[2:9],
    }.items():
        lines = [json.dumps({"text": text}) for text in found]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    run = run_notebook(
        "notebooks/experiments/duplicates.ipynb",
        tmp_path / "runs" / "dup.json",
        model=str(tmp_path / "model"),
        corpora=[f"{tmp_path}/copied.jsonl:train", f"{tmp_path}/plain.jsonl:train"],
        evaluation_corpus=str(tmp_path / "test.jsonl"),
        items=[],
        quality_tokens=30,
    )
    table = results.collect([run])
    assert run.stat().st_size < 100_000

    def value(metric, corpus, **places):
        part = table[(table["metric"] == metric) & (table["corpus"] == corpus)]
        for column, place in places.items():
            part = part[part[column] == place]
        return part["value"].tolist()

    assert value("clusters_of_size", "copied.jsonl", size=1) == [28]
    assert value("clusters_of_size", "copied.jsonl", size=6) == [1]
    assert value("largest", "copied.jsonl") == [6, 3]
    assert value("documents", "copied.jsonl") == [37] and value("clusters", "copied.jsonl") == [30]
    assert value("near_duplicates", "copied.jsonl", state="raw") == [7]
    assert value("near_duplicates", "plain.jsonl") == [3]
    assert value("nll", "copied.jsonl", size_low=5, role="same_length") != []
    results.write_table(table, tmp_path / "duplicates.csv")

    start = {"run": "h/a", "experiment": "healing", "model": "m/tiny", "method": "angular", "size": 1, "repair": "none"}
    start |= {"metric": "nll", "text": "held out", "code": "abc"}
    way = {
        "recipe": "lora",
        "rank": 4,
        "trained_modules": "mlp",
        "learning_rate": 0.1,
        "healing_corpus": "copied",
        "healing_seed": 0,
    }
    healed = [{**start, "recipe": "none", "step": 0, "tokens": 0, "value": 5.0}]
    for unique, end in ((False, 4.0), (True, 3.75)):
        healed += [{**start, **way, "unique": unique, "step": 8 * n, "tokens": 80 * n, "value": end + 2 - n} for n in (1, 2)]
    pandas.DataFrame(healed).to_csv(tmp_path / "healing.csv", index=False)
    for healing, columns in ((None, set()), (str(tmp_path / "healing.csv"), {"raw", "deduplicated", "difference"})):
        run_notebook(
            "notebooks/06_healing_data.ipynb",
            tmp_path / "chapter.json",
            duplicates=str(tmp_path / "duplicates.csv"),
            healing=healing,
            converged=None,
            figures=str(tmp_path / "figures"),
        )
        drawn = pandas.read_csv(tmp_path / "figures" / "own_table_deduplication.csv")
        assert set(drawn) & {"raw", "deduplicated", "difference"} == columns
    last = drawn.iloc[-1]
    assert (last["before"], last["raw"], last["deduplicated"], last["difference"], last["tokens"]) == (5, 4, 3.75, -0.25, 160)
    for stem in ("own_cluster_sizes", "own_quality_by_cluster_size", "own_overlap"):
        assert (tmp_path / "figures" / f"{stem}.png").stat().st_size > 5000

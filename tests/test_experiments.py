"""The experiment notebooks, run as a batch runs them, on a tiny model and a small text."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from prunelib import models, results
from prunelib.notebook import NotebookError, run_notebook
from prunelib.provenance import at_root
from prunelib.search import alpha_path
from prunelib.statistics import LayerStats

STATISTICS = "notebooks/experiments/statistics.ipynb"
DEPTH = "notebooks/experiments/depth.ipynb"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a 6-layer model, its tokenizer and a text."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("experiment")
    words = {f"w{i}": i for i in range(1, 60)} | {"<|endoftext|>": 0}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2)
    models.save(LlamaForCausalLM(config).eval(), fast, folder / "model")
    generator = torch.Generator().manual_seed(1)
    text = " ".join(f"w{int(i)}" for i in torch.randint(1, 60, (4000,), generator=generator))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def statistics(place):
    common = {"model": str(place / "model"), "corpus": str(place / "text.txt"), "n_samples": 8, "seq_len": 16}
    return [str(run_notebook(STATISTICS, place / f"s{seed}.json", seed=seed, **common)) for seed in (0, 1)]


def depth(place, output, statistics, layers_removed, **changes):
    text = str(place / "text.txt")
    values = {
        "model": str(place / "model"),
        "statistics": statistics,
        "layers_removed": layers_removed,
        "alpha_corpora": [text],
        "alpha_splits": ["train"],
        "alpha_samples": 8,
        "alpha_seq_len": 16,
        "report_corpus": text,
        "report_windows": 8,
        "report_seq_len": 16,
        "random_seeds": [0, 1],
    }
    return run_notebook(DEPTH, place / output, **(values | changes))


def test_statistics_writes_the_scores_of_its_own_sums(statistics):
    run = results.read_run(statistics[0])
    stats = LayerStats.load(at_root(statistics[0]).with_suffix(".safetensors"))
    from prunelib.criteria import block_influence, layer_difference

    for metric, expected in (("block_influence", block_influence(stats)), ("mssd", layer_difference(stats, "mssd"))):
        written = [row["value"] for row in run["rows"] if row["metric"] == metric and row["tokens"] == "all"]
        assert written == expected.tolist()
    assert run["parameters"]["seed"] == 0
    assert set(run["provenance"]["data"]) >= {"windows"}
    assert statistics[0] != statistics[1]
    assert run["provenance"]["data"]["windows"] != results.read_run(statistics[1])["provenance"]["data"]["windows"]


def test_depth_reports_every_choice_and_the_exact_alpha_is_never_worse(place, statistics):
    from prunelib.criteria import difference_term, similarity_term

    run = results.read_run(depth(place, "k2.json", statistics, 2))
    choices = [row for row in run["rows"] if row["role"] == "choice"]
    assert {row["method"] for row in choices} == {
        "block_influence", "relative_magnitude", "deepest", "random", "simdiff_mssd", "simdiff_masd"
    }  # fmt: skip
    assert all(len(row["removed_layers"].split()) == 2 for row in choices)
    pairs = 0
    for exact in choices:
        if exact.get("search") == "exact" and exact["metric"] == "nats":
            keys = ("method", "calibration_seed", "alpha_corpus", "metric")
            ternary = next(r for r in choices if r.get("search") == "ternary" and all(r[k] == exact[k] for k in keys))
            assert exact["alpha_nats"] <= ternary["alpha_nats"]
            pairs += 1
    assert pairs == 4
    stats = LayerStats.load(at_root(statistics[0]).with_suffix(".safetensors"))
    sets = [i.removed for i in alpha_path(similarity_term(stats), difference_term(stats, "masd"), 2)]
    written = [
        row["removed_layers"]
        for row in run["rows"]
        if row["role"] == "path" and row["method"] == "simdiff_masd" and row["calibration_seed"] == 0 and row.get("corpus")
        and row["metric"] == "nats"
    ]  # fmt: skip
    assert written == [" ".join(map(str, removed)) for removed in sets]


def test_depth_measures_a_set_as_the_saved_model_without_those_layers(place, statistics):
    import torch

    from prunelib import corpora
    from prunelib.evaluation import perplexity

    run = results.read_run(depth(place, "k3.json", statistics[:1], 3))
    row = next(row for row in run["rows"] if row.get("method") == "deepest" and row["metric"] == "nats")
    dense = models.load(place / "model")
    tokenizer = models.load_tokenizer(place / "model")
    windows = corpora.consecutive_windows(corpora.load(place / "text.txt"), tokenizer, 16, 8)
    pruned = models.remove_layers(dense, [int(layer) for layer in row["removed_layers"].split()])
    models.save(pruned, tokenizer, place / "pruned")
    measured = perplexity(models.load(place / "pruned", dtype=torch.float32), windows).nats
    assert row["value"] == pytest.approx(measured, abs=1e-6)


def test_removing_every_layer_is_one_clear_error_and_leaves_no_result(place, statistics):
    with pytest.raises(NotebookError, match="cannot remove 6 of 6 layers"):
        depth(place, "k6.json", statistics, 6)
    assert not (place / "k6.json").exists()


def test_statistics_of_another_model_are_refused(place, statistics):
    other = json.loads(at_root(statistics[0]).read_text())
    other["parameters"]["model"] = "another/model"
    wrong = place / "wrong.json"
    wrong.write_text(json.dumps(other))
    (place / "wrong.safetensors").write_bytes(at_root(statistics[0]).with_suffix(".safetensors").read_bytes())
    with pytest.raises(NotebookError, match="holds statistics of another/model"):
        depth(place, "k1.json", [str(wrong)], 1)


def test_protected_layers_stay_whatever_the_method(place, statistics):
    run = results.read_run(depth(place, "protected.json", statistics, 2, protect_first=1, protect_last=2))
    removed = {int(layer) for row in run["rows"] for layer in row.get("removed_layers", "").split()}
    assert removed <= {1, 2, 3}
    assert removed

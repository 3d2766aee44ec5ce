"""The model card: from the run and from nothing else."""

import re
import shlex
from dataclasses import asdict

import huggingface_hub
import pytest

from prunelib.apps import model_card
from prunelib.healing.recipes import RECIPES
from prunelib.io import at_root
from prunelib.lab.run_notebook import check


def losses(state, nats, ppl):
    at = {"state": state, "text": "pydocs:evaluation", "n": 100}
    return [{**at, "metric": "nll", "value": nats}, {**at, "metric": "ppl", "value": ppl}]


def gap(state, value):
    at = {"state": state, "text": "pydocs:evaluation", "n": 100, "metric": "nats_over_dense"}
    return {**at, "value": value, "low": value - 0.01, "high": value + 0.02, "level": 0.95}


@pytest.fixture
def run():
    """A run as the notebook writes it, of a model of the hub."""
    healing = {"recipe": asdict(RECIPES["lora"]), "tokens": 262144, "trainable": 12345, "seconds": 61.0}
    about = {"hub": "owner/base", "license": {"license": "llama2"}, "n_layers": 32, "removed": [20, 21, 25]}
    about |= {"removed_fraction": 0.0871, "parameters": {"dense": 1000000, "final": 912900}, "reload_difference": 0.0}
    about |= {"method_source": "SLEB, arXiv 2402.09025", "healing": healing}
    parameters = {"model": "owner/base", "keep": 0.9, "keep_of": "layers", "method": "greedy", "repair": "none"}
    parameters |= {"calibration": "pydocs:calibration", "n_samples": 8, "seq_len": 256, "healing_text": "pydocs:train"}
    parameters |= {"report_texts": ["pydocs:evaluation"], "report_seq_len": 256, "dtype": "bfloat16", "push_to": None}
    parameters |= {"data_dir": "/home/somebody/texts", "folder": "build/small"}
    return {
        "experiment": "own_model",
        "parameters": parameters,
        "rows": [
            *losses("dense", 2.0, 7.389),
            *(*losses("pruned", 2.5, 12.182), gap("pruned", 0.5)),
            *(*losses("healed", 2.1, 8.166), gap("healed", 0.1)),
        ],
        "provenance": {
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "source_sha256": "f" * 64,
            "libraries": {"torch": "2.13.0", "peft": None},
            "device": "cuda (NVIDIA H200)",
            "cpu": "a processor",
            "data": {"training": "e" * 64},
        },
        "seconds": 200.0,
        "peak_bytes": 2**31,
        "extra": {"card": about},
    }


def test_the_front_matter_is_what_the_hub_reads_and_what_is_not_known_is_not_invented(run):
    data = huggingface_hub.ModelCard(model_card.card(run)).data
    assert (data.base_model, data.license, data.library_name) == ("owner/base", "llama2", "transformers")
    assert data.tags == ["prunelib", "pruned", "depth-pruning", "healed"]
    run["extra"]["card"] |= {"hub": None, "license": {}, "healing": None}
    text = model_card.card(run)
    data = huggingface_hub.ModelCard(text).data
    assert data.license is data.base_model is None
    assert "healed" not in data.tags
    assert "It was not: the remaining weights are those of the base model." in text
    assert "peft" not in text, "what was not installed is not named"


def test_a_packaged_model_is_no_name_of_the_hub_and_has_the_license_of_its_package(run):
    name = "smollm2-135m-instruct"
    found = model_card.base(name)
    assert found == {"hub": None, "license": {"license": "apache-2.0"}}
    assert model_card.base(name, "owner/original")["hub"] == "owner/original"
    assert model_card.base("gemma-3-270m")["license"] == {"license": "other", "license_name": "Gemma terms of use"}
    assert model_card.base("somewhere/model.gguf") == {"hub": None, "license": {}}
    run["extra"]["card"] |= found
    run["parameters"]["model"] = name
    assert "\nSmolLM2-135M-Instruct (30 layers, 135M, 4-bit weights dequantized) without 3 of its" in model_card.card(run)


def test_numbers_are_those_of_the_rows_with_their_intervals(run):
    text = model_card.card(run)
    for line in (
        "| pydocs:evaluation | pruned | 2.5000 | 12.18 | 1.649 [1.632, 1.682] | 100 |",
        "| pydocs:evaluation | pruned and healed | 2.1000 | 8.17 | 1.105 [1.094, 1.127] | 100 |",
        "| pydocs:evaluation | before | 2.0000 | 7.39 | 1 | 100 |",
        "without 3 of its 32 decoder layers (8.7 % of its parameters)",
        "| layers removed (0-based) | 20 21 25 |",
        "1,000,000 before, 912,900 now",
        "The license is that of the base model (llama2).",
    ):
        assert line in text
    run["rows"] = [row for row in run["rows"] if (row["state"], row["metric"]) != ("pruned", "ppl")]
    assert "| pruned | 2.5000 | too large | 1.649" in model_card.card(run)


def test_tasks_stand_beside_chance(run):
    at = {"task": "pydocs_summary", "n": 50}
    run["rows"] += [
        {"state": "dense", **at, "metric": "acc", "value": 0.6, "stderr": 0.07},
        {"state": "dense", **at, "metric": "chance", "value": 0.25},
        {"state": "healed", **at, "metric": "acc", "value": 0.5, "stderr": 0.07},
        {"state": "healed", **at, "metric": "acc_over_dense", "value": -0.1, "low": -0.2, "high": 0.01, "level": 0.95},
    ]
    expected = "| pydocs_summary | acc | 0.600 ± 0.070 | 0.500 ± 0.070 | -0.100 [-0.200, 0.010] | 0.250 | 50 |"
    assert expected in model_card.card(run)


def test_the_command_in_the_card_is_one_that_the_notebook_takes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "tasks"):
        (tmp_path / folder).mkdir()
    text = model_card.card(run)
    command = re.search(r"python -m prunelib\.lab\.run_notebook (\S+) OUTPUT\.json \\\n    (.*)\n", text)
    words = dict(word.split("=", 1) for word in shlex.split(command[2]))
    assert check(at_root(command[1]), words)["keep"] == 0.9
    assert words["data_dir"] == "texts", "no folder of a machine in a card that is published"
    assert "/home" not in text


def test_the_license_is_that_of_the_base_models_own_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\nlanguage: en\n---\ntext")
    assert model_card.license_of(str(tmp_path)) == {"license": "other", "license_name": "x", "license_link": "LICENSE"}
    assert model_card.license_of("data/reference/ref-llama-32l") == {"license": "mit"}
    for text in ("no front matter", "---\nlicense: [1, 2]\n---\n", "---\n: : :\n---\n", "---\n- a\n---\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert model_card.license_of(str(tmp_path)) == {}


def test_a_run_of_another_kind_has_no_card():
    with pytest.raises(ValueError, match="a run of 'selection' made no model that a card could describe"):
        model_card.card({"experiment": "selection", "extra": {}})

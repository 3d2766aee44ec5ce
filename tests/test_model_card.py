"""The model card: from the run and from nothing else."""

import copy
import re
from dataclasses import asdict

import pytest

from prunelib.apps import model_card
from prunelib.healing.recipes import RECIPES
from prunelib.io import at_root
from prunelib.lab import run_notebook as notebook
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import check


def gap(state, other, value, text="pydocs:evaluation"):
    interval = {"low": value - 0.01, "high": value + 0.02, "level": 0.95}
    return {"state": state, "text": text, "n": 100, "metric": f"nats_over_{other}", "value": value, **interval}


def losses(state, nats, ppl, text="pydocs:evaluation"):
    at = {"state": state, "text": text, "n": 100}
    return [{**at, "metric": "nll", "value": nats}, {**at, "metric": "ppl", "value": ppl}]


@pytest.fixture
def run(tmp_path):
    """A run file as the notebook writes it, of a model of the hub."""
    healing = {
        "recipe": asdict(RECIPES["lora"]),
        "text": "pydocs:train",
        "tokens": 262144,
        "trainable": 12345,
        "seconds": 61.0,
        "device": "cuda (NVIDIA H200)",
    }
    about = {
        "name": "someone/small",
        "base": {"hub": "owner/base", "label": "base", "revision": "abc123", "licence": {"license": "llama2"}},
        "n_layers": 32,
        "removed": [20, 21, 25],
        "removed_fraction": 0.0871,
        "parameters": {"dense": 1000000, "final": 912900},
        "asked": "90% of the layers to stay",
        "method": "greedy",
        "method_source": "SLEB, arXiv 2402.09025",
        "calibration": "pydocs:calibration, 8 windows of 256 tokens",
        "repair": None,
        "healing": healing,
        "protocol": {"window": 256},
        "dtype": "bfloat16",
        "reload_difference": 0.0,
    }
    rows = [*losses("dense", 2.0, 7.389), *losses("pruned", 2.5, 12.182), *losses("healed", 2.1, 8.166)]
    rows += [gap("pruned", "dense", 0.5), gap("healed", "dense", 0.1), gap("healed", "pruned", -0.4)]
    parameters = {"model": "owner/base", "revision": "abc123", "keep": 0.9, "report_texts": ["pydocs:evaluation"]}
    parameters |= {"data_dir": "/home/somebody/texts", "folder": "build/small", "healing_text": "pydocs:train"}
    results.write_run(
        tmp_path / "run.json",
        experiment="own_model",
        parameters=parameters,
        rows=rows,
        provenance={
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "source_sha256": "f" * 64,
            "libraries": {"torch": "2.13.0", "peft": None},
            "device": "cuda (NVIDIA H200)",
            "cpu": "a processor",
            "data": {"training": "e" * 64},
        },
        seconds=200.0,
        peak_bytes=2**31,
        extra={"card": about},
    )
    return results.read_run(tmp_path / "run.json")


def changed(run, **about):
    other = copy.deepcopy(run)
    other["extra"]["card"] |= about
    return other


def test_the_front_matter_is_what_the_hub_reads(run):
    head = model_card.front_matter(model_card.card(run))
    assert head == {
        "license": "llama2",
        "base_model": "owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prunelib", "pruned", "depth-pruning", "healed"],
    }
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data = huggingface_hub.ModelCard(model_card.card(run)).data
    assert (data.base_model, data.license, data.library_name) == ("owner/base", "llama2", "transformers")


def test_what_is_not_known_is_not_invented(run):
    base = {"hub": None, "label": "mine", "revision": None, "licence": {}}
    text = model_card.card(changed(run, base=base, healing=None))
    head = model_card.front_matter(text)
    assert not {"license", "base_model"} & set(head)
    assert "healed" not in head["tags"]
    assert "The run found no licence in the base model's card" in text
    assert "It was not: the remaining weights are those of the base model." in text
    assert "No task was run" in text
    known = model_card.card(changed(run, base=base | {"licence": {"license": "other", "license_name": "community"}}))
    assert model_card.front_matter(known)["license_name"] == "community"
    assert "The licence is that of the base model (community)." in known


def test_numbers_are_those_of_the_rows_with_their_intervals(run):
    text = model_card.card(run)
    assert "| pydocs:evaluation | pruned | 2.5000 | 12.18 | 1.649 [1.632, 1.682] |" in text
    assert "| pydocs:evaluation | pruned and healed | 2.1000 | 8.17 | 1.105 [1.094, 1.127] |" in text
    assert "| pydocs:evaluation | before | 2.0000 | 7.39 | 1 |" in text
    assert "without 3 of its 32 decoder layers (8.7% of its parameters)" in text
    assert "| layers removed (0-based) | 20 21 25 |" in text
    assert "1,000,000 before, 912,900 now" in text
    assert "commit `0123456789ab`" in text
    assert "2.0 GiB" in text
    assert "peft" not in text, "what was not installed is not named"
    ruined = copy.deepcopy(run)
    ruined["rows"] = [row for row in run["rows"] if (row["state"], row["metric"]) != ("pruned", "ppl")]
    assert "| pruned | 2.5000 | beyond numbers | 1.649" in model_card.card(ruined)


def test_tasks_stand_beside_chance(run):
    at = {"task": "pydocs_summary", "n": 50}
    run["rows"] += [
        {"state": "dense", **at, "metric": "acc", "value": 0.6, "stderr": 0.07},
        {"state": "dense", **at, "metric": "chance", "value": 0.25},
        {"state": "healed", **at, "metric": "acc", "value": 0.5, "stderr": 0.07},
        {"state": "healed", **at, "metric": "acc_over_dense", "value": -0.1, "low": -0.2, "high": 0.01, "level": 0.95},
    ]
    text = model_card.card(run)
    expected = "| pydocs_summary | acc | 0.600 ± 0.070 | 0.500 ± 0.070 | -0.100 [-0.200, 0.010] | 0.250 | 50 |"
    assert expected in text
    assert "No task was run" not in text


def test_the_command_in_the_card_is_one_that_the_notebook_takes(run):
    text = model_card.card(run)
    command = re.search(r"python -m prunelib\.notebook (\S+) OUTPUT\.json \\\n    (.*)\n", text)
    import shlex

    words = dict(word.split("=", 1) for word in shlex.split(command[2]))
    assert check(at_root(command[1]), words, text=True)["keep"] == 0.9
    assert words["data_dir"] == "texts", "no folder of a machine in a card that is published"
    assert "/home" not in text
    assert {"model", "keep", "report_texts"} <= words.keys() <= notebook.parameters(at_root(command[1])).keys()


def test_the_licence_is_that_of_the_base_models_own_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\nlanguage: en\n---\ntext")
    assert model_card.licence_of(str(tmp_path)) == {"license": "other", "license_name": "x", "license_link": "LICENSE"}
    assert model_card.licence_of("data/reference/ref-llama-32l") == {"license": "mit"}
    for text in ("no front matter", "---\nlicense: [1, 2]\n---\n", "---\n: : :\n---\n", "---\n- a\n---\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert model_card.licence_of(str(tmp_path)) == {}
    (tmp_path / "README.md").unlink()
    assert model_card.licence_of(str(tmp_path)) == {}
    huggingface_hub = pytest.importorskip("huggingface_hub")
    fetched = tmp_path / "fetched.md"
    fetched.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: fetched)
    assert model_card.licence_of("owner/base", "abc") == {"license": "mit"}


def test_a_run_of_another_kind_has_no_card(tmp_path, run, capsys):
    with pytest.raises(model_card.CardError, match="a run of 'depth' made no model that a card could describe"):
        model_card.card({"experiment": "depth", "extra": {}})
    assert model_card.main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == model_card.card(run)
    assert model_card.main([str(tmp_path / "missing.json")]) == 1
    assert model_card.main([]) == 2

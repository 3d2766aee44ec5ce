"""A sliced model is a model like any other: saved, loaded, generated with, trained."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import build
from model_helpers import CUT, SLICED_FAMILIES, logits, sliced
from transformers import AutoModelForCausalLM

from prunelib import models
from prunelib.models import UnsupportedModel
from prunelib.slicing.modeling import positions, shortcut_kinds

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (5, 24))


def test_shortcuts_vanish_where_they_can():
    size = 8
    places = positions((6, 5, 4), 2, size)
    assert places == [6, 6, 5, 5, 4, 4, 8]
    assert shortcut_kinds(places, size) == ["diagonal", "dense", "diagonal", "dense", "diagonal", "identity"]
    assert shortcut_kinds(places, size, shortcuts="full") == ["dense"] * 6
    assert shortcut_kinds([8, 8, 8], size) == ["identity"] * 2
    # Layer 0 spared: its places take over the basis of layer 1, from which layer 1 keeps the first directions.
    assert shortcut_kinds([8, 8, 5, 5, 5, 5, 8], size) == ["identity"] * 2 + ["diagonal", "dense", "diagonal", "identity"]
    # Spared in the middle: into it for nothing, out of it at the price of one matrix.
    assert shortcut_kinds([5, 5, 8, 8, 5, 5, 8], size) == ["diagonal", *["identity"] * 2, "dense", "diagonal", "identity"]
    assert shortcut_kinds([5, 8, 5, 8], size) == ["identity", "dense", "identity"]


@pytest.mark.parametrize("name", SLICED_FAMILIES)
def test_saved_loaded_and_generated_with(name, tokens, tmp_path):
    model = sliced(build(name), CUT, tokens)
    models.save(model, None, tmp_path / "sliced")  # proves the reload: keys, weights, logits
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert again.config.slicing["widths"] == list(CUT.widths)
    assert models.load(tmp_path / "sliced", dtype="bfloat16").dtype is torch.bfloat16
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(tokens[:2])
    options["attention_mask"][1, :5] = 0  # padded on the left
    with_cache, without = (again.generate(tokens[:2], use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (2, 32)
    assert torch.equal(with_cache, without)


def test_hidden_states_can_be_asked_for(tiny_llama, tokens):
    states = sliced(tiny_llama, CUT, tokens)(input_ids=tokens, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [*CUT.widths, 32]


@pytest.mark.slow
def test_one_import_is_enough_to_load(tiny_llama, tokens, tmp_path):
    sliced(tiny_llama, CUT, tokens).save_pretrained(tmp_path)
    load = "import sys, prunelib, transformers\nprint(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", load, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "SlicedLlamaForCausalLM" in done.stdout, done.stderr


def test_damaged_configurations_are_named(tiny_llama, tokens, tmp_path):
    sliced(tiny_llama, CUT, tokens).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"family": "llama"', '"family": "gpt17"'))
    with pytest.raises(UnsupportedModel, match="names no family that can be sliced, but 'gpt17'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    path.write_text(text.replace('"num_hidden_layers": 6', '"num_hidden_layers": 5'))
    with pytest.raises(ValueError, match="slicing of this configuration is that of 6 layers, the model has 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

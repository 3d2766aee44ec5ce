"""Checkpoints: complete or absent, equal after a reload, and damaged ones refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelib import models
from prunelib.models import CheckpointError, load, remove_layers, save


def test_save_does_not_overwrite_unless_told(tiny_llama, tmp_path):
    save(tiny_llama, None, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    pruned = remove_layers(tiny_llama, (0,))
    with pytest.raises(ValueError, match="not empty"):
        save(pruned, None, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    save(pruned, None, tmp_path / "model", overwrite=True)
    model = load(tmp_path / "model", dtype="bfloat16")
    assert (model.config.num_hidden_layers, model.training, model.dtype) == (5, False, torch.bfloat16)
    assert not (tmp_path / "model" / "notes.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(tiny_llama, tmp_path, monkeypatch, existing):
    if existing:
        save(tiny_llama, None, tmp_path / "model")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.saving, "_check_reload", fail)
    with pytest.raises(KeyboardInterrupt):
        save(remove_layers(tiny_llama, (0,)), None, tmp_path / "model", overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if existing:
        assert load(tmp_path / "model").config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.model.layers.pop(5), r"9 missing \(model.layers.5"),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "other logits"),  # the norms in memory keep the old value
        (lambda model: model.lm_head.weight.data[0, 0].fill_(float("nan")), r"'lm_head.weight'.*\(or is not finite\)"),
        (lambda model: model.model.norm.weight.data.fill_(3e38), "logits that are not finite"),
    ],
)
def test_a_model_that_would_not_load_as_it_is_is_not_saved(tiny_llama, tmp_path, spoil, message):
    spoil(tiny_llama)
    with pytest.raises(CheckpointError, match=message):
        save(tiny_llama, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tiny_llama, tmp_path) -> Path:
    save(tiny_llama, None, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (truncate, r"model\.safetensors' is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights are not read"),
        (lose_a_shard, r"model-00002-of-00002\.safetensors' is missing"),
        (lambda folder: edit_weights(folder, lambda old: old["lm_head.weight"][2].fill_(float("inf"))), "holds 32 NaN or"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: edit_config(folder, model_type="llamma"), "llamma"),
        (lambda folder: edit_config(folder, num_hidden_layers=7), r"9 missing \(model\.layers\.6"),
        (lambda folder: edit_config(folder, num_hidden_layers=5), r"9 unexpected \(model\.layers\.5"),
        (lambda folder: edit_config(folder, intermediate_size=65), r"18 of another shape \(.*down_proj"),
        (lambda folder: edit_weights(folder, lambda weights: weights.pop("model.norm.weight")), "1 missing.*norm"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"dtype": "auto"}, {"device": "quantum"}, {"revision": "v2"}])
def test_bad_arguments_of_load(saved, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} {value!r}"):
        load(saved, **arguments)

"""Slicing from file to file gives the checkpoint that slicing in memory gives."""

import json

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM

from prunelib import models
from prunelib.models import CheckpointError
from prunelib.scale.shards import Shards, slice_checkpoint
from prunelib.slicing.rotate import slice_model
from prunelib.slicing.schedules import constant


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "gpt_neox", "gemma"])
@pytest.mark.parametrize("shortcuts", ["absorbed", "dense"])
def test_the_sliced_checkpoint_is_that_of_the_model_in_memory(name, shortcuts, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    dense, windows = models.load(tmp_path / "dense"), torch.randint(3, 97, (6, 16))
    plan = constant(6, 32, 0.25)
    expected = slice_model(dense, plan, windows, shortcuts=shortcuts, progress=False)
    models.save(expected, None, tmp_path / "expected")
    options = {"shortcuts": shortcuts, "progress": False, "shard_bytes": 20_000}
    slice_checkpoint(tmp_path / "dense", tmp_path / "found", plan, windows, dtype="float32", **options)
    assert len(list((tmp_path / "found").glob("model-*.safetensors"))) > 2
    assert not list((tmp_path / "found").glob("part-*"))
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "found", dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = found.state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(weights[key], tensor), key
    with torch.no_grad():
        torch.testing.assert_close(found(windows).logits, expected(windows).logits)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("expected", "found")]
    assert configs[0] == configs[1]


def test_a_target_that_is_there_and_a_failure_leave_nothing(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    windows, plan = torch.randint(3, 97, (6, 16)), constant(6, 32, 0.25)
    with pytest.raises(ValueError, match="is there and not empty"):
        slice_checkpoint(tmp_path / "dense", tmp_path / "dense", plan, windows, dtype="float32")
    with pytest.raises(ValueError, match="the plan has the widths of 5 layers"):
        slice_checkpoint(tmp_path / "dense", tmp_path / "new", constant(5, 32, 0.25), windows, dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_shards_hold_what_they_were_given(tmp_path):
    shards = Shards(tmp_path, shard_bytes=100)
    given = {name: torch.randn(size) for name, size in (("a", 3), ("b", 40), ("c", 5))}
    for name, tensor in given.items():
        shards[name] = tensor
    assert len(shards.files) == 1
    shards.finish()
    assert all(torch.equal(shards[name], tensor) for name, tensor in given.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(given)
    assert index["metadata"]["total_size"] == 4 * 48
    with pytest.raises(CheckpointError, match="'d' is not finite"):
        shards["d"] = torch.tensor([float("nan")])

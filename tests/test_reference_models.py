"""The reference models are what their cards and logs say, down to the loss."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pretrain_reference as pretraining
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from prunelib import models
from prunelib.io import file_sha256
from prunelib.text import corpora

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDER = DATA / "reference"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
MEGABYTES = 34
# Mean loss on the first 8 of the 256 held-out windows, in float32 on a CPU. On all 256 (minutes) the same computation gives
# 1.94357 and 2.05204 where the logs, in bfloat16 on the GPU, say 1.94388 and 2.05252.
SAMPLE = 8
SAMPLE_LOSS = {"ref-llama-32l": 1.612395, "ref-neox-24l": 1.748533}

every_model = pytest.mark.parametrize("name", NAMES)


def read(name: str, file: str) -> dict:
    return json.loads((FOLDER / name / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    """Token ids of the evaluation split of pydocs, as the training measured its loss on."""
    tokenizer = models.load_tokenizer(FOLDER / NAMES[0])
    documents = list(corpora.load("pydocs", "evaluation").documents)
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16) for encoding in encodings])


def test_two_families_within_the_size_limit():
    assert set(NAMES) == set(pretraining.REFERENCES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MEGABYTES * 1e6
    assert len({file_sha256(FOLDER / name / "tokenizer.json") for name in NAMES}) == 1, "one tokenizer"


@every_model
def test_weights_are_finite_bfloat16_and_as_many_as_logged(name):
    count = 0
    with safe_open(FOLDER / name / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.bfloat16, key
            assert torch.isfinite(tensor.float()).all(), key
            assert tensor.float().std() > 0 or tensor.ndim == 1, f"{key} was never trained"
            count += tensor.numel()
    assert count == read(name, "training.json")["parameters"]


@every_model
def test_log_agrees_with_the_definition_and_the_config(name):
    log, config = read(name, "training.json"), read(name, "config.json")
    reference = pretraining.REFERENCES[name]
    seen = log["reference"].pop("tokens_seen")
    assert log["reference"].items() <= (dataclasses.asdict(reference) | {"steps": reference.steps}).items()
    assert reference.config.items() <= config.items()
    assert log["window"] == pretraining.WINDOW == config["max_position_embeddings"]
    assert 300e6 <= seen == reference.steps * reference.batch * pretraining.WINDOW <= 500e6
    steps = [entry["step"] for entry in log["log"] if "loss" in entry]
    assert steps == list(range(50, reference.steps + 1, 50)), "an interrupted training went on where it was"


@every_model
def test_card_and_picture_are_those_its_files_give(name, tmp_path):
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert card == pretraining.card(FOLDER / name), f"python scripts/pretrain_reference.py card {name}"
    (tmp_path / "training.json").write_bytes((FOLDER / name / "training.json").read_bytes())
    drawn, committed = (
        np.asarray(Image.open(path).convert("L"), dtype=float)
        for path in (pretraining.draw_losses(tmp_path), FOLDER / name / "loss_curve.png")
    )
    assert (abs(drawn - committed) > 64).mean() < 0.01, "a few pixels differ between versions of the libraries"


@pytest.mark.slow
def test_held_out_text_is_the_one_of_the_training(held_out):
    """The evaluation split, which chapters report on, was not trained on: other split, and its hash is in the log."""
    for name in NAMES:
        log = read(name, "training.json")
        assert len(held_out) == log["tokens"]["pydocs_held_out"]
        digest = hashlib.sha256(held_out.tobytes()).hexdigest()
        assert digest == log["provenance"]["data"]["pydocs_held_out"] != log["provenance"]["data"]["pydocs"]


@pytest.mark.slow
@every_model
def test_loss_is_the_recorded_one(name, held_out):
    """On some of the windows that the log is about: exactly what it was, and consistent with the recorded mean."""
    recorded = read(name, "training.json")["held_out_nats_per_token"]["pydocs"]
    windows = pretraining.Windows([held_out], [1.0], pretraining.REFERENCES[name].held_out_windows, 1)
    model = models.load(FOLDER / name)
    ids = torch.stack([windows[index]["input_ids"] for index in range(SAMPLE)])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).double()
    error = losses.std().item() / math.sqrt(SAMPLE)
    assert losses.mean().item() == pytest.approx(SAMPLE_LOSS[name], abs=1e-3)
    assert abs(losses.mean().item() - recorded) < 3 * error

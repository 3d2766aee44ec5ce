"""Statistics shared by processes, and of a model spread over places: the sums of one process and one place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import assert_close
from transformers import AutoModelForCausalLM
from word_model import drawn_words, write_project

from prunelib import models
from prunelib.criteria import statistics
from prunelib.criteria.statistics import LayerStats
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import check
from prunelib.scale import distributed as parallel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "notebooks/experiments/statistics.ipynb"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("parallel"), n_layers=4, words=drawn_words(60))


def command(place, output, **changes):
    """The statistics notebook on 5 windows in batches of 2, so 3 batches, the last of one window."""
    text = {"model": str(place / "model"), "corpus": str(place / "text.txt")}
    values = text | {"n_samples": 5, "seq_len": 16, "batch_size": 2} | changes
    check(ROOT / NOTEBOOK, values)
    return ["-m", "prunelib.lab.run_notebook", NOTEBOOK, str(output), *(f"{name}={value}" for name, value in values.items())]


def launch(arguments, processes):
    """What `accelerate launch` runs too; it starts several processes on GPUs alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, *launcher, *arguments]
    return subprocess.run(whole, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_sums_of_one_to_the_last_bit_and_one_result(place, tmp_path):
    one, two = tmp_path / "one" / "s0.json", tmp_path / "two" / "s0.json"
    for output, processes in ((one, 1), (two, 2)):
        done = launch(command(place, output), processes)
        assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in two.parent.iterdir()) == ["s0.ipynb", "s0.json", "s0.safetensors"]
    assert two.with_suffix(".safetensors").read_bytes() == one.with_suffix(".safetensors").read_bytes()
    runs = [results.read_run(path) for path in (one, two)]
    assert runs[0]["rows"] == runs[1]["rows"]
    assert runs[0]["parameters"] == runs[1]["parameters"]
    assert LayerStats.load(two.with_suffix(".safetensors")).count[0] == 5 * 16


@pytest.fixture
def as_process(monkeypatch):
    """Stands for one of two processes: `gather_object` gives what both would."""

    def pretend(index, others):
        class State:
            def __init__(self, cpu):
                assert cpu
                self.process_index, self.device = index, torch.device("cpu")

        def gather_object(mine):
            return [*others.pop(0), *mine] if index else [*mine, *others.pop(0)]

        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("accelerate.PartialState", State)
        monkeypatch.setattr("accelerate.utils.gather_object", gather_object)

    return pretend


def test_what_cannot_be_shared_is_refused(as_process, tiny_llama):
    windows = torch.randint(3, 97, (5, 8))
    as_process(1, [["of other windows"]])
    with pytest.raises(ValueError, match=r"5 windows make 1 batches of 8, too few for 2 processes: take batch_size=2 or"):
        parallel.collect(tiny_llama, windows, batch_size=8, progress=False)
    with pytest.raises(RuntimeError, match="calibrate on different windows"):
        parallel.collect(tiny_llama, windows, batch_size=2, progress=False)
    with torch.no_grad():
        tiny_llama.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    as_process(1, [[parallel.windows_sha256(windows)]])
    with pytest.raises(RuntimeError, match=r"output of layer 3, batch 1 \(samples 2 to 3\)"):
        parallel.collect(tiny_llama, windows, batch_size=2, progress=False)


@pytest.mark.parametrize(
    "places",
    [
        ("cpu", "disk"),
        pytest.param((0, 1), marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
    ids=["memory_and_disk", "two_gpus"],
)
def test_a_spread_model_gives_the_same_sums(places, place, tmp_path):
    """What `device_map` does, by hooks: each layer's input comes to where the layer is."""
    windows = torch.randint(1, 60, (4, 16))
    whole = models.load(place / "model", device=places[0])
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), places[0])
    device_map |= {f"model.layers.{index}": places[index % 2] for index in range(4)}
    spread = AutoModelForCausalLM.from_pretrained(
        place / "model", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert set(spread.hf_device_map.values()) == set(places)
    expected, found = (statistics.collect(model, windows, progress=False) for model in (whole, spread))
    assert_close(found, expected, rtol=1e-6 if places[0] == 0 else 0)

"""An offloaded model gives the numbers of the resident one; what does not fit is refused before any work."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from architectures import ARCHITECTURES, build
from model_helpers import assert_close as assert_same
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib import evaluation, models
from prunelib.criteria import statistics
from prunelib.models import CheckpointError, UnsupportedModel, keep_layers
from prunelib.scale import offload
from prunelib.scale.offload import DoesNotFit, OffloadedModel

# Experts that a file holds one by one, and the model in one tensor.
CONVERTED = {"mixtral", "qwen3_moe_mlp_only", "qwen3_moe_step_2", "qwen3_next", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - CONVERTED))
def test_every_architecture_gives_the_same_bits(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    resident = models.load(tmp_path)
    windows = torch.randint(3, 97, (5, 12))
    offloaded = OffloadedModel(tmp_path, dtype="float32")
    found = offload.collect(offloaded, windows, batch_size=2, windows_at_once=4, progress=False)
    assert_same(found, statistics.collect(resident, windows, batch_size=2, progress=False))
    likelihood = offload.perplexity(offloaded, windows, batch_size=2)
    expected = evaluation.perplexity(resident, windows, batch_size=1)
    assert likelihood.window_nll == pytest.approx(expected.window_nll, rel=1e-6)
    assert (likelihood.tokens, likelihood.correct) == (expected.tokens, expected.correct)
    assert all(tensor.is_meta for layer in offloaded.layers for tensor in layer.parameters()), "weights stayed in memory"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_weights_that_are_stored_otherwise_are_refused(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="in another form than the model has: it can only be loaded resident"):
        OffloadedModel(tmp_path, dtype="float32")


def test_groups_and_batches_do_not_matter(folder, tiny_llama):
    windows = torch.randint(3, 97, (7, 10))
    whole = statistics.collect(tiny_llama, windows, batch_size=2, progress=False)
    offloaded = OffloadedModel(folder, dtype="float32")
    for at_once in (None, 1, 4, 100):
        assert_same(offload.collect(offloaded, windows, batch_size=2, windows_at_once=at_once, progress=False), whole)
    nll = [offload.perplexity(offloaded, windows, batch_size=3, windows_at_once=at_once).nll for at_once in (None, 3, 6)]
    assert nll == [evaluation.perplexity(tiny_llama, windows, batch_size=1).nll] * 3


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_dtype_of_the_file_is_converted(stored, wanted, tiny_llama, tmp_path):
    tiny_llama.to(getattr(torch, stored)).save_pretrained(tmp_path)
    windows = torch.randint(3, 97, (4, 10))
    found = offload.collect(OffloadedModel(tmp_path, dtype=wanted), windows, progress=False)
    assert_same(found, statistics.collect(models.load(tmp_path, dtype=wanted), windows, progress=False))


def test_pruned_and_sharded_checkpoints_and_those_without_a_head(tiny_llama, tmp_path):
    windows = torch.randint(3, 97, (3, 10))
    pruned = keep_layers(tiny_llama, [0, 1, 4, 5])
    pruned.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    expected = statistics.collect(pruned, windows, progress=False)
    assert_same(offload.collect(OffloadedModel(tmp_path / "shards", dtype="float32"), windows, progress=False), expected)
    tied = build("llama_tied")
    tied.save_pretrained(tmp_path / "body")
    weights = load_file(tmp_path / "body" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "body" / "model.safetensors", metadata={"format": "pt"})
    found = offload.collect(OffloadedModel(tmp_path / "body", dtype="float32"), windows, progress=False)
    assert_same(found, statistics.collect(tied, windows, progress=False))


def test_nan_names_the_layer_and_the_batch(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    tiny_llama.save_pretrained(tmp_path)
    offloaded, windows = OffloadedModel(tmp_path, dtype="float32"), torch.randint(3, 97, (4, 8))
    with pytest.raises(RuntimeError, match=r"output of layer 3, batch 0 \(samples 0 to 1\)"):
        offload.collect(offloaded, windows, batch_size=2, progress=False)
    with pytest.raises(evaluation.NotFinite, match="window 0 is not finite"):
        offload.perplexity(offloaded, windows)


def test_bad_arguments_and_checkpoints(folder, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="works on one device, not 'auto'"):
        OffloadedModel(folder, dtype="float32", device="auto")
    with pytest.raises(CheckpointError, match="does not exist"):
        OffloadedModel(tmp_path / "absent", dtype="float32")
    offloaded, windows = OffloadedModel(folder, dtype="float32"), torch.randint(3, 97, (3, 8))
    with pytest.raises(ValueError, match="all at least 1"):
        offload.collect(offloaded, windows, windows_at_once=0, progress=False)
    with pytest.raises(ValueError, match="token ids 3 to 500"):
        offload.perplexity(offloaded, torch.tensor([[3, 500]]))

    config = json.loads((folder / "config.json").read_text())
    for change, error, message in (
        ({"num_hidden_layers": 5}, CheckpointError, r"9 unexpected \(model\.layers\.5"),
        ({"num_hidden_layers": 7}, CheckpointError, r"9 missing \(model\.layers\.6"),
        ({"intermediate_size": 65}, CheckpointError, r"has shape \(64, 32\) in .*, \(65, 32\) by its config\.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, UnsupportedModel, "is quantized"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=message):
            OffloadedModel(folder, dtype="float32")


def test_what_does_not_fit_is_refused_with_a_setting_that_does(folder):
    offloaded = OffloadedModel(folder, dtype="float32")
    offloaded.host_limit = 1 << 20
    with pytest.raises(DoesNotFit, match=r"planned peak memory: .* GiB on the host, .*: one window is too much"):
        offloaded.plan(100, 50, states=True)
    offloaded.host_limit = offloaded._peak(8, 50, 16, states=True).host
    with pytest.raises(DoesNotFit, match=r"but the host has .* GiB: batch_size=1, windows_at_once=(\d+) would fit") as caught:
        offloaded.plan(4000, 50, windows_at_once=4000, batch_size=8, states=True)
    fitting = int(str(caught.value).rpartition("windows_at_once=")[2].split()[0])
    assert fitting >= 16
    assert offloaded.plan(4000, 50, windows_at_once=fitting, batch_size=1, states=True)[0] == fitting
    with pytest.raises(DoesNotFit):
        offloaded.plan(4000, 50, windows_at_once=fitting + 1, batch_size=1, states=True)
    at_once, peak = offloaded.plan(4000, 50, batch_size=8, states=True)
    assert (at_once, peak.host <= offloaded.host_limit) == (16, True)
    offloaded.host_limit = None
    at_once, peak = offloaded.plan(4000, 50, batch_size=8, states=True)
    assert at_once > 16
    assert (peak.device, peak.host <= psutil.virtual_memory().total) == (0, True)


def configured(**sizes) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024, **sizes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_planned_peak_on_a_processor_bounds_the_measured_one(tmp_path):
    """A model of 520 MB, of which a pass may hold a third. In a process of its own: what others left behind is not measured."""
    config = configured(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in empty.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    total = sum(tensor.nbytes for tensor in weights.values())
    del weights
    script = f"""
        import json, re
        import torch
        from prunelib.scale import offload
        from prunelib.scale.offload import OffloadedModel
        torch.set_num_threads(1)
        def peak_memory():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        offloaded = OffloadedModel({str(tmp_path)!r}, dtype="bfloat16")
        started = peak_memory()
        at_once, peak = offloaded.plan(2, 64, batch_size=1, windows_at_once=1, states=True)
        try:
            offload.collect(offloaded, torch.zeros(2, 64, dtype=torch.long), batch_size=1, windows_at_once=1, progress=False)
        except RuntimeError as error:
            assert "NaN" in str(error), error
        measured = peak_memory()
        print(json.dumps([started, measured, peak.host]))
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    started, measured, plan = json.loads(done.stdout)
    assert measured < plan
    assert measured - started < total / 3


@needs_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cuda_gives_the_numbers_of_the_resident_model(dtype, tmp_path):
    """Wide enough that copies take a while: an event too few would show as another number."""
    config = configured(vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12)
    with torch.device("cuda"):
        resident = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    resident.save_pretrained(tmp_path)
    resident = models.load(tmp_path, dtype=dtype, device="cuda")
    windows = torch.randint(3, 4096, (23, 512))
    expected = statistics.collect(resident, windows, batch_size=4, progress=False)
    likelihood = evaluation.perplexity(resident, windows, batch_size=1)
    offloaded = OffloadedModel(tmp_path, dtype=dtype, device="cuda")
    tolerance = {"bfloat16": 2e-3, "float32": 1e-5}[dtype]  # the position embeddings come from the CPU here
    for at_once in (None, 4, 12):
        found = offload.collect(offloaded, windows, batch_size=4, windows_at_once=at_once, progress=False)
        assert_same(found, expected, rtol=tolerance, atol=tolerance * found.count.max())
    for at_once in (None, 8):
        nll = offload.perplexity(offloaded, windows, batch_size=4, windows_at_once=at_once).window_nll
        assert nll == pytest.approx(likelihood.window_nll, rel=tolerance)


@needs_cuda
def test_planned_peak_on_a_device_bounds_the_measured_one(tmp_path):
    config = configured(vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=6)
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    offloaded, windows = OffloadedModel(tmp_path, dtype="bfloat16", device="cuda"), torch.randint(3, 8192, (8, 1024))
    for run, kind in ((offload.collect, {"states": True}), (offload.perplexity, {})):
        _, peak = offloaded.plan(*windows.shape, batch_size=4, windows_at_once=8, **kind)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(offloaded, windows, batch_size=4, windows_at_once=8, progress=False)
        assert torch.cuda.max_memory_allocated() - before <= peak.device
    assert torch.cuda.memory_allocated() <= before + 2**20
    offloaded.device_limit = offloaded.plan(8, 1024, batch_size=2, states=True)[1].device
    with pytest.raises(DoesNotFit, match=r"but the device has .* GiB: batch_size=2 would fit"):
        offload.collect(offloaded, windows, batch_size=8, progress=False)

"""A sliced model is a model like any other: saved, loaded, generated with, trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import build
from model_helpers import CUT, SLICED_FAMILIES, logits, sliced
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from prunelib import models
from prunelib.evaluation.perplexity import perplexity
from prunelib.models import UnsupportedModel, parameter_count
from prunelib.slicing import SlicePlan
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


def test_loaded_onto_devices(tiny_llama, tokens, tmp_path):
    model = sliced(tiny_llama, CUT, tokens)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    # Some layers wait on the disk until they are needed.
    places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(6)}
    options = {"device_map": places, "offload_folder": tmp_path / "disk"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-5)


def test_ten_steps_of_lora_improve_it(tiny_llama, tokens):
    peft = pytest.importorskip("peft")
    model = sliced(tiny_llama, CUT, tokens)
    before = perplexity(model, tokens).nll
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    healed = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW((weight for weight in healed.parameters() if weight.requires_grad), lr=1e-2)
    for _ in range(10):
        healed(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = healed.merge_and_unload().eval()
    assert perplexity(merged, tokens).nll < before - 0.1


@pytest.mark.parametrize("shortcuts", ["folded", "full"])
def test_quantized_to_four_bits(shortcuts, tmp_path):
    """NF4 on a CPU, whose fast kernels take widths that are multiples of 64."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, initializer_range=0.08)
    tokens = torch.randint(0, 97, (16, 24))
    model = sliced(LlamaForCausalLM(config).eval(), SlicePlan(256, (192, 128, 64), "test"), tokens, shortcuts=shortcuts)
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    options = {"quantization_config": quantization, "device_map": "cpu", "dtype": torch.float32}

    def distance(a, b):
        return float((logits(a, tokens) - logits(b, tokens)).norm() / logits(b, tokens).norm())

    small, wide = (AutoModelForCausalLM.from_pretrained(tmp_path, **options) for _ in range(2))
    wide = wide.dequantize()
    maps = {path for path, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - maps == {"lm_head"}
    assert any("shortcuts" in path for path in maps)
    assert distance(small, wide) < 0.03  # the kernels compute in bfloat16
    assert 0.05 < distance(wide, model) < 0.5  # what NF4 costs random weights


def test_activations_can_be_computed_again_in_training(tiny_llama, tokens):
    model = sliced(tiny_llama, CUT, tokens).train()
    gradients = []
    for again in (False, True):
        for layer in models.decoder_layers(model):
            layer.gradient_checkpointing = again
            layer._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*gradients, atol=1e-7)
    assert float(gradients[0].abs().max()) > 0


def test_hidden_states_can_be_asked_for(tiny_llama, tokens):
    states = sliced(tiny_llama, CUT, tokens)(input_ids=tokens, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [*CUT.widths, 32]


def run_python(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first_lines",
    [
        "import prunelib\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport prunelib",
        "import prunelib\nimport transformers.models.llama.modeling_llama\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["before", "after", "before_the_family"],
)
def test_one_import_is_enough_to_load(first_lines, tiny_llama, tokens, tmp_path):
    model = sliced(tiny_llama, CUT, tokens)
    model.save_pretrained(tmp_path)
    code = (
        f"{first_lines}\nimport sys, torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters()))\n"
        "assert not any('prunelib' in getattr(finder, '__module__', '') for finder in sys.meta_path)\n"
    )
    done = run_python(code)
    assert done.stdout.split() == ["SlicedLlamaForCausalLM", str(parameter_count(model))], done.stderr


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

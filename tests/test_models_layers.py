"""Layer surgery on tiny random models of many families: what is kept computes, caches, saves and reloads as it should."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, SMALL, WINDOWED, build, build_type
from model_helpers import logits, random_windows
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config

from prunelib import models
from prunelib.models import UnsupportedModel, keep_layers, load, remove_layers, save

SCATTERED = (0, 1, 4)


@torch.no_grad()
def logits_with_identities(model, ids, removed):
    """Logits of `model` when hooks turn the layers `removed` into identities: no code of prunelib but the layer list."""

    def hand_on(module, args, kwargs, output):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    layers = models.decoder_layers(model)
    handles = [layers[index].register_forward_hook(hand_on, with_kwargs=True) for index in removed]
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def greedy(model, ids, use_cache):
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), use_cache=use_cache, **how)
    return out.sequences, torch.stack(out.logits)


def state(model):
    """All that keep_layers must leave alone."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "tensors": {name: (tensor.data_ptr(), tensor.sum().item()) for name, tensor in model.state_dict().items()},
        "indices": {name: getattr(module, "layer_idx", None) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("which", ["scattered", "first_removed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pruned_model_computes_caches_saves_and_reloads(name, which, tmp_path):
    model = build(name)
    ids, before = random_windows(2), state(model)
    dense = logits(model, ids)
    kept = SCATTERED if which == "scattered" else range(1, len(models.decoder_layers(model)))
    removed = [index for index in range(len(models.decoder_layers(model))) if index not in kept]

    pruned = keep_layers(model, kept)
    expected = logits(pruned, ids)
    assert (expected - dense).abs().max() > 1e-3  # the layers that went did something
    assert torch.equal(expected, logits_with_identities(model, ids, removed))

    # With and without the key-value cache.
    cached, cached_logits = greedy(pruned, ids, use_cache=True)
    plain, plain_logits = greedy(pruned, ids, use_cache=False)
    assert torch.equal(cached, plain)
    torch.testing.assert_close(cached_logits, plain_logits, atol=1e-4, rtol=1e-4)

    # An ordinary checkpoint.
    save(pruned, None, tmp_path / "pruned")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(models.decoder_layers(again)) == again.config.num_hidden_layers == len(kept)
    assert (logits(again.eval(), ids) - expected).abs().max() <= 1e-6
    assert torch.equal(greedy(again, ids, use_cache=True)[0], cached)
    if model.config.tie_word_embeddings:
        assert "lm_head.weight" not in load_file(tmp_path / "pruned" / "model.safetensors")
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

    # The model we started from is as it was, and shares its weights.
    assert state(model) == before
    assert torch.equal(logits(model, ids), dense)
    for new, old in enumerate(kept):
        layers = models.decoder_layers(pruned)[new], models.decoder_layers(model)[old]
        assert all(mine is theirs for mine, theirs in zip(*(layer.parameters() for layer in layers), strict=True))


@pytest.mark.parametrize(
    ("name", "kept"),
    [("qwen3_moe_step_2", (0, 2, 4)), ("llama4_text", (0, 2)), ("deepseek_v3", (0, 1)), ("ernie4_5_moe", (0, 1, 5))],
)
def test_a_mixture_may_lose_all_its_experts(name, kept, tmp_path):
    save(keep_layers(build(name), kept), None, tmp_path / "dense_only")
    assert not any("expert" in key for key in load(tmp_path / "dense_only").state_dict())


def test_text_tower_of_a_multimodal_model(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    fields = {"text_config": {**SMALL, **WINDOWED}, "vision_config": vision, "mm_tokens_per_image": 4}
    special = {"image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122, "eos_token_id": None}
    model = build_type("gemma3", {**fields, **special})
    pruned = keep_layers(model, SCATTERED)
    ids = random_windows(2, vocabulary=100)
    assert torch.equal(logits(pruned, ids), logits_with_identities(model, ids, (2, 3, 5)))
    save(pruned, None, tmp_path / "text")
    assert load(tmp_path / "text").config.text_config.layer_types == [WINDOWED["layer_types"][index] for index in SCATTERED]
    assert model.config.text_config.num_hidden_layers == 6


def test_parameter_counts(tiny_llama):
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # attention, grouped keys and values, MLP, norms
    total = 2 * 97 * 32 + 32 + 6 * layer
    assert models.parameter_count(tiny_llama) == total
    pruned = remove_layers(tiny_llama, (1, 4))
    assert models.removed_fraction(tiny_llama, pruned) == pytest.approx(2 * layer / total)
    assert models.parameter_fraction(tiny_llama, (1, 4)) == pytest.approx(2 * layer / total)


@pytest.mark.parametrize("layers", [(0, 6), (-1, 2), (1, 1)])
def test_impossible_layer_sets_are_refused(tiny_llama, layers):
    for function, nothing_left in ((keep_layers, ()), (remove_layers, range(6))):
        with pytest.raises(ValueError, match=r"distinct layers .*from 0 to 5"):
            function(tiny_llama, layers)
        with pytest.raises(ValueError, match="cannot remove 6 of 6 layers"):
            function(tiny_llama, nothing_left)


JAMBA = {**SMALL, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
GEMMA3N = {**SMALL, **WINDOWED, "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6}
GEMMA3N |= {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 4}


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("jamba", {**JAMBA, "use_mamba_kernels": False}, "attn_layer_period"),
        ("gemma3n_text", GEMMA3N, "reuse the keys and values"),
        # Not in any table: the model built from the pruned configuration differs.
        ("diffllama", SMALL, "lambda_init"),
        ("gpt2", {**ARCHITECTURES["gpt2"][1], "scale_attn_by_inverse_layer_idx": True}, "attn.scaling"),
        ("ernie4_5_moe", {**ARCHITECTURES["ernie4_5_moe"][1], "moe_layer_interval": 2, "moe_layer_start_index": 0}, "mlp"),
    ],
)
def test_what_a_checkpoint_cannot_say_is_refused(model_type, fields, reason):
    model = build_type(model_type, fields)
    with pytest.raises(UnsupportedModel, match=rf"{model_type} model.*{reason}"):
        keep_layers(model, (1, 2, 4))
    keep_layers(model, range(6))  # nothing removed, nothing to express


def test_a_hybrid_keeps_an_attention_layer():
    with pytest.raises(UnsupportedModel, match=r"keep one of \[1, 4\]"):
        keep_layers(build("qwen3_next"), (0, 2, 3))


@pytest.mark.parametrize(
    ("table", "name", "message"),
    [
        ("PER_LAYER_LISTS", "gemma3_text", "gemma3_text"),
        ("LAYER_INDEX_LISTS", "llama4_text", "llama4_text"),
        ("DENSE_PREFIX_COUNTS", "deepseek_v3", "deepseek_v3"),
        ("LAYER_INDEX_ATTRIBUTES", "llama", "layer_idx is 1 here, 0 there"),
    ],
)
def test_what_the_tables_do_not_know_is_refused_not_broken(monkeypatch, table, name, message):
    monkeypatch.setattr(models.architectures, table, ())
    with pytest.raises(UnsupportedModel, match=message):
        keep_layers(build(name), (1, 2, 5))


QUANTIZED = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "quantization_config", QUANTIZED), "llama model: it is quantized"),
        (lambda model: add_hook_to_module(model.model.layers[0], ModelHook()), "several devices"),
        (lambda model: model.model.layers.pop(2), "5 layers but its configuration says 6"),
    ],
)
def test_models_that_were_changed_are_refused(tiny_llama, change, message):
    change(tiny_llama)
    with pytest.raises(UnsupportedModel, match=message):
        keep_layers(tiny_llama, (0, 1))


def test_other_kinds_of_models_are_named():
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    for model, message in (
        (AutoModelForMaskedLM.from_config(BertConfig(**bert)), "'bert'"),
        (AutoModelForSeq2SeqLM.from_config(t5), "'t5'"),
        (nn.Sequential(), "Sequential is not a plain transformers model"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            models.decoder_layers(model)
    with pytest.raises(UnsupportedModel, match=r"'opt'.*final_layer_norm"):
        models.final_norm(build("opt", do_layer_norm_before=False))

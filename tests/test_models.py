"""Layer surgery on tiny random models of many families: what is kept computes, caches, saves and reloads as it should."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from architectures import ARCHITECTURES, SMALL, WINDOWED, build, build_type
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config

from prunelib import models
from prunelib.models import (
    CheckpointError,
    IdentityLayer,
    UnsupportedModel,
    keep_layers,
    load,
    remove_layers,
    save,
    with_layers,
)

SCATTERED = (0, 1, 4)


def kept_sets(model):
    return {"scattered": SCATTERED, "first_removed": tuple(range(1, len(models.decoder_layers(model))))}


def tokens(model, length=16):
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


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
    out = model.generate(
        ids[:, :9],
        attention_mask=torch.ones_like(ids[:, :9]),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def state(model):
    """All that keep_layers must leave alone."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "tensors": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "indices": {name: getattr(module, "layer_idx", None) for name, module in model.named_modules()},
    }


# ------------------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("which", ["scattered", "first_removed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pruned_model_computes_caches_saves_and_reloads(name, which, tmp_path):
    model = build(name)
    ids, before = tokens(model), state(model)
    dense = logits(model, ids)
    kept = kept_sets(model)[which]
    removed = [index for index in range(len(models.decoder_layers(model))) if index not in kept]

    pruned = keep_layers(model, kept)
    expected = logits(pruned, ids)
    assert (expected - dense).abs().max() > 1e-3  # the layers that went did something
    assert torch.equal(expected, logits_with_identities(model, ids, removed))

    # The view with skipped layers is the same function.
    layers = models.decoder_layers(model)
    view = with_layers(model, [IdentityLayer(layer) if index in removed else layer for index, layer in enumerate(layers)])
    assert torch.equal(expected, logits(view, ids))
    assert torch.equal(expected, logits(view, ids))  # also once the skips have learnt their form

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

    # The model we started from is as it was, and shares its weights.
    assert state(model) == before
    assert torch.equal(logits(model, ids), dense)
    for new, old in enumerate(kept):
        for mine, theirs in zip(models.decoder_layers(pruned)[new].parameters(), layers[old].parameters(), strict=True):
            assert mine is theirs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_norm_are_found(name):
    model = build(name)
    layers, norm = models.decoder_layers(model), models.final_norm(model)
    seen = {}
    layers[-1].register_forward_hook(lambda module, args, output: seen.update(last=output))
    norm.register_forward_hook(lambda module, args, output: seen.update(norm_input=args[0]))
    logits(model, tokens(model))
    last = seen["last"][0] if isinstance(seen["last"], tuple) else seen["last"]
    assert len(layers) == model.config.num_hidden_layers
    assert torch.equal(last, seen["norm_input"])


def test_at_least_27_variants_are_covered():
    assert len(ARCHITECTURES) >= 27


# ----------------------------------------------------------------------------------- what the configuration must say


@pytest.mark.parametrize(
    ("name", "kept", "expected"),
    [
        ("gemma3_text", (1, 2, 5), {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("smollm3", (1, 2, 5), {"no_rope_layers": [0, 1, 1]}),
        ("llama4_text", (1, 2, 5), {"no_rope_layers": [0, 1, 1], "moe_layers": [0, 2]}),  # steps of 2: layers 1, 3, 5
        ("qwen3_moe_mlp_only", (1, 2, 4), {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1}),
        ("qwen3_moe_step_2", (1, 2, 5), {"mlp_only_layers": [1], "decoder_sparse_step": 1}),  # sparse: 1, 3, 5
        ("deepseek_v3", (1, 2, 5), {"first_k_dense_replace": 2}),  # dense: 0, 1, 2
        ("glm4_moe", (3, 4), {"first_k_dense_replace": 0}),
        ("gpt_neo", (1, 3, 5), {"attention_layers": ["local", "global", "local"], "num_layers": 3}),
        ("lfm2", (1, 2, 5), {"layer_types": ["full_attention", "conv", "conv"]}),
        ("gpt2", (1, 3), {"n_layer": 2}),
        ("ernie4_5_moe", (1, 2, 5), {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),  # sparse: 2, 3, 4
    ],
)
def test_per_layer_fields_are_renumbered(name, kept, expected):
    config = keep_layers(build(name), kept).config
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "kept"),
    [("qwen3_moe_step_2", (0, 2, 4)), ("llama4_text", (0, 2)), ("deepseek_v3", (0, 1)), ("ernie4_5_moe", (0, 1, 5))],
)
def test_a_mixture_may_lose_all_its_experts(name, kept, tmp_path):
    save(keep_layers(build(name), kept), None, tmp_path / "dense_only")
    assert not any("expert" in key for key in load(tmp_path / "dense_only").state_dict())


def test_layer_indices_are_renumbered_on_every_submodule():
    pruned = keep_layers(build("qwen3_next"), (1, 3, 4))
    for new, layer in enumerate(models.decoder_layers(pruned)):
        indices = [module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")]
        assert indices and set(indices) == {new}


def test_text_tower_of_a_multimodal_model(tmp_path):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    fields = {"text_config": {**SMALL, **WINDOWED}, "vision_config": vision, "mm_tokens_per_image": 4}
    special = {"image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122, "eos_token_id": None}
    model = build_type("gemma3", {**fields, **special})
    pruned = keep_layers(model, SCATTERED)
    ids = tokens(model) % 100
    assert torch.equal(logits(pruned, ids), logits_with_identities(model, ids, (2, 3, 5)))
    save(pruned, None, tmp_path / "text")
    assert load(tmp_path / "text").config.text_config.layer_types == [WINDOWED["layer_types"][index] for index in SCATTERED]
    assert model.config.text_config.num_hidden_layers == 6


def test_tied_weights_stay_tied(tmp_path):
    model = build("llama_tied")
    pruned = keep_layers(model, SCATTERED)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight is model.model.embed_tokens.weight
    save(pruned, None, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    again = load(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert models.parameter_count(again) == models.parameter_count(pruned)


def test_pruning_twice_is_pruning_once(tiny_llama):
    ids = tokens(tiny_llama)
    twice = keep_layers(keep_layers(tiny_llama, (0, 2, 3, 5)), (0, 2, 3))
    once = keep_layers(tiny_llama, (0, 3, 5))
    assert torch.equal(logits(twice, ids), logits(once, ids))
    assert twice.config.to_dict() == once.config.to_dict()


def test_keeping_all_layers_changes_nothing(tiny_llama):
    ids = tokens(tiny_llama)
    assert torch.equal(logits(keep_layers(tiny_llama, range(6)), ids), logits(tiny_llama, ids))


def test_hidden_states_are_recorded_after_pruning(tiny_llama):
    ids = tokens(tiny_llama)
    tiny_llama(ids, output_hidden_states=True)  # leaves recording hooks on the layers
    with torch.no_grad():
        states = keep_layers(tiny_llama, SCATTERED)(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(SCATTERED) + 1


def test_remove_layers_is_the_complement(tiny_llama):
    ids = tokens(tiny_llama)
    assert torch.equal(logits(remove_layers(tiny_llama, (5, 2, 3)), ids), logits(keep_layers(tiny_llama, (0, 1, 4)), ids))


def test_parameter_counts(tiny_llama):
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # attention, grouped keys and values, MLP, norms
    total = 2 * 97 * 32 + 32 + 6 * layer
    assert models.parameter_count(tiny_llama) == total
    pruned = remove_layers(tiny_llama, (1, 4))
    assert models.removed_fraction(tiny_llama, pruned) == pytest.approx(2 * layer / total)
    assert models.removed_fraction(tiny_llama, tiny_llama) == 0.0
    assert models.parameter_fraction(tiny_llama, (1, 4)) == pytest.approx(models.removed_fraction(tiny_llama, pruned))
    assert models.parameter_fraction(tiny_llama, ()) == 0.0
    with pytest.raises(ValueError, match=r"layers \[6\] do not exist in a model of 6 layers"):
        models.parameter_fraction(tiny_llama, (0, 6))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("keep", [(), (0, 6), (-1, 2), (2, 1), (1, 1)])
def test_impossible_layer_sets_are_refused(tiny_llama, keep):
    with pytest.raises(ValueError, match=r"6 of 6 layers|ascending order, from 0 to 5"):
        keep_layers(tiny_llama, keep)


@pytest.mark.parametrize("removed", [range(6), (0, 0), (6,), (-1,)])
def test_impossible_removals_are_refused(tiny_llama, removed):
    with pytest.raises(ValueError, match=r"6 of 6 layers|distinct layers from 0 to 5"):
        remove_layers(tiny_llama, removed)


JAMBA = {**SMALL, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
GEMMA3N = {
    **SMALL,
    **WINDOWED,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 6,
}


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


@pytest.mark.parametrize(
    ("table", "field", "name"),
    [
        ("PER_LAYER_LISTS", "layer_types", "gemma3_text"),
        ("PER_LAYER_LISTS", "no_rope_layers", "smollm3"),
        ("PER_LAYER_LISTS", "attention_layers", "gpt_neo"),
        ("LAYER_INDEX_LISTS", "moe_layers", "llama4_text"),
        ("DENSE_PREFIX_COUNTS", "first_k_dense_replace", "deepseek_v3"),
    ],
)
def test_a_field_the_tables_do_not_know_is_refused_not_broken(monkeypatch, table, field, name):
    monkeypatch.setattr(models, table, tuple(known for known in getattr(models, table) if known != field))
    with pytest.raises(UnsupportedModel, match=ARCHITECTURES[name][0]):
        keep_layers(build(name), (1, 2, 5))


def test_a_forgotten_layer_index_is_refused(monkeypatch, tiny_llama):
    monkeypatch.setattr(models, "LAYER_INDEX_ATTRIBUTES", ())
    with pytest.raises(UnsupportedModel, match="layer_idx is 1 here, 0 there"):
        keep_layers(tiny_llama, (1, 2))


def test_a_hybrid_without_attention_layers_is_refused():
    with pytest.raises(UnsupportedModel, match=r"keep one of \[1, 4\]"):
        keep_layers(build("qwen3_next"), (0, 2, 3))


def test_a_quantized_model_is_refused(tiny_llama):
    tiny_llama.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModel, match="llama model is quantized; prune it unquantized"):
        keep_layers(tiny_llama, SCATTERED)


def test_a_dispatched_model_is_refused(tiny_llama):
    add_hook_to_module(tiny_llama.model.layers[0], ModelHook())
    with pytest.raises(UnsupportedModel, match="several devices"):
        keep_layers(tiny_llama, SCATTERED)


def test_a_model_out_of_step_with_its_configuration_is_refused(tiny_llama):
    del tiny_llama.model.layers[2]
    with pytest.raises(UnsupportedModel, match="5 layers but its configuration says 6"):
        keep_layers(tiny_llama, (0, 1))


def test_other_kinds_of_models_are_named():
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    with pytest.raises(UnsupportedModel, match="'bert'"):
        models.decoder_layers(AutoModelForMaskedLM.from_config(BertConfig(**bert)))
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModel, match="'t5'"):
        models.decoder_layers(AutoModelForSeq2SeqLM.from_config(t5))
    with pytest.raises(UnsupportedModel, match="Sequential is not a plain transformers model"):
        models.decoder_layers(nn.Sequential())


def test_a_model_without_final_norm_is_named():
    with pytest.raises(UnsupportedModel, match=r"'opt'.*final_layer_norm"):
        models.final_norm(build("opt", do_layer_norm_before=False))


# -------------------------------------------------------------------------------------------------------------- views


def test_a_view_shares_everything_and_changes_nothing(tiny_llama):
    before = state(tiny_llama)
    layers = models.decoder_layers(tiny_llama)
    view = with_layers(tiny_llama, [*layers[:3], IdentityLayer(layers[3]), *layers[4:]])
    assert view.config is tiny_llama.config
    assert view.lm_head is tiny_llama.lm_head
    assert models.decoder_layers(tiny_llama) is layers
    assert [type(slot) for slot in models.decoder_layers(view)].count(IdentityLayer) == 1
    assert models.parameter_count(view) == models.parameter_count(remove_layers(tiny_llama, (3,)))
    assert state(tiny_llama) == before


def test_slots_may_be_other_modules(tiny_llama):
    """Prefix reuse: a slot that injects stored hidden states stands for all the layers before it."""
    ids, stored = tokens(tiny_llama), {}
    layers = models.decoder_layers(tiny_llama)
    layers[2].register_forward_hook(lambda module, args, output: stored.update(hidden=output))
    expected = logits(tiny_llama, ids)

    class Replay(IdentityLayer):
        def forward(self, *args, **kwargs):
            return stored["hidden"]

    view = with_layers(tiny_llama, [IdentityLayer(layers[0]), IdentityLayer(layers[1]), Replay(layers[2]), *layers[3:]])
    assert torch.equal(logits(view, ids), expected)


def test_a_skip_stands_for_its_layer(tiny_llama):
    layer = models.decoder_layers(tiny_llama)[4]
    layer.attention_type = "sliding_attention"  # which mask a model hands to a layer may be asked of the layer
    skip = IdentityLayer(layer)
    assert skip.attention_type == "sliding_attention"
    assert skip.self_attn is layer.self_attn
    assert not list(skip.parameters())
    with pytest.raises(AttributeError, match="no_such_thing"):
        skip.no_such_thing  # noqa: B018


@pytest.mark.parametrize("name", ["llama", "falcon", "bloom", "gpt_neo"])
def test_a_skip_returns_the_form_of_its_layer(name):
    """In these families layers return a tensor or tuples, some with attention weights behind the hidden states."""
    model, seen = build(name), {}
    layers = models.decoder_layers(model)
    handle = layers[2].register_forward_hook(lambda module, args, output: seen.update(real=output))
    logits(model, tokens(model))
    handle.remove()
    view = with_layers(model, [*layers[:2], IdentityLayer(layers[2]), *layers[3:]])
    models.decoder_layers(view)[2].register_forward_hook(lambda module, args, output: seen.update(skip=output))
    logits(view, tokens(model))
    assert type(seen["skip"]) is type(seen["real"])
    assert isinstance(seen["skip"], torch.Tensor) or len(seen["skip"]) == len(seen["real"])


def test_a_layer_that_hands_on_more_than_hidden_states_is_not_skipped(tiny_llama):
    class Routed(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, hidden_states.mean(-1)

    with pytest.raises(UnsupportedModel, match=r"Routed.*more than hidden states"):
        IdentityLayer(Routed())(torch.ones(1, 2, 3))


def test_a_skip_does_not_run_the_hooks_of_its_layer(tiny_llama):
    calls = []
    layers = models.decoder_layers(tiny_llama)
    layers[1].register_forward_hook(lambda *_: calls.append(1))
    view = with_layers(tiny_llama, [layers[0], IdentityLayer(layers[1]), *layers[2:]])
    logits(view, tokens(tiny_llama))
    assert not calls


def test_a_skip_refuses_a_cache(tiny_llama):
    layers = models.decoder_layers(tiny_llama)
    view = with_layers(tiny_llama, [IdentityLayer(layers[0]), *layers[1:]])
    with pytest.raises(ValueError, match="use_cache=False"):
        view(tokens(tiny_llama), use_cache=True)


def test_the_number_of_slots_is_checked(tiny_llama):
    with pytest.raises(ValueError, match="5 slots were given for a model of 6 layers"):
        with_layers(tiny_llama, models.decoder_layers(tiny_llama)[:5])


# ------------------------------------------------------------------------------------------------------------- saving


def test_save_does_not_overwrite_unless_told(tiny_llama, tmp_path):
    save(tiny_llama, None, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        save(remove_layers(tiny_llama, (0,)), None, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    save(remove_layers(tiny_llama, (0,)), None, tmp_path / "model", overwrite=True)
    assert load(tmp_path / "model").config.num_hidden_layers == 5
    assert not (tmp_path / "model" / "notes.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_save_uses_an_empty_folder_and_makes_parents(tiny_llama, tmp_path):
    (tmp_path / "empty").mkdir()
    save(tiny_llama, None, tmp_path / "empty")
    save(tiny_llama, None, tmp_path / "a" / "b")
    assert models.parameter_count(load(tmp_path / "a" / "b")) == models.parameter_count(load(tmp_path / "empty"))


def test_a_saved_model_is_for_all_to_read_as_the_umask_says(tiny_llama, tmp_path):
    mask = os.umask(0o027)
    try:
        save(tiny_llama, None, tmp_path / "shared")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "shared").iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(tiny_llama, tmp_path, monkeypatch, existing):
    if existing:
        save(tiny_llama, None, tmp_path / "model")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_check_reload", fail)
    with pytest.raises(KeyboardInterrupt):
        save(remove_layers(tiny_llama, (0,)), None, tmp_path / "model", overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if existing:
        assert load(tmp_path / "model").config.num_hidden_layers == 6


def test_save_catches_a_model_pruned_without_its_configuration(tiny_llama, tmp_path):
    del tiny_llama.model.layers[5]
    with pytest.raises(CheckpointError, match=r"9 missing \(model.layers.5"):
        save(tiny_llama, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_save_catches_a_configuration_that_computes_something_else(tiny_llama, tmp_path):
    tiny_llama.config.rms_norm_eps = 0.5  # the norms in memory keep the old value
    with pytest.raises(CheckpointError, match="other logits"):
        save(tiny_llama, None, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_view_cannot_be_saved(tiny_llama, tmp_path):
    layers = models.decoder_layers(tiny_llama)
    with pytest.raises(CheckpointError, match="missing"):
        save(with_layers(tiny_llama, [IdentityLayer(layers[0]), *layers[1:]]), None, tmp_path / "model")


def test_save_refuses_weights_that_are_not_finite(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        save(tiny_llama, None, tmp_path / "model")


def test_save_keeps_the_dtype_and_the_training_mode(tiny_llama, tmp_path):
    model = tiny_llama.to(torch.bfloat16).train()
    save(model, None, tmp_path / "model")
    assert model.training
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_generation_config_that_only_sampling_would_use_is_saved(tiny_llama, tmp_path):
    tiny_llama.generation_config.temperature = 0.9  # as published with Llama 2
    with pytest.warns(UserWarning, match="do_sample=True"):
        save(tiny_llama, None, tmp_path / "model")
    assert load(tmp_path / "model").generation_config.temperature == 0.9
    assert not tiny_llama.generation_config.do_sample


# ------------------------------------------------------------------------------------------------------------ loading


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


def test_load_gives_the_model_ready_to_evaluate(saved, tiny_llama):
    model = load(saved)
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(logits(model, tokens(model)), logits(tiny_llama, tokens(model)))
    assert load(str(saved), dtype="bfloat16").dtype == load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_local_folder_needs_no_network(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(saved)


def break_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def break_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_nan(folder):
    edit_weights(folder, lambda weights: weights["model.layers.3.mlp.up_proj.weight"][2].fill_(float("nan")))


def break_infinite(folder):
    edit_weights(folder, lambda weights: weights["lm_head.weight"][0, 0].fill_(float("inf")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (break_truncate, r"model\.safetensors' is truncated or damaged"),
        (break_header, "truncated or damaged"),
        (break_pickled, r"pytorch_model\.bin is pickled"),
        (break_shard, "'model-00002-of-00002.safetensors' is missing"),
        (break_nan, r"'model\.layers\.3\.mlp\.up_proj\.weight' holds 32 NaN or infinite values of 2048"),
        (break_infinite, r"'lm_head\.weight' holds 1 NaN"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
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


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match=r"t5.*encoder-decoder"):
        load(tmp_path / "t5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "auto"}, "'auto' is not one of float32"),
        ({"device": "quantum"}, "'quantum' is not a torch device"),
        ({"revision": "v2"}, "a folder has no revisions"),
    ],
)
def test_bad_arguments_of_load(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(saved, **arguments)


def test_what_is_no_model_folder_is_refused(saved):
    with pytest.raises(ValueError, match="is a file"):
        load(saved / "config.json")
    with pytest.raises(CheckpointError, match="no local folder"):
        load("nobody/no-such-model")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        models.load_tokenizer(saved)


# -------------------------------------------------------------------------------------------------- trained weights


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_a_trained_model(shared_data, name, tmp_path):
    model, tokenizer = load(shared_data / "models" / name), models.load_tokenizer(shared_data / "models" / name)
    ids = torch.tensor([tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]])
    pruned = remove_layers(model, (2,))
    save(pruned, tokenizer, tmp_path / name)
    again, words = load(tmp_path / name), models.load_tokenizer(tmp_path / name)
    assert torch.equal(logits(again, ids), logits(pruned, ids))
    assert torch.equal(logits(pruned, ids), logits_with_identities(model, ids, (2,)))
    assert torch.equal(greedy(again, ids, use_cache=True)[0], greedy(again, ids, use_cache=False)[0])
    assert words("Lily said hello.")["input_ids"] == tokenizer("Lily said hello.")["input_ids"]
    assert 0.05 < models.removed_fraction(model, again) < 0.25
    # A trained model predicts its own kind of text; one layer less costs something, but not everything.
    with torch.no_grad():
        losses = [float(candidate(ids, labels=ids, use_cache=False).loss) for candidate in (model, again)]
    assert losses[0] < losses[1] < 6.5

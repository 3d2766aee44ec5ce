"""Attention or MLP alone: against layers silenced by hooks of the tests' own, reloads, brute force, and what is counted."""

import pytest
import torch
from architectures import build
from model_helpers import random_windows

from prunelib.models import UnsupportedModel, decoder_layers, parameter_count
from prunelib.models.layerwise import SharedPrefixEvaluator
from prunelib.models.sublayers import idle_fraction, remove_sublayers

# What adds to the residual stream of each family, attention first, as its modelling code reads: behind the norms, if any.
NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
ADDENDS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "mixtral"), ("self_attn", "mlp"))
ADDENDS |= dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), NORMS)
ADDENDS |= dict.fromkeys(("gpt_oss", "deepseek_v3"), ("self_attn.o_proj", "mlp"))
ADDENDS |= {"phi": ("self_attn.dense", "mlp.fc2"), "gpt_neox": ("attention.dense", "mlp"), "opt": ("self_attn.out_proj", "fc2")}
ADDENDS |= {"gpt2": ("attn.resid_dropout", "mlp.dropout"), "falcon": ("self_attention.dense", "mlp")}
SEQUENTIAL = {"gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False})}
FAMILIES = [*ADDENDS, *SEQUENTIAL]
REMOVED = ((0, "attn"), (2, "attn"), (2, "mlp"), (4, "mlp"), (5, "attn"))


def model_of(name: str):
    family, changes = SEQUENTIAL.get(name, (name, {}))
    return build(family, **changes), ADDENDS[family]


@torch.no_grad()
def silenced_logits(model, addends, removed, ids) -> torch.Tensor:
    """Logits of the dense model while hooks put zeros in the place of what each removed sublayer adds."""

    def zeros(_, args, output):
        return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

    names = dict(zip(("attn", "mlp"), addends, strict=True))
    handles = [decoder_layers(model)[i].get_submodule(names[part]).register_forward_hook(zeros) for i, part in removed]
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_silenced_sublayers(name):
    model, addends = model_of(name)
    ids = random_windows()
    pruned = remove_sublayers(model, REMOVED)
    with torch.no_grad():
        found = pruned(ids, use_cache=False).logits
        prompt = pruned(ids[:, :7], use_cache=True)
        rest = pruned(ids[:, 7:], past_key_values=prompt.past_key_values, use_cache=True).logits
        dense = model(ids, use_cache=False).logits
    assert len(decoder_layers(pruned)) == pruned.config.num_hidden_layers == 5
    assert torch.equal(found, silenced_logits(model, addends, REMOVED, ids))
    torch.testing.assert_close(torch.cat([prompt.logits, rest], dim=1), found, atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().max() > 0.01
    # Each of the cuts matters by itself, so that none of them can have been forgotten above.
    assert not any(torch.equal(silenced_logits(model, addends, [unit], ids), dense) for unit in REMOVED)


def test_the_model_is_left_as_it_was_and_the_rest_is_shared(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[3].eval()
    pruned = remove_sublayers(tiny_llama, ((1, "attn"), (3, "mlp")))
    assert [layer.training for layer in tiny_llama.model.layers] == [True, True, True, False, True, True]
    assert [layer.training for layer in pruned.model.layers] == [True, True, True, False, True, True]
    own = {name for name, parameter in pruned.named_parameters() if parameter is not tiny_llama.get_parameter(name)}
    assert own == {"model.layers.1.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"}
    assert not any(module._forward_hooks for model in (tiny_llama, pruned) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "unit", "outputs", "message"),
    [
        ("bloom", (1, "attn"), None, r"'bloom', layer 1, a \w+, does not add its attention and its MLP"),
        ("mpt", (1, "attn"), None, r"'mpt', layer 1, a \w+, does not add its attention and its MLP"),
        ("lfm2", (2, "mlp"), None, r"'lfm2', layer 2, a Lfm2DecoderLayer: no sublayer self_attn or"),
        # As if another family had its output projection under a name that means something else here, or an unknown one.
        ("gpt2", (3, "mlp"), "c_fc", r"zeros for mlp\.c_fc\.weight, mlp\.c_fc\.bias do not silence its mlp"),
        ("gpt2", (3, "mlp"), "out", r"'gpt2', layer 3, a GPT2Block: zeros for an output projection \(out\) do not silence"),
    ],
)
def test_what_cannot_be_removed_is_refused(family, unit, outputs, message, monkeypatch):
    if outputs:
        monkeypatch.setattr("prunelib.models.sublayers.OUTPUT_NAMES", (outputs,))
    with pytest.raises(UnsupportedModel, match=message):
        remove_sublayers(build(family), (unit,))
    whole = remove_sublayers(build(family), ((1, "attn"), (1, "mlp")))  # both go without being told apart
    assert len(decoder_layers(whole)) == len(decoder_layers(build(family))) - 1


def test_idle_parameters_by_hand():
    llama, phi = build("llama"), build("phi")
    norm, attention = 32, 32 * (32 + 16 + 16 + 32)
    found = idle_fraction(llama, ((3, "attn"),))
    assert found * parameter_count(llama) == pytest.approx(norm + attention)
    # One norm feeds both sublayers of Phi: it stays at work.
    found = idle_fraction(phi, ((3, "mlp"),))
    assert found * parameter_count(phi) == pytest.approx(sum(p.numel() for p in phi.model.layers[3].mlp.parameters()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox_sequential"])
@torch.inference_mode()
def test_logits_of_sets_of_sublayers_are_those_of_the_checkpoints(name):
    model, ids = model_of(name)[0], random_windows()
    sets = [(), ((0, "attn"),), ((1, "mlp"),), ((1, "attn"), (1, "mlp")), REMOVED, tuple((i, "attn") for i in range(6))]
    for _, _, removed, logits in SharedPrefixEvaluator(model, sets).logits(ids, batch_size=4):
        expected = remove_sublayers(model, removed)(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())

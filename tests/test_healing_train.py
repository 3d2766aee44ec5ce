"""Healing: what each recipe trains and on how much, exact resumption, and what comes out is an ordinary model."""

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import build
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from prunelib import models
from prunelib.healing import distillation as distilling
from prunelib.healing import train as healing
from prunelib.healing.distillation import kl_divergence
from prunelib.healing.recipes import RECIPES, Recipe
from prunelib.healing.train import HealingError, heal, linear_names
from prunelib.models import UnsupportedModel
from prunelib.slicing import slice_model
from prunelib.slicing.schedules import constant
from prunelib.text.sequences import IGNORED, TrainingRows

FAMILIES = ["llama_tied", "gpt_neox", "phi"]
SIZE = {"batch": 4, "seq_len": 16, "steps": 6, "warmup_steps": 1}
LORA = replace(RECIPES["lora"], **SIZE)
FULL = replace(RECIPES["full"], **SIZE)
LAST = replace(RECIPES["last_layers"], **SIZE)
QLORA = replace(RECIPES["gromov_qlora"], **SIZE)


def random_rows(count=24, seq_len=16, vocabulary=128, padded=False, seed=0) -> TrainingRows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, seq_len), generator=generator)
    if not padded:
        return TrainingRows(ids, ids, None, "random")
    lengths = torch.randint(2, seq_len + 1, (count, 1), generator=generator)
    mask = torch.arange(seq_len) < lengths
    return TrainingRows(ids, ids.masked_fill(~mask, IGNORED), mask, "random")


def pruned(family="llama", **changes):
    return models.keep_layers(build(family, **changes), [0, 1, 4, 5])


def logits(model, seed=1):
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def changed(before, after) -> set[str]:
    theirs = dict(after.named_parameters())
    return {name for name, weight in before.named_parameters() if not torch.equal(weight, theirs[name])}


def run(model, rows, recipe, folder, **options):
    return heal(model, rows, recipe, folder, progress=False, **options)


def measured(healed, name):
    return {entry["step"]: entry["measures"][name] for entry in healed.log if "measures" in entry}


def untimed(log):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


class Killed(Exception):
    """Stands for the end of the process."""


MAPS = {  # role → names within a layer
    "llama": ("mlp.gate_proj mlp.up_proj mlp.down_proj", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h mlp.dense_4h_to_h", "attention.query_key_value attention.dense"),
    "phi": ("mlp.fc1 mlp.fc2", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense"),
    "opt": ("fc1 fc2", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"),
}


@pytest.mark.parametrize("family", MAPS)
def test_roles_name_the_linear_maps_of_a_family(family):
    model = build(family)
    path = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}.get(family, "model.layers")
    for role, names in zip(("mlp", "attention"), MAPS[family], strict=True):
        assert sorted(linear_names(model, (role,))) == sorted(f"{path}.{i}.{name}" for i in range(6) for name in names.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_the_chosen_maps_alone_and_the_result_is_an_ordinary_model(family, tmp_path):
    model = pruned(family)
    before = copy.deepcopy(model.state_dict())
    healed = run(model, random_rows(), replace(LORA, modules=("mlp",)), tmp_path / "h")
    names = linear_names(model, ("mlp",))
    assert changed(model, healed.model) == {f"{name}.weight" for name in names}
    assert [type(module) for module in healed.model.modules()] == [type(module) for module in model.modules()]
    assert healed.model.config.use_cache == model.config.use_cache
    assert not any(module.training for module in healed.model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert healed.trainable == sum(sum(model.get_submodule(name).weight.shape) * LORA.rank for name in names)

    models.save(healed.model, None, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(healed.model))
    assert not torch.equal(logits(healed.model), logits(model))


def merged_alike(model, healed, scale, folder):
    weights = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
    name = linear_names(model, ("mlp",))[0]
    first, second = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert second.abs().max() > 0
    torch.testing.assert_close(
        healed.model.get_submodule(name).weight, model.get_submodule(name).weight + scale * second @ first
    )


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2), (2, 8)])
def test_the_merged_model_computes_what_the_adapter_does(rank, alpha, tmp_path):
    model = pruned()
    healed = run(model, random_rows(), replace(LORA, rank=rank, alpha=alpha, learning_rate=1e-2), tmp_path / "h")
    merged_alike(model, healed, alpha / rank, tmp_path / "h")
    unmerged = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "h" / "checkpoint-6").eval()
    torch.testing.assert_close(logits(unmerged), logits(healed.model), rtol=1e-4, atol=1e-4)
    assert not unmerged.peft_config["default"].base_model_name_or_path, "never the dense model"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "llama_tied"])
def test_last_layers_train_with_the_final_norm_and_the_head(family, tmp_path):
    model = pruned(family)
    healed = run(model, random_rows(), replace(LAST, last_layers=1), tmp_path / "h")
    expected = {name for name, _ in model.named_parameters() if ".layers.3." in name}
    norm = "gpt_neox.final_layer_norm" if family == "gpt_neox" else "model.norm"
    expected |= {f"{norm}.{name}" for name, _ in model.get_submodule(norm).named_parameters()}
    expected.add("model.embed_tokens.weight" if family == "llama_tied" else "lm_head.weight")
    assert {name for name in expected if not name.endswith("bias")} <= changed(model, healed.model)
    assert changed(model, healed.model) <= expected
    assert healed.trainable == sum(p.numel() for name, p in model.named_parameters() if name in expected)


def test_full_training_is_that_of_a_plain_loop(tmp_path):
    model, rows = pruned(), random_rows(padded=True)
    recipe = replace(FULL, schedule="constant", warmup_steps=0, weight_decay=0.1, learning_rate=1e-2)
    healed = run(model, rows, recipe, tmp_path / "h", micro_batch=2)

    plain = copy.deepcopy(model).train()
    no_decay = [p for name, p in plain.named_parameters() if "norm" in name or name.endswith("bias")]
    decay = [p for p in plain.parameters() if not any(p is q for q in no_decay)]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(recipe.steps):
        part = slice(step * 4, step * 4 + 4)
        ids, labels, mask = rows.input_ids[part], rows.labels[part], rows.mask[part].long()
        output = plain(input_ids=ids, attention_mask=mask).logits[:, :-1].reshape(-1, 128)
        loss = functional.cross_entropy(output, labels[:, 1:].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    np.testing.assert_allclose(healed.losses, losses, rtol=1e-5)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(healed.model.get_parameter(name), weight, rtol=1e-3, atol=1e-4)


def test_exactly_the_recipes_tokens_are_read_and_padding_is_told(tmp_path):
    rows = random_rows(40, padded=True)
    healed = run(pruned(), rows, LORA, tmp_path / "h")
    assert healed.tokens == LORA.tokens == 6 * 4 * 16
    assert healed.real_tokens == int(rows.mask[:24].sum()) < healed.tokens
    assert [entry["step"] for entry in healed.log] == [1, 2, 3, 4, 5, 6]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    healed = run(pruned(), random_rows(40), replace(LORA, steps=10, warmup_steps=2), tmp_path / "h")
    rates = [entry["learning_rate"] / LORA.learning_rate for entry in healed.log]
    expected = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 2}, {"gradient_checkpointing": True}])
def test_how_a_batch_is_computed_does_not_change_the_training(options, tmp_path):
    model, rows = pruned(), random_rows(padded=True)
    whole = run(model, rows, LORA, tmp_path / "whole")
    parts = run(model, rows, LORA, tmp_path / "parts", **options)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)


def test_bfloat16_is_close_to_float32(tmp_path):
    model, rows = pruned(), random_rows()
    losses = [run(model, rows, FULL, tmp_path / str(bf16), bf16=bf16).losses for bf16 in (False, True, False)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (replace(LORA, seq_len=8), {}, "reads 6 x 4 = 24 rows of 8 tokens, but there are 24 of 16"),
        (replace(LORA, steps=7), {}, r"reads 7 x 4 = 28 rows of 16 tokens, but there are 24 .* replace\(recipe, steps=6"),
        (LORA, {"micro_batch": 3}, "batch=4 is no multiple of micro_batch=3"),
        (LORA, {"measure_at": [7]}, r"measure_at=\[7\]: take steps from 0 to the recipe's 6"),
        (replace(RECIPES["distillation"], **SIZE), {}, "give dense="),
        (replace(LAST, last_layers=5), {}, "last_layers=5, but the model has 4 layers"),
    ],
)
def test_what_cannot_work_is_refused_before_work_is_spent(recipe, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(pruned(), random_rows(), recipe, tmp_path / "h", **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rows_of_another_tokenizer_and_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="'gpt2': the mlp of layer 0 has no linear map"):
        linear_names(build("gpt2"), ("mlp",))
    with pytest.raises(ValueError, match="token ids 0 to 299, but the model knows 0 to 127"):
        run(pruned(), random_rows(vocabulary=300), LORA, tmp_path / "h")
    with pytest.raises(ValueError, match="made for at most 64 tokens"):
        run(pruned(), random_rows(24, 80), replace(LORA, seq_len=80), tmp_path / "h")


RESUMED = {
    "llama, adapters with dropout": ("llama", replace(LORA, dropout=0.3)),
    "gpt_neox, all weights and a head with two names": ("gpt_neox", FULL),
    "tied, last layers": ("llama_tied", LAST),
    "4 bits": ("llama", replace(QLORA, dropout=0.3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_training_resumes_to_the_same_losses_and_weights(case, tmp_path):
    family, recipe = RESUMED[case]
    recipe = replace(recipe, steps=9)
    model, rows = pruned(family), random_rows(36)
    kill_at = random.Random(case).randrange(4, 9)
    everywhere = range(10)

    def measure(model):
        return {"seen": model.get_output_embeddings().weight.sum().item()}

    def kill(model):
        calls.append(1)
        if len(calls) == kill_at + 1:
            raise Killed
        return measure(model)

    calls = []
    options = {"measure_at": everywhere, "save_every": 3}
    killed = tmp_path / "killed"
    whole = run(model, rows, recipe, tmp_path / "whole", measure=measure, **options)
    with pytest.raises(Killed):
        run(model, rows, recipe, killed, measure=kill, **options)
    assert [path.name for path in killed.glob("checkpoint-*")] == [f"checkpoint-{(kill_at - 1) // 3 * 3}"]
    (killed / "checkpoint-8").mkdir()  # one that was being written
    resumed = run(model, rows, recipe, killed, measure=measure, **options)

    assert untimed(resumed.log) == untimed(whole.log)
    assert len(whole.losses) == 9
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_finished_training_is_not_run_again_and_another_one_in_its_folder_is_refused(tmp_path):
    model, rows = pruned(), random_rows()
    first = run(model, rows, LORA, tmp_path / "h", measure=lambda model: {"one": 1.0}, measure_at=[6])
    again = run(model, rows, LORA, tmp_path / "h", measure=lambda model: pytest.fail("trained once more"), measure_at=[6])
    assert (again.log, again.seconds, again.trainable) == (first.log, first.seconds, first.trainable)
    assert torch.equal(logits(again.model), logits(first.model))
    others = [
        (model, rows, replace(LORA, learning_rate=2e-3), {}, r"recipe.learning_rate is 0.002, was 0.003"),
        (model, random_rows(seed=1), LORA, {}, "rows is"),
        (pruned(), rows, LORA, {"seed": 1}, "seed is 1, was 0"),
        (models.keep_layers(build("llama"), [0, 1, 3, 5]), rows, LORA, {}, "base is"),
        (model, rows, LORA, {"micro_batch": 2}, "per_device_train_batch_size is 2, was 4"),
    ]
    for other, data, recipe, options, message in others:
        with pytest.raises(HealingError, match=f"holds another training: .*{message}"):
            run(other, data, recipe, tmp_path / "h", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(HealingError, match="not empty and holds no training"):
        run(model, rows, LORA, tmp_path / "full")


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    recipe = replace(FULL, learning_rate=1e38, warmup_steps=0)
    with pytest.raises(HealingError, match=r"step 2: the loss is nan, .*; try a lower learning_rate than"):
        run(pruned(), random_rows(), recipe, tmp_path / "h")


def test_a_gradient_that_is_not_finite_ends_the_training(monkeypatch, tmp_path):
    usual = healing.HealingTrainer.compute_loss

    def spoiled(self, *arguments, **options):
        loss = usual(self, *arguments, **options)
        return loss + 0 * (loss - loss.detach()).sqrt() if self.state.global_step == 3 else loss

    monkeypatch.setattr(healing.HealingTrainer, "compute_loss", spoiled)
    with pytest.raises(HealingError, match=r"step 4: the loss is \d.*, the norm of its gradient nan"):
        run(pruned(), random_rows(), FULL, tmp_path / "h")


def test_measuring_changes_neither_the_training_nor_the_callers_random_numbers(tmp_path):
    model, rows = pruned(), random_rows()
    recipe = replace(LORA, dropout=0.5)
    seen = []

    def measure(model):
        seen.append((model.training, torch.is_grad_enabled(), any(module.training for module in model.modules())))
        torch.manual_seed(5)
        return {"mean": logits(model).mean().item()}

    without = run(model, rows, recipe, tmp_path / "without")
    before = torch.get_rng_state()
    found = run(model, rows, recipe, tmp_path / "with", measure=measure, measure_at=[0, 2, 3, 6])
    assert torch.equal(torch.get_rng_state(), before)
    assert found.losses == without.losses
    assert seen == [(False, False, False)] * 4
    values = measured(found, "mean")
    assert list(values) == [0, 2, 3, 6]
    assert values[0] == pytest.approx(logits(model).mean().item(), abs=1e-6)
    assert values[6] == pytest.approx(logits(found.model).mean().item(), abs=1e-5)


def test_the_seed_decides(tmp_path):
    model, rows, recipe = pruned(), random_rows(), replace(LORA, steps=3)
    losses = [run(model, rows, recipe, tmp_path / str(i), seed=seed).losses for i, seed in enumerate((0, 0, 1))]
    assert losses[0] == losses[1] != losses[2]


def test_qlora_is_merged_into_the_full_precision_weights(tmp_path):
    model, rows = pruned(), random_rows()
    healed = run(model, rows, replace(QLORA, learning_rate=1e-2), tmp_path / "h")
    assert changed(model, healed.model) == {f"{name}.weight" for name in linear_names(model, ("mlp",))}
    merged_alike(model, healed, 1.0, tmp_path / "h")


def distillation(**changes) -> Recipe:
    return replace(RECIPES["distillation"], **SIZE, **changes)


def test_the_divergence_is_that_of_the_distributions_in_any_chunks(monkeypatch):
    mine, theirs = torch.randn(3, 5, 11, requires_grad=True), torch.randn(3, 5, 11)
    counts = torch.rand(3, 5) < 0.6
    p, q = (torch.softmax(one, dim=-1) for one in (theirs, mine))
    expected = (p * (p / q).log()).sum(-1)[counts].sum()
    (gradient,) = torch.autograd.grad(expected, mine)
    for size in (2**24, 30):
        monkeypatch.setattr(distilling, "LOGITS_IN_A_CHUNK", size)
        found = kl_divergence(mine, theirs, counts)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, mine)[0], gradient)


def test_an_unpruned_copy_has_nothing_to_learn(tmp_path):
    dense = build("llama")
    healed = run(copy.deepcopy(dense), random_rows(), distillation(), tmp_path / "h", dense=dense)
    np.testing.assert_allclose(healed.losses[:2], 0, atol=1e-6)  # before the first update; Adam then follows rounding errors


def test_distillation_follows_the_dense_model_and_leaves_it_alone(tmp_path):
    dense = build("llama").train()
    model, rows = models.keep_layers(dense, [0, 1, 3, 4, 5]), random_rows(120)
    recipe = replace(distillation(learning_rate=1e-2), steps=30)
    healed = run(model, rows, recipe, tmp_path / "h", dense=dense)
    assert np.mean(healed.losses[-5:]) < 0.8 * np.mean(healed.losses[:5])
    assert all(module.training for module in dense.modules())
    assert all(parameter.grad is None for parameter in dense.parameters())


def sentences(count, seed):
    """Counting by a hidden step from a hidden start, in 61 numbers: learnt in seconds, and not without layers."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(0, high, (count, 1), generator=generator) for high in (61, 5))
    return (start + (step + 1) * torch.arange(16)) % 61


@pytest.fixture(scope="module")
def trained():
    model = build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = sentences(32, step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def held_out(model) -> dict[str, float]:
    ids = sentences(64, 10**6)
    with torch.no_grad():
        return {"nll": model(input_ids=ids, labels=ids).loss.item()}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_heals_a_trained_model(name, trained, tmp_path):
    ids = sentences(16 * 40, 1)
    model = models.remove_layers(trained, [2, 3])
    recipe = replace(RECIPES[name], batch=16, seq_len=16, steps=40, warmup_steps=2, learning_rate=5e-3)
    options = {"dense": trained, "removed": [2, 3], "measure": held_out, "measure_at": [0, 40]}
    healed = run(model, TrainingRows(ids, ids, None, "counting"), recipe, tmp_path / "h", **options)
    before, after, dense = held_out(model)["nll"], held_out(healed.model)["nll"], held_out(trained)["nll"]
    if recipe.base == "full":  # else it is the 4-bit model that is measured
        assert measured(healed, "nll") == pytest.approx({0: before, 40: after}, rel=1e-4)
    assert before > dense + 0.3
    assert after < before - 0.3 * (before - dense)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_sliced_model_heals_and_stays_one(family, tmp_path):
    dense = build(family)
    windows = random_rows().input_ids
    sliced = slice_model(dense, constant(6, 32, 0.3), windows, progress=False)
    ids = sentences(4 * 10, 1)
    rows = TrainingRows(ids, ids, None, "counting")
    healed = run(sliced, rows, replace(LORA, steps=10, learning_rate=2e-2), tmp_path / "h")
    assert held_out(healed.model)["nll"] < held_out(sliced)["nll"] - 0.2
    names = linear_names(dense, ("attention", "mlp"))
    assert changed(sliced, healed.model) == {f"{name}.weight" for name in names}, "no shortcut is adapted"
    models.save(healed.model, None, tmp_path / "saved")
    torch.testing.assert_close(logits(models.load(tmp_path / "saved")), logits(healed.model))

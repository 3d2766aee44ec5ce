"""Recipes of healing: the settings of the papers, and contradictions refused."""

import math
from dataclasses import replace

import pytest
import torch
from architectures import build

from prunelib.healing import heal, heal_in_stages
from prunelib.healing.recipes import RECIPES, gromov
from prunelib.healing.train import beside_cuts, linear_names
from prunelib.models import remove_layers
from prunelib.text.sequences import TrainingRows

# Table 2 of the paper, and the learning rates in its text, written down once more.
GROMOV = {
    "Llama-2-7B": (2, 3e-4, 2048),
    "Llama-2-13B": (64, 3e-4, 4096),
    "Llama-2-70B": (8, 3e-5, 4096),
    "Qwen-7B": (64, 3e-4, 2048),
    "Qwen-14B": (64, 3e-4, 4096),
    "Mistral-7B": (4, 3e-6, 2048),
    "Phi-2": (64, 2e-4, 2048),
}


@pytest.mark.parametrize("name", GROMOV)
def test_the_settings_of_the_paper(name):
    recipe = gromov(name)
    assert (recipe.rank, recipe.learning_rate, recipe.seq_len) == GROMOV[name]
    assert recipe.alpha == recipe.rank
    assert (recipe.trains, recipe.modules, recipe.base, recipe.dropout) == ("lora", ("mlp",), "nf4", 0.05)
    assert (recipe.schedule, recipe.warmup_steps, recipe.steps, recipe.batch) == ("cosine", 100, 5000, 16)
    assert recipe.tokens == {2048: 163_840_000, 4096: 327_680_000}[recipe.seq_len]


def test_the_default_of_that_paper_is_its_smallest_llama():
    seven = gromov("llama-2-7b")
    assert replace(RECIPES["gromov_qlora"], source=seven.source) == seven
    with pytest.raises(ValueError, match=r"no model 'Llama-3-8B'; it healed: Llama-2-7B, .*, Phi-2"):
        gromov("Llama-3-8B")
    with pytest.raises(ValueError, match=r"unknown recipe 'qlora'; there are: cut_adjacent, .*, simdiff_lora"):
        RECIPES["qlora"]


def test_simdiffs_settings():
    recipe = RECIPES["simdiff_lora"]
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.batch, recipe.seq_len) == (8, 16, 0.05, 32, 256)
    assert recipe.steps == (52_002 - 2_000) // 32
    assert len(linear_names(build("llama"), recipe.modules)) == 6 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": "everything"}, "trains='everything' is not one of lora, all, last_layers, beside_cuts"),
        ({"schedule": "step"}, "schedule='step' is not one of"),
        ({"modules": ()}, r"modules=\(\) with trains='lora': give a value"),
        ({"modules": ("ffn",)}, r"modules=\('ffn',\) is not one of attention, mlp"),
        ({"rank": 0}, "rank=0 is no finite number from 1"),
        ({"steps": 0}, "steps=0 is no finite number from 1"),
        ({"seq_len": 1}, "seq_len=1 is no finite number from 2"),
        ({"learning_rate": math.inf}, "learning_rate=inf is no finite number"),
        ({"warmup_steps": 65}, "warmup_steps=65 is more than steps=64"),
        ({"last_layers": 2}, "last_layers=2 with trains='lora'"),
        ({"trains": "all"}, "modules=.* with trains='all'"),
        ({"trains": "all", "modules": (), "rank": None, "alpha": None, "base": "nf4"}, "base='nf4' with trains='all'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"recipe lora: {message}"):
        replace(RECIPES["lora"], **changes)


@pytest.mark.parametrize(
    ("layers", "removed", "beside"),
    [(4, [2, 3], [1, 2]), (4, [0, 5], [0, 3]), (3, [1, 3, 5], [0, 1, 2]), (5, [2], [1, 2]), (6, [], [])],
)
def test_the_layers_beside_a_cut(layers, removed, beside):
    assert beside_cuts(layers, removed) == beside


@pytest.mark.parametrize("family", ["llama_tied", "gpt_neox"])
@pytest.mark.parametrize("name", ["last3_head", "cut_adjacent"])
def test_what_the_partial_recipes_train(family, name, tmp_path):
    """The last three layers, the final norm and the head, which stays tied; or the two layers at the cut."""
    model, ids = remove_layers(build(family), [2, 3]), torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    recipe = replace(RECIPES[name], batch=2, seq_len=8, steps=1, warmup_steps=0)
    healed = heal(model, TrainingRows(ids, ids, None, ""), recipe, tmp_path / "h", removed=(2, 3), progress=False)
    after, layers = dict(healed.model.named_parameters()), [1, 2, 3] if name == "last3_head" else [1, 2]
    trained = {key for key in after if any(f".layers.{index}." in key for index in layers)}
    if name == "last3_head":
        ends = ("norm.weight", "final_layer_norm.weight", "final_layer_norm.bias", "lm_head.weight")
        ends += ("embed_tokens.weight",) * (family == "llama_tied")
        trained |= {key for key in after if ".layers." not in key and key.endswith(ends)}
    changed = {key for key, weight in model.named_parameters() if not torch.equal(weight, after[key])}
    assert {key for key in trained if not key.endswith("bias")} <= changed <= trained
    assert healed.trainable == sum(after[key].numel() for key in trained)
    assert healed.model.config.tie_word_embeddings == (family == "llama_tied")
    if name == "cut_adjacent":
        with pytest.raises(ValueError, match=r"recipe cut_adjacent .*removed=\(\)"):
            heal(model, TrainingRows(ids, ids, None, ""), recipe, tmp_path / "i", progress=False)
        with pytest.raises(ValueError, match=r"removed=\[6\]"):
            heal(model, TrainingRows(ids, ids, None, ""), recipe, tmp_path / "i", removed=[6], progress=False)


def test_stages_are_healings_one_after_the_other_on_the_same_rows(tmp_path):
    dense, ids = build("llama"), torch.randint(3, 128, (8, 8), generator=torch.Generator().manual_seed(0))
    rows, options = TrainingRows(ids, ids, None, ""), {"seed": 3, "progress": False}
    recipe = replace(RECIPES["cut_adjacent"], batch=2, seq_len=8, steps=4, warmup_steps=1)
    found = heal_in_stages(dense, [(3,), (1, 3)], rows, recipe, tmp_path / "stages", **options)
    model, half = dense, replace(recipe, steps=2)
    for stage, (now, gone) in enumerate([([3], [3]), ([1], [1, 3])]):
        part = TrainingRows(ids[4 * stage : 4 * stage + 4], ids[4 * stage : 4 * stage + 4], None, "")
        model = heal(remove_layers(model, now), part, half, tmp_path / f"{stage}", removed=gone, **options).model
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in found.model.state_dict().items())
    assert (found.tokens, len(found.losses), found.log[-1]["step"]) == (64, 4, 4)
    for cuts in ([(3,), (1, 2)], [(), (3,)], [(3,), (3, 1), (3, 1, 2)]):
        with pytest.raises(ValueError, match="of 4 steps: each must hold the one before"):
            heal_in_stages(dense, cuts, rows, recipe, tmp_path / "wrong", **options)

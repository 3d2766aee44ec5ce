"""Pruning and healing by turns: a few layers go, the model is healed, the next go (arXiv 2503.06291, 2412.11242)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunelib.healing.recipes import Recipe
from prunelib.healing.train import Healed, heal
from prunelib.models import decoder_layers, remove_layers
from prunelib.text.sequences import TrainingRows


def heal_in_stages(
    dense: PreTrainedModel, cuts: Sequence[Sequence[int]], rows: TrainingRows, recipe: Recipe, folder: Path, **options: Any
) -> Healed:
    """Remove and heal by turns, on the tokens of one healing by `recipe`: each stage has an equal part of its steps and rows.

    cuts: the layers of the dense model that are gone after each stage, each list a part of the next. The warm-up and the
    schedule of the learning rate begin anew at each. (The papers choose the next layers on the healed model; here they are
    chosen before.) options: as `heal` takes them. The log counts the steps of all stages.

    Raises ValueError for cuts that do not grow or steps that they do not divide, and as `heal`.
    """
    if not all(set(one) < set(other) for one, other in zip([(), *cuts], cuts, strict=False)) or recipe.steps % len(cuts):
        raise ValueError(f"cuts={cuts} of {recipe.steps} steps: each must hold the one before and more, and divide the steps")
    share = recipe.steps // len(cuts)
    part = dataclasses.replace(recipe, steps=share, warmup_steps=min(recipe.warmup_steps, share))
    model, gone, log, seconds = dense, (), [], 0.0
    for stage, cut in enumerate(cuts):
        kept = [layer for layer in range(len(decoder_layers(dense))) if layer not in gone]
        model = remove_layers(model, [kept.index(layer) for layer in cut if layer not in gone])
        some = slice(stage * part.rows, (stage + 1) * part.rows)
        tensors = {name: getattr(rows, name) for name in ("input_ids", "labels", "mask")}
        now = dataclasses.replace(rows, **{name: one if one is None else one[some] for name, one in tensors.items()})
        healed = heal(model, now, part, folder / f"stage-{stage}", dense=dense, removed=cut, **options)
        model, gone = healed.model, cut
        log += [{**entry, "step": entry["step"] + stage * share} for entry in healed.log]
        seconds += healed.seconds
    return dataclasses.replace(
        healed, recipe=recipe, log=log, tokens=recipe.tokens, real_tokens=rows.real_tokens(recipe.rows), seconds=seconds
    )

"""Healing: recovery training of a pruned or sliced model, on peft and the Trainer of transformers.

A recipe (`prunelib.healing.recipes`) says how a paper healed, down to the number of tokens; `heal` trains exactly so many, from rows
of tokens (`prunelib.text.sequences`):

    rows = packed_rows(corpus, tokenizer, recipe.rows, recipe.seq_len, seed=0)
    healed = heal(pruned, rows, recipe, folder)
    models.save(healed.model, tokenizer, destination)

What comes out is an ordinary model: adapters are merged into the weights they were trained on. A killed training goes on from
its last checkpoint with the next call, to the same losses and weights as an uninterrupted one; a call that asks for something
else in the same folder is refused. Under ``accelerate launch`` the same code trains on several processes, with the same global
batches: ``accelerate launch -m prunelib.healing.train MODEL OUT --corpus c4 --recipe gromov_qlora`` (``--help`` lists the rest).
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib import models
from prunelib.healing import plainstate
from prunelib.healing.recipes import RECIPES, Recipe, gromov
from prunelib.io import flush, from_root, write_json
from prunelib.lab.provenance import peak_bytes, record
from prunelib.models import UnsupportedModel, decoder_layers, evaluating, final_norm, memory
from prunelib.models.nf4 import quantize
from prunelib.models.sublayers import sublayers_of
from prunelib.text import corpora
from prunelib.text.sequences import IGNORED, TrainingRows, document_rows, packed_rows

GRADIENT_NORM = 1.0  # gradients are scaled down to this norm, the Trainer's default
SECONDS_BETWEEN_CHECKPOINTS = 300.0
TOKENS_IN_A_MICRO_BATCH = 16384  # at most, where the caller does not say
OPTIMIZER, SCHEDULE, GENERATORS = "optimizer.safetensors", "schedule.safetensors", "generators_{}.safetensors"
LOGITS_IN_A_CHUNK = 2**24  # at most so many at once are compared with the dense model's

# -------------------------------------------------------------------------------------------------------- what trains


def linear_names(model: PreTrainedModel, roles: Sequence[str]) -> tuple[str, ...]:
    """Names of the linear maps in the attention or the MLP of every decoder layer, in order.

    Raises UnsupportedModel where a layer has none (GPT-2 has its own kind of map, mixtures of experts fuse theirs).
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, mlp = sublayers_of(model, index)
        # OPT's layer holds the two matrices of its MLP itself.
        mlps = [child for child in layer.children() if child is not attention] if isinstance(mlp, nn.Linear) else [mlp]
        parts = {"attention": [attention], "mlp": mlps}
        for role in roles:
            linear = [names[module] for part in parts[role] for module in part.modules() if isinstance(module, nn.Linear)]
            if not linear:
                raise UnsupportedModel(
                    f"model type {model.config.model_type!r}: the {role} of layer {index} has no linear map to adapt; "
                    "train all weights instead (recipe 'full')"
                )
            found += linear
    return tuple(found)


def _adapter_config(model: PreTrainedModel, recipe: Recipe):
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(linear_names(model, recipe.modules)),
        task_type="CAUSAL_LM",
    )


def _train_adapters(model: PreTrainedModel, recipe: Recipe) -> None:
    with _quiet():
        from peft import inject_adapter_in_model

        config = _adapter_config(model, recipe)
        BASES[recipe.base](model)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _train_all(model: PreTrainedModel, recipe: Recipe) -> None:
    model.requires_grad_(True)


def _train_last_layers(model: PreTrainedModel, recipe: Recipe) -> None:
    layers = decoder_layers(model)
    if recipe.last_layers > len(layers):
        raise ValueError(f"last_layers={recipe.last_layers}, but the model has {len(layers)} layers")
    for module in (*layers[-recipe.last_layers :], final_norm(model), model.get_output_embeddings()):
        module.requires_grad_(True)


TRAINS: dict[str, Callable[[PreTrainedModel, Recipe], None]] = {
    "lora": _train_adapters,
    "all": _train_all,
    "last_layers": _train_last_layers,
}
"""What is trained: each makes a model ready, whose weights all are frozen when it is called."""


BASES: dict[str, Callable[[PreTrainedModel], None]] = {"full": lambda model: None, "nf4": quantize}
"""What adapters are trained on."""

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Schedules of the learning rate, by the Trainer's names: down to 0 at the end along a cosine or a line, or constant."""


def _working_copy(pruned: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A model to train, with frozen weights: those of `pruned` itself under adapters, else a copy in float32.

    Updates are often smaller than a 16-bit weight can show, so weights that are trained themselves need float32.
    """

    def weight(parameter: nn.Parameter) -> Tensor:
        return parameter.detach() if recipe.trains == "lora" else parameter.detach().to(torch.float32, copy=True)

    model = _rebuilt(pruned, {id(p): nn.Parameter(weight(p), requires_grad=False) for p in pruned.parameters()})
    TRAINS[recipe.trains](model, recipe)
    return model


def _rebuilt(model: PreTrainedModel, parameters: dict[int, nn.Parameter]) -> PreTrainedModel:
    """A copy of `model` with other objects for its parameters, by their id; tied ones stay tied."""
    return copy.deepcopy(model, dict(parameters))


def _trained(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by their names in memory, tied ones once. Names on disk may differ (GPT-NeoX's head)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adapter_change(weights: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """What adapters add to the weights: name of the weight → [out, in], float32."""
    scale = recipe.alpha / recipe.rank
    mark = ".lora_A.default.weight"
    return {
        f"{name.removesuffix(mark)}.weight": scale * (weights[name.replace(".lora_A.", ".lora_B.")] @ first)
        for name, first in weights.items()
        if name.endswith(mark)
    }


def _healed_model(pruned: PreTrainedModel, weights: Mapping[str, Tensor], recipe: Recipe) -> PreTrainedModel:
    """`pruned` with the trained weights, or with adapters merged, in evaluation mode; it shares the weights that are as before.

    Adapters trained on 4-bit weights are merged into the full-precision ones.
    """
    adapters = recipe.trains == "lora"
    changed = _adapter_change(weights, recipe) if adapters else weights
    parameters = {}
    for name, old in pruned.named_parameters():
        value = old.detach()
        if name in changed:
            change = changed[name].to(value.device)
            value = (value.float() + change if adapters else change).to(value.dtype)
        parameters[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
    return _rebuilt(pruned, parameters).eval()


# --------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class _Teacher:
    """The dense model in distillation, and which of its states belong to which of the pruned model's.

    pairs: (index in the pruned model's list of hidden states, index in the dense one's); both lists hold the input of every
    layer, and what the final norm gives.
    """

    model: PreTrainedModel
    pairs: tuple[tuple[int, int], ...]
    autocast: bool


def _shifted(labels: Int64[Tensor, "row position"]) -> Int64[Tensor, "row position"]:
    """At each position the token that follows it."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _next_token(model: nn.Module, inputs: Mapping[str, Tensor], recipe: Recipe, teacher: _Teacher | None) -> Tensor:
    """Sum of the cross-entropies of a batch, in nats."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), _shifted(inputs["labels"]).flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _distillation(model: nn.Module, inputs: Mapping[str, Tensor], recipe: Recipe, teacher: _Teacher | None) -> Tensor:
    """Sum over a batch of temperature² KL(dense ‖ pruned), plus the weighted distance of hidden states."""
    arguments = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs.get("attention_mask"),
        "use_cache": False,
        "output_hidden_states": bool(teacher.pairs),
    }
    with torch.no_grad(), torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=teacher.autocast):
        dense = teacher.model(**arguments)
    output = model(**arguments)
    counts = _shifted(inputs["labels"]) != IGNORED
    loss = kl_divergence(output.logits, dense.logits, counts, recipe.temperature)
    if teacher.pairs:
        distances = [
            _relative_distance(output.hidden_states[mine], dense.hidden_states[theirs], counts)
            for mine, theirs in teacher.pairs
        ]
        loss = loss + recipe.hidden_weight * torch.stack(distances).mean()
    return loss


def kl_divergence(
    logits: Float[Tensor, "row position vocabulary"],
    dense: Float[Tensor, "row position vocabulary"],
    counts: Bool[Tensor, "row position"],
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """temperature² × sum over the positions that count of KL(dense ‖ model) in nats, both softened by the temperature.

    Some positions at a time: of the logits in float32 and their softmax, no more than `LOGITS_IN_A_CHUNK` are in memory.
    """

    def part(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
        mine, theirs = (torch.log_softmax(x.float() / temperature, dim=-1) for x in (mine, theirs))
        return (functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=-1) * weight).sum()

    size = max(1, LOGITS_IN_A_CHUNK // logits.shape[-1])
    pieces = (logits.flatten(0, 1).split(size), dense.flatten(0, 1).split(size), counts.flatten().float().split(size))
    total = sum(checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in zip(*pieces, strict=True))
    return total * temperature**2


def _relative_distance(
    states: Float[Tensor, "row position hidden"],
    dense: Float[Tensor, "row position hidden"],
    counts: Bool[Tensor, "row position"],
) -> Float[Tensor, ""]:
    """Sum over the positions that count of |states − dense|² / |dense|²."""
    mine, theirs = states.float(), dense.float()
    error = (mine - theirs).square().sum(dim=-1) / theirs.square().sum(dim=-1).clamp_min(1e-12)
    return (error * counts).sum()


OBJECTIVES: dict[str, Callable[[nn.Module, Mapping[str, Tensor], Recipe, _Teacher | None], Tensor]] = {
    "next_token": _next_token,
    "distillation": _distillation,
}
"""What is minimized: each gives the sum over the trained positions of a batch, to be divided by their number."""


def _matched_states(pruned: PreTrainedModel, dense: PreTrainedModel, cut: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Which hidden states correspond from the cut on: pruned layer j, which was layer `kept[j]`, reads what that one read."""
    n_dense, n_pruned = len(decoder_layers(dense)), len(decoder_layers(pruned))
    kept = [index for index in range(n_dense) if index not in set(cut)]
    if len(kept) != n_pruned or not cut or not all(0 <= index < n_dense for index in cut):
        raise ValueError(
            f"cut={tuple(cut)} does not lead from {n_dense} to {n_pruned} layers; to match hidden states, give the indices of "
            "the layers that were removed"
        )
    if pruned.config.hidden_size != dense.config.hidden_size or pruned.config.model_type != dense.config.model_type:
        raise ValueError("hidden states of a sliced model lie in other bases than the dense model's: take hidden_weight=0")
    behind = [(new, old) for new, old in enumerate(kept) if old > min(cut)]
    return (*behind, (n_pruned, n_dense))


# -------------------------------------------------------------------------------------------------------- fingerprints


class HealingError(RuntimeError):
    """A folder holds another training than the one asked for, or an adapter belongs to another model."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells a model from others: its kind, its number of layers, and hashes of the shapes and of some of its weights.

    Of each weight up to 256 evenly spaced values count, rounded to bfloat16, so that a model loaded in 16 bits is the same one.
    """
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        shapes.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16)
        values.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return {
        "model_type": model.config.model_type,
        "layers": len(decoder_layers(model)),
        "shapes": shapes.hexdigest(),
        "weights": values.hexdigest(),
    }


def _differences(before: Mapping, now: Mapping, path: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        mine, theirs = now.get(key), before.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(theirs, mine, f"{path}{key}.")
        elif mine != theirs:
            yield f"{path}{key} is {mine!r}, was {theirs!r}"


def load_adapter(base: PreTrainedModel, folder: str | os.PathLike):
    """The adapter that `heal` left in its `folder`, on the pruned model it was trained on: a peft model in evaluation mode.

    peft would put an adapter of a pruned model onto the first layers of the dense one without a word; here `base` is compared
    with the fingerprint beside the adapter first. `base` gets the adapter's modules.

    Raises HealingError when `base` is another model, or `folder` holds no adapter.
    """
    from peft import PeftModel

    adapter = Path(folder) / "adapter"
    if not (adapter / "base.json").is_file():
        raise HealingError(f"no adapter in {str(folder)!r}: healing with a LoRA recipe leaves one when it has finished")
    expected = json.loads((adapter / "base.json").read_text(encoding="utf-8"))
    if not (adapter / "adapter_model.safetensors").is_file():
        raise HealingError(f"no adapter_model.safetensors in {str(adapter)!r}: pickled weights are not read, heal again")
    differences = list(_differences(expected, fingerprint(base)))
    if differences:
        raise HealingError(
            f"the adapter in {str(folder)!r} was trained on another model: {'; '.join(differences)}. "
            f"Its own one is in {str(Path(folder) / 'base')!r}"
        )
    return PeftModel.from_pretrained(base, adapter).eval()


# ------------------------------------------------------------------------------------------------------------- healing


@dataclass(frozen=True)
class Healed:
    """A healed model and how it came about.

    Attributes:
        model: an ordinary model in evaluation mode, adapters merged; weights that were not trained are those of the pruned one,
            shared.
        log: one entry per step (``step``, ``tokens`` read so far, ``loss`` in nats per trained position before the update,
            ``learning_rate``, ``gradient_norm``), and one with ``measures`` at each step measured.
        tokens: read in the training that `model` comes from; real_tokens: without padding; targets: positions trained.
        trainable: number of trained weights.
        seconds: of training, without measuring. peak_bytes: largest memory of the process (CPU) or the device.
        stopped: None, or at which step and why the training ended before its budget.
    """

    model: PreTrainedModel
    recipe: Recipe
    log: tuple[dict[str, Any], ...]
    tokens: int
    real_tokens: int
    targets: int
    trainable: int
    seconds: float
    peak_bytes: int
    stopped: str | None = None

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [entry["loss"] for entry in self.log if "loss" in entry]

    def measured(self, name: str) -> dict[int, float]:
        """One measure: step → value."""
        return {entry["step"]: entry["measures"][name] for entry in self.log if name in entry.get("measures", ())}

    def summary(self) -> dict[str, Any]:
        """Everything but the model, as plain data."""
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "model"}
        return found | {"recipe": asdict(self.recipe), "log": list(self.log)}


@memory.says_what_fits("micro_batch", "micro_batch=1, gradient_checkpointing=True or bf16=True")
def heal(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    folder: str | os.PathLike,
    *,
    dense: PreTrainedModel | None = None,
    cut: Sequence[int] | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    measure_at: Sequence[int] = (),
    save_every: int | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    progress: bool = True,
) -> Healed:
    """Train a pruned or sliced model by a recipe, on exactly `recipe.tokens` tokens, where the model is (CPU or one GPU).

    Under ``accelerate launch`` every process calls this with the same arguments, its model on its own device. The models passed
    in are not changed, nor are the global generators of random numbers.

    Args:
        rows: at least `recipe.rows` rows of `recipe.seq_len`; the first ones are read, each once.
        folder: where checkpoints and the result are kept. A call with the same arguments goes on from the last checkpoint, or
            returns the finished result; `measure` is not compared, as functions cannot be.
        dense: the teacher of a distillation, on the same device; no other recipe looks at it.
        cut: indices of the layers that were removed from `dense`; needed where `recipe.hidden_weight` is not 0.
        micro_batch: rows in one forward pass; None takes as many as have 16,384 tokens. Batch = micro_batch x processes x
            accumulated passes.
        measure: called with the model in evaluation mode and without derivatives after the steps `measure_at` (0: before
            training); what it returns goes to the log. Under 4 bits it sees the 4-bit model.
        save_every: steps between checkpoints; None saves every five minutes.
        bf16: compute in bfloat16 (autocast).
        gradient_checkpointing: recompute activations instead of keeping them.

    Returns: `Healed`. A loss or gradient that is NaN or infinite ends the training; the model is then the last one whose loss
    was finite, and `Healed.stopped` says where that was.

    Raises ValueError for rows, sizes or models that do not fit the recipe, UnsupportedModel where there is nothing to adapt,
    and HealingError when `folder` holds another training.
    """
    from transformers import TrainingArguments

    folder = Path(folder)
    _check(pruned, rows, recipe, dense, measure, measure_at, save_every)
    teacher = None
    if OBJECTIVES[recipe.objective] is _distillation:
        pairs = _matched_states(pruned, dense, cut or ()) if recipe.hidden_weight else ()
        teacher = _Teacher(dense, pairs, bf16)
    with _generators_kept(), evaluating(dense) if dense is not None else contextlib.nullcontext():
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            use_cpu=pruned.device.type == "cpu",
            max_steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=SCHEDULES[recipe.schedule],
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            optim="adamw_torch_fused",
            max_grad_norm=0.0,  # `_Watch` does it, and so knows the norm
            bf16=bf16,
            seed=seed,
            save_strategy="no",  # `_Watch` says when
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            average_tokens_across_devices=False,  # `compute_loss` does it
            ddp_find_unused_parameters=False,  # whatever is trained is used in every step
            remove_unused_columns=False,
            dataloader_pin_memory=pruned.device.type != "cpu",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # several GPUs are several processes, never threads of one
        arguments.per_device_train_batch_size = _micro_batch(recipe, arguments.world_size, micro_batch)
        arguments.gradient_accumulation_steps = recipe.batch // (arguments.per_device_train_batch_size * arguments.world_size)
        request = {
            "recipe": asdict(recipe) | {"modules": list(recipe.modules)},
            "rows": rows.sha256,
            "base": fingerprint(pruned) | {"dtype": str(pruned.dtype)},
            "dense": None if teacher is None else fingerprint(dense) | {"pairs": [list(pair) for pair in teacher.pairs]},
            "seed": seed,
            "micro_batch": arguments.per_device_train_batch_size,
            "processes": arguments.world_size,
            "device": pruned.device.type,
            "measure_at": sorted(set(measure_at)),
            "bf16": bf16,
            "gradient_checkpointing": gradient_checkpointing,
        }
        finished = _opened(folder, request)
        arguments.distributed_state.wait_for_everyone()  # nobody writes before everybody has looked
        if finished is None:
            training = _Training(recipe, rows, teacher, measure, frozenset(measure_at), save_every, progress, seed)
            finished = _train(pruned, training, arguments, folder, request, gradient_checkpointing)
    weights = load_file(folder / "trained.safetensors")
    return Healed(model=_healed_model(pruned, weights, recipe), recipe=recipe, **finished | {"log": tuple(finished["log"])})


def _check(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    dense: PreTrainedModel | None,
    measure: Callable | None,
    measure_at: Sequence[int],
    save_every: int | None,
) -> None:
    """Everything that can be seen to be wrong before work is spent."""
    decoder_layers(pruned)
    config = pruned.config.get_text_config(decoder=True)
    if rows.input_ids.shape[1] != recipe.seq_len:
        raise ValueError(
            f"rows have {rows.input_ids.shape[1]} tokens, recipe {recipe.name} reads rows of {recipe.seq_len}: draw them anew, "
            "or replace(recipe, seq_len=…)"
        )
    if len(rows) < recipe.rows:
        raise ValueError(
            f"recipe {recipe.name} reads {recipe.steps} x {recipe.batch} = {recipe.rows} rows ({recipe.tokens:,} tokens), "
            f"there are {len(rows)}: draw more, or replace(recipe, steps={len(rows) // recipe.batch})"
        )
    if recipe.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"recipe {recipe.name} trains on 4-bit weights, which need the library bitsandbytes: install it")
    longest = getattr(config, "max_position_embeddings", None)
    if longest and recipe.seq_len > longest:
        raise ValueError(f"seq_len={recipe.seq_len}, but the model was made for at most {longest} tokens: take shorter rows")
    low, high = int(rows.input_ids.min()), int(rows.input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token {high if low >= 0 else low} is not in the model's vocabulary of {config.vocab_size}: the rows come from "
            "another tokenizer"
        )
    if OBJECTIVES[recipe.objective] is _distillation:
        if dense is None:
            raise ValueError(f"recipe {recipe.name} distils: give the dense model as dense=")
        if dense.device != pruned.device:
            raise ValueError(f"the dense model is on {dense.device}, the pruned one on {pruned.device}: move one of them")
        if dense.config.get_text_config(decoder=True).vocab_size != config.vocab_size:
            raise ValueError("the dense model has another vocabulary than the pruned one: distil from the model it came from")
    outside = [step for step in measure_at if not 0 <= step <= recipe.steps]
    if outside or (measure is None and measure_at):
        raise ValueError(
            f"measure_at={list(measure_at)}: give a function measure, and steps between 0 and the recipe's {recipe.steps}"
        )
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every={save_every}: at least 1 step, or None for every five minutes")


def _micro_batch(recipe: Recipe, processes: int, asked: int | None) -> int:
    if recipe.batch % processes:
        raise ValueError(
            f"recipe {recipe.name}: batch={recipe.batch} rows cannot be shared by {processes} processes: take a multiple, or "
            "another number of processes"
        )
    share = recipe.batch // processes
    if asked is None:
        fits = max(1, TOKENS_IN_A_MICRO_BATCH // recipe.seq_len)
        return max(size for size in range(1, share + 1) if share % size == 0 and size <= fits)
    if asked < 1 or share % asked:
        raise ValueError(
            f"micro_batch={asked} does not divide the {share} rows of each of {processes} processes (batch={recipe.batch})"
        )
    return asked


def _generators() -> dict[str, Any]:
    """The states of all random generators of this process: Python's, numpy's, torch's and its GPUs'."""
    numpy = np.random.get_state()  # noqa: NPY002 (dropout and the Trainer use the global ones)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state(), "cuda": cuda}


def _set_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["cpu"])
    # On a machine with fewer GPUs than before they begin anew.
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Global generators of random numbers are afterwards as before."""
    before = _generators()
    try:
        yield
    finally:
        _set_generators(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of loading and saving, and without bitsandbytes' advice to fetch faster kernels."""
    from transformers.utils import logging as bars

    advice, shown = logging.getLogger("bitsandbytes"), bars.is_progress_bar_enabled()
    level = advice.level
    advice.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        advice.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _opened(folder: Path, request: dict) -> dict | None:
    """The finished result in `folder`, if there is one. Raises HealingError when the folder holds something else."""
    asked = folder / "request.json"
    if asked.is_file():
        differences = list(_differences(json.loads(asked.read_text(encoding="utf-8")), request))
        if differences:
            raise HealingError(
                f"{str(folder)!r} holds another training: {'; '.join(differences)}. Choose another folder, or delete this one"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise HealingError(f"{str(folder)!r} is not empty and holds no training of this kind; choose another folder")
    result = folder / "result.json"
    return json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class _Training:
    """What `heal` was asked for, as far as the loop needs it."""

    recipe: Recipe
    rows: TrainingRows
    teacher: _Teacher | None
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None
    measure_at: frozenset[int]
    save_every: int | None
    progress: bool
    seed: int


class _Rows(Dataset):
    """The rows that a recipe reads, as the Trainer takes them."""

    def __init__(self, rows: TrainingRows, count: int):
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.rows.input_ids[index], "labels": self.rows.labels[index]}
        return row if self.rows.mask is None else row | {"attention_mask": self.rows.mask[index].long()}


class _NotFinite(Exception):
    """Ends a training; the message says where and why."""


def _train(
    pruned: PreTrainedModel, training: _Training, arguments, folder: Path, request: dict, gradient_checkpointing: bool
) -> dict:
    """Train from the last checkpoint, or from the beginning, and write and return the result."""
    recipe, main = training.recipe, arguments.should_save
    torch.manual_seed(training.seed)  # the adapters' first values
    model = _working_copy(pruned, recipe)
    if main:
        write_json(folder / "request.json", request)  # first: a folder without one is taken for somebody else's
        if recipe.trains == "lora" and not (folder / "base").is_dir():
            with _quiet():
                models.save(pruned, None, folder / "base")
    if gradient_checkpointing:
        # The older name of the same thing where the newer one is not there yet.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if pruned.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pruned.device)
    with _quiet():
        trainer_class, watch_class = _classes()
    watch = watch_class(training, folder / "checkpoints")
    trainer = trainer_class(watch, model=model, args=arguments, train_dataset=_Rows(training.rows, recipe.rows))
    stopped = None
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "checkpoints"))
    except _NotFinite as error:
        stopped = str(error)
    finally:
        watch.bar.close()
    trained = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model).items()}
    steps = watch.good_steps
    result = {
        "log": watch.log,
        "tokens": steps * recipe.batch * recipe.seq_len,
        "real_tokens": training.rows.real_tokens(steps * recipe.batch),
        "targets": training.rows.targets(0, steps * recipe.batch),
        "trainable": sum(weight.numel() for weight in trained.values()),
        "seconds": watch.seconds,
        "peak_bytes": peak_bytes(str(pruned.device)),
        "stopped": stopped,
    }
    if recipe.base == "nf4":
        merged = _healed_model(pruned, trained, recipe)
        measures = {"quantized_loss": _mean_loss(model, training), "merged_loss": _mean_loss(merged, training)}
        watch.log.append(_entry(recipe, steps) | {"measures": measures})
    if main:
        _write_result(pruned, trained, result, recipe, folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _entry(recipe: Recipe, step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * recipe.batch * recipe.seq_len}


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, training: _Training) -> float:
    """Next-token loss on the last batch that was trained, in evaluation mode."""
    rows, recipe = training.rows, training.recipe
    model.eval()
    total = 0.0
    start = recipe.rows - recipe.batch
    for index in range(start, recipe.rows):
        row = {key: value[None].to(model.device) for key, value in _Rows(rows, recipe.rows)[index].items()}
        total += _next_token(model, row, recipe, None).item()
    return total / max(1, rows.targets(start, recipe.rows))


def _write_result(pruned: PreTrainedModel, trained: dict[str, Tensor], result: dict, recipe: Recipe, folder: Path) -> None:
    """The result last, so that it is there only when everything is; then the checkpoints have served."""
    save_file(trained, folder / "trained.safetensors")
    if recipe.trains == "lora":
        adapter = folder / "adapter"
        adapter.mkdir(exist_ok=True)
        config = _adapter_config(pruned, recipe)
        config.base_model_name_or_path = str((folder / "base").resolve())  # never the dense one
        config.inference_mode = True
        config.save_pretrained(adapter)
        weights = {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in trained.items()}
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(adapter / "base.json", fingerprint(pruned))
        flush(adapter)
    flush(folder / "trained.safetensors")
    write_json(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint: one that was being written when the process died has no log yet."""
    found = [path.parent for path in folder.glob("checkpoint-*/log.json")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _state(path: Path) -> Any:
    try:
        return plainstate.load(path)
    except ValueError as error:
        raise HealingError(f"the checkpoint {str(path.parent)!r} cannot be gone on from: {error}; delete it") from error


@functools.cache
def _classes() -> tuple[type, type]:
    """Trainer and callback; made when first needed, as importing their base classes takes seconds."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Watch(TrainerCallback):
        """Logs every step, measures, decides when to save, and stops when something is not finite."""

        def __init__(self, training: _Training, folder: Path):
            self.training, self.folder = training, folder
            self.trainer: Any = None
            self.log: list[dict[str, Any]] = []
            self.good_steps = 0  # of the weights that are there
            self.loss = torch.zeros(())
            self.kept: list[Tensor] = []  # the last weights whose loss was finite
            self.before = 0.0  # seconds of earlier calls
            self.bar = tqdm(disable=True)

        @property
        def seconds(self) -> float:
            return self.before + time.perf_counter() - self.started

        def on_train_begin(self, args, state, control, **_: Any) -> None:
            recipe = self.training.recipe
            # Every process its own dropout. A resumed training gets its generators from the checkpoint, after this.
            torch.manual_seed(self.training.seed + args.process_index)
            self.parameters = list(_trained(self.trainer.model).values())
            self.loss = torch.zeros((), device=args.device)
            self.started = self.saved = time.perf_counter()
            if state.global_step:
                checkpoint = self.folder / f"checkpoint-{state.global_step}"
                saved = json.loads((checkpoint / "log.json").read_text(encoding="utf-8"))
                self.log, self.before, self.good_steps = saved["log"], saved["seconds"], state.global_step
                before = load_file(checkpoint / "before.safetensors")
                self.kept = [before[name].to(p.device) for name, p in _trained(self.trainer.model).items()]
            disable = not (self.training.progress and args.should_save)
            self.bar = tqdm(
                total=recipe.steps, initial=state.global_step, desc=f"heal ({recipe.name})", unit="step", disable=disable
            )
            if not state.global_step:
                self._measure(0)

        def on_pre_optimizer_step(self, args, state, control, **_: Any) -> None:
            step = state.global_step + 1
            norm = nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
            loss, norm, due = self._agreed(norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                if not math.isfinite(loss) and self.kept:
                    # It was the last update that spoilt the weights.
                    torch._foreach_copy_([parameter.detach() for parameter in self.parameters], self.kept)
                    self.good_steps -= 1
                raise _NotFinite(f"step {step}: {what}; kept are the weights after step {self.good_steps}")
            if self.kept:
                torch._foreach_copy_(self.kept, [parameter.detach() for parameter in self.parameters])
            else:
                self.kept = [parameter.detach().clone() for parameter in self.parameters]
            rate = float(self.trainer.lr_scheduler.get_last_lr()[0])
            self.log.append(_entry(self.training.recipe, step) | {"loss": loss, "learning_rate": rate, "gradient_norm": norm})
            self.due = bool(due)

        def _agreed(self, norm: Tensor) -> list[float]:
            """Loss, norm of the gradient, and whether a checkpoint is due, the same in every process: one exchange a step."""
            due = time.perf_counter() - self.saved > SECONDS_BETWEEN_CHECKPOINTS
            mine = torch.stack([self.loss, norm.to(self.loss), self.loss.new_tensor(float(due))])
            self.loss = torch.zeros_like(self.loss)
            return self.trainer.accelerator.reduce(mine, reduction="mean").tolist()

        def on_step_end(self, args, state, control, **_: Any) -> None:
            self.good_steps = state.global_step
            self.bar.update()
            self.bar.set_postfix(loss=f"{self.log[-1]['loss']:.4f}", refresh=False)
            self._measure(state.global_step)
            every = self.training.save_every
            due = self.due if every is None else state.global_step % every == 0
            control.should_save = due and state.global_step < state.max_steps

        def on_save(self, args, state, control, **_: Any) -> None:
            current = self.folder / f"checkpoint-{state.global_step}"
            self.trainer.accelerator.wait_for_everyone()
            if args.should_save:
                flush(current)  # a checkpoint with a log is complete, after a power cut too
                write_json(current / "log.json", {"log": self.log, "seconds": self.seconds})
                for path in self.folder.glob("checkpoint-*"):
                    if path != current:
                        shutil.rmtree(path, ignore_errors=True)
            self.saved = time.perf_counter()

        def _measure(self, step: int) -> None:
            if step not in self.training.measure_at:
                return
            started = time.perf_counter()
            if self.trainer.args.should_save:
                model = self.trainer.model
                with _generators_kept(), evaluating(model), torch.no_grad():
                    found = {name: float(value) for name, value in self.training.measure(model).items()}
                # A measure that overflows is left out: JSON has no number for it.
                finite = {name: value for name, value in found.items() if math.isfinite(value)}
                self.log.append(_entry(self.training.recipe, step) | {"measures": finite})
            self.trainer.accelerator.wait_for_everyone()
            self.before -= time.perf_counter() - started

    class HealingTrainer(Trainer):
        """The Trainer with rows in their order, its loss normalized over the whole batch, and trained weights alone on disk."""

        def __init__(self, watch: Watch, **arguments: Any):
            # A loss function of one's own tells the Trainer that the loss needs no division by the accumulated passes;
            # `compute_loss` comes before it.
            super().__init__(**arguments, compute_loss_func=_next_token, callbacks=[watch])
            self.remove_callback(PrinterCallback)
            self.watch = watch
            watch.trainer = self

        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            training = self.watch.training
            start = self.state.global_step * training.recipe.batch
            # Known to every process without asking: the positions trained in the whole batch.
            targets = max(1, training.rows.targets(start, start + training.recipe.batch))
            total = OBJECTIVES[training.recipe.objective](model, inputs, training.recipe, training.teacher)
            # Gradients are averaged over the processes, so each sums its share and multiplies by their number.
            loss = total / targets * self.args.world_size
            self.watch.loss = self.watch.loss + loss.detach()
            return loss

        def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
            return None  # `compute_loss` knows

        def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
            # By their names in memory and without the frozen ones; the Trainer's way loses GPT-NeoX's head on resuming.
            if self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                weights = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(self.model).items()}
                save_file(weights, Path(output_dir) / "trained.safetensors")
                save_file(dict(zip(weights, self.watch.kept, strict=True)), Path(output_dir) / "before.safetensors")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            weights = load_file(Path(resume_from_checkpoint) / "trained.safetensors")
            parameters = _trained(self.model)
            if weights.keys() != parameters.keys():
                raise HealingError(f"{resume_from_checkpoint!r} holds other weights than are trained: delete it")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])

        # The Trainer's own checkpoints are pickled; these say the same in safetensors.

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.args.should_save:
                plainstate.save(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
                plainstate.save(Path(output_dir) / SCHEDULE, self.lr_scheduler.state_dict())

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                self.optimizer.load_state_dict(_state(Path(checkpoint) / OPTIMIZER))
                self.lr_scheduler.load_state_dict(_state(Path(checkpoint) / SCHEDULE))

        def _save_rng_state(self, output_dir: str) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            plainstate.save(Path(output_dir) / GENERATORS.format(self.args.process_index), _generators())

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                _set_generators(_state(Path(checkpoint) / GENERATORS.format(self.args.process_index)))

        def _save_scaler(self, output_dir: str) -> None:
            return  # bfloat16 and float32 need none

        def _load_scaler(self, checkpoint: str | None) -> None:
            return

        def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
            return 0  # not needed, and counted anew for every batch

        def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float | None:
            return grad_norm

    return HealingTrainer, Watch


# -------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prunelib.healing.train",
        description="Heal a pruned or sliced model and save it as an ordinary checkpoint. For several GPUs: accelerate launch "
        "-m prunelib.healing.train … A second call with the same arguments goes on where a killed one ended.",
    )
    parser.add_argument("model", help="folder of the pruned model, with its tokenizer")
    parser.add_argument("out", type=Path, help="folder for checkpoints, healing.json and the healed model (OUT/healed)")
    parser.add_argument("--recipe", default="lora", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--gromov", metavar="MODEL", help="the recipe of that paper for one of its models, as Llama-2-13B")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe, as steps=64")
    parser.add_argument("--corpus", default="pydocs", help="a corpus of prunelib.text.corpora, or a text file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", help="offline copy of the corpus")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--rows", choices=sorted(ROWS), default="packed", help="one document a row is Alpaca's setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", help="folder of the dense model, for distillation")
    parser.add_argument("--cut", type=int, nargs="*", help="layers removed from the dense model, to match hidden states")
    parser.add_argument("--dtype", choices=sorted(models.DTYPES), default="float32", help="of the weights in memory")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one, for each process its own")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; by default five minutes")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)

    process = int(os.environ.get("LOCAL_RANK", 0))
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{process}"
    try:
        base = gromov(given.gromov) if given.gromov else RECIPES[given.recipe]
        recipe = dataclasses.replace(base, **dict(_setting(text) for text in given.set))
        tokenizer = models.load_tokenizer(given.model)
        corpus = corpora.load(given.corpus, given.split, data_dir=given.data_dir, max_documents=given.max_documents)
        quiet = given.quiet or process > 0
        rows = ROWS[given.rows](corpus, tokenizer, recipe.rows, recipe.seq_len, given.seed, progress=not quiet)
        pruned = models.load(given.model, dtype=given.dtype, device=device)
        dense = models.load(given.dense, dtype=given.dtype, device=device) if given.dense else None
        healed = heal(
            pruned,
            rows,
            recipe,
            given.out / "training",
            dense=dense,
            cut=given.cut,
            seed=given.seed,
            micro_batch=given.micro_batch,
            save_every=given.save_every,
            bf16=given.bf16,
            gradient_checkpointing=given.gradient_checkpointing,
            progress=not quiet,
        )
        if int(os.environ.get("RANK", 0)) == 0:
            models.save(healed.model, tokenizer, given.out / "healed", overwrite=True)
            provenance = record(data={corpus.label: corpus.sha256}, model={"base": from_root(given.model)}, device=device)
            write_json(given.out / "healing.json", healed.summary() | {"rows": rows.source, "provenance": provenance})
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


ROWS = {"packed": packed_rows, "documents": document_rows}


def _setting(text: str) -> tuple[str, Any]:
    """``name=value`` of a setting of `Recipe`; numbers are numbers, several words are separated by commas."""
    name, _, value = text.partition("=")
    if name not in {item.name for item in dataclasses.fields(Recipe)} or not value:
        raise ValueError(f"--set {text}: give NAME=VALUE with a setting of a recipe, as steps=64")
    if name == "modules":
        return name, tuple(value.split(","))
    if value == "none":
        return name, None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return name, kind(value)
    return name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

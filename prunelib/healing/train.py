"""Healing: recovery training of a pruned or sliced model, on peft and the Trainer of transformers.

    rows = packed_rows(corpus, tokenizer, recipe.rows, recipe.seq_len, seed=0)
    healed = heal(pruned, rows, recipe, folder)
    models.save(healed.model, tokenizer, destination)

Under ``accelerate launch`` the same code trains on several processes, with the same global batches.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prunelib.healing.distillation import distillation_loss
from prunelib.healing.recipes import Recipe
from prunelib.io import write_json
from prunelib.models import UnsupportedModel, check_vocabulary, decoder_layers, evaluating, final_norm
from prunelib.models.layers import layers_path, sublayers_of
from prunelib.models.quantization import to_format
from prunelib.text.sequences import TrainingRows

TOKENS_IN_A_MICRO_BATCH = 16384  # at most, where the caller does not say
STATE = "trainer_state.json"  # what the Trainer writes last to a checkpoint


class HealingError(RuntimeError):
    """A folder holds another training than the one asked for, or a loss is not finite."""


@dataclass(frozen=True)
class Healed:
    """A healed model and its training.

    `log` has one entry per step (``step``, ``loss`` in nats per trained position before the update, ``learning_rate``,
    ``grad_norm``, ``seconds`` of training so far), and one with ``measures`` at each step measured. `tokens` were read, padding
    included (`real_tokens`: without it), in so many `seconds`, measuring left out; `trainable` weights were trained.
    """

    model: PreTrainedModel
    recipe: Recipe
    log: list[dict[str, Any]]
    tokens: int
    real_tokens: int
    trainable: int
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The training loss of every step."""
        return [entry["loss"] for entry in self.log if "loss" in entry]


def heal(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    folder: str | os.PathLike,
    *,
    dense: PreTrainedModel | None = None,
    removed: Collection[int] = (),
    seed: int = 0,
    micro_batch: int | None = None,
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    measure_at: Collection[int] = (),
    save_every: int = 50,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    progress: bool = True,
) -> Healed:
    """Train a pruned or sliced model by a recipe, on exactly `recipe.tokens` tokens, where the model is (CPU or one GPU).

    The result is an ordinary model in evaluation mode, adapters merged. The models passed in are not changed, nor are torch's
    generators of random numbers.

    Args:
        rows: at least `recipe.rows` rows of `recipe.seq_len`; the first ones are read, each once.
        folder: for a checkpoint every `save_every` steps. A call with the same arguments resumes from the last one, to the same
            losses and weights as without the interruption, or returns the finished result; `measure` is not compared.
        dense: the teacher of a distillation, on the same device; no other recipe looks at it.
        removed: layers of the dense model that are gone, for a recipe that trains those beside them; no other looks at it.
        micro_batch: rows in one forward pass; by default as many as have 16,384 tokens.
        measure: called with the model in evaluation mode and without derivatives after the steps `measure_at` (0: before
            training); what it returns goes to the log. Under 4 bits it sees the 4-bit model.
        bf16: compute in bfloat16 (autocast).

    Raises ValueError for rows, sizes or models that do not fit the recipe, UnsupportedModel where there is nothing to adapt,
    and HealingError when `folder` holds another training, or when a loss or gradient is NaN or infinite.
    """
    folder = Path(folder).absolute()
    check_training(pruned, rows, recipe, dense, measure_at, removed)
    teacher = dense if recipe.objective == "distillation" else None
    settings = {"seed": seed, "save_steps": save_every, "bf16": bf16, "gradient_checkpointing": gradient_checkpointing or None}
    arguments = _arguments(recipe, pruned, micro_batch, output_dir=str(folder), **settings)
    request = {f"recipe.{name}": value for name, value in dataclasses.asdict(recipe).items()} | {
        "rows": rows.sha256,
        "base": [str(pruned.dtype), fingerprint(pruned)],
        "dense": None if teacher is None else fingerprint(teacher),
        "device": pruned.device.type,
        "measure_at": sorted(measure_at),
        "removed": sorted(removed) if recipe.trains == "beside_cuts" else None,
    }
    request |= {name: getattr(arguments, name) for name in ("seed", "per_device_train_batch_size", "world_size", "bf16")}
    with arguments.main_process_first(local=False):
        _claim(folder, request)
    with torch.random.fork_rng([pruned.device] if pruned.device.type == "cuda" else []):
        callbacks = [Watch(measure, measure_at), *([Bar()] if progress else [])]
        torch.manual_seed(seed)  # the adapters' first values
        model = working_copy(pruned, recipe, removed)
        trainable = _train(model, rows, recipe, teacher, callbacks, arguments)
        model = _healed_model(pruned, recipe, folder / f"checkpoint-{recipe.steps}")
    log = json.loads((folder / f"checkpoint-{recipe.steps}" / STATE).read_text(encoding="utf-8"))["log_history"]
    return Healed(model, recipe, log, recipe.tokens, rows.real_tokens(recipe.rows), trainable, _seconds(log))


def check_training(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    dense: PreTrainedModel | None = None,
    measure_at: Collection[int] = (),
    removed: Collection[int] = (),
) -> None:
    """Raise ValueError, before any work, for rows, sizes or models that do not fit the recipe."""
    count, length = rows.input_ids.shape
    longest = getattr(pruned.config.get_text_config(decoder=True), "max_position_embeddings", None)
    layers = len(decoder_layers(pruned))
    if length != recipe.seq_len or count < recipe.rows:
        raise ValueError(
            f"recipe {recipe.name} reads {recipe.steps} x {recipe.batch} = {recipe.rows} rows of {recipe.seq_len} tokens, but "
            f"there are {count} of {length}: draw others, or replace(recipe, steps={count // recipe.batch}, seq_len={length})"
        )
    if longest and length > longest:
        raise ValueError(f"seq_len={length}, but the model was made for at most {longest} tokens: take shorter rows")
    check_vocabulary(pruned, rows.input_ids)
    if (recipe.last_layers or 0) > layers:
        raise ValueError(f"last_layers={recipe.last_layers}, but the model has {layers} layers")
    cut = set(removed) & set(range(layers + len(removed)))
    if recipe.trains == "beside_cuts" and not 0 < len(removed) == len(cut):
        raise ValueError(f"recipe {recipe.name} trains beside a cut: removed={removed} is no list of layers that went out")
    if not set(measure_at) <= set(range(recipe.steps + 1)):
        raise ValueError(f"measure_at={measure_at}: take steps from 0 to the recipe's {recipe.steps}")
    sizes = {model.get_input_embeddings().num_embeddings for model in (pruned, dense or pruned)}
    if recipe.objective == "distillation" and (dense is None or len(sizes) > 1):
        raise ValueError(f"recipe {recipe.name} distils: give dense=, the model that this one was made from")


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of up to 256 values of every weight, rounded: a model loaded in 16 bits is the same one."""
    flat = {name: weight.detach().flatten() for name, weight in model.named_parameters()}
    samples = {name: weight[:: max(1, len(weight) // 256)].to("cpu", torch.bfloat16) for name, weight in flat.items()}
    return hashlib.sha256(save(samples)).hexdigest()


def _claim(folder: Path, request: dict) -> None:
    """Write the request to the folder, which then is this training's. Raises HealingError when it holds something else."""
    asked = folder / "request.json"
    if asked.is_file():
        before = json.loads(asked.read_text(encoding="utf-8"))
        request = json.loads(json.dumps(request))  # tuples are read back as lists
        other = [f"{name} is {now!r}, was {before.get(name)!r}" for name, now in request.items() if now != before.get(name)]
        if other:
            raise HealingError(f"{str(folder)!r} holds another training: {'; '.join(other)}; choose another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise HealingError(f"{str(folder)!r} is not empty and holds no training of this kind; choose another folder")
    else:
        write_json(asked, request)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / STATE).is_file():  # it was interrupted
            shutil.rmtree(checkpoint)


def _arguments(recipe: Recipe, pruned: PreTrainedModel, micro_batch: int | None, **settings: Any) -> TrainingArguments:
    arguments = TrainingArguments(
        use_cpu=pruned.device.type == "cpu",
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        train_sampling_strategy="sequential",
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,  # `Bar` instead
        ddp_find_unused_parameters=False,  # whatever is trained is used in every step
        remove_unused_columns=False,
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never threads of one
    share, rest = divmod(recipe.batch, arguments.world_size)
    size = micro_batch or math.gcd(share, max(1, TOKENS_IN_A_MICRO_BATCH // recipe.seq_len))
    if size < 1 or rest or share % size:
        raise ValueError(f"batch={recipe.batch} is no multiple of micro_batch={size} x {arguments.world_size} processes")
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, share // size
    return arguments


def linear_names(model: PreTrainedModel, roles: Sequence[str]) -> list[str]:
    """Names of the linear maps in the attention or the MLP of every decoder layer.

    Raises UnsupportedModel where a layer has none (GPT-2 has its own kind of map, mixtures of experts fuse theirs).
    """
    found: list[str] = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, mlp = sublayers_of(model, index).values()
        # OPT's layer holds the two matrices of its MLP itself.
        mlps = {*layer.children()} - {attention} if isinstance(mlp, nn.Linear) else {*mlp.modules()}
        parts = {"attention": {*attention.modules()}, "mlp": mlps}
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for role in roles:
            here = [f"{layers_path(model)}.{index}.{name}" for name, module in linear.items() if module in parts[role]]
            if not here:
                raise UnsupportedModel(
                    f"model type {model.config.model_type!r}: the {role} of layer {index} has no linear map to adapt; "
                    "train all weights instead (recipe 'full')"
                )
            found += here
    return found


def beside_cuts(layers: int, removed: Collection[int]) -> list[int]:
    """Which of the `layers` that are left stood beside a removed one, counted among those left."""
    kept = [index for index in range(layers + len(removed)) if index not in removed]
    return [place for place, index in enumerate(kept) if not {index - 1, index + 1}.isdisjoint(removed)]


def working_copy(pruned: PreTrainedModel, recipe: Recipe, removed: Collection[int] = ()) -> PreTrainedModel | PeftModel:
    """A model to train. Under adapters it shares the frozen weights of `pruned`; else all weights are copies in float32.

    Updates are often smaller than a 16-bit weight can show, so weights that are trained themselves need float32.
    """
    if recipe.trains == "lora":
        # deepcopy takes what this dictionary holds for a copy; tied weights stay tied.
        model = copy.deepcopy(pruned, {id(weight): nn.Parameter(weight.detach(), False) for weight in pruned.parameters()})
        model.name_or_path = ""  # else peft names the dense model as the adapter's base, and looks for it on the hub
        names = linear_names(model, recipe.modules)
        if recipe.base == "nf4":
            to_format(model, "nf4")
        sizes = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names, **sizes))
    else:
        model = copy.deepcopy(pruned).float().requires_grad_(False)
        layers, trained = decoder_layers(model), [model]
        if recipe.trains == "last_layers":
            trained = [*layers[-recipe.last_layers :], final_norm(model), model.get_output_embeddings()]
        elif recipe.trains == "beside_cuts":
            trained = [layers[index] for index in beside_cuts(len(layers), removed)]
        for module in trained:
            module.requires_grad_(True)
    model.config.use_cache = False
    return model


def _train(
    model: PreTrainedModel | PeftModel,
    rows: TrainingRows,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    callbacks: list[TrainerCallback],
    arguments: TrainingArguments,
) -> int:
    """Train from the last checkpoint, or from the beginning, to the last step; the number of trained weights."""
    last = get_last_checkpoint(arguments.output_dir)
    if last is None or Path(last).name != f"checkpoint-{recipe.steps}":
        tensors = {"input_ids": rows.input_ids, "labels": rows.labels}
        tensors |= {} if rows.mask is None else {"attention_mask": rows.mask.long()}
        trainer = HealingTrainer(
            model=model,
            args=arguments,
            train_dataset=range(recipe.rows),
            data_collator=lambda indices: {name: tensor[indices] for name, tensor in tensors.items()},
            callbacks=callbacks,
        )
        trainer.teacher = teacher
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
        arguments.distributed_state.wait_for_everyone()
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _healed_model(pruned: PreTrainedModel, recipe: Recipe, checkpoint: Path) -> PreTrainedModel:
    """`pruned` with the trained weights, or with the adapters merged into its full-precision weights, in evaluation mode."""
    model = copy.deepcopy(pruned).eval()
    if recipe.trains == "lora":
        return PeftModel.from_pretrained(model, checkpoint, torch_device=str(pruned.device)).merge_and_unload()
    _load_weights(model, checkpoint)
    return model


def _load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    # The Trainer goes by names in memory, and so loses GPT-NeoX's head, which has another name on disk.
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())


class HealingTrainer(Trainer):
    """The Trainer, with the loss of a distillation where there is a teacher."""

    teacher: PreTrainedModel | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Gradients are averaged over the processes, so each sums its share and multiplies by their number.
        loss = distillation_loss(model, self.teacher, inputs, self.args.bf16)
        return loss / num_items_in_batch * self.args.world_size

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_weights(self.model, resume_from_checkpoint)


def _seconds(log: list[dict[str, Any]]) -> float:
    return max((entry.get("seconds", 0.0) for entry in log), default=0.0)


class Bar(ProgressCallback):
    """The Trainer's progress bar, without a line for every step."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


class Watch(TrainerCallback):
    """Measures, times the steps, and ends a training whose loss or gradient is not finite."""

    def __init__(self, measure: Callable[[PreTrainedModel], Mapping[str, float]] | None, measure_at: Collection[int]):
        self.measure, self.measure_at = measure, measure_at

    def on_train_begin(self, args, state, control, model, **_: Any) -> None:
        # Every process its own dropout. A resumed training gets its generators from the checkpoint, after this.
        torch.manual_seed(args.seed + args.process_index)
        self.seconds = _seconds(state.log_history)
        if not state.global_step:
            self._measure(args, state, model)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_log(self, args, state, control, model, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:  # the summary at the end
            return
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            what = f"the loss is {entry['loss']}, the norm of its gradient {entry['grad_norm']}"
            raise HealingError(f"step {state.global_step}: {what}; try a lower learning_rate than {args.learning_rate}")
        self.seconds += time.perf_counter() - self.begun
        entry["seconds"] = self.seconds
        self._measure(args, state, model)

    def _measure(self, args: TrainingArguments, state, model: nn.Module) -> None:
        if args.should_save and state.global_step in self.measure_at:
            # Under adapters, the model inside: `measure` is made for an ordinary one.
            inner = model.get_base_model() if isinstance(model, PeftModel) else model
            with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []), evaluating(model), torch.no_grad():
                found = {name: float(value) for name, value in self.measure(inner).items()}
            state.log_history.append({"step": state.global_step, "measures": found})

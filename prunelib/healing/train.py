"""Healing: recovery training of a pruned or sliced model, on peft and the Trainer of transformers.

    rows = packed_rows(corpus, tokenizer, recipe.rows, recipe.seq_len, seed=0)
    healed = heal(pruned, rows, recipe, folder)
    models.save(healed.model, tokenizer, destination)

A recipe (`prunelib.healing.recipes`) says how a paper healed, down to the number of tokens. The result is an ordinary model:
adapters are merged. Under ``accelerate launch`` the same code trains on several processes, with the same global batches.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prunelib.healing.objectives import OBJECTIVES, Teacher, matched_states, next_token
from prunelib.healing.recipes import Recipe
from prunelib.io import write_json
from prunelib.models import UnsupportedModel, decoder_layers, evaluating, final_norm
from prunelib.models.layers import sublayers_of
from prunelib.models.quantization import to_format
from prunelib.text.sequences import TrainingRows

SECONDS_BETWEEN_CHECKPOINTS = 300.0
TOKENS_IN_A_MICRO_BATCH = 16384  # at most, where the caller does not say
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # recipe → Trainer


class HealingError(RuntimeError):
    """A folder holds another training than the one asked for."""


@dataclass(frozen=True)
class Healed:
    """A healed model and how it came about.

    Attributes:
        model: an ordinary model in evaluation mode, adapters merged.
        log: one entry per step (``step``, ``tokens`` read so far, ``loss`` in nats per trained position before the update,
            ``learning_rate``, ``grad_norm``, ``seconds`` of training so far), and one with ``measures`` at each step measured.
        tokens: read in the training that `model` comes from; real_tokens: without padding; targets: positions trained.
        trainable: number of trained weights.
        seconds: of training, without measuring.
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
        return found | {"recipe": dataclasses.asdict(self.recipe), "log": list(self.log)}


def heal(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    folder: str | os.PathLike,
    *,
    dense: PreTrainedModel | None = None,
    removed: Sequence[int] | None = None,
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
    in are not changed, nor are torch's generators of random numbers.

    Args:
        rows: at least `recipe.rows` rows of `recipe.seq_len`; the first ones are read, each once.
        folder: where checkpoints and the result are kept. A call with the same arguments resumes from the last checkpoint, to
            the same losses and weights as without the interruption, or returns the finished result; `measure` is not compared.
        dense: the teacher of a distillation, on the same device; no other recipe looks at it.
        removed: indices of the layers that were removed from `dense`; needed where `recipe.hidden_weight` is not 0.
        micro_batch: rows in one forward pass; None takes as many as have 16,384 tokens. Batch = micro_batch x processes x
            accumulated passes.
        measure: called with the model in evaluation mode and without derivatives after the steps `measure_at` (0: before
            training); what it returns goes to the log. Under 4 bits it sees the 4-bit model.
        save_every: steps between checkpoints; None saves every five minutes.
        bf16: compute in bfloat16 (autocast).
        gradient_checkpointing: recompute activations instead of keeping them.

    A loss or gradient that is NaN or infinite ends the training; the model is then the last one whose loss and gradient were
    finite (after resuming: at least the one of the checkpoint), and `Healed.stopped` says where that was.

    Raises ValueError for rows, sizes or models that do not fit the recipe, UnsupportedModel where there is nothing to adapt,
    and HealingError when `folder` holds another training.
    """
    folder = Path(folder).absolute()
    _check_rows(pruned, rows, recipe)
    _check_settings(pruned, recipe, dense, measure, measure_at, save_every)
    teacher = None
    if recipe.objective == "distillation":
        pairs = matched_states(pruned, dense, removed or ()) if recipe.hidden_weight else ()
        teacher = Teacher(dense, pairs, bf16)
    arguments = _arguments(recipe, folder, pruned.device, micro_batch, seed, bf16, gradient_checkpointing)
    request = _request(pruned, rows, recipe, dense, teacher, seed, arguments, measure_at)
    _check_folder(folder, request)
    arguments.distributed_state.wait_for_everyone()  # nobody writes before everybody has looked
    cuda = [pruned.device] if pruned.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        if not (folder / "result.json").is_file():
            watch = Watch(recipe, rows, measure, frozenset(measure_at), save_every, progress)
            with evaluating(dense) if teacher else contextlib.nullcontext():
                _train(pruned, rows, recipe, teacher, watch, arguments, folder, request)
        model = _healed_model(pruned, recipe, folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Healed(model=model, recipe=recipe, **result | {"log": tuple(result["log"])})


def _request(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    dense: PreTrainedModel | None,
    teacher: Teacher | None,
    seed: int,
    arguments: TrainingArguments,
    measure_at: Sequence[int],
) -> dict:
    """All that a training depends on: a folder with another request holds another training."""
    return {
        "recipe": dataclasses.asdict(recipe) | {"modules": list(recipe.modules)},
        "rows": rows.sha256,
        "base": fingerprint(pruned) | {"dtype": str(pruned.dtype)},
        "dense": None if teacher is None else fingerprint(dense) | {"pairs": [list(pair) for pair in teacher.pairs]},
        "seed": seed,
        "micro_batch": arguments.per_device_train_batch_size,
        "processes": arguments.world_size,
        "device": pruned.device.type,
        "measure_at": sorted(set(measure_at)),
        "bf16": arguments.bf16,
        "gradient_checkpointing": arguments.gradient_checkpointing,
    }


# -------------------------------------------------------------------------------------------------------- what trains


def linear_names(model: PreTrainedModel, roles: Sequence[str]) -> tuple[str, ...]:
    """Names of the linear maps in the attention or the MLP of every decoder layer, in order.

    Raises UnsupportedModel where a layer has none (GPT-2 has its own kind of map, mixtures of experts fuse theirs).
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, mlp = sublayers_of(model, index).values()
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


def working_copy(pruned: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """A model to train. Under adapters it shares the frozen weights of `pruned`; else all weights are copies in float32.

    Updates are often smaller than a 16-bit weight can show, so weights that are trained themselves need float32.
    """
    lora = recipe.trains == "lora"
    weights = {id(p): p.detach() if lora else p.detach().to(torch.float32, copy=True) for p in pruned.parameters()}
    frozen = {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()}
    model = copy.deepcopy(pruned, dict(frozen))  # deepcopy takes what the dict holds for a copy; tied weights stay tied
    if lora:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=list(linear_names(model, recipe.modules)),
            task_type="CAUSAL_LM",
        )
        if recipe.base == "nf4":
            to_format(model, "nf4")
        return get_peft_model(model, config)
    trained = [model]
    if recipe.trains == "last_layers":
        trained = [*decoder_layers(model)[-recipe.last_layers :], final_norm(model), model.get_output_embeddings()]
    for module in trained:
        module.requires_grad_(True)
    return model


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by their names in memory, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _healed_model(pruned: PreTrainedModel, recipe: Recipe, folder: Path) -> PreTrainedModel:
    """`pruned` with the trained weights, or with the adapters merged into its full-precision weights, in evaluation mode."""
    model = copy.deepcopy(pruned).eval()
    if recipe.trains == "lora":
        adapted = PeftModel.from_pretrained(model, folder / "adapter", torch_device=str(pruned.device))
        return adapted.merge_and_unload()
    with torch.no_grad():
        for name, weight in load_file(folder / "trained.safetensors").items():
            model.get_parameter(name).copy_(weight)
    return model


# ------------------------------------------------------------------------------------------------------------- checks


def _check_rows(pruned: PreTrainedModel, rows: TrainingRows, recipe: Recipe) -> None:
    config = pruned.config.get_text_config(decoder=True)
    if rows.input_ids.shape[1] != recipe.seq_len:
        raise ValueError(
            f"rows have {rows.input_ids.shape[1]} tokens, recipe {recipe.name} reads rows of {recipe.seq_len}: draw others, "
            "or replace(recipe, seq_len=…)"
        )
    if len(rows) < recipe.rows:
        raise ValueError(
            f"recipe {recipe.name} reads {recipe.steps} x {recipe.batch} = {recipe.rows} rows ({recipe.tokens:,} tokens), "
            f"there are {len(rows)}: draw more, or replace(recipe, steps={len(rows) // recipe.batch})"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and recipe.seq_len > longest:
        raise ValueError(f"seq_len={recipe.seq_len}, but the model was made for at most {longest} tokens: take shorter rows")
    low, high = int(rows.input_ids.min()), int(rows.input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token {high if low >= 0 else low} is not in the model's vocabulary of {config.vocab_size}: the rows come from "
            "another tokenizer"
        )


def _check_settings(
    pruned: PreTrainedModel,
    recipe: Recipe,
    dense: PreTrainedModel | None,
    measure: Callable | None,
    measure_at: Sequence[int],
    save_every: int | None,
) -> None:
    layers = len(decoder_layers(pruned))
    if (recipe.last_layers or 0) > layers:
        raise ValueError(f"last_layers={recipe.last_layers}, but the model has {layers} layers")
    if recipe.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"recipe {recipe.name} trains on 4-bit weights, which need the library bitsandbytes: install it")
    if recipe.objective == "distillation":
        if dense is None:
            raise ValueError(f"recipe {recipe.name} distils: give the dense model as dense=")
        if dense.device != pruned.device:
            raise ValueError(f"the dense model is on {dense.device}, the pruned one on {pruned.device}: move one of them")
        if len({model.config.get_text_config(decoder=True).vocab_size for model in (dense, pruned)}) > 1:
            raise ValueError("the dense model has another vocabulary than the pruned one: distil from the model it came from")
    if any(not 0 <= step <= recipe.steps for step in measure_at) or (measure is None and measure_at):
        raise ValueError(
            f"measure_at={list(measure_at)}: give a function measure, and steps between 0 and the recipe's {recipe.steps}"
        )
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every={save_every}: at least 1 step, or None for every five minutes")


def _micro_batch(recipe: Recipe, processes: int, asked: int | None) -> int:
    share, rest = divmod(recipe.batch, processes)
    if rest:
        raise ValueError(f"batch={recipe.batch} rows cannot be shared by {processes} processes: take a multiple of {processes}")
    if asked is None:
        fits = max(1, TOKENS_IN_A_MICRO_BATCH // recipe.seq_len)
        return max(size for size in range(1, share + 1) if share % size == 0 and size <= fits)
    if asked < 1 or share % asked:
        raise ValueError(
            f"micro_batch={asked} does not divide the {share} rows of each of {processes} processes (batch={recipe.batch})"
        )
    return asked


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
    kind = {"model_type": model.config.model_type, "layers": len(decoder_layers(model))}
    return kind | {"shapes": shapes.hexdigest(), "weights": values.hexdigest()}


def _check_folder(folder: Path, request: dict) -> None:
    """Raises HealingError when the folder holds something else than this training."""
    asked = folder / "request.json"
    if asked.is_file():
        differences = list(_differences(json.loads(asked.read_text(encoding="utf-8")), request))
        if differences:
            raise HealingError(
                f"{str(folder)!r} holds another training: {'; '.join(differences)}. Choose another folder, or delete this one"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise HealingError(f"{str(folder)!r} is not empty and holds no training of this kind; choose another folder")


def _differences(before: Mapping, now: Mapping, path: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        mine, theirs = now.get(key), before.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(theirs, mine, f"{path}{key}.")
        elif mine != theirs:
            yield f"{path}{key} is {mine!r}, was {theirs!r}"


# ------------------------------------------------------------------------------------------------------------ training


def _arguments(
    recipe: Recipe, folder: Path, device: torch.device, micro_batch: int | None, seed: int, bf16: bool, checkpointing: bool
) -> TrainingArguments:
    # Named only where it is wanted: newer versions of transformers call it activation checkpointing, and warn.
    recompute = (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    )
    arguments = TrainingArguments(
        **(recompute if checkpointing else {}),
        output_dir=str(folder / "checkpoints"),
        use_cpu=device.type == "cpu",
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        bf16=bf16,
        seed=seed,
        save_strategy="no",  # `Watch` says when
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        average_tokens_across_devices=False,  # `HealingTrainer.compute_loss` does it
        ddp_find_unused_parameters=False,  # whatever is trained is used in every step
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are several processes, never threads of one
    arguments.per_device_train_batch_size = _micro_batch(recipe, arguments.world_size, micro_batch)
    arguments.gradient_accumulation_steps = recipe.batch // (arguments.per_device_train_batch_size * arguments.world_size)
    return arguments


def _train(
    pruned: PreTrainedModel,
    rows: TrainingRows,
    recipe: Recipe,
    teacher: Teacher | None,
    watch: "Watch",
    arguments: TrainingArguments,
    folder: Path,
    request: dict,
) -> None:
    """Train from the last checkpoint, or from the beginning, and write the result."""
    torch.manual_seed(arguments.seed)  # the adapters' first values
    model = working_copy(pruned, recipe)
    checkpoints = folder / "checkpoints"
    if arguments.should_save:
        write_json(folder / "request.json", request)  # first: a folder without one is taken for somebody else's
        if recipe.trains == "lora":
            # peft would name the dense model as the adapter's base, onto whose first layers it would load without a word.
            pruned.config.save_pretrained(folder)
        for path in checkpoints.glob("checkpoint-*"):
            if not (path / "trainer_state.json").is_file():  # written last: this one was interrupted
                shutil.rmtree(path)
    if recipe.trains == "lora":
        model.peft_config["default"].base_model_name_or_path = str(folder)
    arguments.distributed_state.wait_for_everyone()
    trainer = HealingTrainer(recipe, teacher, watch, model=model, args=arguments, train_dataset=_Rows(rows, recipe.rows))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    watch.bar.close()
    if arguments.should_save:
        trained = {name: weight.detach().cpu().contiguous() for name, weight in trained_weights(model).items()}
        if recipe.trains == "lora":
            model.save_pretrained(folder / "adapter")
        else:
            save_file(trained, folder / "trained.safetensors")
        read = watch.good_step * recipe.batch
        result = {
            "log": [entry for entry in trainer.state.log_history if "tokens" in entry],
            "tokens": read * recipe.seq_len,
            "real_tokens": rows.real_tokens(read),
            "targets": rows.targets(0, read),
            "trainable": sum(weight.numel() for weight in trained.values()),
            "seconds": watch.seconds,
            "stopped": watch.stopped,
        }
        write_json(folder / "result.json", result)  # last, so that it is there only when everything is
        shutil.rmtree(checkpoints, ignore_errors=True)
    arguments.distributed_state.wait_for_everyone()


class _Rows(Dataset):
    """The rows that a recipe reads, as the Trainer takes them."""

    def __init__(self, rows: TrainingRows, count: int):
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.rows.input_ids[index], "labels": self.rows.labels[index]}
        return row if self.rows.mask is None else row | {"attention_mask": self.rows.mask[index].long()}


class HealingTrainer(Trainer):
    """The Trainer with the objective of a recipe, normalized over the whole batch, and checkpoints read by names on disk."""

    def __init__(self, recipe: Recipe, teacher: Teacher | None, watch: "Watch", **arguments: Any):
        # A loss function of its own tells the Trainer that the loss is normalized; `compute_loss` comes before it.
        super().__init__(**arguments, compute_loss_func=next_token, callbacks=[watch])
        self.remove_callback(PrinterCallback)
        self.recipe, self.teacher = recipe, teacher
        watch.model = self.model

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        start = self.state.global_step * self.recipe.batch
        # The positions trained in the whole batch, known to every process without asking. Gradients are averaged over the
        # processes, so each sums its share and multiplies by their number.
        targets = max(1, self.train_dataset.rows.targets(start, start + self.recipe.batch))
        total = OBJECTIVES[self.recipe.objective](model, inputs, self.recipe, self.teacher)
        return total / targets * self.args.world_size

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # The Trainer goes by names in memory, and so loses GPT-NeoX's head, which has another name on disk.
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())
        return None


class Watch(TrainerCallback):
    """Completes the log, measures, decides when to save, and stops when something is not finite."""

    def __init__(
        self,
        recipe: Recipe,
        rows: TrainingRows,
        measure: Callable[[PreTrainedModel], Mapping[str, float]] | None,
        measure_at: frozenset[int],
        save_every: int | None,
        progress: bool,
    ):
        self.recipe, self.rows, self.measure, self.measure_at = recipe, rows, measure, measure_at
        self.save_every, self.progress = save_every, progress
        self.model: nn.Module = nn.Module()  # the one that is trained; the trainer says which
        self.stopped: str | None = None
        self.good: list[Tensor] = []  # the last weights whose loss and gradient were finite,
        self.good_step = 0  # and the step that made them
        self.before: list[Tensor] = []  # weights before the newest update
        self.bar = tqdm(disable=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        # Every process its own dropout. A resumed training gets its generators from the checkpoint, after this.
        torch.manual_seed(args.seed + args.process_index)
        self.weights = [weight.detach() for weight in trained_weights(self.model).values()]
        self.good, self.before = ([weight.clone() for weight in self.weights] for _ in range(2))
        self.good_step = state.global_step
        earlier = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.started = self.saved = time.perf_counter()
        self.started -= max(earlier, default=0.0)
        disable = not (self.progress and args.should_save)
        self.bar = tqdm(
            total=args.max_steps, initial=state.global_step, desc=f"heal ({self.recipe.name})", unit="step", disable=disable
        )
        if not state.global_step:
            self._measure(args, state)

    def on_pre_optimizer_step(self, args, state, control, **_: Any) -> None:
        torch._foreach_copy_(self.before, self.weights)

    def on_log(self, args, state, control, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:  # the summary at the end
            return
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(entry[name]):
                torch._foreach_copy_(self.weights, self.good)
                self.stopped = f"step {step}: {name} is {entry[name]}; kept are the weights after step {self.good_step}"
                control.should_training_stop = True
                state.log_history.pop()
                return
        self.good, self.before, self.good_step = self.before, self.good, step - 1
        entry |= {"tokens": step * self.recipe.batch * self.recipe.seq_len, "seconds": self.seconds}
        del entry["epoch"]
        self.bar.update()
        self.bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
        self._measure(args, state)
        if step == args.max_steps:
            self.good_step = step
        elif self.save_every is None:
            (control.should_save,) = broadcast_object_list([time.perf_counter() - self.saved > SECONDS_BETWEEN_CHECKPOINTS])
        else:
            control.should_save = step % self.save_every == 0

    def on_save(self, args, state, control, **_: Any) -> None:
        self.saved = time.perf_counter()

    def _measure(self, args, state) -> None:
        if state.global_step not in self.measure_at:
            return
        started = time.perf_counter()
        if args.should_save:
            cuda = [args.device] if args.device.type == "cuda" else []
            # Under adapters, the model inside: `measure` is made for an ordinary one.
            model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            with torch.random.fork_rng(cuda), evaluating(self.model), torch.no_grad():
                found = {name: float(value) for name, value in self.measure(model).items()}
            # A measure that overflows is left out: JSON has no number for it.
            finite = {name: value for name, value in found.items() if math.isfinite(value)}
            tokens = state.global_step * self.recipe.batch * self.recipe.seq_len
            state.log_history.append({"step": state.global_step, "tokens": tokens, "measures": finite})
        args.distributed_state.wait_for_everyone()
        self.started += time.perf_counter() - started

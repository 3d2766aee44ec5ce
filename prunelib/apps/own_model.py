"""Prune a model of your own: how many layers go, which ones, and what that costs (`notebooks/own_model.ipynb`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelib import io, models, text
from prunelib.apps import publishing
from prunelib.criteria import ABLATIONS, BLOCK_CRITERIA, CRITERIA, collect
from prunelib.criteria.registry import Rule
from prunelib.depth import LayerSet, LayerSetLoss, greedy, lowest, lowest_block
from prunelib.depth.repair import METHODS as REPAIRS
from prunelib.depth.select import candidates_for
from prunelib.evaluation.intervals import paired_bootstrap
from prunelib.evaluation.perplexity import Perplexity, check_length, check_windows
from prunelib.evaluation.tasks import TaskResults, compare
from prunelib.healing import RECIPES, Recipe, check_training, heal
from prunelib.models import export, gguf
from prunelib.models.plans import DropPlan
from prunelib.models.saving import rehearse
from prunelib.text.sequences import TrainingRows

LEVEL = 0.95  # of intervals
NEW_TOKENS = 24  # of the text that continues the prompt
SEARCHES = {
    "greedy": ("nll", "SLEB, arXiv 2402.09025: the layer without which the loss is lowest, one after the other"),
    "greedy_kl": ("kl", "the layer without which the predictions stay nearest to the dense model's, one after the other"),
}
"""Searches by name: the metric of their `LayerSetLoss`, and what they do."""


def layers_to_remove(model: PreTrainedModel, keep: float | int, of: str = "layers") -> int:
    """How many decoder layers go when the fraction `keep` is to stay, of the "layers" or of the "parameters".

    Of the layers, at least `keep` stays: K = floor((1 - keep) L). Of the parameters (embeddings and head counted), at most
    `keep` stays: the smallest K for layers of mean size. Raises ValueError for a fraction that leaves everything or nothing.
    """
    n_layers = len(models.decoder_layers(model))
    if n_layers < 2 or not 0 < keep < 1:
        raise ValueError(f"keep={keep} of a model of {n_layers} layers: a fraction between 0 and 1, of 2 layers or more")
    share = models.parameter_fraction(model, range(n_layers))
    slack = 1e-9  # 0.25 * 32 must not become 7
    sizes = {
        "layers": (math.floor((1 - keep) * n_layers + slack), 1 / n_layers, 1 - 1 / n_layers),
        "parameters": (math.ceil((1 - keep) * n_layers / share - slack), 1 - share * (n_layers - 1) / n_layers, 1 - 1e-6),
    }
    if of not in sizes:
        raise ValueError(f"keep_of={of!r}: a fraction of the {' or of the '.join(sizes)}")
    size, least, most = sizes[of]
    if not 1 <= size < n_layers:
        raise ValueError(
            f"keep={keep} of the {of} of a model of {n_layers} layers, which hold {share:.0%} of its parameters, removes "
            f"{max(size, 0)} of them: give a fraction from {math.ceil(least * 1000) / 1000:g} to {int(most * 1000) / 1000:g}"
        )
    return size


def check(method: str, repair: str, folder: Path, push_to: str | None = None) -> str:
    """What `check_method` says, once nothing else is wrong.

    Raises ValueError for a folder in use and an unknown method or repair, and as `publishing.check`.
    """
    check_folder(folder)
    if repair not in ("none", *REPAIRS):
        raise ValueError(f"no repair {repair!r}; there are: none, {', '.join(REPAIRS)}")
    if push_to:
        publishing.check(push_to)
    return check_method(method)


def check_method(name: str) -> str:
    """What a method does and where it was published: a search, a criterion, or one defined a moment ago. Else ValueError."""
    rules = {**CRITERIA, **BLOCK_CRITERIA, **ABLATIONS}
    if name not in SEARCHES | rules:
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(SEARCHES | rules)}")
    return SEARCHES[name][1] if name in SEARCHES else f"{rules[name].title}; {rules[name].source}"


def check_choice(name: str, n_layers: int, layers_removed: int) -> None:
    """Raise ValueError, before any work, when a method cannot remove so many layers because it protects some."""
    rule = {**CRITERIA, **BLOCK_CRITERIA, **ABLATIONS}.get(name)
    if rule is not None:
        candidates_for(n_layers, layers_removed, rule.protect_first, rule.protect_last)


def check_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    prompt: str,
    windows: Int64[Tensor, "window position"],
    rows: TrainingRows | None,
    plan: Recipe | None,
    kinds: Sequence[str] = (),
) -> None:
    """Raise now whatever of the dense model, its texts and its place would end the run later, after hours of work."""
    for kind in kinds:
        export.check_gguf(model.config, tokenizer, kind)
    rehearse(model, tokenizer, folder)
    check_windows(model, windows)
    check_length(model, len(tokenizer(prompt)["input_ids"]) + NEW_TOKENS)
    if rows is not None and plan is not None:
        check_training(model, rows, plan, model)


def choose(
    name: str,
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    layers_removed: int,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> LayerSet:
    """The layers that a method removes, ascending, with its own defaults and the protections of its paper.

    Raises ValueError for an unknown method, or when so many layers cannot go.
    """
    check_method(name)
    if name in SEARCHES:
        loss = LayerSetLoss(model, windows, SEARCHES[name][0], batch_size=batch_size)
        return greedy(loss.units, layers_removed, loss, progress=progress).removed
    rule = {**CRITERIA, **BLOCK_CRITERIA, **ABLATIONS}[name]
    protected = rule.protect_first, rule.protect_last
    if name in BLOCK_CRITERIA:
        stats = collect(model, windows, batch_size=batch_size, progress=progress)
        return lowest_block(rule(stats, layers_removed), stats.n_layers, *protected)
    return lowest(importance(name, model, windows, batch_size=batch_size, progress=progress), layers_removed, *protected)


def importance(
    name: str, model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, batch_size: int = 8, progress: bool = False
) -> Float64[np.ndarray, " layer"]:
    """What a criterion, or an ablation, says every layer is worth, higher = keep. Raises as `layer_rule`."""
    rule = layer_rule(name)
    if name in ABLATIONS:
        return rule(model, windows)
    return rule(collect(model, windows, batch_size=batch_size, progress=progress))


def layer_rule(name: str) -> Rule:
    """The criterion, or the ablation, of single layers; ValueError for another name."""
    rules = {**CRITERIA, **ABLATIONS}
    if name not in rules:
        raise ValueError(f"{name!r} is no criterion of single layers; there are: {', '.join(rules)}")
    return rules[name]


def write_exports(
    plan: DropPlan,
    config: PreTrainedConfig,
    name: str,
    folder: Path,
    final: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kinds: Sequence[str] = (),
) -> str:
    """Write the plan and what other programs take beside the saved model; a line for each file, or why there is none.

    config, name: of the dense model. kinds: of the GGUF files of `final`. Raises as `prunelib.models.export.write_gguf`.
    """
    plan.write(folder / "plan.json")
    place = io.from_root(gguf.safetensors_folder(name)) if gguf.is_gguf(name) else name  # what mergekit can read
    told = export.write_plan(plan, config, place, folder)
    for kind in kinds:
        file = f"model-{kind}.gguf"
        note = f"without layers {' '.join(map(str, plan.removed))} of {plan.n_layers}, by {plan.method}"
        divergence = export.write_gguf(final, tokenizer, folder / file, kind, note)
        told[file] = f"KL from the model {divergence:.2g} nats per token"
    return "\n".join(f"{file}: {' '.join(text.split())}" for file, text in told.items())


def read_texts(
    report: Sequence[str], used: Mapping[str, str], data_dir: Path | None = None, max_documents: int | None = None
) -> tuple[dict[str, text.Corpus], dict[str, text.Corpus]]:
    """The texts to report, by their names without the folder of one machine, and those that are used, by their roles.

    A text is NAME:SPLIT or a local file. Raises as `text.load`, and ValueError when a reported text is one that is used.
    """

    def read(name: str) -> text.Corpus:
        return text.load(*text.corpora.named(name), data_dir=data_dir, max_documents=max_documents)

    if not report:
        raise ValueError("no text to report: name at least one")
    reported = dict(zip(_labels(report), map(read, report), strict=True))
    seen = {role: read(name) for role, name in used.items()}
    text.check_held_out(reported, seen)
    return reported, seen


def _labels(names: Sequence[str]) -> list[str]:
    """What texts are called: without the folders of one machine, but for those that tell two of one name apart."""
    parts = [Path(name).parts for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-depth:]).removeprefix("//") for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"report_texts={list(names)}: one of them is named twice")


def check_folder(folder: Path) -> None:
    """Raise ValueError when a folder holds something that an earlier run of this kind did not write: it would be replaced."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").is_file()):
        raise ValueError(f"{folder} holds something other than a pruned model: give an empty or a new folder")


def planned(recipe: str, **budget: Any) -> Recipe | None:
    """A recipe with the budget given, its own where that is None; None for "none"."""
    given = {name: value for name, value in budget.items() if value is not None}
    return replace(RECIPES[recipe], **given) if recipe != "none" else None


def train(
    start: PreTrainedModel, rows: TrainingRows, plan: Recipe, work: Path, *, batch_size: int, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The healed model, and what its card says of the training.

    batch_size: the most sequences of one backward pass. options: of `prunelib.healing.heal`, which raises.
    """
    micro_batch = max(size for size in range(1, min(batch_size, plan.batch) + 1) if plan.batch % size == 0)
    healed = heal(start, rows, plan, work, micro_batch=micro_batch, **options)
    told = {"tokens": healed.tokens, "trainable": healed.trainable, "seconds": healed.seconds}
    return healed.model, {"recipe": asdict(plan), **told}


def reload(
    folder: Path, expected: Mapping[str, Perplexity], measured: Callable, *, dtype: str, device: str
) -> tuple[PreTrainedModel, float]:
    """The saved model, and the largest difference (nats) between what `measured` gives for it and what is `expected`.

    Raises RuntimeError when they differ by more than 0.001 nats.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    difference = max(abs(one.nll - expected[name].nll) for name, one in measured(model).items())
    if difference > 1e-3:
        raise RuntimeError(f"the saved model differs by {difference:.3g} nats from the one in memory; do not use {folder}")
    return model, difference


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each state and text: nats over the dense model, with the interval."""
    form = "{state}, {text}: {value:.3f} [{low:.3f}, {high:.3f}] nats over dense"
    return "\n".join(form.format(**row) for row in rows if row["metric"] == "nats_over_dense")


def loss_rows(states: Mapping[str, Mapping[str, Perplexity]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a run from state → text → `Perplexity`, the dense state first.

    `nll`, `ppl` and `accuracy`; of later states also `nats_over_dense` and `nats_over_<state before>`, with the ends `low` and
    `high` of a paired bootstrap interval over the windows.
    """
    rows, names = [], list(states)
    for place, state in enumerate(names):
        for name, found in states[state].items():
            at = {"state": state, "text": name, "n": found.tokens}
            values = {"nll": found.nll, "accuracy": found.accuracy, "ppl": found.ppl}
            rows += [{**at, "metric": metric, "value": value} for metric, value in values.items() if math.isfinite(value)]
            for other in dict.fromkeys([names[0], names[place - 1]] if place else []):
                pair = found.window_nll, states[other][name].window_nll
                gap = paired_bootstrap(*pair, seed, sizes=found.window_tokens)
                interval = {"value": gap.value, "low": gap.low, "high": gap.high, "level": LEVEL}
                rows.append({**at, "metric": f"nats_over_{other}", **interval})
    return rows


def task_rows(states: Mapping[str, TaskResults], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the tasks, the dense state first; of later states also paired differences, `<metric>_over_dense`."""
    rows = [{"state": state, **row} for state, found in states.items() for row in found.rows()]
    for state in list(states)[1:]:
        for one in compare(states[state], states["dense"], seed=seed):
            gap = one.difference
            interval = {"value": gap.value, "low": gap.low, "high": gap.high, "level": LEVEL, "n": one.n}
            rows.append({"state": state, "task": one.task, "metric": f"{one.metric}_over_dense", **interval})
    return rows

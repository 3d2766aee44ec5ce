"""The whole way of one model, in steps: how many layers go, which ones, and what became of it, with intervals.

`notebooks/own_model.ipynb` walks it; `prunelib.apps.model_card` tells it, `prunelib.apps.publishing` uploads it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from prunelib import models
from prunelib.criteria.loss_based import ABLATIONS, LayerSetLoss
from prunelib.criteria.registry import Rule
from prunelib.criteria.similarity import BLOCK_CRITERIA, CRITERIA
from prunelib.criteria.statistics import collect
from prunelib.depth.search import LayerSet, greedy, lowest, lowest_block
from prunelib.evaluation.perplexity import Perplexity, paired_bootstrap
from prunelib.text import corpora

SEARCHES = {
    "greedy": ("nll", "SLEB, arXiv 2402.09025: the layer without which the loss is lowest, one after the other"),
    "greedy_kl": ("kl", "the layer without which the predictions stay nearest to the dense model's, one after the other"),
}
"""Searches by name: the loss they ask for (`ablations.METRICS`), and what they do."""


# ---------------------------------------------------------------------------------------------------------- how many


def layers_to_remove(model: PreTrainedModel, keep: float | int, of: str = "layers") -> int:
    """How many decoder layers go when the fraction `keep` is to stay, of the "layers" or of the "parameters".

    Of the layers, at least `keep` stays: K = floor((1 - keep) L). Of the parameters (embeddings and head counted), at most
    `keep` stays: K is the smallest number that layers of mean size need. Where layers differ in size, what is really gone
    depends on which ones go: `models.removed_fraction` says it.

    Raises ValueError for a fraction that leaves everything or nothing, and for another unit.
    """
    n_layers = len(models.decoder_layers(model))
    share = models.parameter_fraction(model, range(n_layers))
    slack = 1e-9  # 0.25 * 32 must not become 7
    sizes = {
        "layers": (math.floor((1 - keep) * n_layers + slack), 1 / n_layers),
        "parameters": (math.ceil((1 - keep) * n_layers / share - slack), 1 - share * (n_layers - 1) / n_layers),
    }
    if of not in sizes:
        raise ValueError(f"keep_of={of!r}: a fraction of the {' or of the '.join(sizes)}")
    size, least = sizes[of]
    if not 0 < keep < 1 or size < 1 or size >= n_layers:
        most = 1 - 1 / n_layers if of == "layers" else 1 - 1e-6
        raise ValueError(
            f"keep={keep} of the {of} of a model of {n_layers} layers, which hold {share:.0%} of its parameters, removes "
            f"{max(size, 0)} of them: give a fraction from {math.ceil(least * 1000) / 1000:g} to "
            f"{math.floor(most * 1000) / 1000:g}"
        )
    return size


# --------------------------------------------------------------------------------------------------------------- which


Chooser = Callable[[PreTrainedModel, Int64[Tensor, "window position"], int, int], LayerSet]


def _by_criterion(rule: Rule) -> Chooser:
    def choose(model: PreTrainedModel, windows: Tensor, size: int, batch_size: int) -> LayerSet:
        stats = collect(model, windows, batch_size=batch_size, progress=False)
        return lowest(rule(stats), size, rule.protect_first, rule.protect_last)

    return choose


def _by_block(rule: Rule) -> Chooser:
    def choose(model: PreTrainedModel, windows: Tensor, size: int, batch_size: int) -> LayerSet:
        stats = collect(model, windows, batch_size=batch_size, progress=False)
        return lowest_block(rule(stats, size), stats.n_layers, rule.protect_first, rule.protect_last)

    return choose


def _by_ablation(rule: Rule) -> Chooser:
    def choose(model: PreTrainedModel, windows: Tensor, size: int, batch_size: int) -> LayerSet:
        return lowest(rule(model, windows), size, rule.protect_first, rule.protect_last)

    return choose


def _by_search(metric: str) -> Chooser:
    def choose(model: PreTrainedModel, windows: Tensor, size: int, batch_size: int) -> LayerSet:
        loss = LayerSetLoss(model, windows, metric, batch_size=batch_size, keep_dense=True)
        return greedy(loss.n_units, size, loss, finalists=loss.finalists, progress=False).removed

    return choose


def methods() -> dict[str, tuple[Chooser, str]]:
    """Every way to choose layers by name, and where it was published: searches, criteria, blocks, ablations.

    A criterion that was registered a moment ago is among them.
    """
    found = {name: (_by_search(metric), source) for name, (metric, source) in SEARCHES.items()}
    for rules, way in ((CRITERIA, _by_criterion), (BLOCK_CRITERIA, _by_block), (ABLATIONS, _by_ablation)):
        found |= {name: (way(rule), f"{rule.title}; {rule.source}") for name, rule in rules.items()}
    return found


def check_method(name: str) -> str:
    """Where a method was published. Raises ValueError listing what there is."""
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(known)}")
    return known[name][1]


def choose(
    name: str, model: PreTrainedModel, windows: Int64[Tensor, "window position"], layers_removed: int, *, batch_size: int = 8
) -> LayerSet:
    """The layers that a method removes, ascending, with its own defaults and the protections of its paper.

    Raises ValueError for an unknown method, or when so many layers cannot go.
    """
    check_method(name)
    return methods()[name][0](model, windows, layers_removed, batch_size)


# ------------------------------------------------------------------------------------------------------- what became of it


def read_text(name: str, data_dir: Path | None = None, max_documents: int | None = None) -> corpora.Corpus:
    """The text that `NAME:SPLIT` means, or a local file by its path. Raises as `corpora.load`, ValueError without a split."""
    corpus, colon, split = name.rpartition(":")
    if not colon:
        if name in corpora.LOADERS:
            raise ValueError(f"text {name!r}: give its split too, as in {name}:train or {name}:evaluation")
        corpus, split = name, "train"
    return corpora.load(corpus, split, data_dir=data_dir, max_documents=max_documents)


def text_name(name: str) -> str:
    """How a text of `read_text` is called in results: without the folder of one machine."""
    return Path(name).name


def check_held_out(report: Mapping[str, corpora.Corpus], seen: Mapping[str, corpora.Corpus]) -> None:
    """Raise ValueError when a text that is reported is one that the layers were chosen on or that was trained on.

    Each maps the role of a text (or its name) to the text; the same documents under another name are found too.
    """
    for name, text in report.items():
        for role, other in seen.items():
            if text.sha256 == other.sha256:
                raise ValueError(
                    f"the reported text {name} is the text of {role}: a loss on it proves nothing; report another text or split"
                )


def loss_rows(
    states: Mapping[str, Mapping[str, Perplexity]], *, seed: int = 0, draws: int = 1000, level: float = 0.95
) -> list[dict[str, Any]]:
    """Rows of a run from what each state of a model loses on each text: state → text → `Perplexity`, the dense one first.

    `nats`, `ppl` and `accuracy` of every state, then, for every later state, `nats_over_dense`, and `nats_over_<state before>`,
    with the ends `low` and `high` of a paired bootstrap interval over the windows.

    Raises ValueError as `evaluation.paired_bootstrap`.
    """
    rows = []
    names = list(states)
    for place, state in enumerate(names):
        for text, found in states[state].items():
            at = {"state": state, "text": text, "n": found.tokens}
            rows.append({**at, "metric": "nll", "value": found.nats})
            rows.append({**at, "metric": "accuracy", "value": found.accuracy})
            if math.isfinite(found.ppl):
                rows.append({**at, "metric": "ppl", "value": found.ppl})
            for other in dict.fromkeys([names[0], names[place - 1]] if place else []):
                base = states[other][text]
                gap = paired_bootstrap(
                    found.window_nll, base.window_nll, seed, draws, window_tokens=found.window_tokens, level=level
                )
                interval = {"low": gap.low, "high": gap.high, "level": level}
                rows.append({**at, "metric": f"nats_over_{other}", "value": gap.difference, **interval})
    return rows


def task_rows(states: Mapping[str, Any], *, seed: int = 0, level: float = 0.95) -> list[dict[str, Any]]:
    """Rows of tasks: state → `tasks.TaskResults`, the dense one first.

    Later states have rows of paired differences too, `<metric>_over_dense` with `low` and `high`.
    """
    from prunelib.evaluation.tasks import compare

    rows = []
    first = next(iter(states), None)
    for state, found in states.items():
        rows += [{"state": state, **row} for row in found.rows()]
        if state != first:
            for one in compare(found, states[first], seed=seed, level=level):
                gap = one.difference
                interval = {"low": gap.low, "high": gap.high, "level": level, "n": one.n}
                rows.append(
                    {
                        "state": state,
                        "task": one.task,
                        "metric": f"{one.metric}_over_dense",
                        "value": gap.difference,
                        **interval,
                    }
                )
    return rows


def check_folder(folder: Path) -> None:
    """Raise ValueError when a folder holds something that an earlier run of this kind did not write: it would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the model")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").is_file():
        raise ValueError(f"{folder} holds something else than a pruned model: give an empty or a new folder")

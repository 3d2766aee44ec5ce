"""What follows from a setting: the layers that a criterion removes, the width that slicing leaves, and what they cost.

`choose_layers`, `choose_slices`, `compare` and `read` return tables, which `prunelib.figures.explorer` draws; `layer_sliders`
and `slice_sliders` put widgets of JupyterLab over the first two.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import display
from jaxtyping import Float64
from matplotlib import pyplot
from numpy import ndarray
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelib.criteria import CRITERIA, LayerStats, difference_term, similarity_term
from prunelib.depth import AlphaInterval, LayerSet, alpha_path, lowest
from prunelib.figures import explorer as figures
from prunelib.figures.save import Drawing
from prunelib.figures.style import METHODS
from prunelib.slicing import constant, count_parameters, dynamic, layer_redundancy

PATHS = {"simdiff_mssd": "mssd", "simdiff_masd": "masd"}
"""Criteria that have an alpha → their difference term: the whole path of sets that any alpha chooses is known."""


class Losses:
    """Nats per token without sets of layers, each measured once; `evaluate` is a `LayerSetLoss`."""

    def __init__(self, evaluate: Callable[[Sequence[LayerSet]], Iterable[float]]):
        self.evaluate = evaluate
        self.known: dict[LayerSet, float] = {}

    def __call__(self, layer_sets: Iterable[LayerSet]) -> list[float]:
        """The losses of these sets, in their order."""
        sets = list(layer_sets)
        missing = sorted(set(sets) - set(self.known))
        if missing:
            self.known.update(zip(missing, map(float, self.evaluate(missing)), strict=True))
        return [self.known[removed] for removed in sets]

    def predicted(self, removed: LayerSet) -> float:
        """The loss if the costs of single layers added up: dense + sum over `removed` of (without it - dense)."""
        dense, *without = self([(), *((layer,) for layer in removed)])
        return dense + math.fsum(one - dense for one in without)

    def measure_ahead(self, stats: LayerStats, sizes: Iterable[int], criteria: Sequence[str]) -> None:
        """Everything that `choose_layers` will ask for at these sizes, in one call of `evaluate`."""
        sets: list[LayerSet] = [(), *((layer,) for layer in range(stats.n_layers))]
        for size in sizes:
            for name in criteria:
                sets += [interval.removed for interval in path_of(stats, name, size)] or [chosen(stats, name, size)]
        self(sets)


def importance_of(stats: LayerStats, criterion: str, alpha: float | int = 0.5) -> Float64[ndarray, "layer"]:
    """Importance of every layer, with alpha where the criterion has one. Raises ValueError for an unknown criterion."""
    rule = CRITERIA[criterion]
    return rule(stats, alpha=alpha) if "alpha" in rule.options else rule(stats)


def chosen(stats: LayerStats, criterion: str, layers_removed: int, alpha: float | int = 0.5) -> LayerSet:
    """The layers that a criterion removes, as its paper protects them. Raises ValueError when so many cannot go."""
    rule = CRITERIA[criterion]
    return lowest(importance_of(stats, criterion, alpha), layers_removed, rule.protect_first, rule.protect_last)


def path_of(stats: LayerStats, criterion: str, layers_removed: int) -> list[AlphaInterval]:
    """The sets that any alpha chooses, in order of alpha; none for a criterion without alpha (`PATHS`)."""
    if criterion not in PATHS:
        return []
    rule = CRITERIA[criterion]
    terms = similarity_term(stats), difference_term(stats, PATHS[criterion])
    return alpha_path(*terms, layers_removed, rule.protect_first, rule.protect_last)


def title_of(criterion: str) -> str:
    return METHODS[criterion].title if criterion in METHODS else CRITERIA[criterion].title


def choose_layers(
    stats: LayerStats, losses: Losses, criterion: str, layers_removed: int, alpha: float | int = 0.5
) -> pd.DataFrame:
    """What a criterion removes, and what that costs in nats per token, as rows `what`, `value`.

    The importance of every layer, the loss `dense`, `measured` and `predicted` (`Losses.predicted`), and both along the path of
    alpha where there is one. Raises ValueError for an unknown criterion, an alpha or a K out of range.
    """
    removed, path = chosen(stats, criterion, layers_removed, alpha), path_of(stats, criterion, layers_removed)
    dense, measured, *on_path = losses([(), removed, *(interval.removed for interval in path)])
    rows: list[dict[str, Any]] = [
        {"what": "importance", "layer": layer, "removed": layer in removed, "value": float(value)}
        for layer, value in enumerate(importance_of(stats, criterion, alpha))
    ]
    rows.append({"what": "dense nats", "value": dense})
    ends = [{"alpha_low": interval.low, "alpha_high": interval.high} for interval in path]
    sets = [removed, *(interval.removed for interval in path)]
    for layers, nats, place in zip(sets, [measured, *on_path], [{}, *ends], strict=True):
        on, place = " on the path" if place else "", {**place, "removed_layers": " ".join(map(str, layers))}
        rows.append({"what": f"measured nats{on}", **place, "value": nats})
        rows.append({"what": f"predicted nats{on}", **place, "value": losses.predicted(layers)})
    table = pd.DataFrame(rows).astype({"layer": "Int64", "removed": "boolean"})
    table = table.assign(criterion=criterion, title=title_of(criterion))
    return table.assign(alpha=alpha) if "alpha" in CRITERIA[criterion].options else table


def choose_slices(
    stats: LayerStats, config: PreTrainedConfig, slice_percentage: float | int, slice_base: float | int
) -> pd.DataFrame:
    """The slice and width of every layer, and what that removes beside a constant slice; nothing is sliced.

    Raises ValueError as `slicing.dynamic`, and UnsupportedModel for a family that cannot be sliced.
    """
    plan = dynamic(layer_redundancy(stats), config.hidden_size, slice_percentage, slice_base)
    even = constant(stats.n_layers, config.hidden_size, slice_percentage)
    rows: list[dict[str, Any]] = [
        {"what": "slice", "layer": layer, "width": width, "value": loss}
        for layer, (width, loss) in enumerate(zip(plan.widths, plan.slices, strict=True))
    ]
    for schedule, one in (("dynamic", plan), ("constant", even)):
        counted = count_parameters(config, one)
        rows.append({"what": "parameters removed", "schedule": schedule, "value": counted.removed})
        rows.append({"what": "FLOPs removed", "schedule": schedule, "value": counted.flops_removed})
    table = pd.DataFrame(rows).astype({"layer": "Int64", "width": "Int64"})
    return table.assign(slice_percentage=slice_percentage, slice_base=slice_base)


def compare(
    stats: LayerStats, losses: Losses, criteria: Sequence[str], sizes: Sequence[int], *, random_seeds: Sequence[int] = (0, 1, 2)
) -> pd.DataFrame:
    """Nats over the dense model (`value`) of what criteria choose at every K, with one row of random layers per seed.

    A criterion with an alpha takes its default. Raises ValueError for an unknown criterion or a K out of range.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += [{"method": name, "layers_removed": size, "set": chosen(stats, name, size)} for name in criteria]
        for seed in random_seeds:
            removed = lowest(CRITERIA["random"](stats, seed=seed), size)
            rows.append({"method": "random", "layers_removed": size, "seed": seed, "set": removed})
    table = pd.DataFrame(rows, columns=["method", "layers_removed", "seed", "set"]).astype({"seed": "Int64"})
    dense, *nats = losses([(), *table["set"]])
    layers = [" ".join(map(str, removed)) for removed in table.pop("set")]
    table.insert(1, "title", table["method"].map(title_of))
    return table.assign(removed_layers=layers, value=[one - dense for one in nats])


@torch.inference_mode()
def read(
    candidates: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompt: str, sentence: str, tokens: int = 40
) -> pd.DataFrame:
    """What models make of a text, as rows `model`, `what`, `token`, `value`, in order of the tokens.

    `continuation`: the `tokens` that a model adds to `prompt`, greedily. `loss` and `entropy`, in nats: of every token of
    `sentence` but the first, given those before it; the entropy is that of the prediction. Raises ValueError when the sentence
    has fewer than two tokens.
    """
    rows: list[dict[str, Any]] = []
    for name, model in candidates.items():
        start, ids = (tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in (prompt, sentence))
        if ids.shape[1] < 2:
            raise ValueError(f"sentence={sentence!r} is {ids.shape[1]} token: give one of two or more")
        said = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, do_sample=False)[0]
        log = model(ids).logits[0, :-1].float().log_softmax(-1)
        loss, entropy = -log.gather(1, ids[0, 1:, None])[:, 0], -(log.exp() * log).sum(-1)
        found = {"loss": loss.tolist(), "entropy": entropy.tolist(), "continuation": [None] * (len(said) - start.shape[1])}
        for what, values in found.items():
            place = {"model": name, "what": what}
            texts = map(tokenizer.decode, said[start.shape[1] :] if what == "continuation" else ids[0, 1:])
            rows += [{**place, "token": text, "value": value} for text, value in zip(texts, values, strict=True)]
    return pd.DataFrame(rows)


def attended() -> bool:
    """Whether somebody can move sliders: JupyterLab lets a cell ask for input; papermill and nbconvert do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin", False))


def layer_sliders(stats: LayerStats, losses: Losses) -> Any:
    """A widget over `choose_layers`. What was not measured yet is measured then."""
    names = [(title_of(name), name) for name in CRITERIA]
    return _sliders(
        lambda **setting: choose_layers(stats, losses, **setting),
        figures.layers_drawing,
        criterion=ipywidgets.Dropdown(options=names, value="simdiff_mssd"),
        layers_removed=_slider(ipywidgets.IntSlider, 8, stats.n_layers - 1, 1),
        alpha=_slider(ipywidgets.FloatSlider, 0.5, 1.0, 0.01),
    )


def slice_sliders(stats: LayerStats, config: PreTrainedConfig) -> Any:
    """A widget over `choose_slices`."""
    return _sliders(
        lambda **setting: choose_slices(stats, config, **setting),
        figures.slices_drawing,
        slice_percentage=_slider(ipywidgets.FloatSlider, 0.3, 0.8, 0.01),
        slice_base=_slider(ipywidgets.FloatSlider, 0.1, 0.8, 0.01),
    )


def _slider(kind: type, value: float | int, high: float | int, step: float | int) -> Any:
    return kind(value=min(value, high), min=0, max=high, step=step, continuous_update=False)


def _sliders(choose: Callable[..., pd.DataFrame], draw: Callable[[pd.DataFrame], Drawing], **controls: Any) -> Any:
    """Controls above a sentence and a picture that follow them; a setting that cannot be is named in the sentence."""

    def show(**setting: Any) -> str:
        try:
            drawing = draw(choose(**setting))
            text = drawing.text
            display(drawing.figure)
            pyplot.close(drawing.figure)
        except ValueError as error:
            text = str(error)
        print(text)
        return text

    return ipywidgets.interactive(show, **controls)

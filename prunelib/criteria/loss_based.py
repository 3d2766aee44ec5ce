"""Importance that needs the model itself: what its loss says when a layer is left out, its weights, their gradients.

`ABLATIONS` holds the rules, each called with a model, calibration windows and its own options; like every importance,
higher = keep. `LayerSetLoss` is the loss of many sets of layers as the searches of `prunelib.depth.search` ask for it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.criteria.registry import Rules
from prunelib.depth.stopping import finals
from prunelib.evaluation.perplexity import check_windows, layer_set_divergence, layer_set_perplexity
from prunelib.models import decoder_layers
from prunelib.models.layerwise import (
    UNITS,
    LayerSet,
    SharedPrefixEvaluator,
    Shell,
    check_layer_set,
    layer_forwards_alone,
    shared_layer_forwards,
)
from prunelib.models.sublayers import MLP


class LayerSetLoss:
    """Loss of one model without sets of layers, on fixed windows, in nats per token: the evaluation that searches call.

    Two metrics (`METRICS`): "nll", the negative log-likelihood, and "kl", the divergence from the dense model. The sets of
    one call share the hidden states of their common beginnings. With unit="sublayer" the sets are made of attention (2 l) and
    MLP (2 l + 1) sublayers: BlockPruner (arXiv 2406.10594) is ``greedy(loss.n_units, K, loss, 0, 0)`` with "nll", and EvoPress
    (arXiv 2410.14649) ``evolutionary(loss.n_units, 2 * k, loss, len(windows), groups=2)`` with "kl".

    ``n_units`` is the number of units to choose from. `together` branches go through a layer in one call, as in
    `prefix.SharedPrefixEvaluator`. With `keep_dense`, "kl" runs the dense model once and keeps its logits (windows x positions x
    vocabulary), which otherwise runs along with every call.
    ``layer_windows`` adds up what all calls so far ran, in layers x windows (the dense model of "kl" included),
    ``layer_windows_unstopped`` what they would have run if `finalists` dropped nothing, and ``layer_windows_alone`` what
    evaluating every set by itself would have run. Raises ValueError for an unknown metric or unit and windows that do not fit
    the model; a call raises as `evaluation.layer_set_perplexity`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "window position"],
        metric: str = "nll",
        *,
        batch_size: int = 8,
        progress: bool = False,
        unit: str = "layer",
        together: int = 1,
        keep_dense: bool = False,
    ):
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; there are: {', '.join(METRICS)}")
        self.n_layers = len(decoder_layers(model))
        check_layer_set(self.n_layers, (), unit)
        check_windows(model, windows, batch_size=batch_size)
        self.model, self.windows, self.metric, self.unit = model, windows, metric, unit
        self.n_units = UNITS[unit] * self.n_layers
        self.batch_size, self.progress, self.together = batch_size, progress, together
        self.layer_windows = 0
        self.layer_windows_unstopped = 0
        self.layer_windows_alone = 0
        self._starts = list(range(0, len(windows), batch_size))  # of the batches, those that tell most in front
        self._shell: Shell | None = None
        self._keeps_dense = keep_dense and metric == "kl"
        self._dense: Float[Tensor, "window position vocabulary"] | None = None

    def __call__(self, layer_sets: Sequence[LayerSet], rows: Sequence[int] | None = None) -> list[float]:
        """Nats per token without each of the sets, in their order; on the windows of the indices `rows` only, if given."""
        where = slice(None) if rows is None else list(rows)
        found = self._measured(layer_sets, where)
        self._would_run(layer_sets, len(self.windows[where]))
        return [found[removed].nats for removed in layer_sets]

    def finalists(self, layer_sets: Sequence[LayerSet], width: int = 1, bound: float = math.inf) -> dict[LayerSet, float]:
        """Sets → nats per token, for those that are evaluated on all windows; the others cannot be among the `width` lowest.

        As `search.Finalists` promises, by `stopping.finals`: batch by batch, a set is dropped once what it has lost already
        is above the sum of the best sets, or above `bound`. The values are those of a call, to the last bit while
        `together` is 1. Batches on which the winner of the previous call lost most come first.
        """
        if not layer_sets:
            return {}
        tokens = self.windows[:, 1:].numel()
        found = finals(layer_sets, self._starts, self._window_losses, tokens, width, bound)
        self._would_run(layer_sets, len(self.windows))
        self._starts.sort(key=lambda start: -found.part_sums.get(start, 0.0))
        return found.values

    def _window_losses(self, layer_sets: list[LayerSet], start: int) -> list[tuple[float, ...]]:
        """For each set its summed losses in the windows of one batch."""
        found = self._measured(layer_sets, slice(start, start + self.batch_size))
        by_window = attrgetter(METRICS[self.metric][2])
        return [by_window(found[removed]) for removed in layer_sets]

    def _measured(self, layer_sets: Sequence[LayerSet], where: slice | list[int]) -> dict:
        """`METRICS` on some of the windows."""
        windows = self.windows[where]
        if self._shell is None and self.unit == "layer":
            with torch.inference_mode():
                self._shell = Shell(self.model, decoder_layers(self.model), self.windows[:1, :2].to(self.model.device))
        how = {"batch_size": self.batch_size, "progress": self.progress, "unit": self.unit, "together": self.together}
        if self._keeps_dense:
            self._dense = self._dense_logits() if self._dense is None else self._dense
            how |= {"dense": self._dense[where]}
        found = METRICS[self.metric][0](self.model, windows, layer_sets, **how, shell=self._shell)
        self.layer_windows += shared_layer_forwards(self.n_layers, self._run_for(layer_sets), self.unit) * len(windows)
        return found

    @torch.inference_mode()
    def _dense_logits(self) -> Float[Tensor, "window position vocabulary"]:
        runs = SharedPrefixEvaluator(
            self.model, self.windows, [()], batch_size=self.batch_size, progress=False, shell=self._shell
        )
        ran = self.n_layers * len(self.windows)
        self.layer_windows += ran
        self.layer_windows_unstopped += ran
        self.layer_windows_alone += ran
        return torch.cat([logits for *_, logits in runs])

    def _run_for(self, layer_sets: Sequence[LayerSet]) -> list[LayerSet]:
        beside = () if self._keeps_dense else METRICS[self.metric][1]
        return list(dict.fromkeys([*beside, *layer_sets])) if layer_sets else []

    def _would_run(self, layer_sets: Sequence[LayerSet], windows: int) -> None:
        sets = self._run_for(layer_sets)
        self.layer_windows_unstopped += shared_layer_forwards(self.n_layers, sets, self.unit) * windows
        self.layer_windows_alone += layer_forwards_alone(self.n_layers, sets, self.unit) * windows


# How a loss is measured, which sets the measurement runs beside those asked for, and where it holds the losses by window.
METRICS: dict[str, tuple[Callable, tuple[LayerSet, ...], str]] = {
    "nll": (layer_set_perplexity, (), "window_nll"),
    "kl": (layer_set_divergence, ((),), "window_kl"),
}


ABLATIONS = Rules("ablation", data=2)
"""Ablations by name, called as ``ablation(model, windows, **options)``; the model is left as it was, gradients included."""

ablation = ABLATIONS.register


# --- leave one out -------------------------------------------------------------------------------------------------------


@ablation(title="Leave-one-out NLL", source="Shortened LLaMA (PPL), arXiv 2402.02834", protect_first=4, protect_last=2)
def leave_one_out_nll(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 8, progress: bool = False
) -> Float64[np.ndarray, "layer"]:
    """Nats per token that the dense model loses without the layer; negative where it does better.

    The order is that of the perplexity without the layer, the paper's PPL criterion, and of the first step of SLEB. The
    paper's "plus" rule protects the first four and the last two layers, for this and the next two of its criteria.
    Published calibration: 10 samples of 128 tokens of BookCorpus.
    """
    everything = [(), *((layer,) for layer in range(len(decoder_layers(model))))]
    dense, *without = LayerSetLoss(model, windows, "nll", batch_size=batch_size, progress=progress)(everything)
    return np.array(without) - dense


@ablation(title="Leave-one-out KL", source="fitness of EvoPress, arXiv 2410.14649, for one layer")
def leave_one_out_kl(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 8, progress: bool = False
) -> Float64[np.ndarray, "layer"]:
    """KL(dense || without the layer) of the predicted distributions, nats per token; >= 0."""
    singles = [(layer,) for layer in range(len(decoder_layers(model)))]
    return np.array(LayerSetLoss(model, windows, "kl", batch_size=batch_size, progress=progress)(singles))


# --- weights and their gradients -----------------------------------------------------------------------------------------


@ablation(title="Taylor+", source="Shortened LLaMA (Taylor+), arXiv 2402.02834, Eq. 2", protect_first=4, protect_last=2)
def taylor(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    batch_size: int = 10,
    power: int = 1,
    progress: bool = False,
) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights w of a layer of |w dLoss/dw| to the power `power`; >= 0.

    The first-order change of the loss (mean negative log-likelihood of all scored tokens) when a weight is set to zero. All
    matrices and norms of the layer count, biases do not, as in the released code; the products are summed over the samples
    first, the absolute value comes after, so the batch size changes nothing. Needs the memory of one gradient of all layers.
    """
    check_windows(model, windows, batch_size=batch_size)
    weights = [_weights(layer) for layer in decoder_layers(model)]
    flat = [weight for layer in weights for weight in layer]
    tokens = windows[:, 1:].numel()
    gradients: list[Tensor | None] = [None] * len(flat)
    starts = range(0, len(windows), batch_size)
    with _requiring_gradients(flat), torch.enable_grad():
        for start in tqdm(starts, desc="gradients", unit="batch", disable=not progress):
            ids = windows[start : start + batch_size].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / tokens
            parts = torch.autograd.grad(loss, flat, allow_unused=True)
            gradients = [_sum(total, part) for total, part in zip(gradients, parts, strict=True)]
    found = iter(gradients)
    return np.array([math.fsum(_salience(weight, next(found), power) for weight in layer) for layer in weights])


@ablation(title="Mag+", source="Shortened LLaMA (Mag+), arXiv 2402.02834, Eq. 1", protect_first=4, protect_last=2)
def magnitude(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], power: int = 1
) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights of a layer of |w| to the power `power`; biases do not count; >= 0. The windows do not matter."""
    return np.array([math.fsum(_norm(weight, power) for weight in _weights(layer)) for layer in decoder_layers(model)])


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.endswith("bias")]


@contextmanager
def _requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters only, which others then do not cost; and the model as it was, after that."""
    changed = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    # In float32 whatever the model: sums of float16 gradients overflow. An expert that no token reached has none.
    if part is None:
        return total
    return part.float() if total is None else total.add_(part.float())


def _salience(weight: Tensor, gradient: Tensor | None, power: int) -> float:
    return 0.0 if gradient is None else _norm(weight.detach().float() * gradient, power)


def _norm(values: Tensor, power: int) -> float:
    return values.detach().float().abs().pow(power).sum(dtype=torch.float64).item()


# --- entropy -------------------------------------------------------------------------------------------------------------


@ablation(title="EntroDrop", source="EntroDrop, arXiv 2504.03794", protect_first=2, protect_last=1)
def entropy_gain(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    neighbors: int = 25,
    batch_size: int = 1,
    progress: bool = False,
) -> Float64[np.ndarray, "layer"]:
    """H(output) - H(input) of the hidden states of a layer, by `knn_entropy` in nats; mean over batches.

    As published for a whole layer. The first stage, in which entropy falls, is never pruned: the first two layers are
    protected, and the last. A layer that changes nothing has 0, which is not the lowest where others lower the entropy.
    Entropies are those of the tokens of one batch together, which must be more than `neighbors`. Published calibration:
    128 windows of 256 tokens of C4.
    """
    return _entropy_gains(model, windows, neighbors, batch_size, progress)


@ablation(title="EntroDrop (as released)", source="EntroDrop's released code", protect_first=2, protect_last=1)
def entropy_gain_attention(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    neighbors: int = 25,
    batch_size: int = 1,
    progress: bool = False,
) -> Float64[np.ndarray, "layer"]:
    """H(input + attention(input)) - H(input), otherwise as `entropy_gain`.

    The released code computes the score of the layer, then ranks whole layers by this one of the attention sublayer alone.
    Raises UnsupportedModel where the sublayers of a layer cannot be told apart, or do not simply add to its input.
    """
    return _entropy_gains(model, windows, neighbors, batch_size, progress, without=(MLP,))


def knn_entropy(states: Float[Tensor, "token dim"], neighbors: int = 25) -> float:
    """Differential entropy in nats, from the distance r of each token to its k-th nearest neighbor (not itself).

    d mean(log r) + log(pi^(d/2) / Gamma(d/2 + 1)) + log(n) - log(k), for n tokens of width d, as EntroDrop estimates it: the
    estimator of Kozachenko and Leonenko with logarithms in the place of digamma functions. Distances below 1e-10 count as
    that. Raises ValueError when there are not more than `neighbors` tokens.
    """
    tokens, width = states.shape
    if not 1 <= neighbors < tokens:
        raise ValueError(
            f"{tokens} tokens: the distance to neighbor {neighbors} needs more than {neighbors} (and a neighbor from 1); "
            "take longer windows or a larger batch_size"
        )
    # Products of matrices would lose small distances between large states.
    distance = torch.cdist(states.float(), states.float(), compute_mode="donot_use_mm_for_euclid_dist")
    radius = distance.kthvalue(neighbors + 1, dim=1).values.double()
    volume = width / 2 * math.log(math.pi) - math.lgamma(width / 2 + 1)
    return width * (radius + 1e-10).log().mean().item() + volume + math.log(tokens) - math.log(neighbors)


@torch.inference_mode()
def _entropy_gains(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    neighbors: int,
    batch_size: int,
    progress: bool,
    without: tuple[int, ...] = (),
) -> Float64[np.ndarray, "layer"]:
    """Entropy of the output of each layer while its sublayers `without` are silent, minus that of its input; batch mean.

    With a silent MLP the output is the input plus what the attention adds, whatever norms and factors stand in between.
    """
    check_windows(model, windows, batch_size=batch_size)
    layers = decoder_layers(model)
    shell = Shell(model, layers, windows[:1, :2].to(model.device), range(len(layers)) if without else ())
    gains = []
    for start in tqdm(range(0, len(windows), batch_size), desc="entropy", unit="batch", disable=not progress):
        hidden = shell.enter(windows[start : start + batch_size].to(model.device))
        entropy = knn_entropy(hidden.flatten(0, 1), neighbors)
        gain = []
        for index in range(len(layers)):
            output = shell.run(index, hidden)
            state = shell.run(index, hidden, without) if without else output
            after = knn_entropy(state.flatten(0, 1), neighbors)
            gain.append(after - entropy)
            hidden, entropy = output, after if state is output else knn_entropy(output.flatten(0, 1), neighbors)
        gains.append(gain)
    return np.mean(gains, axis=0)

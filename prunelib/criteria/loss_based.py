"""Importance that needs the model itself: its loss without a layer, its weights, their gradients, the entropy of its states."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from prunelib.criteria.registry import ablation
from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_perplexity
from prunelib.evaluation.perplexity import check_windows
from prunelib.models import decoder_layers
from prunelib.models.layerwise import LayerwiseModel

# --- leave one out -------------------------------------------------------------------------------------------------------


@ablation(title="Leave-one-out NLL", source="Shortened LLaMA (PPL), arXiv 2402.02834", protect_first=4, protect_last=2)
def leave_one_out_nll(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 8
) -> Float64[np.ndarray, "layer"]:
    """Nats per token that the dense model loses without the layer; negative where it does better.

    The order is that of the perplexity without the layer, the paper's PPL criterion, and of the first step of SLEB. The
    paper's "plus" rule protects the first four and the last two layers, for this and the next two of its criteria.
    Published calibration: 10 samples of 128 tokens of BookCorpus.
    """
    sets = [(), *((layer,) for layer in range(len(decoder_layers(model))))]
    found = layer_set_perplexity(model, windows, sets, batch_size=batch_size, progress=False)
    return np.array([found[removed].nll for removed in sets[1:]]) - found[()].nll


@ablation(title="Leave-one-out KL", source="fitness of EvoPress, arXiv 2410.14649, for one layer")
def leave_one_out_kl(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 8
) -> Float64[np.ndarray, "layer"]:
    """KL(dense || without the layer) of the predicted distributions, nats per token; >= 0."""
    sets = [(layer,) for layer in range(len(decoder_layers(model)))]
    found = layer_set_divergence(model, windows, sets, batch_size=batch_size, progress=False)
    return np.array([found[removed].kl for removed in sets])


# --- weights and their gradients -----------------------------------------------------------------------------------------


@ablation(title="Taylor+", source="Shortened LLaMA (Taylor+), arXiv 2402.02834, Eq. 2", protect_first=4, protect_last=2)
def taylor(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 10
) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights w of a layer of |w dLoss/dw|; >= 0.

    The first-order change of the loss (mean negative log-likelihood of all scored tokens) when a weight is set to zero. All
    matrices and norms of the layer count, biases do not, as in the released code; the products are summed over the samples
    first, the absolute value comes after, so the batch size changes nothing. Needs the memory of one gradient of all layers.
    """
    check_windows(model, windows, batch_size=batch_size)
    weights = [_weights(layer) for layer in decoder_layers(model)]
    flat = [weight for layer in weights for weight in layer]
    tokens = windows[:, 1:].numel()
    gradients: list[Tensor | None] = [None] * len(flat)
    with _requiring_gradients(flat), torch.enable_grad():
        for batch in windows.split(batch_size):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / tokens
            parts = torch.autograd.grad(loss, flat, allow_unused=True)
            gradients = [_sum(total, part) for total, part in zip(gradients, parts, strict=True)]
    # An expert that no token reached has no gradient.
    salience = iter(
        0.0 if gradient is None else _absolute_sum(weight.detach().float() * gradient)
        for weight, gradient in zip(flat, gradients, strict=True)
    )
    return np.array([math.fsum(next(salience) for _ in layer) for layer in weights])


@ablation(title="Mag+", source="Shortened LLaMA (Mag+), arXiv 2402.02834, Eq. 1", protect_first=4, protect_last=2)
def magnitude(model: PreTrainedModel, windows: Int64[Tensor, "window position"]) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights of a layer of |w|; biases do not count; >= 0. The windows do not matter."""
    return np.array([math.fsum(map(_absolute_sum, _weights(layer))) for layer in decoder_layers(model)])


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
    # In float32 whatever the model: sums of float16 gradients overflow.
    if part is None:
        return total
    return part.float() if total is None else total.add_(part.float())


def _absolute_sum(values: Tensor) -> float:
    return values.detach().float().abs().sum(dtype=torch.float64).item()


# --- entropy -------------------------------------------------------------------------------------------------------------


@ablation(title="EntroDrop", source="EntroDrop, arXiv 2504.03794", protect_first=2, protect_last=1)
def entropy_gain(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], neighbors: int = 25, batch_size: int = 1
) -> Float64[np.ndarray, "layer"]:
    """H(output) - H(input) of the hidden states of a layer, by `knn_entropy` in nats; mean over batches.

    As published for a whole layer. The first stage, in which entropy falls, is never pruned: the first two layers are
    protected, and the last. A layer that changes nothing has 0, which is not the lowest where others lower the entropy.
    Entropies are those of the tokens of one batch together, which must be more than `neighbors`. Published calibration:
    128 windows of 256 tokens of C4.
    """
    return _entropy_gains(model, windows, neighbors, batch_size)


@ablation(title="EntroDrop (as released)", source="EntroDrop's released code", protect_first=2, protect_last=1)
def entropy_gain_attention(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], neighbors: int = 25, batch_size: int = 1
) -> Float64[np.ndarray, "layer"]:
    """H(input + attention(input)) - H(input), otherwise as `entropy_gain`.

    The released code computes the score of the layer, then ranks whole layers by this one of the attention sublayer alone.
    Raises UnsupportedModel where the sublayers of a layer cannot be told apart, or do not simply add to its input.
    """
    return _entropy_gains(model, windows, neighbors, batch_size, without=("mlp",))


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
    without: tuple[str, ...] = (),
) -> Float64[np.ndarray, "layer"]:
    """Entropy of the output of each layer while its sublayers `without` are silent, minus that of its input; batch mean.

    With a silent MLP the output is the input plus what the attention adds, whatever norms and factors stand in between.
    """
    check_windows(model, windows, batch_size=batch_size)
    engine = LayerwiseModel(model)
    gains = []
    for batch in windows.split(batch_size):
        hidden = engine.embed(batch)
        entropy = knn_entropy(hidden.flatten(0, 1), neighbors)
        gain = []
        for index in range(engine.n_layers):
            output = engine.run_layer(index, hidden)
            state = engine.run_layer(index, hidden, without) if without else output
            after = knn_entropy(state.flatten(0, 1), neighbors)
            gain.append(after - entropy)
            hidden, entropy = output, after if state is output else knn_entropy(output.flatten(0, 1), neighbors)
        gains.append(gain)
    return np.mean(gains, axis=0)

"""Importance that needs the model itself: its loss without a layer, its weights, their gradients, the entropy of its states."""

import math
from collections.abc import Iterable

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


@ablation(title="Leave-one-out NLL", source="Shortened LLaMA (PPL), arXiv 2402.02834", protect_first=4, protect_last=2)
def leave_one_out_nll(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 8
) -> Float64[np.ndarray, "layer"]:
    """Nats per token that the dense model loses without the layer; negative where it does better.

    The order is that of the paper's PPL criterion and of the first step of SLEB. The paper's "plus" rule protects the first
    four and the last two layers. Published calibration: 10 samples of 128 tokens of BookCorpus.
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


@ablation(title="Taylor+", source="Shortened LLaMA (Taylor+), arXiv 2402.02834, Eq. 2", protect_first=4, protect_last=2)
@torch.enable_grad()
def taylor(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], batch_size: int = 10
) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights w of a layer of |w dLoss/dw|; >= 0.

    The first-order change of the loss when a weight is set to zero. Matrices and norms count, biases do not, as in the released
    code; gradients are summed over the samples before the absolute value is taken, so the batch size changes nothing. Needs the
    memory of one float32 gradient of all layers.
    """
    check_windows(model, windows, batch_size=batch_size)
    weights = [_weights(layer) for layer in decoder_layers(model)]
    flat = [weight for layer in weights for weight in layer]
    gradients = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in flat}  # sums of float16 overflow
    frozen = [weight for weight in flat if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for batch in windows.split(batch_size):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            # An expert that no token reached has the gradient 0.
            parts = torch.autograd.grad(loss / windows[:, 1:].numel(), flat, materialize_grads=True)
            for weight, part in zip(flat, parts, strict=True):
                gradients[weight] += part
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return np.array([_absolute_sum(weight.detach().float() * gradients[weight] for weight in layer) for layer in weights])


@ablation(title="Mag+", source="Shortened LLaMA (Mag+), arXiv 2402.02834, Eq. 1", protect_first=4, protect_last=2)
def magnitude(model: PreTrainedModel, windows: Int64[Tensor, "window position"]) -> Float64[np.ndarray, "layer"]:
    """Sum over the weights of a layer of |w|; biases do not count; >= 0. The windows do not matter."""
    return np.array([_absolute_sum(_weights(layer)) for layer in decoder_layers(model)])


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.endswith("bias")]


def _absolute_sum(tensors: Iterable[Tensor]) -> float:
    return math.fsum(values.detach().float().abs().sum(dtype=torch.float64).item() for values in tensors)


@ablation(title="EntroDrop", source="EntroDrop, arXiv 2504.03794", protect_first=2, protect_last=1)
def entropy_gain(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], neighbors: int = 25, batch_size: int = 1
) -> Float64[np.ndarray, "layer"]:
    """H(output) - H(input) of the hidden states of a layer, by `knn_entropy` in nats; mean over batches.

    The first stage, in which entropy falls, is never pruned: the first two layers are protected, and the last. A layer that
    changes nothing has 0, which is not the lowest where others lower the entropy. Entropies are those of the tokens of one
    batch together, more than `neighbors` of them. Published calibration: 128 windows of 256 tokens of C4.
    """
    return _entropy_gains(model, windows, neighbors, batch_size, without=())


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

    d mean(log r) + log(pi^(d/2) / Gamma(d/2 + 1)) + log(n) - log(k), for n tokens of width d: as EntroDrop, the estimator of
    Kozachenko and Leonenko with logarithms for digamma functions. Raises ValueError for not more than `neighbors` tokens.
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
    without: tuple[str, ...],
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
        gains.append([])
        for index in range(engine.n_layers):
            output = engine.run_layer(index, hidden)
            after = knn_entropy(output.flatten(0, 1), neighbors)
            part = engine.run_layer(index, hidden, without) if without else output
            gains[-1].append((knn_entropy(part.flatten(0, 1), neighbors) if without else after) - entropy)
            hidden, entropy = output, after
    return np.mean(gains, axis=0)

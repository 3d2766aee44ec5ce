"""Attention or MLP alone taken out of decoder layers, and what of that an ordinary checkpoint can express.

A checkpoint describes every layer with both of its sublayers. In a layer that loses one, its output projection becomes zeros:
the file loads anywhere and gives the right logits, but the weights stay in it. `idle_fraction` says how much of the model that
is (BlockPruner's and EvoPress's own code mask sublayers in memory and write no smaller model).
"""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from prunelib.models.architectures import OUTPUT_NAMES, SUBLAYERS, UnsupportedModel
from prunelib.models.layers import (
    decoder_layers,
    describe_layer,
    evaluating,
    keep_layers,
    parameter_count,
    probe_tokens,
    remove_layers,
    sublayers_of,
)
from prunelib.models.layerwise import LayerSet, LayerwiseModel, check_layer_set


def all_sublayers(n_layers: int) -> tuple[tuple[int, str], ...]:
    """Every sublayer of a model, in order: ((0, "attn"), (0, "mlp"), (1, "attn"), ...)."""
    return tuple((layer, part) for layer in range(n_layers) for part in SUBLAYERS)


def whole_layers(removed: Collection[tuple[int, str]]) -> tuple[int, ...]:
    """The layers of which both sublayers are among `removed`."""
    return tuple(layer for layer, part in removed if part == "attn" and (layer, "mlp") in removed)


def remove_sublayers(model: PreTrainedModel, removed: LayerSet) -> PreTrainedModel:
    """A model without the sublayers `removed`, ((layer, "attn" | "mlp"), ...), that saves and reloads as one of its family.

    It shares every tensor but the zeros with `model`, which is left as it was. Raises the same errors as `remove_layers`, and
    UnsupportedModel where the sublayers of a layer do not simply add to its input or are not silenced by zeros.
    """
    n_layers = len(decoder_layers(model))
    removed = check_layer_set(n_layers, removed)
    whole, pruned = whole_layers(removed), keep_layers(model, range(n_layers))
    with torch.no_grad(), evaluating(pruned):
        engine = LayerwiseModel(pruned)
        hidden = engine.embed(probe_tokens(pruned))
        for index, part in removed:
            if index in whole:
                continue
            silenced = engine.run_layer(index, hidden, (part,))
            names = _zero_output(engine.layers[index], sublayers_of(pruned, index)[part])
            if not names or not torch.equal(silenced, engine.run_layer(index, hidden)):
                zeros = ", ".join(names) or f"an output projection ({', '.join(OUTPUT_NAMES)})"
                raise UnsupportedModel(f"{describe_layer(model, index)}: zeros for {zeros} do not silence its {part}")
    return remove_layers(pruned, whole)


def _zero_output(layer: nn.Module, sublayer: nn.Module) -> list[str]:
    """Put zeros in the place of the output projections of a sublayer; their names within the layer."""
    own = set(sublayer.parameters())
    names = [
        name
        for name, parameter in layer.named_parameters()
        if parameter in own and any(word.removesuffix("_bias") in OUTPUT_NAMES for word in name.split("."))
    ]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        old = layer.get_parameter(name)
        setattr(layer.get_submodule(parent), attribute, nn.Parameter(torch.zeros_like(old), old.requires_grad))
    return names


def idle_fraction(model: PreTrainedModel, removed: LayerSet) -> float:
    """Fraction of the parameters that `remove_sublayers` leaves in the checkpoint without effect; raises as it does.

    These are the weights of sublayers lost alone and of the norms that serve nothing else, found by their gradients: a norm
    that feeds both sublayers (Phi, GPT-J) still works for the other one.
    """
    removed = check_layer_set(len(decoder_layers(model)), removed)
    halves = [unit for unit in removed if unit[0] not in whole_layers(removed)]
    with evaluating(model), torch.no_grad():
        engine = LayerwiseModel(model)
        hidden = engine.embed(probe_tokens(model))
        return sum(_idle(engine, *unit, hidden) for unit in halves) / parameter_count(model)


def _idle(engine: LayerwiseModel, index: int, part: str, hidden: torch.Tensor) -> int:
    """Parameters of a layer that have no effect while one of its sublayers is silent.

    Those of the other sublayer all count as working, whatever their gradient: the bias of keys has none by nature, nor has an
    expert that no token reached.
    """
    parameters = list(engine.layers[index].parameters())
    (other,) = (module for name, module in sublayers_of(engine.model, index).items() if name != part)
    with torch.enable_grad():
        output = engine.run_layer(index, hidden, (part,))
        gradients = torch.autograd.grad(output.float().square().sum(), parameters, allow_unused=True)
    working = set(other.parameters()) | {p for p, g in zip(parameters, gradients, strict=True) if g is not None and g.any()}
    return sum(parameter.numel() for parameter in parameters if parameter not in working)

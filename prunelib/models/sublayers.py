"""Attention or MLP alone taken out of decoder layers, and what of that an ordinary checkpoint can express.

A checkpoint of transformers describes every layer with both of its sublayers. A layer that loses both can leave the file. In a
layer that loses one, the output projection of that sublayer becomes zeros: the file loads anywhere and gives the right logits,
but the weights stay in the file and are multiplied as before. `idle_fraction` says how much of the model that is (BlockPruner's
and EvoPress's own code mask sublayers in memory and write no smaller model).
"""

import torch
from torch import nn
from torch.func import functional_call
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
    sublayer_names,
    sublayers_of,
)
from prunelib.models.layerwise import LayerwiseModel, silent
from prunelib.models.plans import SublayerPlan


def all_sublayers(n_layers: int) -> tuple[tuple[int, str], ...]:
    """Every sublayer of a model, in order: ((0, "attn"), (0, "mlp"), (1, "attn"), ...)."""
    return tuple((layer, part) for layer in range(n_layers) for part in SUBLAYERS)


def remove_sublayers(model: PreTrainedModel, plan: SublayerPlan) -> PreTrainedModel:
    """A model without the sublayers of `plan` that saves and reloads as an ordinary checkpoint of its family.

    Layers that lose both sublayers are gone, as by `remove_layers`; a layer that loses one stays, with zeros for the output
    projection and its bias. The result shares every other weight tensor with `model`, which is left as it was.

    Raises ValueError for a plan of another number of layers, UnsupportedModel where the sublayers of a layer to be cut cannot
    be told apart, do not simply add to its input, or are not silenced by zeros, and the same errors as `remove_layers`.
    """
    lost = _lost(model, plan)
    pruned = keep_layers(model, range(plan.n_layers))
    with torch.no_grad(), evaluating(pruned):
        engine = LayerwiseModel(pruned)
        hidden = engine.embed(probe_tokens(pruned))
        for index, part in lost.items():
            silenced = engine.run_layer(index, hidden, (part,))
            names = ", ".join(_zero_output(pruned, index, part))
            if not torch.equal(silenced, engine.run_layer(index, hidden)):
                raise UnsupportedModel(f"{describe_layer(model, index)}: zeros for {names} do not silence its sublayer")
    return remove_layers(pruned, plan.layers)


def idle_fraction(model: PreTrainedModel, plan: SublayerPlan) -> float:
    """Fraction of the parameters that `remove_sublayers` leaves in the checkpoint without effect.

    These are the weights of sublayers lost alone and of the norms that serve nothing else, found by their gradients: a norm
    that feeds both sublayers (Phi, GPT-J) still works for the other one. BlockPruner's first twelve sublayers of Llama-2-7B
    are no whole layer: nothing is removed, 14.0 % of the model is idle. Raises the same errors as `remove_sublayers`.
    """
    lost = _lost(model, plan)
    with evaluating(model):
        engine = LayerwiseModel(model)
        with torch.no_grad():
            hidden = engine.embed(probe_tokens(model))
            for index, part in lost.items():
                engine.run_layer(index, hidden, (part,))  # refuses layers that do more than add
        return sum(_idle(engine, index, part, hidden) for index, part in lost.items()) / parameter_count(model)


def _lost(model: PreTrainedModel, plan: SublayerPlan) -> dict[int, str]:
    """The layers that lose one sublayer, and which one; checked against the model."""
    n_layers = len(decoder_layers(model))
    if plan.n_layers != n_layers:
        raise ValueError(f"the plan is for {plan.n_layers} layers, this {model.config.model_type} model has {n_layers}")
    lost = {index: part for index, part in plan.removed if index not in plan.layers}
    for index in lost:
        sublayer_names(model, index)
    return lost


def _zero_output(model: PreTrainedModel, index: int, part: str) -> list[str]:
    """Put zeros in the place of the output projections of a sublayer; their names within the layer."""
    layer, prefix = decoder_layers(model)[index], sublayer_names(model, index)[part] + "."
    names = [
        name
        for name, _ in layer.named_parameters()
        if name.startswith(prefix) and any(word.removesuffix("_bias") in OUTPUT_NAMES for word in name.split("."))
    ]
    if not names:
        known = ", ".join(OUTPUT_NAMES)
        raise UnsupportedModel(f"{describe_layer(model, index)}: no output projection {known} in {prefix[:-1]}")
    for name in names:
        parent, _, attribute = name.rpartition(".")
        old = layer.get_parameter(name)
        setattr(layer.get_submodule(parent), attribute, nn.Parameter(torch.zeros_like(old), old.requires_grad))
    return names


def _idle(engine: LayerwiseModel, index: int, part: str, hidden: torch.Tensor) -> int:
    """Parameters of a layer that have no effect while one of its sublayers is silent.

    Those of the other sublayer all count as working, whatever their gradient: the bias of keys has none by nature, nor has an
    expert that no token reached.
    """
    layer, sublayers = engine.layers[index], sublayers_of(engine.model, index)
    silenced = sublayers.pop(part)
    working = {id(parameter) for other in sublayers.values() for parameter in other.parameters()}
    weights = {name: parameter.detach().requires_grad_() for name, parameter in layer.named_parameters()}
    args, kwargs = engine.calls[index]
    with torch.enable_grad(), silent(silenced):
        output = functional_call(layer, weights, (hidden, *args), kwargs)
        output = output[0] if isinstance(output, (tuple, list)) else output
        gradients = torch.autograd.grad(output.float().square().sum(), list(weights.values()), allow_unused=True)
    return sum(
        parameter.numel()
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True)
        if id(parameter) not in working and (gradient is None or not gradient.any())
    )

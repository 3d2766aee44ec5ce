"""Attention or MLP alone taken out of decoder layers, and what of that an ordinary checkpoint can express.

A checkpoint of transformers describes every layer with both of its sublayers. A layer that loses both can leave the file. A
layer that loses one cannot: here it keeps its form, and the output projection of the lost sublayer becomes zeros. The file
then loads anywhere and gives the logits of a model without that sublayer, but nothing is saved: the weights of the lost
sublayer stay in the file and in memory, they are multiplied as before, and a lost attention still computes and caches its
keys and values. `account` says how much of the model that is. Only a runtime that skips sublayers gains from the rest
(BlockPruner's and EvoPress's own code mask them in memory and write no smaller model).

Sublayers are found by name, and what the names promise is checked by running the layers: with both sublayers silent a layer
must hand its input on, and with the zeros in place it must give what it gives with that sublayer silent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from prunelib.models import (
    UnsupportedModel,
    decoder_layers,
    evaluating,
    parameter_count,
    probe_tokens,
    remove_layers,
    removed_fraction,
)
from prunelib.models.architectures import SUBLAYERS
from prunelib.models.plans import SublayerPlan

ATTENTION, MLP = 0, 1

# Where a decoder layer keeps its two sublayers; the first name that leads to a module is taken.
ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention", "linear_attn")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "fc2")  # OPT's layer holds the two matrices itself
SUBLAYER_NAMES = (ATTENTION_NAMES, MLP_NAMES)

# The last matrix of a sublayer, attention or MLP; each expert of a mixture has one, and so has a shared expert.
OUTPUT_NAMES = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")


@dataclass(frozen=True)
class Account:
    """What a removal of sublayers comes to in an ordinary checkpoint; fractions are of the parameters of the dense model.

    Attributes:
        removed: parameters that are gone, those of whole layers.
        idle: parameters that are still in the file, loaded and multiplied, and change nothing: those of sublayers lost alone.
        idle_caches: layers that still compute and cache keys and values to no effect.
    """

    removed: float
    idle: float
    idle_caches: int


def remove_sublayers(model: PreTrainedModel, plan: SublayerPlan) -> PreTrainedModel:
    """A model without the sublayers of `plan` that saves and reloads as an ordinary checkpoint of its family.

    Layers that lose both sublayers are gone, as by `models.remove_layers`. A layer that loses one stays, with zeros for the
    output projection of that sublayer (and its bias). The result has its own modules and shares every other weight tensor with
    `model`, which is left as it was. `account` tells what such a model does not save.

    Raises ValueError for a plan of another number of layers, and UnsupportedModel where the sublayers of a layer to be cut
    cannot be told apart, do not simply add to its input, or are not silenced by zeros; and as `models.remove_layers`.
    """
    n_layers = len(decoder_layers(model))
    if plan.n_layers != n_layers:
        raise ValueError(f"the plan is for {plan.n_layers} layers, this {model.config.model_type} model has {n_layers}")
    for index in plan.cut:
        sublayers_of(model, index)
    pruned = remove_layers(model, plan.layers)
    places = _places(plan)
    zeroed = {index: _zero_output(pruned, new, _lost(plan, index)) for new, index in places.items()}
    for new, call in _calls(pruned, places).items():
        _check_cut(model, places[new], _lost(plan, places[new]), call, zeroed[places[new]])
    return pruned


def account(dense: PreTrainedModel, plan: SublayerPlan) -> Account:
    """What `remove_sublayers` really removes, and what it leaves idle in the checkpoint.

    Idle are the weights of a sublayer lost alone and of the norms that serve nothing else, found by their gradients: a norm
    that feeds both sublayers (Phi, GPT-J) still works for the other one. BlockPruner's first twelve sublayers of Llama-2-7B
    are no whole layer: nothing is removed, 14.0 % of the model is idle, and 10 of 32 layers cache keys in vain.

    Raises as `remove_sublayers`.
    """
    pruned = remove_sublayers(dense, plan)
    places = _places(plan)
    idle = sum(_idle(pruned, new, _lost(plan, places[new]), call) for new, call in _calls(pruned, places).items())
    caches = sum(_lost(plan, index) == ATTENTION for index in plan.cut)
    return Account(removed_fraction(dense, pruned), idle / parameter_count(dense), caches)


def all_sublayers(n_layers: int) -> tuple[tuple[int, str], ...]:
    """Every sublayer of a model, in order: ((0, "attn"), (0, "mlp"), (1, "attn"), ...)."""
    return tuple((layer, part) for layer in range(n_layers) for part in SUBLAYERS)


# --- the sublayers of a layer --------------------------------------------------------------------------------------------


def sublayers_of(model: PreTrainedModel, index: int) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a decoder layer. Raises UnsupportedModel where one of them has none of the known names."""
    layer = decoder_layers(model)[index]
    attention, mlp = (getattr(layer, _name(model, index, part)) for part in (ATTENTION, MLP))
    return attention, mlp


def _name(model: PreTrainedModel, index: int, part: int) -> str:
    layer = decoder_layers(model)[index]
    for name in SUBLAYER_NAMES[part]:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise UnsupportedModel(
        f"{_place(model, index)}: no sublayer {' or '.join(SUBLAYER_NAMES[part])}; look at whole layers instead"
    )


def _place(model: PreTrainedModel, index: int) -> str:
    return f"model type {model.config.model_type!r}, layer {index}, a {type(decoder_layers(model)[index]).__name__}"


@contextmanager
def silent(*modules: nn.Module) -> Iterator[None]:
    """While this lasts, the modules give zeros, in the form of their output."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(lambda module, args, output: _zeroed(output)).remove)
        yield


def _zeroed(output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return type(output)([torch.zeros_like(output[0]), *output[1:]])


def check_additive(
    model: PreTrainedModel,
    index: int,
    hidden: Float[Tensor, "batch position hidden"],
    run: Callable[[], Float[Tensor, "batch position hidden"]],
) -> None:
    """Raise UnsupportedModel unless layer `index`, which `run` calls on `hidden`, adds its attention and its MLP to its input.

    Its output with both silent must be its input. So whatever norms and factors stand in between give zero for zero, and
    silence is what the absence of a sublayer means.
    """
    with silent(*sublayers_of(model, index)):
        output = run()
    if not torch.equal(output.to(hidden.device), hidden):  # a model spread over devices moves its states along
        raise UnsupportedModel(
            f"{_place(model, index)}, does not add its attention and its MLP to its input; look at whole layers instead"
        )


# --- one cut -------------------------------------------------------------------------------------------------------------

_Call = tuple[tuple, dict[str, Any], Float[Tensor, "batch position hidden"]]


def _places(plan: SublayerPlan) -> dict[int, int]:
    """Index in the pruned model → index in the dense model, of the layers that lose one sublayer."""
    kept = [index for index in range(plan.n_layers) if index not in plan.layers]
    return {new: index for new, index in enumerate(kept) if index in plan.cut}


def _lost(plan: SublayerPlan, index: int) -> int:
    return ATTENTION if index in plan.attention else MLP


def _zero_output(pruned: PreTrainedModel, index: int, part: int) -> list[str]:
    """Put zeros in the place of the output projections of a sublayer; their names within the layer."""
    layer = decoder_layers(pruned)[index]
    prefix = _name(pruned, index, part) + "."
    names = [
        name
        for name, _ in layer.named_parameters()
        if name.startswith(prefix) and any(word.removesuffix("_bias") in OUTPUT_NAMES for word in name.split("."))
    ]
    if not names:
        raise UnsupportedModel(f"{_place(pruned, index)}: no output projection {', '.join(OUTPUT_NAMES)} in {prefix[:-1]}")
    for name in names:
        parent, _, attribute = name.rpartition(".")
        old = layer.get_parameter(name)
        setattr(layer.get_submodule(parent), attribute, nn.Parameter(torch.zeros_like(old), old.requires_grad))
    return names


def _check_cut(model: PreTrainedModel, index: int, part: int, call: _Call, names: Sequence[str]) -> None:
    """The dense layer, called as the cut one was, gives the same output with the lost sublayer silent."""
    args, kwargs, output = call
    layer = decoder_layers(model)[index]

    def run() -> Tensor:
        return _hidden(layer(*args, **kwargs))

    with torch.no_grad(), evaluating(model):
        check_additive(model, index, args[0] if args else kwargs["hidden_states"], run)
        with silent(sublayers_of(model, index)[part]):
            expected = run()
    if not torch.equal(expected, output):
        raise UnsupportedModel(f"{_place(model, index)}: zeros for {', '.join(names)} do not silence its sublayer")


def _calls(model: PreTrainedModel, indices: Sequence[int] | dict[int, int]) -> dict[int, _Call]:
    """How each of some layers is called within the model, on a few tokens, and what it gives."""
    calls: dict[int, _Call] = {}
    layers = decoder_layers(model)
    with ExitStack() as hooks:
        for index in indices:

            def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
                calls[index] = args, kwargs, _hidden(output)

            hooks.callback(layers[index].register_forward_hook(hook, with_kwargs=True).remove)
        if indices:
            with torch.no_grad(), evaluating(model):
                model(input_ids=probe_tokens(model), use_cache=False)
    return calls


def _hidden(output: Any) -> Float[Tensor, "batch position hidden"]:
    return output[0] if isinstance(output, tuple) else output


def _idle(pruned: PreTrainedModel, index: int, part: int, call: _Call) -> int:
    """Parameters of a layer that have no effect while one of its sublayers is silent.

    Those of the other sublayer all count as working, whatever their gradient: the bias of keys has none by nature, nor has an
    expert that no token reached.
    """
    args, kwargs, _ = call
    layer, sublayers = decoder_layers(pruned)[index], sublayers_of(pruned, index)
    working = {id(parameter) for parameter in sublayers[1 - part].parameters()}
    weights = {name: parameter.detach().requires_grad_() for name, parameter in layer.named_parameters()}
    with torch.enable_grad(), evaluating(pruned), silent(sublayers[part]):
        output = _hidden(functional_call(layer, weights, args, kwargs))
        gradients = torch.autograd.grad(output.float().square().sum(), list(weights.values()), allow_unused=True)
    return sum(
        parameter.numel()
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True)
        if id(parameter) not in working and (gradient is None or not gradient.any())
    )

"""Models with a narrower residual stream, as ordinary transformers models: built, saved, loaded and generated with.

One table, `ARCHITECTURES`, says for each family which modules read the residual stream and which write to it. A sliced model is the
family's own model in which exactly these modules are replaced by narrower ones, its norms by norms without weights (they
were folded into what follows them), and every residual connection by a shortcut between the bases on its two sides.
Attention, MLP activations, rotary embeddings, masks, caches and generation stay the family's own code.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prunelib.models import UnsupportedModel
from prunelib.models.architectures import ARCHITECTURES, Architecture, Sublayer
from prunelib.models.architectures import SLICED_MODEL_TYPE as MODEL_TYPE
from prunelib.slicing.registration import register_model_type


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The wiring of a dense model's family. Raises UnsupportedModel naming the model type when it has none."""
    if config.model_type == MODEL_TYPE:
        raise UnsupportedModel("this model is sliced already: slice the dense model with the widths wanted in the end")
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"model type {config.model_type!r} cannot be sliced; the families that can: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[config.model_type]


# ---------------------------------------------------------------------------------------------------- widths, shortcuts


def positions(widths: Sequence[int], steps: int, hidden_size: int) -> list[int]:
    """Widths of the stream before every step of every layer, and before the head, where it is as wide as in the dense model."""
    return [width for width in widths for _ in range(steps)] + [hidden_size]


def shortcut_kinds(widths: Sequence[int], hidden_size: int, shortcuts: str = "absorbed") -> list[str]:
    """What stands between each two neighboring places of these widths, a key of `SHORTCUT_MODULES`; `shortcuts` is one of
    `SHORTCUTS`. Raises ValueError for an unknown one."""
    if shortcuts not in SHORTCUTS:
        raise ValueError(f"unknown shortcuts {shortcuts!r}; there are: {', '.join(SHORTCUTS)}")
    return SHORTCUTS[shortcuts](widths, hidden_size)


def _absorbed(widths: Sequence[int], hidden_size: int) -> list[str]:
    # A basis may be turned within the space it spans, which the matrices that read and write there take in; and where nothing
    # is cut, any basis of the whole space will do. So of two shortcuts that meet, one can be made diagonal (singular value
    # decomposition, both bases turned), and one into or out of an uncut place becomes the identity, with dimensions dropped
    # or zeros added.
    kinds = []
    turned = False  # the basis before this shortcut is used up by the diagonal shortcut before it
    sliced_before = False
    for width, following in itertools.pairwise(widths):
        sliced_before |= width < hidden_size
        if following == hidden_size or (width == hidden_size and not sliced_before):
            kinds.append("identity")
        elif width == hidden_size or turned:
            kinds.append("dense")
        else:
            kinds.append("diagonal")
        turned = kinds[-1] == "diagonal"
    return kinds


SHORTCUTS: dict[str, Callable[[Sequence[int], int], list[str]]] = {
    "absorbed": _absorbed,
    "dense": lambda widths, hidden_size: ["dense"] * (len(widths) - 1),
    "none": lambda widths, hidden_size: ["identity"] * (len(widths) - 1),
}
"""Kinds of shortcut between places of given widths. "dense": a basis of its own at every place, and a matrix between each two,
as in SliceGPT. "absorbed": the same function, with matrices shrunk to diagonals or nothing wherever that changes nothing.
"none": one basis for the whole model, of which each place keeps the first directions; no shortcut has parameters."""


class Identity(nn.Module):
    """Leading dimensions kept; the others dropped, or zeros added: [..., before] to [..., after]."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.added = after - before

    def forward(self, states: Float[Tensor, "... before"]) -> Float[Tensor, "... after"]:
        return functional.pad(states, (0, self.added)) if self.added else states


class Diagonal(nn.Module):
    """A rectangular diagonal matrix: [..., before] to [..., after]."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(min(before, after)))
        self.added = after - before

    def forward(self, states: Float[Tensor, "... before"]) -> Float[Tensor, "... after"]:
        scaled = states[..., : len(self.weight)] * self.weight
        return functional.pad(scaled, (0, self.added)) if self.added > 0 else scaled


def _dense(before: int, after: int) -> nn.Linear:
    return nn.Linear(before, after, bias=False)


SHORTCUT_MODULES = {"identity": Identity, "diagonal": Diagonal, "dense": _dense}
"""Modules of a residual connection between two bases, called with the widths before and after."""


# ------------------------------------------------------------------------------------------------------------ the model


def normalized(states: Float[Tensor, "... width"], size: int, eps: float) -> Float[Tensor, "... width"]:
    """states / sqrt(sum of squares / size + eps), in float32 at least: RMSNorm of a stream that was `size` wide when dense."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / size + eps)).to(states.dtype)


class Normalize(nn.Module):
    """`normalized` as a module, without weights."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, states: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return normalized(states, self.size, self.eps)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a family's norm."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def branch_output(
    layer: nn.Module, branch: Sublayer, normed: Float[Tensor, "sample token width"], arguments: dict[str, Any]
) -> Float[Tensor, "sample token _"]:
    """What a branch of a layer, dense or sliced, adds to the stream, from the normed stream and the layer's arguments."""
    states = normed
    for index, path in enumerate(branch.modules):
        module = layer.get_submodule(path)
        states = module(hidden_states=states, **arguments)[0] if branch.attention and index == 0 else module(states)
    return states


class SlicedLayer(GradientCheckpointingLayer):
    """A decoder layer between bases of given widths; takes over the modules of `layer`, under their names.

    `widths` has one element more than there are steps: before each step, and after the last. In a model, a layer is also an
    instance of its family's own class (`_layer_class`), by which transformers finds the layers to record hidden states of.
    """

    returns = torch.Tensor  # for `models.IdentityLayer`, which cannot run a layer on hidden states of another one's width

    def __init__(
        self,
        layer: nn.Module,
        steps: tuple[tuple[Sublayer, ...], ...],
        widths: Sequence[int],
        shortcuts: Sequence[str],
        hidden_size: int,
        dropout: float,
    ):
        nn.Module.__init__(self)  # not that of the family's class, which would build a dense layer
        self.steps = steps
        self.dropout = dropout
        branches = [branch for step in steps for branch in step]
        paths = [path for branch in branches for path in (branch.norm, *branch.modules)]
        for name, module in layer.named_children():
            if name in paths:
                self.add_module(name, module)
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        norms = {branch.norm: self.get_submodule(branch.norm) for branch in branches}
        for index, step in enumerate(steps):
            for branch in step:
                for path in branch.inputs:
                    _narrow(self, path, inputs=widths[index], bias=getattr(norms[branch.norm], "bias", None) is not None)
                _narrow(self, branch.output, outputs=widths[index + 1])
        for path, norm in norms.items():
            self.set_submodule(path, Normalize(hidden_size, norm_eps(norm)))
        self.shortcuts = nn.ModuleList(
            SHORTCUT_MODULES[kind](widths[index], widths[index + 1]) for index, kind in enumerate(shortcuts)
        )

    def forward(self, hidden_states: Float[Tensor, "sample token before"], **arguments: Any) -> Tensor:
        for step, shortcut in zip(self.steps, self.shortcuts, strict=True):
            result = shortcut(hidden_states)
            for branch in step:
                normed = self.get_submodule(branch.norm)(hidden_states)
                added = branch_output(self, branch, normed, arguments)
                result = result + functional.dropout(added, self.dropout, self.training)
            hidden_states = result
        return hidden_states


@functools.cache
def _layer_class(dense: type[nn.Module]) -> type[SlicedLayer]:
    return type(f"Sliced{dense.__name__}", (SlicedLayer, dense), {})


def _narrow(module: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None, bias: bool = False) -> None:
    """Put an unset linear map of other widths in the place of the one at `path`."""
    old = module.get_submodule(path)
    new = nn.Linear(inputs or old.in_features, outputs or old.out_features, bias=bias or old.bias is not None)
    module.set_submodule(path, new)


def _narrow_model(model: PreTrainedModel, wiring: Architecture, config: PreTrainedConfig) -> None:
    """Replace the modules of a model of the dense family, in place, by those its `config.slicing` describes."""
    size = config.hidden_size
    steps = wiring.steps(config)
    n_steps = len(steps)
    widths = positions(config.slicing["widths"], n_steps, size)
    shortcuts = config.slicing["shortcuts"]
    if len(widths) - 1 != config.num_hidden_layers * n_steps or len(shortcuts) != len(widths) - 1:
        raise ValueError(
            f"the slicing of this configuration is that of {len(config.slicing['widths'])} layers and {len(shortcuts)} "
            f"shortcuts, the model has {config.num_hidden_layers} layers: remove layers first, then slice what is left"
        )
    for path in wiring.embeddings:
        table = model.get_submodule(path)
        table.weight = nn.Parameter(torch.empty(table.num_embeddings, widths[0]))
        table.embedding_dim = widths[0]
    layers = model.get_submodule(wiring.layers)
    dropout = float(getattr(config, wiring.dropout)) if wiring.dropout else 0.0
    for index, layer in enumerate(layers):
        first = index * n_steps
        layers[index] = _layer_class(type(layer))(
            layer, steps, widths[first : first + n_steps + 1], shortcuts[first : first + n_steps], size, dropout
        )
    norm = model.get_submodule(wiring.final_norm)
    _narrow(model, wiring.head, bias=getattr(norm, "bias", None) is not None)
    model.set_submodule(wiring.final_norm, Normalize(size, norm_eps(norm)))


@functools.cache
def classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and model class of a sliced family, registered with AutoModelForCausalLM."""
    wiring = ARCHITECTURES[family]
    dense_config = type(AutoConfig.for_model(family))
    dense_model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]

    # Not a class statement: transformers makes it a dataclass that takes more than its fields, which type checks object to.
    Config = type(f"Sliced{dense_config.__name__}", (dense_config,), {"model_type": MODEL_TYPE})

    class Model(dense_model):
        config_class = Config
        _no_split_modules = [f"Sliced{name}" for name in dense_model._no_split_modules]  # noqa: RUF012 (a list is expected)

        def __init__(self, config: Config):
            super().__init__(config)
            _narrow_model(self, wiring, config)
            self.post_init()

    Model.__name__ = Model.__qualname__ = f"Sliced{dense_model.__name__}"
    AutoModelForCausalLM.register(Config, Model)
    return Config, Model


def config_class(record: dict) -> type[PreTrainedConfig]:
    """The class for the contents of a sliced model's config.json. Raises UnsupportedModel when they are damaged."""
    slicing = record.get("slicing")
    family = slicing.get("family") if isinstance(slicing, dict) else None
    if family not in ARCHITECTURES:
        raise UnsupportedModel(f"this configuration of a sliced model names no family that can be sliced, but {family!r}")
    return classes(family)[0]


register_model_type()

"""Models with a narrower residual stream, as ordinary transformers models: built, saved, loaded and generated with.

A sliced model is the family's own model in which the modules that read or write the residual stream (`ARCHITECTURES`) are
replaced by narrower ones, its norms by norms without weights (these were folded into the modules behind them), and every
residual connection by a shortcut between the bases on its two sides. Everything else is the family's own code.
"""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prunelib.models import UnsupportedModel
from prunelib.models.architectures import ARCHITECTURES, SLICED_MODEL_TYPE, Architecture, Sublayer
from prunelib.slicing.schedules import SlicePlan


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a dense model. Raises UnsupportedModel naming the model type when it cannot be sliced."""
    if config.model_type == SLICED_MODEL_TYPE:
        raise UnsupportedModel("this model is sliced already: slice the dense model with the widths wanted in the end")
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(f"model type {config.model_type!r} cannot be sliced; the families that can: {known}")
    return ARCHITECTURES[config.model_type]


def positions(widths: Sequence[int], steps: int, hidden_size: int) -> list[int]:
    """Widths of the stream before every step of every layer, and before the head, where it is as wide as in the dense model."""
    return [width for width in widths for _ in range(steps)] + [hidden_size]


SHORTCUTS = ("folded", "full", "shared_basis")
"""Kinds of shortcut. "full": a basis of its own at every position, and a matrix between each two, as in SliceGPT. "folded": the
same function with half of these parameters or less: diagonals or the identity wherever that changes nothing. "shared_basis":
one basis for the whole model, the principal axes of the sum over positions of the dense stream's moments, each divided by its
trace; each position keeps the first directions, and no shortcut has parameters."""


def shortcut_kinds(widths: Sequence[int], hidden_size: int, shortcuts: str = "folded") -> list[str]:
    """The module between each two neighboring positions of these widths, a key of `SHORTCUT_MODULES`.

    Raises ValueError when `shortcuts` is not one of `SHORTCUTS`.
    """
    if shortcuts not in SHORTCUTS:
        raise ValueError(f"unknown shortcuts {shortcuts!r}; there are: {', '.join(SHORTCUTS)}")
    if shortcuts != "folded":
        return ["dense" if shortcuts == "full" else "identity"] * (len(widths) - 1)
    # A basis may be rotated within the space it spans: the matrices that read and write there absorb the rotation. So of two
    # shortcuts in a row one can be made diagonal (by singular vectors), and one into or out of an uncut position, where any
    # basis will do, becomes the identity, with dimensions dropped or zeros added.
    kinds, sliced_before = [], False
    rotated = False  # the diagonal shortcut before this one has fixed the basis between them
    for width, following in itertools.pairwise(widths):
        sliced_before |= width < hidden_size
        if following == hidden_size or (width == hidden_size and not sliced_before):
            kinds.append("identity")
        elif width == hidden_size or rotated:
            kinds.append("dense")
        else:
            kinds.append("diagonal")
        rotated = kinds[-1] == "diagonal"
    return kinds


class Identity(nn.Module):
    """Leading dimensions kept; the others dropped, or zeros added: [..., before] to [..., after]."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.added = after - before

    def forward(self, states: Float[Tensor, "... before"]) -> Float[Tensor, "... after"]:
        return functional.pad(states, (0, self.added)) if self.added else states


class Diagonal(Identity):
    """A rectangular diagonal matrix: [..., before] to [..., after]."""

    def __init__(self, before: int, after: int):
        super().__init__(before, after)
        self.weight = nn.Parameter(torch.ones(min(before, after)))

    def forward(self, states: Float[Tensor, "... before"]) -> Float[Tensor, "... after"]:
        scaled = states[..., : len(self.weight)] * self.weight
        return functional.pad(scaled, (0, self.added)) if self.added > 0 else scaled


SHORTCUT_MODULES = {"identity": Identity, "diagonal": Diagonal, "dense": functools.partial(nn.Linear, bias=False)}
"""Modules of a residual connection between two bases, called with the widths before and after."""


class Normalize(nn.Module):
    """RMSNorm without weights of a stream that was `size` wide when dense, in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, states: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / self.size + self.eps)).to(states.dtype)


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a family's norm."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def sublayer_output(
    layer: nn.Module, sublayer: Sublayer, normed: Float[Tensor, "sample token width"], arguments: dict[str, Any]
) -> Float[Tensor, "sample token _"]:
    """What a sublayer of a dense or sliced layer adds to the stream, from the normed stream and the layer's arguments."""
    states = normed
    for index, path in enumerate(sublayer.modules):
        module = layer.get_submodule(path)
        states = module(hidden_states=states, **arguments)[0] if sublayer.attention and index == 0 else module(states)
    return states


class SlicedLayer(GradientCheckpointingLayer):
    """A decoder layer between bases of the widths before each step and after the last, with the modules of `layer`.

    In a model, it is also an instance of its family's own class, by which transformers finds layers to record hidden states of.
    """

    returns = torch.Tensor  # `models.layerwise` cannot find out: the layers differ in width

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
        self.steps, self.dropout = steps, dropout
        sublayers = [sublayer for step in steps for sublayer in step]
        paths = [path for sublayer in sublayers for path in (sublayer.norm, *sublayer.modules)]
        for name, module in layer.named_children():
            if name in paths:
                self.add_module(name, module)
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        norms = {sublayer.norm: self.get_submodule(sublayer.norm) for sublayer in sublayers}
        for index, step in enumerate(steps):
            for sublayer in step:
                for path in sublayer.inputs:
                    _narrow(self, path, inputs=widths[index], bias=getattr(norms[sublayer.norm], "bias", None) is not None)
                _narrow(self, sublayer.output, outputs=widths[index + 1])
        for path, norm in norms.items():
            self.set_submodule(path, Normalize(hidden_size, norm_eps(norm)))
        between = zip(shortcuts, itertools.pairwise(widths), strict=True)
        self.shortcuts = nn.ModuleList(SHORTCUT_MODULES[kind](*ends) for kind, ends in between)

    def forward(self, hidden_states: Float[Tensor, "sample token before"], **arguments: Any) -> Tensor:
        for step, shortcut in zip(self.steps, self.shortcuts, strict=True):
            result = shortcut(hidden_states)
            for sublayer in step:
                normed = self.get_submodule(sublayer.norm)(hidden_states)
                added = sublayer_output(self, sublayer, normed, arguments)
                result = result + functional.dropout(added, self.dropout, self.training)
            hidden_states = result
        return hidden_states


@functools.cache
def _layer_class(dense: type[nn.Module]) -> type[SlicedLayer]:
    return type(f"Sliced{dense.__name__}", (SlicedLayer, dense), {})


def _narrow(module: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None, bias: bool = False) -> None:
    """Replace the linear map at `path` by one of other widths, without values."""
    old = module.get_submodule(path)
    new = nn.Linear(inputs or old.in_features, outputs or old.out_features, bias=bias or old.bias is not None)
    module.set_submodule(path, new)


def _narrow_model(model: PreTrainedModel, architecture: Architecture, config: PreTrainedConfig) -> None:
    """Replace the modules of a model of the dense family, in place, by those its `config.slicing` describes."""
    size, steps, shortcuts = config.hidden_size, architecture.steps(config), config.slicing["shortcuts"]
    n_steps = len(steps)
    widths = positions(config.slicing["widths"], n_steps, size)
    if len(widths) - 1 != config.num_hidden_layers * n_steps or len(shortcuts) != len(widths) - 1:
        what = f"the slicing of this configuration is that of {len(config.slicing['widths'])} layers"
        raise ValueError(f"{what}, the model has {config.num_hidden_layers}: remove layers first, then slice what is left")
    for path in architecture.embeddings:
        table = model.get_submodule(path)
        table.weight = nn.Parameter(torch.empty(table.num_embeddings, widths[0]))
        table.embedding_dim = widths[0]
    layers = model.get_submodule(architecture.layers)
    dropout = float(getattr(config, architecture.dropout)) if architecture.dropout else 0.0
    for index, layer in enumerate(layers):
        first = index * n_steps
        layers[index] = _layer_class(type(layer))(
            layer, steps, widths[first : first + n_steps + 1], shortcuts[first : first + n_steps], size, dropout
        )
    norm = model.get_submodule(architecture.final_norm)
    _narrow(model, architecture.head, bias=getattr(norm, "bias", None) is not None)
    model.set_submodule(architecture.final_norm, Normalize(size, norm_eps(norm)))


@functools.cache
def classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and model class of a sliced family, registered with AutoModelForCausalLM."""
    architecture = ARCHITECTURES[family]
    dense_config = type(AutoConfig.for_model(family))
    dense_model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]

    # Not a class statement: transformers makes it a dataclass that takes more than its fields, which type checks object to.
    Config = type(f"Sliced{dense_config.__name__}", (dense_config,), {"model_type": SLICED_MODEL_TYPE})

    class Model(dense_model):
        config_class = Config
        _no_split_modules = [f"Sliced{name}" for name in dense_model._no_split_modules]  # noqa: RUF012 (a list is expected)

        def __init__(self, config: Config):
            super().__init__(config)
            _narrow_model(self, architecture, config)
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


def sliced_configuration(config: PreTrainedConfig, plan: SlicePlan, *, shortcuts: str = "folded") -> PreTrainedConfig:
    """Configuration of the model that `slice_model` makes of a dense one with this configuration; raises the same errors."""
    steps = len(architecture_of(config).steps(config))
    if (plan.hidden_size, plan.n_layers) != (config.hidden_size, config.num_hidden_layers):
        what = f"the plan is for {plan.n_layers} layers of width {plan.hidden_size}"
        raise ValueError(f"{what}, this model has {config.num_hidden_layers} of width {config.hidden_size}")
    record = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    kinds = shortcut_kinds(positions(plan.widths, steps, plan.hidden_size), plan.hidden_size, shortcuts)
    record["slicing"] = asdict(plan) | {"family": config.model_type, "shortcuts": kinds}
    record["tie_word_embeddings"] = False
    sliced = classes(config.model_type)[0].from_dict(record)
    sliced._attn_implementation = config._attn_implementation
    return sliced


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, sliced or not, without its weights: on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))

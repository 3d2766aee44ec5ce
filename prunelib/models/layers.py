"""Find the decoder layers of a model, remove some of them, and view a model with other modules in their place.

Layers are found, and what a configuration says about single layers is renumbered, by the tables of
`prunelib.models.architectures`. What the tables do not know is caught, not guessed: the pruned configuration is written to
JSON, read back and built once without weights, and every parameter and every plain attribute of that model must agree with
the pruned one.
"""

import contextlib
import copy
import itertools
import operator
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import SupportsIndex

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from prunelib.io import first_line
from prunelib.models.architectures import (
    DENSE_PREFIX_COUNTS,
    INEXPRESSIBLE,
    LAYER_INDEX_ATTRIBUTES,
    LAYER_INDEX_LISTS,
    PATHS,
    PER_LAYER_LISTS,
    SHARED_KV,
    SUBLAYER_NAMES,
    UnsupportedModel,
)
from prunelib.models.onednn import use_onednn_like

# ---------------------------------------------------------------------------------------------------- finding layers


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of `model`, in order. Raises UnsupportedModel naming the model type when they are not found."""
    return _get(model, layers_path(model))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the output head. Raises UnsupportedModel when there is none (OPT-350m)."""
    paths = PATHS[layers_path(model)]
    norms = [norm for norm in (_get(model, path) for path in paths) if isinstance(norm, nn.Module)]
    if not norms:
        raise UnsupportedModel(f"model type {_model_type(model)!r}: no final norm at {', '.join(paths)}")
    return norms[0]


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def layers_path(model: nn.Module) -> str:
    """Where the decoder layers of `model` are. Raises UnsupportedModel as `decoder_layers`."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a plain transformers model; merge an adapter first (merge_and_unload)"
        )
    for path in PATHS:
        if isinstance(_get(model, path), nn.ModuleList) and not model.config.is_encoder_decoder:
            return path
    raise UnsupportedModel(
        f"model type {_model_type(model)!r}: no decoder layers at {', '.join(PATHS)}; "
        "for a decoder-only model, add its path to prunelib.models.architectures.PATHS"
    )


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied weights count once, buffers not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def removed_fraction(dense: nn.Module, pruned: nn.Module) -> float:
    """Fraction of the parameters of `dense` that `pruned` no longer has: the achieved ratio, not the one asked for."""
    return 1.0 - parameter_count(pruned) / parameter_count(dense)


def parameter_fraction(model: nn.Module, removed: Collection[int]) -> float:
    """`removed_fraction` of these decoder layers, without making a pruned model: also of a model spread over devices.

    Raises ValueError for a layer that does not exist.
    """
    layers = decoder_layers(model)
    wrong = [index for index in removed if not 0 <= index < len(layers)]
    if wrong:
        raise ValueError(f"layers {wrong} do not exist in a model of {len(layers)} layers (0 to {len(layers) - 1})")
    view = with_layers(model, [IdentityLayer(layer) if index in removed else layer for index, layer in enumerate(layers)])
    return removed_fraction(model, view)


def sublayers_of(model: PreTrainedModel, index: int) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a decoder layer. Raises UnsupportedModel where one of them has none of the known names."""
    layer = decoder_layers(model)[index]
    attention, mlp = (getattr(layer, sublayer_name(model, index, part)) for part in SUBLAYER_NAMES)
    return attention, mlp


def sublayer_name(model: PreTrainedModel, index: int, part: str) -> str:
    """The attribute of a decoder layer that holds its sublayer `part` ("attn", "mlp"). Raises as `sublayers_of`."""
    layer = decoder_layers(model)[index]
    for name in SUBLAYER_NAMES[part]:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise UnsupportedModel(
        f"{describe_layer(model, index)}: no sublayer {' or '.join(SUBLAYER_NAMES[part])}; look at whole layers instead"
    )


def describe_layer(model: PreTrainedModel, index: int) -> str:
    """What error messages call a layer."""
    return f"model type {model.config.model_type!r}, layer {index}, a {type(decoder_layers(model)[index]).__name__}"


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate has placed the model on several devices: it can be evaluated, not pruned."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def probe_tokens(model: PreTrainedModel) -> Int64[Tensor, "sample token"]:
    """A fixed batch of token ids, 2 x 16 or as long as the model allows, spread over the vocabulary, on the model's device."""
    config = model.config.get_text_config(decoder=True)
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    return (torch.arange(2 * length).reshape(2, length) * 7919 + 3).remainder(config.vocab_size).to(model.device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While this lasts `model` is in evaluation mode; then every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --------------------------------------------------------------------------------------------------- removing layers


def keep_layers(model: PreTrainedModel, keep: Sequence[SupportsIndex]) -> PreTrainedModel:
    """A model of the decoder layers `keep` (0-based, ascending) of `model`, ready to run, generate and save.

    The result has its own modules and configuration and SHARES the weight tensors: no memory is spent on a copy, training one
    trains both. `model` itself is left as it was. Layer indices, the layer count and everything the configuration says
    about single layers are renumbered; index rules of mixture-of-experts models become explicit lists or new counts.

    Raises ValueError for an impossible `keep`, and UnsupportedModel where an ordinary checkpoint cannot say what is left: the
    configuration of the result, written and read back, must build the very same modules.
    """
    path = layers_path(model)
    old = _get(model, path)
    kept = [operator.index(index) for index in keep]
    if not kept:
        raise ValueError(f"cannot remove {len(old)} of {len(old)} layers: at least one must stay")
    if any(a >= b for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= len(old):
        raise ValueError(f"keep={kept}: give distinct layers in ascending order, from 0 to {len(old) - 1}")
    _check_prunable(model, len(old), kept)

    # The memo makes deepcopy share what it holds: tensors, and nothing at all for layers that go.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(layer): None for index, layer in enumerate(old) if index not in set(kept)}
    pruned = copy.deepcopy(model, memo)
    parent, _, name = path.rpartition(".")
    layers = nn.ModuleList(_get(pruned, path)[index] for index in kept)
    layers.training = old.training
    setattr(_get(pruned, parent), name, layers)

    for new, index in enumerate(kept):
        for module in layers[new].modules():
            for attribute in LAYER_INDEX_ATTRIBUTES:
                if getattr(module, attribute, None) == index:
                    setattr(module, attribute, new)
    _renumber(pruned.config.get_text_config(decoder=True), kept, len(old))
    _check_expressible(pruned, path)
    return pruned


def remove_layers(model: PreTrainedModel, removed: Collection[SupportsIndex]) -> PreTrainedModel:
    """`keep_layers` of all layers but `removed` (any order, no duplicates)."""
    n_layers = len(decoder_layers(model))
    gone = [operator.index(index) for index in removed]
    if len(set(gone)) < len(gone) or any(not 0 <= index < n_layers for index in gone):
        raise ValueError(f"removed={gone}: give distinct layers from 0 to {n_layers - 1}")
    return keep_layers(model, [index for index in range(n_layers) if index not in set(gone)])


def _check_prunable(model: PreTrainedModel, n_layers: int, kept: Sequence[int]) -> None:
    """Refuse, before any work, what is known not to survive."""
    model_type, config = _model_type(model), model.config.get_text_config(decoder=True)
    remedy = "prune it unquantized on one device (load(..., device='cpu')), save it, and load the saved folder as you like"
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"this {model_type} model is quantized; {remedy}")
    if is_spread(model):
        raise UnsupportedModel(f"this {model_type} model is spread over several devices; {remedy}")
    if n_layers != config.num_hidden_layers:
        raise UnsupportedModel(
            f"this {model_type} model has {n_layers} layers but its configuration says {config.num_hidden_layers}: "
            "it was changed without its configuration; load it again"
        )
    if len(kept) == n_layers:
        return
    reason = INEXPRESSIBLE.get(config.model_type) or INEXPRESSIBLE.get(model_type)
    if getattr(config, "num_kv_shared_layers", 0):
        reason = reason or f"num_kv_shared_layers={config.num_kv_shared_layers}: {SHARED_KV}"
    if getattr(config, "is_heterogeneous", False):
        reason = reason or "its configuration overrides single layers by index (per_layer_config)"
    kinds = getattr(config, "layer_types", None) or ()
    if _with_attention(kinds) and not _with_attention([kinds[index] for index in kept]):
        reason = reason or f"its key-value cache needs an attention layer; keep one of {_with_attention(kinds)}"
    if reason is not None:
        raise UnsupportedModel(f"cannot remove these layers of a {model_type} model: {reason}")


def _with_attention(kinds: Sequence[str]) -> list[int]:
    """Indices of the layers that attend, in a model that may mix them with convolutions and recurrences."""
    return [i for i, kind in enumerate(kinds) if "hybrid" in kind or ("attention" in kind and kind != "linear_attention")]


def _renumber(config: transformers.PretrainedConfig, kept: Sequence[int], n_layers: int) -> None:
    """Rewrite, in place, everything `config` says about single layers. Lists keep their identity: modules may hold them."""
    _renumber_experts(config, kept, n_layers)
    new_index = {old: new for new, old in enumerate(kept)}
    done = set()
    for name in (*LAYER_INDEX_LISTS, *PER_LAYER_LISTS):
        entries = getattr(config, name, None)
        if isinstance(entries, tuple):
            entries = list(entries)
            setattr(config, name, entries)
        # A property computes its list again each time: changing that copy changes nothing, which is right.
        if not isinstance(entries, list) or id(entries) in done:
            continue
        if name in LAYER_INDEX_LISTS:
            entries[:] = [new_index[index] for index in entries if index in new_index]
        elif len(entries) == n_layers:
            entries[:] = [entries[index] for index in kept]
        else:
            raise UnsupportedModel(f"model type {config.model_type!r}: {name} has {len(entries)} entries, not {n_layers}")
        done.add(id(entries))
    if getattr(config, "attention_types", None) is not None and hasattr(config, "attention_layers"):
        config.attention_types = [[list(config.attention_layers), 1]]  # GPT-Neo: [[pattern, repetitions], ...]
    if isinstance(getattr(config, "block_types", None), list):  # RecurrentGemma repeats a short pattern
        config.block_types = [config.block_types[index % len(config.block_types)] for index in kept]
    config.num_hidden_layers = len(kept)


def _renumber_experts(config: transformers.PretrainedConfig, kept: Sequence[int], n_layers: int) -> None:
    """Which layers of the kept ones are mixtures of experts."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:  # Qwen MoE: every step-th layer is sparse, unless listed in mlp_only_layers
        only = getattr(config, "mlp_only_layers", None) or []
        config.mlp_only_layers = [index for index in range(n_layers) if index in only or (index + 1) % step != 0]
        config.decoder_sparse_step = 1
    if getattr(config, "moe_layer_interval", None) == 1:  # ERNIE 4.5: sparse from start to end, both included
        end = config.moe_layer_end_index if config.moe_layer_end_index != -1 else n_layers - 1
        config.moe_layer_start_index = sum(index < config.moe_layer_start_index for index in kept)
        # -1 would be read as "to the last layer"; an end before the start says "none" as well as an empty range does.
        config.moe_layer_end_index = max(sum(index <= end for index in kept) - 1, 0)
        if not any(index <= end for index in kept):
            config.moe_layer_start_index = len(kept)
    for name in DENSE_PREFIX_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and not isinstance(count, bool):
            setattr(config, name, sum(index < count for index in kept))


def _check_expressible(pruned: PreTrainedModel, path: str) -> None:
    """Raise UnsupportedModel unless the configuration, as a file would hold it, builds the modules of `pruned`.

    Compared are the names and shapes of all weights and, in the decoder layers, the classes and all plain attributes: layer
    indices, window sizes, attention scales, which layers rotate. Built on the meta device, so no memory is needed.
    """
    model_type, config = _model_type(pruned), pruned.config
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            as_saved = type(config).from_pretrained(folder, local_files_only=True)
        as_saved._attn_implementation = config._attn_implementation
        with torch.device("meta"):
            rebuilt = use_onednn_like(pruned, type(pruned)(as_saved))
    except Exception as error:
        reason = f"its configuration does not allow it ({first_line(error)})"
        raise UnsupportedModel(f"cannot remove these layers of a {model_type} model: {reason}") from error
    differences = list(_differences(pruned, rebuilt, path))
    if differences:
        raise UnsupportedModel(
            f"cannot remove these layers of a {model_type} model: a checkpoint of its configuration would load with "
            f"{len(differences)} differences, such as {'; '.join(differences[:3])}"
        )


def _differences(pruned: nn.Module, rebuilt: nn.Module, path: str) -> Iterator[str]:
    here = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"weight {name} is {here.get(name, 'absent')} here, {there.get(name, 'absent')} there"
    modules = dict(rebuilt.named_modules())
    for name, module in pruned.named_modules():
        other = modules.get(name)
        if not name.startswith(path + ".") or other is None:
            continue
        if type(module) is not type(other):
            yield f"{name} is a {type(module).__name__} here, a {type(other).__name__} there"
            continue
        mine, theirs = _plain_attributes(module), _plain_attributes(other)
        for attribute in sorted(mine.keys() & theirs.keys()):
            if mine[attribute] != theirs[attribute]:
                yield f"{name}.{attribute} is {mine[attribute]} here, {theirs[attribute]} there"


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    ignored = ("training", "gradient_checkpointing")
    plain = (bool, int, float, str, type(None), tuple, list)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ignored
    }


# ------------------------------------------------------------------------------------------------------------- views


def with_layers(model: PreTrainedModel, slots: Sequence[nn.Module] | nn.ModuleList) -> PreTrainedModel:
    """A view of `model` whose L decoder slots are the modules `slots`; everything else, weights included, is shared.

    The configuration is that of `model`: slot l is called as layer l is (its mask, its position embeddings). Put
    `IdentityLayer(layer)` where a layer is to be left out. For evaluation with `use_cache=False`; to keep a smaller model, use
    `keep_layers`.
    Raises ValueError when the number of slots is not L.
    """
    path = layers_path(model)
    n_layers = len(_get(model, path))
    if len(slots) != n_layers:
        raise ValueError(f"{len(slots)} slots were given for a model of {n_layers} layers")
    view = parent = _shallow(model)
    *names, last = path.split(".")
    for name in names:
        child = _shallow(getattr(parent, name))
        parent._modules[name] = child
        parent = child
    container = nn.ModuleList(slots)
    container.training = model.training
    parent._modules[last] = container
    return view


def _shallow(module: nn.Module) -> nn.Module:
    """The same module object's state in a new object: own registries (children, hooks), same children and tensors."""
    clone = object.__new__(type(module))
    clone.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()})
    if "_hf_hook" in vars(module):
        # Where accelerate spreads a model, `forward` is an attribute of the instance, bound to the module it was made for: the
        # clone would run that module, with its children. Children have hooks of their own, which move what they are given.
        for name in ("_hf_hook", "_old_forward", "forward"):
            clone.__dict__.pop(name, None)
    return clone


class IdentityLayer(nn.Module):
    """A decoder slot that hands its input on, in the form (tensor, tuple, list) in which `layer` returns its output.

    Attributes it does not have itself are those of `layer` (models ask a layer for its `attention_type`, say). `layer` is not a
    submodule: it adds no parameters, and its hooks do not run. The form is not declared anywhere, so the first call runs
    `layer` once to see it.

    Raises ValueError when called with a key-value cache (a cache counts its length in a layer that runs), and
    UnsupportedModel when `layer` hands the next layer something beside the hidden states, which skipping would lose.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["stands_for"] = layer
        self.returns: type | None = getattr(layer, "returns", None)  # None: not seen yet; sliced layers say it
        self.length = 1

    def forward(self, *args, **kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError("a skipped layer cannot run with a key-value cache: pass use_cache=False, or use keep_layers")
        if self.returns is None:
            self.returns, self.length = self.output_form(*args, **kwargs)
        if self.returns is torch.Tensor:
            return hidden_states
        return self.returns([hidden_states, *[None] * (self.length - 1)])

    @torch.no_grad()
    def output_form(self, *args, **kwargs) -> tuple[type, int]:
        """The type in which the layer returns its output (Tensor, tuple or list) and its length."""
        output = self.stands_for.forward(*args, **kwargs)
        if not isinstance(output, (tuple, list)):
            return torch.Tensor, 1
        # Attention weights [sample, head, query, key] may be dropped. Anything else is read by the next layer (Zaya).
        if any(isinstance(item, Tensor) and item.ndim != 4 for item in output[1:]):
            raise UnsupportedModel(f"cannot skip a {type(self.stands_for).__name__}: it passes on more than hidden states")
        return tuple if isinstance(output, tuple) else list, len(output)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "stands_for" not in self.__dict__:
                raise
            return getattr(self.stands_for, name)

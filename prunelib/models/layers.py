"""Find the decoder layers of a model and remove some of them, by the tables of `prunelib.models.architectures`.

What the tables do not know is caught, not guessed: see `keep_layers`.
"""

import contextlib
import copy
import functools
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

from prunelib.io import first_line
from prunelib.models import architectures
from prunelib.models.architectures import UnsupportedModel
from prunelib.models.onednn import use_onednn_like


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of `model`, in order. Raises UnsupportedModel naming the model type when they are not found."""
    return model.get_submodule(layers_path(model))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the output head. Raises UnsupportedModel when there is none (OPT-350m)."""
    body = model.get_submodule(layers_path(model).rpartition(".")[0])
    for name in architectures.FINAL_NORMS:
        if isinstance(getattr(body, name, None), nn.Module):
            return getattr(body, name)
    raise UnsupportedModel(
        f"model type {model.config.model_type!r}: no final norm called {', '.join(architectures.FINAL_NORMS)}"
    )


def layers_path(model: nn.Module) -> str:
    """The name of the decoder layers within `model`."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a plain transformers model; merge an adapter first (merge_and_unload)"
        )
    for path in architectures.PATHS:
        found = functools.reduce(lambda module, name: getattr(module, name, None), path.split("."), model)
        if isinstance(found, nn.ModuleList) and not model.config.is_encoder_decoder:
            return path
    raise UnsupportedModel(
        f"model type {model.config.model_type!r}: no decoder layers at {', '.join(architectures.PATHS)}; "
        "for a decoder-only model, add its path to prunelib.models.architectures.PATHS"
    )


def sublayers_of(model: PreTrainedModel, index: int) -> dict[str, nn.Module]:
    """The sublayers of a decoder layer, by "attn" and "mlp". Raises UnsupportedModel where their names are not known."""
    layer, found = decoder_layers(model)[index], {}
    for part, names in architectures.SUBLAYER_NAMES.items():
        known = [getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), nn.Module)]
        if not known:
            where = describe_layer(model, index)
            raise UnsupportedModel(f"{where}: no sublayer {' or '.join(names)}; look at whole layers instead")
        found[part] = known[0]
    return found


def describe_layer(model: PreTrainedModel, index: int) -> str:
    """What error messages call a layer."""
    return f"model type {model.config.model_type!r}, layer {index}, a {type(decoder_layers(model)[index]).__name__}"


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate has placed the model on several devices: it can be evaluated, not pruned."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied weights count once, buffers not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def removed_fraction(dense: nn.Module, pruned: nn.Module) -> float:
    """Fraction of the parameters of `dense` that `pruned` no longer has: the achieved ratio, not the one asked for."""
    return 1.0 - parameter_count(pruned) / parameter_count(dense)


def parameter_fraction(model: nn.Module, removed: Collection[int]) -> float:
    """`removed_fraction` of these decoder layers, without making a pruned model."""
    layers, count = decoder_layers(model), parameter_count(model)
    return 1.0 - (count - parameter_count(nn.ModuleList(layers[index] for index in removed))) / count


def probe_tokens(model: PreTrainedModel) -> Int64[Tensor, "sample token"]:
    """A fixed batch of token ids, 2 x 16 or as long as the model allows, spread over the vocabulary."""
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


def keep_layers(model: PreTrainedModel, keep: Sequence[SupportsIndex]) -> PreTrainedModel:
    """A model of the decoder layers `keep` (0-based, ascending) of `model`, ready to run, generate and save.

    The result has its own modules and configuration and SHARES the weight tensors: training one trains both. `model` itself is
    left as it was. Whatever the configuration says about single layers is renumbered.

    Raises ValueError for an impossible `keep`, and UnsupportedModel where an ordinary checkpoint cannot say what is left: the
    configuration of the result, written and read back, must build the very same modules.
    """
    path, old = layers_path(model), decoder_layers(model)
    kept = [operator.index(index) for index in keep]
    if not kept:
        raise ValueError(f"cannot remove {len(old)} of {len(old)} layers: at least one must stay")
    if any(a >= b for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= len(old):
        raise ValueError(f"keep={kept}: give distinct layers in ascending order, from 0 to {len(old) - 1}")
    _check_prunable(model, len(old), kept)

    # The memo makes deepcopy share what it holds: tensors, and nothing at all for layers that go.
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(layer): None for index, layer in enumerate(old) if index not in kept}
    pruned = copy.deepcopy(model, memo)
    layers = nn.ModuleList(pruned.get_submodule(path)[index] for index in kept)
    layers.training = old.training
    pruned.set_submodule(path, layers)

    for new, index in enumerate(kept):
        for module in layers[new].modules():
            for attribute in architectures.LAYER_INDEX_ATTRIBUTES:
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
    return keep_layers(model, [index for index in range(n_layers) if index not in gone])


def _check_prunable(model: PreTrainedModel, n_layers: int, kept: Sequence[int]) -> None:
    """Refuse, before any work, what is known not to survive."""
    model_type, config = model.config.model_type, model.config.get_text_config(decoder=True)
    remedy = "prune it unquantized on one device (load(..., device='cpu')), save it, and load the saved folder as you like"
    shared, said = getattr(config, "num_kv_shared_layers", 0), config.num_hidden_layers
    # A hybrid mixes layers that attend with convolutions and recurrences.
    kinds = enumerate(getattr(config, "layer_types", None) or ())
    attend = [i for i, kind in kinds if "hybrid" in kind or ("attention" in kind and kind != "linear_attention")]
    quantized = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    reasons = {
        f"it is quantized; {remedy}": quantized is not None,
        f"it is spread over several devices; {remedy}": is_spread(model),
        f"it has {n_layers} layers but its configuration says {said}: load it again": n_layers != said,
    }
    if len(kept) < n_layers:
        known = architectures.INEXPRESSIBLE.get(config.model_type) or architectures.INEXPRESSIBLE.get(model_type)
        reasons |= {
            str(known): known is not None,
            f"num_kv_shared_layers={shared}: {architectures.SHARED_KV}": shared,
            "its configuration overrides single layers by index": getattr(config, "is_heterogeneous", False),
            f"its key-value cache needs an attention layer; keep one of {attend}": attend and not set(attend) & set(kept),
        }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(f"cannot remove these layers of a {model_type} model: {reason}")


def _renumber(config: transformers.PretrainedConfig, kept: Sequence[int], n_layers: int) -> None:
    """Rewrite, in place, everything `config` says about single layers. Lists keep their identity: modules may hold them."""
    _renumber_experts(config, kept, n_layers)
    done = set()
    for name in (*architectures.LAYER_INDEX_LISTS, *architectures.PER_LAYER_LISTS):
        entries = getattr(config, name, None)
        if isinstance(entries, tuple):
            entries = list(entries)
            setattr(config, name, entries)
        # A property computes its list again each time: changing that copy changes nothing, which is right.
        if not isinstance(entries, list) or id(entries) in done:
            continue
        if name in architectures.LAYER_INDEX_LISTS:
            entries[:] = [kept.index(index) for index in entries if index in kept]
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
    for name in architectures.DENSE_PREFIX_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and not isinstance(count, bool):
            setattr(config, name, sum(index < count for index in kept))


def _check_expressible(pruned: PreTrainedModel, path: str) -> None:
    """Raise UnsupportedModel unless the configuration, as a file would hold it, builds the modules of `pruned`."""
    config, refusal = pruned.config, f"cannot remove these layers of a {pruned.config.model_type} model"
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            as_saved = type(config).from_pretrained(folder, local_files_only=True)
        as_saved._attn_implementation = config._attn_implementation
        with torch.device("meta"):
            rebuilt = use_onednn_like(pruned, type(pruned)(as_saved))
    except Exception as error:
        raise UnsupportedModel(f"{refusal}: its configuration does not allow it ({first_line(error)})") from error
    here, there = ({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (pruned, rebuilt))
    mine, theirs = _attributes(pruned, path), _attributes(rebuilt, path)
    shared = mine.keys() & theirs.keys()  # one of them has run, which leaves attributes behind
    here, there = here | {name: mine[name] for name in shared}, there | {name: theirs[name] for name in shared}
    differences = [
        f"{name} is {here.get(name, 'absent')} here, {there.get(name, 'absent')} there"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise UnsupportedModel(
            f"{refusal}: a checkpoint of its configuration would load with {len(differences)} differences, such as "
            f"{'; '.join(differences[:3])}"
        )


def _attributes(model: nn.Module, path: str) -> dict[str, object]:
    """Classes and plain attributes of the modules below `path`: indices, window sizes, scales."""
    found: dict[str, object] = {}
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        found[f"class of {name}"] = type(module).__name__
        for attribute, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None), tuple, list)) and not attribute.startswith("_")
            if plain and attribute not in ("training", "gradient_checkpointing"):
                found[f"{name}.{attribute}"] = list(value) if isinstance(value, tuple) else value
    return found

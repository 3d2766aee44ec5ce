"""Load a causal language model, take decoder layers out of it, and save what is left as an ordinary checkpoint.

Layers are found through a small table of attribute paths (`PATHS`). Which fields of a configuration speak about single
layers is written down in three more tables (`PER_LAYER_LISTS`, `LAYER_INDEX_LISTS`, `DENSE_PREFIX_COUNTS`); what the
tables do not know is caught, not guessed: the pruned configuration is written to JSON, read back and built once without
weights, and every parameter and every plain attribute of that model must agree with the pruned one.
"""

import contextlib
import copy
import itertools
import json
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import torch
import transformers
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from prunelib import io
from prunelib.io import flush, leftovers, temporary_prefix
from prunelib.models import memory, onednn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Where the decoder layers are, and where their final norm may be. The first path that leads to a ModuleList is taken.
PATHS = {
    "model.layers": (
        "model.norm",
        "model.final_layernorm",
        "model.final_norm",
        "model.embedding_norm",
        "model.norm_f",
        "model.layer_norm",
    ),
    "model.language_model.layers": ("model.language_model.norm",),  # text tower of a multimodal model
    "model.decoder.layers": ("model.decoder.final_layer_norm",),  # OPT
    "gpt_neox.layers": ("gpt_neox.final_layer_norm",),
    "transformer.h": ("transformer.ln_f", "transformer.layernorm"),  # GPT-2, GPT-Neo, GPT-J, Falcon, BLOOM
    "transformer.blocks": ("transformer.norm_f",),  # MPT
    "biogpt.layers": ("biogpt.layer_norm",),
    "backbone.layers": ("backbone.norm_f",),  # Mamba
}

# Attributes in which a module remembers which layer it belongs to (the key-value cache is addressed by it).
LAYER_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number", "layer_index")

# Configuration fields with one entry per layer. By name only: another list may have L entries by coincidence.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "attention_layers",  # GPT-Neo
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "indexer_types",
    "swiglu_limits",
    "swiglu_limits_shared",
    "num_experts",  # Hunyuan: one number, or one per layer; likewise the next two
    "moe_topk",
    "num_shared_expert",
)

# Configuration fields that list the indices of certain layers.
LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")

# Configuration fields that count how many of the first layers are dense; the others are mixtures of experts.
DENSE_PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers")

# Families whose checkpoint format cannot say what is left after a free choice of layers.
_SHARED_KV = "later layers reuse the keys and values of earlier ones, and per-layer embeddings share one packed table"
_SHARED_BLOCKS = "one attention block is shared by layers at fixed places"
INEXPRESSIBLE = {
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gemma4": _SHARED_KV,
    "gemma4_text": _SHARED_KV,
    "jamba": "attention and expert layers are placed by period and offset (attn_layer_period, expert_layer_period)",
    "zamba": _SHARED_BLOCKS,
    "zamba2": _SHARED_BLOCKS,
}


class UnsupportedModel(ValueError):
    """The request cannot be met for this kind of model; the message names the model type and the reason."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be trusted: missing or damaged files, wrong keys, non-finite weights, or a failed reload."""


# ------------------------------------------------------------------------------------------------------------ loading


@memory.says_what_fits("dtype", "dtype='bfloat16', device='auto' with several GPUs, or stream it (prunelib.scale.offload)")
def load(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, checked: every weight present, none left over, all finite.

    `name_or_path` is a local folder (then nothing is asked of the network) or a name on the Hugging Face hub, fixed by
    `revision`. `dtype` is the type of the weights in memory: from_pretrained's own default is the type in the file, which
    would silently calibrate in bfloat16. `device` "auto" spreads the model over all accelerators; such a model can be
    evaluated but not pruned.

    Raises ValueError for a bad argument, CheckpointError for a missing, damaged, incomplete or non-finite checkpoint.
    """
    torch_dtype, target = checked_dtype(dtype), checked_device(device)
    folder = _local_folder(name_or_path, revision)
    if folder is not None:
        _check_files(folder)
    source, silent = str(folder or name_or_path), None if folder is not None else io.hub_unreachable()
    local = folder is not None or silent is not None
    _config(source, revision, trust_remote_code, local=local, silent=silent)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision or "main",
            dtype=torch_dtype,
            device_map="auto" if device == "auto" else None,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported by name, below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if memory.is_out_of_memory(error):
            raise
        raise CheckpointError(f"cannot load a causal language model from {source!r}: {_first_line(error)}") from error
    _check_keys(info, source)
    if target is not None:
        model = model.to(target)
    check_finite(model)
    return onednn.use_onednn(model).eval()


def load_tokenizer(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a local folder (no network) or the hub. Raises CheckpointError when there is none."""
    folder = _local_folder(name_or_path, revision)
    source, silent = str(folder or name_or_path), None if folder is not None else io.hub_unreachable()
    local = folder is not None or silent is not None
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=local
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        where = "" if folder is not None else f": {_not_from_the_hub(source, silent)}"
        raise CheckpointError(f"cannot load a tokenizer from {source!r}{where} ({_first_line(error)})") from error


def check_finite(model: nn.Module) -> None:
    """Raise CheckpointError naming the first parameter or buffer of `model` that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"tensor {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; "
                "the checkpoint is damaged, or its values overflow this dtype (try dtype='float32')"
            )


def check_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """Raise ValueError when token ids are not in the vocabulary of `model`: on a GPU they would end the process."""
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids {low} to {high}, but the model knows 0 to {vocabulary - 1}: another model's tokenizer?")


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name. Raises ValueError for one that is not in `DTYPES`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)} (name it: results depend on it)")
    return DTYPES[dtype]


def checked_device(device: str | torch.device) -> torch.device | None:
    """The device to move to, None for "auto" (then from_pretrained places the weights). Raises ValueError for a bad one."""
    if device == "auto":
        return None
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a torch device such as 'cpu' or 'cuda:0', nor 'auto'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no CUDA device; use device='cpu'")
    return target


def checkpoint_folder(name_or_path: str | os.PathLike) -> Path:
    """The folder of a complete safetensors checkpoint with a readable configuration, checked without reading weights.

    Raises as `load`, and ValueError for a name that can only be one on the hub.
    """
    folder = _local_folder(name_or_path, None)
    if folder is None:
        raise ValueError(f"{os.fspath(name_or_path)!r} is no local folder: download the model first (`hf download`)")
    _check_files(folder)
    _config(str(folder), None, False, local=True)
    return folder


def _local_folder(name_or_path: str | os.PathLike, revision: str | None) -> Path | None:
    """The folder meant by `name_or_path`, None if it can only be a name on the hub."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    _recover(path)
    if path.is_dir():
        if revision:
            raise ValueError(f"revision {revision!r} was given with the local folder {text!r}: a folder has no revisions")
        return path
    if path.exists():
        raise ValueError(f"{text!r} is a file; give the folder that holds config.json and model.safetensors")
    looks_local = not isinstance(name_or_path, str) or text.startswith((".", "~", os.sep)) or text.count("/") > 1
    if looks_local or not text:
        raise CheckpointError(f"model folder {text!r} does not exist (working directory {str(Path.cwd())!r})")
    return None


def _check_files(folder: Path) -> None:
    """Every file a safetensors checkpoint needs is there and complete, seen without reading the weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"no config.json in {str(folder)!r}: this is not a saved model")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(config)!r} is not valid JSON: {error}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{str(index)!r} is not an index of weight files: {error}") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        file = folder / name
        if not file.is_file():
            others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {', '.join(others)} is pickled and is not read: convert it to safetensors" if others else ""
            raise CheckpointError(f"weight file {name!r} is missing from {str(folder)!r}{hint}")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(file)!r} is truncated or damaged ({_first_line(error)}); copy it again") from error


def _not_from_the_hub(name: str, silent: str | None) -> str:
    """Why a name gave no files, and what to do. `silent` is why the hub does not answer, if it does not."""
    why = "the hub did not give it" if silent is None else f"the hub cannot be reached ({silent}) and its client has no copy"
    return (
        f"it is no local folder, and {why}; check the name, or download it where there is a network "
        f"(hf download {name} --local-dir FOLDER) and give that folder"
    )


def _config(source: str, revision: str | None, trust_remote_code: bool, *, local: bool, silent: str | None = None) -> None:
    """Fail early, and in one line, where the configuration cannot be read or is of an unknown kind."""
    try:
        config = AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=local
        )
    except OSError as error:
        raise CheckpointError(
            f"cannot find model {source!r}: {_not_from_the_hub(source, silent)} ({_first_line(error)})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the configuration of {source!r} with transformers {transformers.__version__}: {_first_line(error)}"
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{source!r} ({config.model_type}) is an encoder-decoder model, not a causal language model")


def _check_keys(info: Mapping, source: str) -> None:
    problems = {
        "missing": _names(info.get("missing_keys", ())),
        "unexpected": _names(info.get("unexpected_keys", ())),
        "of another shape": _names(info.get("mismatched_keys", ())),
    }
    found = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"the weights in {source!r} do not fit their config.json: {'; '.join(found)}. "
            "Was the model pruned without its configuration? Save it again with prunelib.models.save"
        )


def _names(keys: Collection) -> list[str]:
    """Sorted names; a key of another shape comes as (name, shape in the file, shape in the model)."""
    return sorted(key if isinstance(key, str) else f"{key[0]}: {[tuple(shape) for shape in key[1:]]}" for key in keys)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _some(items: Sequence[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f", … {len(items) - limit} more" if len(items) > limit else "")


# ---------------------------------------------------------------------------------------------------- finding layers


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of `model`, in order. Raises UnsupportedModel naming the model type when they are not found."""
    return _get(model, layers_path(model))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the output head. Raises UnsupportedModel when there is none (OPT-350m)."""
    paths = PATHS[layers_path(model)]
    for path in paths:
        norm = _get(model, path)
        if isinstance(norm, nn.Module):
            return norm
    raise UnsupportedModel(f"model type {_model_type(model)!r}: no final norm at {', '.join(paths)}")


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
        "for a decoder-only model, add its path to prunelib.models.PATHS"
    )


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied weights count once, buffers not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def removed_fraction(dense: nn.Module, pruned: nn.Module) -> float:
    """Fraction of the parameters of `dense` that `pruned` no longer has: the achieved ratio, not the one asked for."""
    return 1.0 - parameter_count(pruned) / parameter_count(dense)


def parameter_fraction(model: nn.Module, removed: Collection[int]) -> float:
    """Fraction of the parameters that these decoder layers alone hold: `removed_fraction` without making a pruned model.

    So it is known for a model that is spread over devices, too. Raises ValueError for a layer that does not exist.
    """
    layers = decoder_layers(model)
    wrong = [index for index in removed if not 0 <= index < len(layers)]
    if wrong:
        raise ValueError(f"layers {wrong} do not exist in a model of {len(layers)} layers (0 to {len(layers) - 1})")
    gone = {id(parameter): parameter.numel() for index in removed for parameter in layers[index].parameters()}
    inside = {id(module) for index in removed for module in layers[index].modules()}
    others = (module for module in model.modules() if id(module) not in inside)
    kept = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return sum(count for name, count in gone.items() if name not in kept) / parameter_count(model)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate has placed the model on several devices: it can be evaluated, not pruned."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


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
    kept = _checked_keep(keep, len(old), _model_type(model))
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
    if len(gone) == n_layers:
        raise ValueError(f"cannot remove {len(gone)} of {n_layers} layers: at least one must stay")
    return keep_layers(model, [index for index in range(n_layers) if index not in set(gone)])


def _checked_keep(keep: Sequence[SupportsIndex], n_layers: int, model_type: str) -> list[int]:
    kept = [operator.index(index) for index in keep]
    if not kept:
        raise ValueError(f"cannot remove {n_layers} of {n_layers} layers of this {model_type} model: at least one must stay")
    if any(a >= b for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= n_layers:
        raise ValueError(f"keep={kept}: give distinct layers in ascending order, from 0 to {n_layers - 1}")
    return kept


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
    if reason is None and getattr(config, "num_kv_shared_layers", 0):
        reason = f"num_kv_shared_layers={config.num_kv_shared_layers}: {_SHARED_KV}"
    if reason is None and getattr(config, "is_heterogeneous", False):
        reason = "its configuration overrides single layers by index (per_layer_config)"
    if reason is not None:
        raise UnsupportedModel(f"cannot remove layers of a {model_type} model: {reason}")
    kinds = getattr(config, "layer_types", None) or ()
    if _with_attention(kinds) and not _with_attention([kinds[index] for index in kept]):
        raise UnsupportedModel(
            f"cannot keep only layers {list(kept)} of this {model_type} model: its key-value cache needs an attention layer; "
            f"keep one of {_with_attention(kinds)}"
        )


def _with_attention(kinds: Sequence[str]) -> list[int]:
    """Indices of the layers that attend, in a model that may mix them with convolutions and recurrences."""
    return [i for i, kind in enumerate(kinds) if "hybrid" in kind or ("attention" in kind and kind != "linear_attention")]


def _renumber(config: transformers.PretrainedConfig, kept: Sequence[int], n_layers: int) -> None:
    """Rewrite, in place, everything `config` says about single layers. Lists keep their identity: modules may hold them."""
    new_index = {old: new for new, old in enumerate(kept)}

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
    done = set()
    for name in LAYER_INDEX_LISTS:
        entries = getattr(config, name, None)
        if isinstance(entries, list) and id(entries) not in done:
            entries[:] = [new_index[index] for index in entries if index in new_index]
            done.add(id(entries))
    for name in PER_LAYER_LISTS:
        entries = getattr(config, name, None)
        if isinstance(entries, tuple):
            entries = list(entries)
            setattr(config, name, entries)
        # A property computes its list anew: slicing that copy changes nothing, which is right.
        if isinstance(entries, list) and id(entries) not in done:
            if len(entries) != n_layers:
                raise UnsupportedModel(
                    f"model type {config.model_type!r}: {name} has {len(entries)} entries for {n_layers} layers"
                )
            entries[:] = [entries[index] for index in kept]
            done.add(id(entries))
    if getattr(config, "attention_types", None) is not None and hasattr(config, "attention_layers"):
        config.attention_types = [[list(config.attention_layers), 1]]  # GPT-Neo: [[pattern, repetitions], ...]
    if isinstance(getattr(config, "block_types", None), list):  # RecurrentGemma repeats a short pattern
        config.block_types = [config.block_types[index % len(config.block_types)] for index in kept]
    config.num_hidden_layers = len(kept)


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
            rebuilt = onednn.adopt_as(pruned, type(pruned)(as_saved))
    except Exception as error:
        raise UnsupportedModel(
            f"cannot remove these layers of a {model_type} model: its configuration does not allow it ({_first_line(error)})"
        ) from error
    differences = list(_differences(pruned, rebuilt, path))
    if differences:
        raise UnsupportedModel(
            f"cannot remove these layers of a {model_type} model: a checkpoint of its configuration would load differently: "
            + "; ".join(differences[:3])
            + (f"; and {len(differences) - 3} more differences" if len(differences) > 3 else "")
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
    `IdentityLayer(layer)`
    where a layer is to be left out. For evaluation with `use_cache=False`; to keep a smaller model, use `keep_layers`.
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


# ------------------------------------------------------------------------------------------------------------ saving


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> None:
    """Write `model` (and `tokenizer`) to `folder` as an ordinary safetensors checkpoint, and prove that it loads.

    Everything is written to a temporary folder beside it, loaded from there with AutoModelForCausalLM, compared (no missing,
    unexpected or reshaped key, equal weights, equal logits on a probe batch), and only then renamed: `folder` is complete or
    absent. The check needs the memory of a second model on the device of `model`.

    Raises ValueError when `folder` holds something and `overwrite` is False, CheckpointError when the reload differs.
    """
    target = Path(folder).expanduser()
    _recover(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save to {str(target)!r}: it is a file")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{str(target)!r} is not empty; choose another folder or pass overwrite=True")
    layers_path(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(target)
    try:
        written = scratch / "new"
        _write(model, tokenizer, written)
        _check_reload(model, tokenizer, written)
        flush(written)
        if target.is_dir():
            target.rename(scratch / "old")
        written.rename(target)
    except BaseException:
        if (scratch / "old").exists() and not target.exists():
            (scratch / "old").rename(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratch_beside(target: Path) -> Path:
    """A new folder for what is to become `target`; those that killed processes left behind for it go."""
    for left in leftovers(target):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=temporary_prefix(target), dir=target.parent))


def _recover(target: Path) -> None:
    """Bring back a folder that a save had moved away when it was killed, just before the new one took its place."""
    if not target.exists():
        for old in (left / "old" for left in leftovers(target)):
            if old.is_dir():
                old.rename(target)
                return


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    generation = model.generation_config
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError as error:
            # Several published models set a temperature without do_sample, which save_pretrained refuses to write.
            warnings.warn(f"generation_config saved with do_sample=True: {_first_line(error)}", stacklevel=3)
            model.generation_config = copy.deepcopy(generation)
            model.generation_config.do_sample = True
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _check_reload(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    # Code that already runs in this process may run once more; nothing new is trusted.
    trusted = type(model).__module__.startswith("transformers_modules")
    try:
        again, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            trust_remote_code=trusted,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the saved model does not load again: {_first_line(error)}") from error
    _check_keys(info, "the saved copy")
    again = onednn.adopt_as(model, again.to(model.device).eval())
    weights = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(tensor, weights[name].to(tensor)):
            raise CheckpointError(f"tensor {name!r} of the saved model is not the one in memory (or is not finite)")

    probe = probe_tokens(model)
    expected, actual = _logits(model, probe), _logits(again, probe)
    if not bool(torch.isfinite(expected).all()):
        raise CheckpointError("the model gives logits that are not finite; it is not worth saving")
    difference, scale = float((expected - actual).abs().max()), float(expected.abs().max())
    # Same weights, same code, same device: the sums may still be ordered differently.
    if difference > 8 * torch.finfo(model.dtype).eps * max(scale, 1.0):
        raise CheckpointError(f"the saved model gives other logits: they differ by up to {difference:.3g} (of {scale:.3g})")
    if tokenizer is not None:
        text = "One clone, two commands: 3.14 (naïve)\n"
        if load_tokenizer(folder, trust_remote_code=trusted)(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise CheckpointError("the saved tokenizer does not load as the one in memory")


def probe_tokens(model: PreTrainedModel) -> Int64[Tensor, "sample token"]:
    """A fixed batch of token ids, 2 x 16 or as long as the model allows, spread over the vocabulary, on the model's device."""
    config = model.config.get_text_config(decoder=True)
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    return (torch.arange(2 * length).reshape(2, length) * 7919 + 3).remainder(config.vocab_size).to(model.device)


def _logits(model: PreTrainedModel, tokens: Int64[Tensor, "sample token"]) -> Float[Tensor, "sample token vocabulary"]:
    with evaluating(model):
        return model(input_ids=tokens, use_cache=False).logits.float()


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

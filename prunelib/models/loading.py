"""Load a causal language model and its tokenizer, checked, with errors of one line."""

import copy
import json
import os
import re
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from prunelib import io
from prunelib.models.architectures import UnsupportedModel
from prunelib.models.memory import is_out_of_memory, says_what_fits
from prunelib.models.onednn import use_onednn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Keys of older checkpoints that a model computes itself, and transformers drops for some families only.
COMPUTED = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq)$")
LAYER = re.compile(r"\.\d+\.")
# Settings that decoding reads with sampling, or with several beams, only: transformers takes them in a file, and writes none.
UNREAD = {"do_sample": ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")}
UNREAD["num_beams"] = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
# Text on which tokenizers differ that do not split or normalize alike: digits, accents, contractions, scripts, white space.
PROBE = "word 2023, naïve it's WE'LL 650841823\n\n\tif x == 3.14e-10:    # ½ «日本語» 👍🏽 cafe\u0301 CamelCase snake_case \r\n"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be trusted: missing or damaged files, wrong keys, non-finite weights, or a failed reload."""


@says_what_fits("dtype", "dtype='bfloat16', device='auto' with several GPUs, or stream it (prunelib.scale.offload)")
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
    `revision`. `dtype` is that of the weights in memory, whatever the file holds. `device` "auto" spreads the model over all
    accelerators; such a model can be evaluated but not pruned. `trust_remote_code` runs code that comes with the model.

    Raises ValueError for a bad argument, CheckpointError for a missing, damaged, incomplete or non-finite checkpoint.
    """
    torch_dtype, target = checked_dtype(dtype), checked_device(device)
    source, options = checked_source(name_or_path, revision, trust_remote_code)
    model = from_files(source, dtype=torch_dtype, device_map="auto" if target is None else None, **options)
    if target is not None:
        model = model.to(target)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"tensor {name!r} holds {bad} NaN or infinite values of {tensor.numel()}; "
                "the checkpoint is damaged, or its values overflow this dtype (try dtype='float32')"
            )
    return use_onednn(model).eval()


def load_tokenizer(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a local folder (no network) or the hub: that of its tokenizer.json, where it has one.

    transformers may build another one from the model type; then the file's is taken, with a warning. Raises CheckpointError
    when there is none, or when the file's cannot be had.
    """
    source, options, remedy = _source(name_or_path, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        place = {name: options[name] for name in ("revision", "local_files_only")}
        file = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **place)
        if file is None or _splits_like(tokenizer, stored := Tokenizer.from_file(file)):
            return tokenizer
        kind, tokenizer = type(tokenizer).__name__, PreTrainedTokenizerFast.from_pretrained(source, **options)
    except Exception as error:  # of many unrelated types
        raise CheckpointError(f"cannot load a tokenizer from {source!r}{remedy} ({io.first_line(error)})") from error
    if not _splits_like(tokenizer, stored):
        raise CheckpointError(
            f"the tokenizer of {source!r} gives other token ids than its tokenizer.json: it cannot be trusted"
        )
    warnings.warn(f"{kind} gives other token ids than the tokenizer.json of {source!r}, which is taken instead", stacklevel=2)
    return tokenizer


def _splits_like(tokenizer: PreTrainedTokenizerBase, stored: Tokenizer) -> bool:
    """Whether both make the same token ids of `PROBE`, a padding or truncation that the file asks for left out."""
    stored.no_padding()
    stored.no_truncation()
    texts = [PROBE, f" {PROBE}"]
    found = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    return found == [one.ids for one in stored.encode_batch(texts, add_special_tokens=False)]


def from_files(source: str | os.PathLike, **options: object) -> PreTrainedModel:
    """from_pretrained of safetensors files that hold exactly the weights of the configuration, else CheckpointError.

    Keys that the model computes itself may be there, too. The generation settings are in a form that can be saved again.
    """
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:  # weights of another shape are reported by name, below
        model, info = AutoModelForCausalLM.from_pretrained(source, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # of many unrelated types
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"cannot load a causal language model from {str(source)!r}: {io.first_line(error)}") from error
    found, keys = [], {}
    for kind, what in {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}.items():
        # A key of another shape comes as (name, shape in the file, shape in the model).
        named = (key if isinstance(key, str) else f"{key[0]}: {[*map(tuple, key[1:])]}" for key in info[f"{kind}_keys"])
        keys[kind] = sorted(key for key in named if not (kind == "unexpected" and COMPUTED.search(key)))
        if keys[kind]:
            found.append(f"{len(keys[kind])} {what} ({', '.join(keys[kind][:4])}{', …' * (len(keys[kind]) > 4)})")
    if found:
        remedy = "Was the model pruned without its configuration? Save it again with prunelib.models.save"
        if keys["unexpected"] and not (keys["missing"] or keys["mismatched"] or any(map(LAYER.search, keys["unexpected"]))):
            remedy = f"{type(model).__name__} has no place for them (a value head?): save it with transformers to drop them"
        raise CheckpointError(f"the weights in {str(source)!r} do not fit their config.json: {'; '.join(found)}. {remedy}")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.tie_word_embeddings and head is not None
    if tied and not torch.equal(head.weight, table.weight.to(head.weight.device)):
        model.config.get_text_config(decoder=True).tie_word_embeddings = model.config.tie_word_embeddings = False  # as the file
    model.generation_config = savable_generation(model.generation_config)
    return model


def savable_generation(generation: GenerationConfig | None) -> GenerationConfig | None:
    """Generation settings that can be written: those that decoding does not read are left out of a copy, with a warning.

    Raises CheckpointError with the reason when that is not enough.
    """
    try:
        if generation is not None:
            generation.validate(strict=True)
        return generation
    except ValueError as error:
        mended, why = copy.deepcopy(generation), " ".join(str(error).split())
    for switch, names in UNREAD.items():
        if (getattr(mended, switch, None) or 1) == 1 and getattr(mended, switch, None) is not True:
            for name in names:
                setattr(mended, name, None)
    if (mended.pad_token_id or 0) < 0:
        mended.pad_token_id = None
    try:
        mended.validate(strict=True)
    except ValueError as error:
        raise CheckpointError(f"generation_config.json cannot be saved again: {' '.join(str(error).split())}") from error
    warnings.warn(f"settings of generation_config that decoding does not read are left out: {why}", stacklevel=3)
    return mended


def check_vocabulary(model: nn.Module, tokens: Tensor) -> None:
    """Raise ValueError when token ids are not in the vocabulary of `model`: on a GPU they would end the process."""
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids {low} to {high}, but the model knows 0 to {vocabulary - 1}: another model's tokenizer?")


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name of `DTYPES`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)} (name it: results depend on it)")
    return DTYPES[dtype]


def checked_device(device: str | torch.device) -> torch.device | None:
    """The device to move to, None for "auto" (then from_pretrained places the weights)."""
    if device == "auto":
        return None
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a torch device such as 'cpu' or 'cuda:0', nor 'auto'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no CUDA device; use device='cpu'")
    return target


def checked_source(
    name_or_path: str | os.PathLike, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[str, dict]:
    """What from_pretrained is called with, after looking at files and configuration, not at the weights; raises as `load`."""
    source, options, remedy = _source(name_or_path, revision, trust_remote_code)
    try:
        place = {name: options[name] for name in ("revision", "local_files_only")}
        adapter = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **place)
        config = None if adapter else AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # of many unrelated types
        # Of a local folder: an absent or damaged file, or a model type that this version of transformers does not know.
        what = f"cannot read the configuration of {source!r}{remedy} (transformers {transformers.__version__})"
        raise CheckpointError(f"{what}: {io.first_line(error)}") from error
    if adapter:
        raise CheckpointError(
            f"{source!r} holds an adapter (adapter_config.json), which transformers would add to the weights beside it: delete "
            "the files adapter_* where it is merged into them already, else merge it first (peft's merge_and_unload)"
        )
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{source!r} ({config.model_type}) is an encoder-decoder model, not a causal language model")
    if not remedy:
        _check_files(Path(source), config)
    return source, options


def _source(name_or_path: str | os.PathLike, revision: str | None, trust_remote_code: bool) -> tuple[str, dict, str]:
    """Source and options of from_pretrained, and what to do where the hub gives no files; "" for a local folder."""
    from prunelib.models import gguf  # it needs this module

    if gguf.is_gguf(name_or_path):
        name_or_path = gguf.safetensors_folder(name_or_path)
    text, path = os.fspath(name_or_path), io.found(name_or_path)
    options = {"revision": revision or "main", "local_files_only": True, "trust_remote_code": trust_remote_code}
    recover(path)
    if path.is_dir():
        if revision:
            raise ValueError(f"revision {revision!r} was given with the local folder {text!r}: a folder has no revisions")
        return str(path), options, ""
    if path.exists():
        raise ValueError(f"{text!r} is a file; give the folder that holds config.json and model.safetensors")
    if not isinstance(name_or_path, str) or text.startswith((".", "~", os.sep)) or text.count("/") > 1 or not text:
        raise CheckpointError(f"model folder {text!r} does not exist (working directory {str(Path.cwd())!r})")
    unreachable = io.hub_unreachable()
    why = f"the hub cannot be reached ({unreachable}) and its client has no copy" if unreachable else "the hub did not give it"
    remedy = (
        f": it is no local folder, and {why}; check the name, or download it where there is a network "
        f"(hf download {text} --local-dir FOLDER) and give that folder"
    )
    return text, options | {"local_files_only": unreachable is not None}, remedy


def recover(target: Path) -> None:
    """Bring back a folder that a save had moved away when it was killed, just before the new one took its place."""
    if not target.exists():
        old = [left / "old" for left in io.leftovers(target) if (left / "old").is_dir()]
        if old:
            old[0].rename(target)


def _check_files(folder: Path, config: PreTrainedConfig) -> None:
    """The weight files that transformers takes of a safetensors checkpoint are complete, seen without reading the weights."""
    named = getattr(config, "transformers_weights", None)
    names = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    try:
        parts = [file.name]
        if file.suffix == ".json":
            parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        for file in (folder / name for name in sorted(set(parts))):
            with safe_open(file, framework="pt"):
                pass
    except FileNotFoundError as error:
        raise CheckpointError(f"weight file {str(file)!r} is missing; pickled weights are not read") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{str(file)!r} is truncated or damaged ({io.first_line(error)}); copy it again") from error

"""Load a causal language model and its tokenizer, checked, with errors of one line."""

import json
import os
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunelib import io
from prunelib.models.architectures import UnsupportedModel
from prunelib.models.memory import is_out_of_memory, says_what_fits
from prunelib.models.onednn import use_onednn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)  # what from_pretrained raises


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
    """The tokenizer of a model, from a local folder (no network) or the hub. Raises CheckpointError when there is none."""
    source, options, remedy = _source(name_or_path, revision, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except ERRORS as error:
        raise CheckpointError(f"cannot load a tokenizer from {source!r}{remedy} ({io.first_line(error)})") from error


def from_files(source: str | os.PathLike, **options: object) -> PreTrainedModel:
    """from_pretrained of safetensors files that hold exactly the weights of the configuration, else CheckpointError."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:  # weights of another shape are reported by name, below
        model, info = AutoModelForCausalLM.from_pretrained(source, ignore_mismatched_sizes=True, **options)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"cannot load a causal language model from {str(source)!r}: {io.first_line(error)}") from error
    found = []
    for kind, what in {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}.items():
        # A key of another shape comes as (name, shape in the file, shape in the model).
        keys = sorted(key if isinstance(key, str) else f"{key[0]}: {[*map(tuple, key[1:])]}" for key in info[f"{kind}_keys"])
        if keys:
            found.append(f"{len(keys)} {what} ({', '.join(keys[:4])}{', …' * (len(keys) > 4)})")
    if found:
        raise CheckpointError(
            f"the weights in {str(source)!r} do not fit their config.json: {'; '.join(found)}. "
            "Was the model pruned without its configuration? Save it again with prunelib.models.save"
        )
    return model


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
        config = AutoConfig.from_pretrained(source, **options)
    except ERRORS as error:
        # Of a local folder: an absent or damaged file, or a model type that this version of transformers does not know.
        what = f"cannot read the configuration of {source!r}{remedy} (transformers {transformers.__version__})"
        raise CheckpointError(f"{what}: {io.first_line(error)}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{source!r} ({config.model_type}) is an encoder-decoder model, not a causal language model")
    if not remedy:
        _check_files(Path(source))
    return source, options


def _source(name_or_path: str | os.PathLike, revision: str | None, trust_remote_code: bool) -> tuple[str, dict, str]:
    """Source and options of from_pretrained, and what to do where the hub gives no files; "" for a local folder."""
    from prunelib.models import gguf  # it needs this module

    if gguf.is_gguf(name_or_path):
        name_or_path = gguf.safetensors_folder(name_or_path)
    text, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
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


def _check_files(folder: Path) -> None:
    """Every weight file of a safetensors checkpoint is there and complete, seen without reading the weights."""
    index = file = folder / "model.safetensors.index.json"
    try:
        parts = ["model.safetensors"]
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        for file in (folder / name for name in sorted(set(parts))):
            with safe_open(file, framework="pt"):
                pass
    except FileNotFoundError as error:
        raise CheckpointError(f"weight file {str(file)!r} is missing; pickled weights are not read") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{str(file)!r} is truncated or damaged ({io.first_line(error)}); copy it again") from error

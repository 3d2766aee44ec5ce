"""What is left of a stopped training, in safetensors: the states that ``torch.save`` would pickle.

States of optimizers, schedules and random generators are tensors in nested dicts, lists and tuples of numbers and names. The
tensors go into a safetensors file, the nesting into its header as JSON; nothing else can be in such a file.
"""

import json
import os
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STRUCTURE = "structure"


def save(path: str | os.PathLike, state: Any) -> None:
    """Write a state. Raises TypeError for an object that is none of: tensor, array, dict, list, tuple, number, text, None."""
    tensors: dict[str, Tensor] = {}
    structure = _plain(state, tensors)
    save_file(tensors, path, metadata={STRUCTURE: json.dumps(structure)})


def load(path: str | os.PathLike) -> Any:
    """The state as it was saved, tensors on the CPU. Raises ValueError for a file that `save` did not write."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[STRUCTURE])
            return _restored(structure, file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is missing, damaged, or no saved state ({error})") from error


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors, which may share memory with each other, are copied into `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        # As bytes: not every type of numpy's is one of torch's.
        raw = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.uint8).copy())
        return {"array": _plain(raw, tensors)["tensor"], "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"dict": [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(item, tensors) for item in value]}
    raise TypeError(f"a state holds a {type(value).__name__}, which only pickle could write: {value!r}")


def _restored(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        flat = file.get_tensor(value["array"]).numpy().tobytes()
        return np.frombuffer(flat, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {_restored(key, file): _restored(item, file) for key, item in content}
    items = [_restored(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items

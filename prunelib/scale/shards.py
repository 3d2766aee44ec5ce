"""Slicing from file to file: the dense weights are mapped from their checkpoint, the new ones are written as they are made."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunelib.io import flush
from prunelib.models import CheckpointError, scratch_beside
from prunelib.scale.offload import Streamed
from prunelib.slicing.rotate import slice_model
from prunelib.slicing.schedules import SlicePlan

SHARD_BYTES = 1 << 30


class Shards(dict[str, Tensor]):
    """Tensors by name that go to safetensors files in a folder as they come, and are mapped from there from then on.

    No more than `shard_bytes` and one tensor wait in memory. Raises CheckpointError for a tensor that is not finite.
    """

    def __init__(self, folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES):
        super().__init__()
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.waiting: list[str] = []
        self.files: list[list[str]] = []

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name!r} is not finite: it is not worth saving")
        super().__setitem__(name, tensor.contiguous())
        self.waiting.append(name)
        if sum(self[name].nbytes for name in self.waiting) >= self.shard_bytes:
            self._write()

    def _write(self) -> None:
        path = self.folder / f"part-{len(self.files)}.safetensors"
        save_file({name: self[name].cpu() for name in self.waiting}, path, metadata={"format": "pt"})
        with safe_open(path, framework="pt") as file:
            for name in self.waiting:
                super().__setitem__(name, file.get_tensor(name))
        self.files.append(self.waiting)
        self.waiting = []

    def finish(self) -> None:
        """Write what waits, give the files the names of a checkpoint, and write its index."""
        if self.waiting:
            self._write()
        names = {}
        for number, held in enumerate(self.files):
            name = f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
            os.replace(self.folder / f"part-{number}.safetensors", self.folder / name)
            names |= dict.fromkeys(held, name)
        size = sum(tensor.nbytes for tensor in self.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def slice_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    plan: SlicePlan,
    windows: Int[Tensor, "sample token"],
    *,
    dtype: str | torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard_bytes: int = SHARD_BYTES,
    **options: Any,
) -> None:
    """`slicing.slice_model` of the checkpoint in the folder `source`, written to `target`; neither is ever in memory.

    In the dtype of the file, memory of the process holds a layer, its rotated weights, a shard and the stream of all windows
    (`activation_device` of the `options`, which are those of `slice_model`). `target` appears complete or not at all.

    Raises as `Streamed` and `slice_model`, and ValueError for a target that is there and not empty.
    """
    target = Path(target).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{str(target)!r} is there and not empty: choose another folder")
    dense = Streamed(source, dtype=dtype).mapped()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(target)
    try:
        weights = Shards(scratch, shard_bytes)
        sliced = slice_model(dense, plan, windows, weights=weights, **options)
        weights.finish()
        sliced.config.architectures, sliced.config.dtype = [type(sliced).__name__], dense.dtype
        sliced.config.save_pretrained(scratch)
        if (Path(source) / "generation_config.json").is_file():
            shutil.copy(Path(source) / "generation_config.json", scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        flush(scratch)
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Models larger than memory: statistics and perplexity with two layers of weights in memory, read from safetensors.

Windows go through a layer in batches before the next layer is used, and the layer after it is read meanwhile. What stands
before, between and behind the layers is `layerwise.LayerwiseModel`, as everywhere; the sums are those of `statistics`, the likelihood that
of `evaluation`. Embeddings stay on the CPU, where only the rows that occur are read; the head goes to the device at the end.

The statistics compare all hidden states of a token with each other, so those of all layers wait on the host, for as many
windows at once as it can hold (`footprint.planned`): weights are read once for each such group.
"""

import contextlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from prunelib.criteria.statistics import LayerStats, check_finite, checked_mask, from_states
from prunelib.evaluation.perplexity import NllAccumulator, Perplexity, check_windows
from prunelib.models import (
    CheckpointError,
    UnsupportedModel,
    check_vocabulary,
    checked_device,
    checked_dtype,
    checkpoint_folder,
    decoder_layers,
    final_norm,
    layers_path,
    onednn,
)
from prunelib.models.layerwise import LayerwiseModel
from prunelib.scale.footprint import BOXES, GIB, Peak, Sizes, planned, windows_that_fit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_PIECE = 16 << 20  # bytes that one thread reads at once
_READERS = 8
_ALIGNMENT = 256  # of each tensor in a buffer, in bytes


class DoesNotFit(RuntimeError):
    """Planned memory exceeds what there is; the message names the setting that fits, where there is one."""


# ---------------------------------------------------------------------------------------------------------- checkpoint


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its name there, the file, and offset and length in bytes."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def entries(folder: str | os.PathLike) -> dict[str, Entry]:
    """Every tensor of the safetensors files of a model folder, by name, from their headers alone.

    Raises as `models.checkpoint_folder`, and UnsupportedModel for a dtype that is not a plain number.
    """
    folder = checkpoint_folder(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {}
    for file in files:
        with open(folder / file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            if tensor["dtype"] not in _DTYPES:
                raise UnsupportedModel(f"{str(folder)!r} holds {name!r} as {tensor['dtype']}: it can only be loaded resident")
            start, stop = tensor["data_offsets"]
            place = folder / file, 8 + length + start, stop - start
            found[name] = Entry(name, *place, _DTYPES[tensor["dtype"]], tuple(tensor["shape"]))
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Files:
    """Reads tensors with several threads straight into their place: a mapped file would count as memory of the process."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self.descriptors: dict[Path, int] = {}

    def read(self, wanted: list[tuple[Entry, Tensor]]) -> None:
        """Fill tensors of bytes on the CPU. Raises CheckpointError when a file ends early."""
        pieces = []
        for entry, target in wanted:
            if entry.file not in self.descriptors:
                self.descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
            view = memoryview(target.numpy())
            for start in range(0, entry.nbytes, _PIECE):
                pieces.append(self.pool.submit(self._piece, entry, view[start : start + _PIECE], entry.offset + start))
        for piece in pieces:
            piece.result()

    def _piece(self, entry: Entry, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self.descriptors[entry.file], [view], offset)
            if count == 0:
                raise CheckpointError(f"{str(entry.file)!r} ends within {entry.name!r}: copy it again")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        self.pool.shutdown()
        for descriptor in self.descriptors.values():
            os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------- model


class Streamed:
    """A causal language model whose layers stay in its safetensors files until they are used; for evaluation only.

    `folder` holds an ordinary checkpoint; weights and activations are `dtype`, the work is done on `device`. What stands
    outside the layers is mapped from the files, on the CPU. `device_limit` and `host_limit`, in bytes, are to be kept even
    where more memory is free.

    Raises ValueError for bad arguments, CheckpointError for a missing, damaged or incomplete checkpoint, UnsupportedModel for a
    quantized model, one without known layers, or one whose weights have other names in the file than in the model.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dtype: str | torch.dtype,
        device: str | torch.device = "cpu",
        device_limit: int | None = None,
        host_limit: int | None = None,
    ):
        from accelerate import init_empty_weights  # takes a while to import, and nothing else here needs it

        self.dtype, target = checked_dtype(dtype), checked_device(device)
        if target is None:
            raise ValueError(f"a streamed model works on one device, not {device!r}")
        self.folder = checkpoint_folder(folder)
        self.device = torch.empty(0, device=target).device  # with its index
        self.device_limit, self.host_limit = device_limit, host_limit
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModel(f"this {config.model_type} model is quantized: it can only be loaded resident")
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = onednn.use_onednn(AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval())
        self.layers = decoder_layers(self.model)
        self.entries = self._matched(entries(self.folder))
        self._fill_outside()

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model."""
        return self.model.config

    def _matched(self, stored: dict[str, Entry]) -> dict[str, Entry]:
        """The file entry of every weight of the model, which may have been saved with or without its head."""
        prefix = self.model.base_model_prefix + "."
        stored = dict(zip(_renamed(self.model, list(stored)), stored.values(), strict=True))
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        found, missing = {}, []
        for name, tensor in self.model.state_dict().items():
            entry = next((stored[key] for key in (name, name.removeprefix(prefix), prefix + name) if key in stored), None)
            if entry is None:
                missing += [name] if name not in tied else []
            elif entry.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{name!r} has shape {entry.shape} in {str(self.folder)!r}, {tuple(tensor.shape)} by its config.json"
                )
            else:
                found[name] = entry
        if missing:
            raise UnsupportedModel(
                f"{str(self.folder)!r} lacks {len(missing)} weights of a {self.config.model_type} model, or holds them under "
                f"other names ({missing[0]}, …): it can only be loaded resident"
            )
        used = {entry.name for entry in found.values()}
        unused = [entry.name for entry in stored.values() if entry.name not in used]
        unexpected = [name for name in unused if not any(re.search(known, name) for known in ignored)]
        if unexpected:
            raise CheckpointError(
                f"the weights in {str(self.folder)!r} do not fit their config.json: {len(unexpected)} unexpected "
                f"({unexpected[0]}, …). Was the model pruned without its configuration?"
            )
        return found

    def _fill_outside(self) -> None:
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        self._map([(path, module) for path, module in self.model.named_modules() if id(module) not in inside])

    def _map(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Weights of modules mapped from the files: of those in the dtype that is wanted, only what is touched is ever read."""
        values: dict[int, Tensor] = {}  # by the tensor that they replace: tied ones stay one
        places = []
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="pt")) for file in {e.file for e in self.entries.values()}
            }
            for path, module in modules:
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    entry = self.entries.get(f"{path}.{name}" if path else name)
                    if tensor is not None:
                        places.append((module, name, tensor))
                    if entry is not None and id(tensor) not in values:
                        values[id(tensor)] = _like(tensor, files[entry.file].get_tensor(entry.name).to(tensor.dtype))
        for module, name, tensor in places:
            if id(tensor) in values:
                (module._parameters if name in module._parameters else module._buffers)[name] = values[id(tensor)]
        self.model.tie_weights()

    def mapped(self) -> PreTrainedModel:
        """The model with all of its weights mapped from the files, on the CPU; this object is of no use afterwards.

        The system reads what is used, and forgets it when memory is short. In another dtype than that of the files it is an
        ordinary model.
        """
        self._map(list(self.model.named_modules()))
        return self.model

    def layer_entries(self, index: int) -> dict[str, Entry]:
        """The file entry of every weight of a layer, by its name within the layer."""
        start = f"{layers_path(self.model)}.{index}."
        return {name.removeprefix(start): entry for name, entry in self.entries.items() if name.startswith(start)}

    def layer_bytes(self, index: int) -> int:
        """Bytes that a layer takes as it is in the file."""
        return sum(_aligned(entry.nbytes) for entry in self.layer_entries(index).values())

    @property
    def sizes(self) -> Sizes:
        """What the peaks of memory depend on, of this checkpoint in this dtype."""
        config, number = self.config.get_text_config(decoder=True), self.dtype.itemsize
        every = [list(self.layer_entries(index).values()) for index in range(len(self.layers))]
        same = all(entry.dtype == self.dtype or not entry.dtype.is_floating_point for layer in every for entry in layer)
        stored = max(self.layer_bytes(index) for index in range(len(every)))
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Sizes(
            n_layers=len(every),
            hidden=config.hidden_size,
            attention=heads * head_size,
            key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            mlp=_mlp_width(config),
            vocabulary=table.shape[0],
            number_bytes=number,
            layer_bytes=stored if same else max(sum(math.prod(entry.shape) for entry in layer) for layer in every) * number,
            table_bytes=table.nbytes,
            head_bytes=0 if head is table else head.nbytes,
            stored_layer_bytes=None if same else stored,
        )

    def plan(
        self,
        n_windows: int,
        seq_len: int,
        *,
        batch_size: int = 8,
        windows_at_once: int | None = None,
        states: bool = False,
        logits: bool = False,
    ) -> tuple[int, Peak]:
        """Windows at once, and the planned peak of memory of a pass: print `Peak.describe` before the work starts.

        states: statistics, which keep all hidden states; logits: perplexity, which needs the head. Unless `windows_at_once` is
        given it is what fits into half of the host's free memory (all of `host_limit`, where that is given), in whole batches.
        Raises ValueError for numbers below 1, and DoesNotFit when the plan exceeds what is free, or a limit.
        """
        if min(batch_size, n_windows, seq_len) < 1 or (windows_at_once is not None and windows_at_once < 1):
            raise ValueError(f"{n_windows=}, {seq_len=}, {batch_size=}, {windows_at_once=}: all at least 1")
        batch_size = min(batch_size, n_windows)
        kind = {"seq_len": seq_len, "states": states, "logits": logits, "accelerator": self.device.type != "cpu"}
        host = free_host_bytes() + psutil.Process().memory_info().rss  # the plan counts the process from its start
        if windows_at_once is None:
            room = host // 2 if self.host_limit is None else min(host, self.host_limit)
            fitting = windows_that_fit(self.sizes, room, batch_size=batch_size, **kind)
            windows_at_once = min(max(fitting, batch_size), n_windows)
        windows_at_once = min(math.ceil(windows_at_once / batch_size) * batch_size, n_windows)
        peak = planned(self.sizes, batch_size=batch_size, windows_at_once=windows_at_once, **kind)
        host = host if self.host_limit is None else min(host, self.host_limit)
        if peak.host_peak > host:
            fitting = windows_that_fit(self.sizes, host, batch_size=1, **kind)
            remedy = f"batch_size=1, windows_at_once={fitting} would fit" if fitting else "one window is too much, too"
            raise DoesNotFit(f"{peak.describe()}, but the host has {host / GIB:.2f} GiB: {remedy}")
        device = self._free_device_bytes()
        if device is not None and peak.device_peak > device:
            sizes = [
                size
                for size in range(1, batch_size)
                if planned(self.sizes, batch_size=size, windows_at_once=size, **kind).device_peak <= device
            ]
            remedy = f"batch_size={sizes[-1]} would fit" if sizes else "one window is too much, too: take shorter ones"
            raise DoesNotFit(f"{peak.describe()}, but the device has {device / GIB:.2f} GiB: {remedy}")
        return windows_at_once, peak

    def _free_device_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + unused
        return free if self.device_limit is None else min(free, self.device_limit)

    def engine(self) -> LayerwiseModel:
        """Everything but the layers, on the CPU. One layer of each class is read for a moment, to see what it returns."""
        with _Weights(self, torch.device("cpu")) as weights:
            return LayerwiseModel(self.model, ready=weights.apart)

    @contextlib.contextmanager
    def head_on_device(self) -> Iterator[None]:
        """While this lasts the final norm and the head are on the device (a tied table then exists twice)."""
        modules = [final_norm(self.model), self.model.get_output_embeddings()]
        before = [dict(module._parameters) for module in modules]
        for module in modules:
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = _like(value, value.to(self.device))
        try:
            yield
        finally:
            for module, parameters in zip(modules, before, strict=True):
                module._parameters.update(parameters)


def _renamed(model: PreTrainedModel, names: list[str]) -> list[str]:
    """What transformers calls the weights of a file today: a few families have other names there than in the model."""
    for transform in get_model_conversion_mapping(model):
        if isinstance(transform, WeightRenaming):
            names = [transform.rename_source_key(name)[0] for name in names]
    return names


def _mlp_width(config: PreTrainedConfig) -> int:
    """Numbers of a token inside the MLP, generously: the largest width in the configuration, times the experts of a token."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
    widths = [width for name in names if isinstance(width := getattr(config, name, None), int)]
    experts = getattr(config, "num_experts_per_tok", None)
    return max(widths, default=4 * config.hidden_size) * (experts if isinstance(experts, int) else 1)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def free_host_bytes() -> int:
    """Memory that the process may still take: what the machine has available, or its container allows."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


# -------------------------------------------------------------------------------------------------- moving between memories


_FREE: list[Tensor] = []
"""Page-locked memory of earlier passes. It is kept for the next ones: to unlock it made copies fault that were long done
("unspecified launch failure", an MMU fault of the copy engine) in a virtual machine with an H200 and driver 580."""


@contextlib.contextmanager
def _host_space(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Memory on the host, page-locked where a CUDA device copies from and to it.

    PyTorch's own page-locked memory comes in powers of two: up to twice what is needed.
    """
    if device.type != "cuda":
        yield torch.empty(shape, dtype=dtype)
        return
    size = math.prod(shape) * dtype.itemsize
    fitting = [index for index, space in enumerate(_FREE) if space.nbytes >= size]
    whole = _FREE.pop(min(fitting, key=lambda index: _FREE[index].nbytes)) if fitting else _page_locked(size)
    try:
        yield whole[:size].view(dtype).view(shape)
    finally:
        torch.cuda.synchronize(device)
        _FREE.append(whole)


def _page_locked(size: int) -> Tensor:
    with torch.inference_mode(False):  # to be used in either mode
        space = torch.zeros(size, dtype=torch.uint8)  # by all threads: the registration would touch every page with one
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(space.data_ptr(), space.nbytes, 0))
    return space


class _Weights:
    """The layers of a streamed model on a device, one in use and the next on its way. Use it as a context."""

    def __init__(self, streamed: Streamed, device: torch.device):
        self.streamed, self.device = streamed, device
        self.files, self.reader = _Files(), ThreadPoolExecutor(1, thread_name_prefix="layer")
        self.stack = contextlib.ExitStack()
        self.pending: tuple[int, int, Future] | None = None
        self.turn = 0
        self.staging: list[Tensor] = []
        self.buffers: list[Tensor] = []
        # Of each buffer: when the copy to the device was done, and when the layer in it had done its work.
        self.arrived: list[torch.cuda.Event | None] = [None, None]
        self.done: list[torch.cuda.Event | None] = [None, None]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_) -> None:
        self.reader.shutdown()
        self.files.close()
        self.stack.close()

    def _allocate(self) -> None:
        size = max(self.streamed.layer_bytes(index) for index in range(len(self.streamed.layers)))
        for _ in range(2):
            self.staging.append(self.stack.enter_context(_host_space((size,), torch.uint8, self.device)))
        self.buffers = self.staging
        if self.stream is not None:
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may have used this memory before

    def _fetch(self, index: int) -> None:
        if not self.buffers:
            self._allocate()
        turn, self.turn = self.turn, 1 - self.turn
        self.pending = index, turn, self.reader.submit(self._bring, index, turn)

    @torch.inference_mode()
    def _bring(self, index: int, turn: int) -> None:
        """In a thread: read a layer, and start copying it to the device."""
        if self.arrived[turn] is not None:
            self.arrived[turn].synchronize()
        size = self._read(index, self.staging[turn])
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                if self.done[turn] is not None:
                    self.stream.wait_event(self.done[turn])
                self.buffers[turn][:size].copy_(self.staging[turn][:size], non_blocking=True)
                self.arrived[turn] = self.stream.record_event()

    def _read(self, index: int, space: Tensor) -> int:
        wanted, offset = [], 0
        for entry in self.streamed.layer_entries(index).values():
            wanted.append((entry, space[offset : offset + entry.nbytes]))
            offset += _aligned(entry.nbytes)
        self.files.read(wanted)
        return offset

    @contextlib.contextmanager
    def layer(self, index: int, following: int | None) -> Iterator[None]:
        """While this lasts the layer has its weights on the device; the one `following` is read meanwhile."""
        if self.pending is None or self.pending[0] != index:
            self._fetch(index)
        _, turn, future = self.pending
        future.result()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[turn])
        self.pending = None
        if following is not None:
            self._fetch(following)
        with self._filled(index, self.buffers[turn]):
            yield
        if self.stream is not None:
            self.done[turn] = torch.cuda.current_stream(self.device).record_event()

    @contextlib.contextmanager
    def apart(self, index: int) -> Iterator[None]:
        """While this lasts the layer has its weights, in memory of its own."""
        space = torch.empty(self.streamed.layer_bytes(index), dtype=torch.uint8)
        self._read(index, space)
        with self._filled(index, space.to(self.device)):
            yield

    @contextlib.contextmanager
    def _filled(self, index: int, space: Tensor) -> Iterator[None]:
        """The weights of a layer are those that lie one after the other in `space`; its own buffers go to the device."""
        layer, offset, before = self.streamed.layers[index], 0, []
        for module in layer.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    before.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.to(self.device)
        for name, entry in self.streamed.layer_entries(index).items():
            path, _, last = name.rpartition(".")
            module = layer.get_submodule(path)
            owner = module._parameters if last in module._parameters else module._buffers
            before.append((owner, last, owner[last]))
            value = space[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape)
            owner[last] = _like(owner[last], value.to(owner[last].dtype))
            offset += _aligned(entry.nbytes)
        try:
            yield
        finally:
            for owner, name, tensor in reversed(before):
                owner[name] = tensor


class _Lanes:
    """Hidden states between the host, where they wait, and the device, where they are worked on: copied beside the work.

    All waiting is done by the device, through events, so that the host is ahead and copies overlap with what is computed.
    """

    def __init__(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype):
        self.device = device
        self.turn = 0
        if device.type == "cuda":
            self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self.inbox, self.outbox = (torch.empty((BOXES, *shape), dtype=dtype, device=device) for _ in range(2))
            self.incoming.wait_stream(torch.cuda.current_stream(device))  # which may have used this memory before
            self.used: list[torch.cuda.Event | None] = [None] * BOXES  # the layer has read the inbox
            self.sent: list[torch.cuda.Event | None] = [None] * BOXES  # the outbox has been copied to the host
            self.written: dict[int, torch.cuda.Event] = {}  # the same, by the first window of the batch

    def receive(self, source: Float[Tensor, "sample token dim"], start: int) -> Float[Tensor, "sample token dim"]:
        """A copy on the device of what waits on the host, of the batch that begins with window `start`."""
        if self.device.type != "cuda":
            return source.to(self.device, copy=True)  # a layer may work in place
        here = self.inbox[self.turn][: len(source)]
        with torch.cuda.stream(self.incoming):
            for event in (self.used[self.turn], self.written.get(start)):
                if event is not None:
                    self.incoming.wait_event(event)
            here.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self.incoming)
        return here

    def send(self, output: Float[Tensor, "sample token dim"], target: Float[Tensor, "sample token dim"], start: int) -> None:
        """Bring the output of the batch that was received last to the host."""
        if self.device.type != "cuda":
            target.copy_(output)
            return
        work, here = torch.cuda.current_stream(self.device), self.outbox[self.turn][: len(output)]
        if self.sent[self.turn] is not None:
            work.wait_event(self.sent[self.turn])
        here.copy_(output)
        self.used[self.turn] = work.record_event()
        with torch.cuda.stream(self.outgoing):
            self.outgoing.wait_event(self.used[self.turn])
            target.copy_(here, non_blocking=True)
            self.sent[self.turn] = self.written[start] = self.outgoing.record_event()
        self.turn = (self.turn + 1) % BOXES

    def finish(self) -> None:
        """Wait until everything has arrived on the host."""
        if self.device.type == "cuda":
            self.outgoing.synchronize()


class _Calls:
    """What the layers are called with beside the hidden states, by batch. Tensors that are equal in several batches (position
    embeddings, mostly) are kept once, and stay on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known: list[Tensor] = []
        self.batches: dict[int, set[int]] = {}  # by the place of a tensor among the known ones
        self.there: dict[int, Tensor] = {}
        self.calls: dict[int, list[tuple[tuple, dict]]] = {}

    def keep(self, start: int, calls: list[tuple[tuple, dict]]) -> None:
        """The calls of the batch that begins with window `start`."""
        seen: dict[int, Tensor] = {}

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in seen:
                    seen[id(value)] = self._known(value, start)
                return seen[id(value)]
            return _nested(kept, value)

        self.calls[start] = [kept(call) for call in calls]

    def _known(self, value: Tensor, start: int) -> Tensor:
        for other in self.known:
            if other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value):
                self.batches[id(other)].add(start)
                return other
        self.known.append(value)
        self.batches[id(value)] = {start}
        return value

    def on_device(self, start: int, index: int) -> tuple[tuple, dict]:
        """The call of one layer, on the device, but for its hidden states."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return _nested(moved, value)
            if id(value) not in self.there:
                if len(self.batches[id(value)]) == 1:
                    return value.to(self.device)  # masks of one batch: those of all batches may be too much for the device
                self.there[id(value)] = value.to(self.device)
            return self.there[id(value)]

        return moved(self.calls[start][index])


def _nested(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    return type(value)(function(item) for item in value) if type(value) in (tuple, list) else value


# -------------------------------------------------------------------------------------------------------------- passes


class _Passes:
    """Groups of windows through all layers, layer by layer, batch by batch."""

    def __init__(
        self,
        streamed: Streamed,
        windows: Int[Tensor, "sample token"],
        mask: Bool[Tensor, "sample token"],
        *,
        batch_size: int,
        windows_at_once: int,
        states: bool,
        progress: bool,
    ):
        self.streamed, self.windows, self.mask, self.states, self.progress = streamed, windows, mask, states, progress
        starts = range(0, len(windows), windows_at_once)
        self.groups = [range(start, min(start + windows_at_once, len(windows))) for start in starts]
        self.batch_size = min(batch_size, len(windows))
        # While one group goes through the layers on an accelerator, the states of the one before are reduced.
        self.n_spaces = 2 if states and len(self.groups) > 1 and streamed.device.type != "cpu" else 1
        self.engine = streamed.engine()

    def batches(self, group: range) -> list[slice]:
        """Windows of each batch of a group."""
        starts = range(group.start, group.stop, self.batch_size)
        return [slice(start, min(start + self.batch_size, group.stop)) for start in starts]

    def __iter__(self) -> Iterator[tuple[range, Float[Tensor, "state sample token dim"]]]:
        """Each group and its hidden states, on the host: all L + 1, or the last alone.

        They stay until `n_spaces` more groups are asked for: the caller must be done with them by then.
        """
        streamed, length = self.streamed, self.windows.shape[1]
        n_layers, dtype, device = len(streamed.layers), streamed.dtype, streamed.device
        shape = (n_layers + 1 if self.states else 1, len(self.groups[0]), length, streamed.config.hidden_size)
        with (
            contextlib.ExitStack() as stack,
            tqdm(total=len(self.groups) * n_layers, desc="streamed", unit="layer", disable=not self.progress) as bar,
            contextlib.ExitStack() as engine,
        ):
            spaces = [stack.enter_context(_host_space(shape, dtype, device)) for _ in range(self.n_spaces)]
            weights = lanes = None
            for number, group in enumerate(self.groups):
                space = spaces[number % self.n_spaces]
                if weights is None:
                    weights = engine.enter_context(_Weights(streamed, device))
                    lanes = _Lanes(device, (self.batch_size, *shape[2:]), dtype)
                self._run(group, space, weights, lanes, bar)
                if not self.states:  # the head comes next, and takes their place on the device
                    engine.close()
                    weights = lanes = None
                yield group, space[:, : len(group)]

    def _run(self, group: range, space: Tensor, weights: _Weights, lanes: _Lanes, bar: tqdm) -> None:
        calls = _Calls(self.streamed.device)
        last = len(self.streamed.layers) - 1
        another = self.states and group is not self.groups[-1]
        for index in range(last + 1):
            source, target = (index, index + 1) if self.states else (0, 0)
            following = index + 1 if index < last else 0 if another else None
            with weights.layer(index, following):
                for rows in self.batches(group):
                    here = slice(rows.start - group.start, rows.stop - group.start)
                    if index == 0:
                        space[0, here] = self._enter(rows, calls)
                    self.engine.calls[index] = calls.on_device(rows.start, index)
                    output = self.engine.run_layer(index, lanes.receive(space[source, here], rows.start))
                    self._check(output, f"the output of layer {index}")
                    lanes.send(output, space[target, here], rows.start)
            bar.update()
        lanes.finish()

    def _enter(self, rows: slice, calls: _Calls) -> Float[Tensor, "sample token dim"]:
        """The input of the first layer, on the CPU; keeps what the layers are called with."""
        hidden = self.engine.embed(self.windows[rows], self.mask[rows])
        calls.keep(rows.start, self.engine.calls)
        return self._check(hidden, "the input of layer 0")

    def _check(self, hidden: Tensor, what: str) -> Tensor:
        found, expected = (hidden.dtype, hidden.shape[-1]), (self.streamed.dtype, self.streamed.config.hidden_size)
        if found != expected:
            raise UnsupportedModel(
                f"{what} of this {self.streamed.config.model_type} model is {found[1]} wide in {found[0]}, not {expected[1]} "
                f"in {expected[0]}: it can only be loaded resident"
            )
        return hidden


@torch.inference_mode()
def collect(
    streamed: Streamed,
    windows: Int[Tensor, "sample token"],
    *,
    mask: Shaped[Tensor, "_ _"] | None = None,
    batch_size: int = 8,
    windows_at_once: int | None = None,
    progress: bool = True,
) -> LayerStats:
    """`statistics.collect` of a streamed model: the same batches, the same sums.

    `windows_at_once` as in `Streamed.plan`. Raises as both.
    """
    mask = checked_mask(windows, mask)
    check_vocabulary(streamed.model, windows)
    at_once, _ = streamed.plan(*windows.shape, batch_size=batch_size, windows_at_once=windows_at_once, states=True)
    setting = {"batch_size": batch_size, "windows_at_once": at_once, "states": True, "progress": progress}
    passes = _Passes(streamed, windows, mask, **setting)
    cuda = streamed.device.type == "cuda"
    beside = torch.cuda.Stream(streamed.device) if cuda else None

    def reduced(group: range, states: Tensor) -> list[LayerStats]:
        found = []
        with torch.inference_mode(), torch.cuda.stream(beside) if cuda else contextlib.nullcontext():
            for rows in passes.batches(group):
                part = states[:, rows.start - group.start : rows.stop - group.start].permute(1, 2, 0, 3)
                stats = from_states(part, mask[rows], device=streamed.device)
                check_finite(stats, f"batch {rows.start // batch_size} (samples {rows.start} to {rows.stop - 1})")
                found.append(stats)
        return found

    found, waiting = [], deque()
    with ThreadPoolExecutor(1, thread_name_prefix="sums") as pool:
        for group, states in passes:
            if passes.n_spaces == 1:
                found += reduced(group, states)
                continue
            waiting.append(pool.submit(reduced, group, states))
            while len(waiting) >= passes.n_spaces:
                found += waiting.popleft().result()
        for future in waiting:
            found += future.result()
    total = found[0]
    for stats in found[1:]:
        total += stats
    return total


@torch.inference_mode()
def perplexity(
    streamed: Streamed,
    windows: Int64[Tensor, "window position"],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    windows_at_once: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """`evaluation.perplexity` of a streamed model; the head runs window by window.

    `windows_at_once` as in `Streamed.plan`. Raises as both.
    """
    check_windows(streamed.model, windows, stride=stride, batch_size=batch_size)
    at_once, _ = streamed.plan(*windows.shape, batch_size=batch_size, windows_at_once=windows_at_once, logits=True)
    setting = {"batch_size": batch_size, "windows_at_once": at_once, "states": False, "progress": progress}
    passes = _Passes(streamed, windows, torch.ones(windows.shape, dtype=torch.bool), **setting)
    tally = NllAccumulator(windows, stride)
    for group, states in passes:
        with streamed.head_on_device():
            for window in group:
                ids, hidden = windows[window : window + 1], states[0, window - group.start][None].to(streamed.device)
                tally.add(window, ids.to(streamed.device), passes.engine.head(hidden, streamed.device))
    return tally.result()

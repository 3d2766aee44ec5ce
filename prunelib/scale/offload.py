"""Models larger than memory: statistics and perplexity with two layers of weights in memory, read from safetensors.

Windows go through a layer in batches before the next layer is used, and the layer after it is read meanwhile. Everything else
is loaded on the CPU. The statistics compare all hidden states of a token, so those of all layers wait on the host, for as many
windows at once as fit (`OffloadedModel.plan`): weights are read once for each such group.
"""

import contextlib
import functools
import math
import operator
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int, Int64
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunelib.criteria.statistics import LayerStats, check_collectable, check_finite, from_states
from prunelib.evaluation.perplexity import NllAccumulator, Perplexity, check_windows
from prunelib.models import CheckpointError, UnsupportedModel, decoder_layers, final_norm
from prunelib.models.layers import layers_path
from prunelib.models.layerwise import LayerwiseModel
from prunelib.models.loading import checked_device, checked_dtype, checked_source, from_files
from prunelib.models.onednn import use_onednn

GIB = 2**30
# Python with torch and transformers, before any work. The libraries of a CUDA build took 90 MB more (measured on a processor).
PROCESS = int((0.85 if torch.version.cuda else 0.7) * GIB)
SUMS = {"cpu": 32 * 2**20, "cuda": 3 * GIB // 4}  # chunks of states and float64 work of the statistics


class DoesNotFit(RuntimeError):
    """Planned memory exceeds what there is; the message names the setting that fits, where there is one."""


@dataclass(frozen=True)
class Peak:
    """Planned bytes on the accelerator (0 without one) and in the memory of the host; an upper bound."""

    device: int
    host: int

    def describe(self) -> str:
        """One line to print before the work starts."""
        device = f"{self.device / GIB:.2f} GiB on the device, " if self.device else ""
        return f"planned peak memory: {device}{self.host / GIB:.2f} GiB on the host"


class OffloadedModel:
    """A causal language model whose layers stay in its safetensors files until they are used; for evaluation only.

    `name_or_path` as in `models.load`; weights and activations are `dtype`, on `device`.

    Raises ValueError for bad arguments, CheckpointError for a missing, damaged or incomplete checkpoint, UnsupportedModel for a
    quantized model, one without known layers, or one whose weights are stored in another form than in the model.
    """

    device_limit: int | None = None  # bytes that a pass may take at most; None: what is free
    host_limit: int | None = None

    def __init__(self, name_or_path: str | os.PathLike, *, dtype: str | torch.dtype, device: str | torch.device = "cpu"):
        self.dtype, target = checked_dtype(dtype), checked_device(device)
        if target is None:
            raise ValueError(f"an offloaded model works on one device, not {device!r}")
        source, options = checked_source(name_or_path)
        self.device = torch.empty(0, device=target).device  # with its index
        self.model, self.weights = _offloaded(source, options, self.dtype)
        self.layers = decoder_layers(self.model)
        self.path = layers_path(self.model)

    def plan(
        self, n_windows: int, seq_len: int, *, batch_size: int = 8, windows_at_once: int | None = None, states: bool = False
    ) -> tuple[int, Peak]:
        """Windows at once, and the planned peak of memory of a pass: print `Peak.describe` before the work starts.

        states: statistics, which keep all hidden states; else perplexity, which needs the head. Unless `windows_at_once` is
        given it is what fits into half of the host's free memory (all of `host_limit`, where that is given), in whole batches.
        Raises ValueError for numbers below 1, and DoesNotFit when the plan exceeds what is free, or a limit.
        """
        if min(batch_size, n_windows, seq_len) < 1 or (windows_at_once is not None and windows_at_once < 1):
            raise ValueError(f"{n_windows=}, {seq_len=}, {batch_size=}, {windows_at_once=}: all at least 1")
        batch_size = min(batch_size, n_windows)
        free = free_host_bytes() + psutil.Process().memory_info().rss  # the plan counts the process from its start
        host = free if self.host_limit is None else min(free, self.host_limit)

        def fitting(room: int, size: int) -> int:
            none, one = (self._peak(size, seq_len, count, states).host for count in (0, size))
            return max(0, (room - none) // (one - none)) * size

        if windows_at_once is None:
            room = free // 2 if self.host_limit is None else host
            windows_at_once = max(fitting(room, batch_size), batch_size)
        windows_at_once = min(math.ceil(windows_at_once / batch_size) * batch_size, n_windows)
        peak = self._peak(batch_size, seq_len, windows_at_once, states)
        if peak.host > host:
            most = fitting(host, 1)
            remedy = f"batch_size=1, windows_at_once={most} would fit" if most else "one window is too much, too"
            raise DoesNotFit(f"{peak.describe()}, but the host has {host / GIB:.2f} GiB: {remedy}")
        device = math.inf
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            device = min(torch.cuda.mem_get_info(self.device)[0] + unused, self.device_limit or math.inf)
        if peak.device > device:
            sizes = [size for size in range(1, batch_size) if self._peak(size, seq_len, size, states).device <= device]
            remedy = f"batch_size={sizes[-1]} would fit" if sizes else "one window is too much, too: take shorter ones"
            raise DoesNotFit(f"{peak.describe()}, but the device has {device / GIB:.2f} GiB: {remedy}")
        return windows_at_once, peak

    def _peak(self, batch_size: int, seq_len: int, windows_at_once: int, states: bool) -> Peak:
        """An upper bound for one pass; all hidden states of `windows_at_once` are kept for statistics, else the newest."""
        config, number = self.model.config.get_text_config(decoder=True), self.dtype.itemsize
        hidden, heads, n_states = config.hidden_size, config.num_attention_heads, len(self.layers) + 1
        attention = heads * (getattr(config, "head_dim", None) or hidden // heads)
        # One layer works while the next is on its way; each as it is in the file and, in another dtype, converted.
        layer = max(sum(math.prod(part.shape) for part in one.parameters()) for one in self.layers) * number
        table, head = (part.weight for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings()))
        # What a sublayer computes with; norms compute in float32: the stream, its copy, and two steps of the norm.
        sublayer = max(number * (3 * hidden + max(9 * attention, 3 * _mlp_width(config))), hidden * (2 * number + 12))
        outside = table.nbytes + (0 if head is table else head.nbytes)
        batch_states = seq_len * batch_size * hidden * number
        if self.device.type != "cpu":
            batch_states = 1 << (batch_states - 1).bit_length()  # page-locked memory comes in powers of two
        kept = math.ceil(windows_at_once / batch_size) * batch_states * (n_states if states else 1)
        work = 4 * layer + batch_size * seq_len * sublayer
        if states:
            work = max(work, 2 * layer + SUMS[self.device.type] + n_states * batch_states)
        else:  # float32 copies for the log-likelihood: of the scored logits and of their logarithms
            work = max(work, head.nbytes + seq_len * (table.shape[0] * (number + 8) + hidden * (2 * number + 12)))
        host = PROCESS + outside + kept
        if self.device.type == "cpu":
            return Peak(0, host + work)
        # The states of one batch are put together on the host.
        return Peak(work + GIB // 8, host + 2 * layer + n_states * batch_states * states)

    @torch.inference_mode()
    def read(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """The weights of a layer by name, on `device`; safe to call from a thread."""
        prefix, layer = f"{self.path}.{index}.", self.layers[index]
        names = [name for name, tensor in layer.state_dict().items() if tensor.is_meta]
        return {name: self.weights[prefix + name].to(device, non_blocking=True) for name in names}

    @contextlib.contextmanager
    def layer(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """While this lasts the layer has its weights, those of `read`, and its other buffers are on their device."""
        weights = self.read(index, torch.device("cpu")) if weights is None else weights
        device = next(iter(weights.values())).device
        with _replaced(self.layers[index], lambda name, tensor: weights[name] if name in weights else tensor.to(device)):
            yield

    def in_turn(self) -> Iterator[int]:
        """The index of each layer while it has its weights on the device; the next one is read meanwhile."""
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def fetch(index: int) -> dict[str, Tensor]:
            with torch.cuda.stream(copies) if copies else contextlib.nullcontext():
                return self.read(index, self.device)

        with ThreadPoolExecutor(1, thread_name_prefix="layer") as reader:
            following = reader.submit(fetch, 0)
            for index in range(len(self.layers)):
                weights = following.result()
                if copies:  # waits for the copies of this layer; those of the next one are not queued yet
                    current = torch.cuda.current_stream(self.device)
                    current.wait_stream(copies)
                    for tensor in weights.values():
                        tensor.record_stream(current)
                if index + 1 < len(self.layers):
                    following = reader.submit(fetch, index + 1)
                with self.layer(index, weights):
                    yield index
                del weights


def _offloaded(source: str, options: dict, dtype: torch.dtype) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The model with its layers on the meta device, and accelerate's mapping from the names of their weights to the files."""
    from accelerate import init_empty_weights  # takes a while to import, and nothing else here needs it
    from accelerate.hooks import remove_hook_from_submodules

    config = AutoConfig.from_pretrained(source, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"this {config.model_type} model is quantized: it can only be loaded resident")
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(config)
    path = layers_path(empty)
    places = {}
    for name, module in empty.named_modules():
        if f"{name}.".startswith(f"{path}."):
            continue
        if not [*module.children()]:
            places[name] = "cpu"
        else:  # parameters beside modules, as in the head of a vision tower
            own = (*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False))
            places |= {tensor: "cpu" for tensor, _ in own}
    places |= {f"{path}.{index}": "disk" for index in range(len(decoder_layers(empty)))}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            model = from_files(source, dtype=dtype, device_map=places, **options)
    except CheckpointError as error:
        if "re-saved" not in str(error.__cause__):
            raise
        # Such as experts that the files hold one by one, and the model in one tensor.
        what = f"{source!r} stores weights of a {config.model_type} model in another form than the model has"
        raise UnsupportedModel(f"{what}: it can only be loaded resident") from error
    hooks = [hook for module in decoder_layers(model).modules() if (hook := getattr(module, "_hf_hook", None)) is not None]
    hooks += [inner for hook in hooks for inner in getattr(hook, "hooks", ())]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    remove_hook_from_submodules(model)
    for module in model.modules():  # what the hooks leave behind: bound methods, which copies of a module would call
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_old_forward", None)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:  # transformers compares the shapes of loaded weights only
            with safe_open(weights.index[name]["safetensors_file"], framework="pt") as file:
                shape = tuple(file.get_slice(weights.index[name]["weight_name"]).get_shape())
            if shape != tuple(tensor.shape):
                raise CheckpointError(f"{name!r} has shape {shape} in {source!r}, {tuple(tensor.shape)} by its config.json")
    return use_onednn(model.eval()), weights


@contextlib.contextmanager
def _replaced(module: nn.Module, value) -> Iterator[None]:
    """While this lasts the parameters and buffers of a module are those of `value(name, tensor)`."""
    before = []
    for path, part in module.named_modules():
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    before.append((owner, name, tensor))
                    found = value(f"{path}.{name}" if path else name, tensor)
                    owner[name] = nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
    try:
        yield
    finally:
        for owner, name, tensor in before:
            owner[name] = tensor


def _mlp_width(config: Any) -> int:
    """Numbers of a token inside the MLP, generously: the largest width in the configuration, times the experts of a token."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
    widths = [width for name in names if isinstance(width := getattr(config, name, None), int)]
    experts = getattr(config, "num_experts_per_tok", None)
    return max(widths, default=4 * config.hidden_size) * (experts if isinstance(experts, int) else 1)


def free_host_bytes() -> int:
    """Memory that the process may still take: what the machine has available, or its container allows."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _passes(
    offloaded: OffloadedModel,
    windows: Int[Tensor, "sample token"],
    *,
    states: bool,
    batch_size: int,
    windows_at_once: int | None,
    progress: bool,
) -> Iterator[tuple[LayerwiseModel, slice, list[Float[Tensor, "sample token dim"]]]]:
    """Each batch of windows and its hidden states on the host: all L + 1, or the last alone."""
    from accelerate.utils import send_to_device

    sizes = {"batch_size": batch_size, "windows_at_once": windows_at_once}
    windows_at_once, _ = offloaded.plan(*windows.shape, **sizes, states=states)
    engine = LayerwiseModel(offloaded.model, ready=offloaded.layer)
    device, pinned = offloaded.device, offloaded.device.type == "cuda"

    def on_host(hidden: Tensor) -> Tensor:
        return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=pinned).copy_(hidden, non_blocking=pinned)

    groups = range(0, len(windows), windows_at_once)
    with tqdm(total=len(groups) * engine.n_layers, desc="offloaded", unit="layer", disable=not progress) as bar:
        for first in groups:
            batches = []
            for start in range(first, min(first + windows_at_once, len(windows)), batch_size):
                rows = slice(start, min(start + batch_size, first + windows_at_once, len(windows)))
                hidden = engine.embed(windows[rows])
                batches.append((rows, engine.calls, [on_host(hidden)]))
            for index in offloaded.in_turn():
                for _, calls, kept in batches:
                    engine.calls = [*calls[:index], send_to_device(calls[index], device), *calls[index + 1 :]]
                    # A copy on the CPU as well: a layer may work in place.
                    output = engine.run_layer(index, kept[-1].to(device, copy=True, non_blocking=pinned))
                    kept[:] = [*kept, on_host(output)] if states else [on_host(output)]
                bar.update()
            if pinned:
                torch.cuda.synchronize(device)
            for rows, _, kept in batches:
                yield engine, rows, kept
                kept.clear()


@torch.inference_mode()
def collect(
    offloaded: OffloadedModel,
    windows: Int[Tensor, "sample token"],
    *,
    batch_size: int = 8,
    windows_at_once: int | None = None,
    progress: bool = True,
) -> LayerStats:
    """`statistics.collect` of an offloaded model: the same sums. `windows_at_once` as in its `plan`. Raises as both."""
    check_collectable(offloaded.model, windows, batch_size=batch_size)
    setting = {"batch_size": batch_size, "windows_at_once": windows_at_once, "progress": progress}
    found = []
    for _, rows, states in _passes(offloaded, windows, states=True, **setting):
        found.append(from_states(torch.stack(states).permute(1, 2, 0, 3), offloaded.device))
        check_finite(found[-1], rows, batch_size)
    return functools.reduce(operator.add, found)


@torch.inference_mode()
def perplexity(
    offloaded: OffloadedModel,
    windows: Int64[Tensor, "window position"],
    *,
    batch_size: int = 8,
    windows_at_once: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """`evaluation.perplexity` of an offloaded model, whose head runs window by window; otherwise as `collect`."""
    check_windows(offloaded.model, windows, batch_size=batch_size)
    setting = {"batch_size": batch_size, "windows_at_once": windows_at_once, "progress": progress}
    sums, device = NllAccumulator(windows), offloaded.device
    for engine, rows, (hidden,) in _passes(offloaded, windows, states=False, **setting):
        with contextlib.ExitStack() as on_device:  # a tied table then exists twice
            for module in (final_norm(offloaded.model), offloaded.model.get_output_embeddings()):
                on_device.enter_context(_replaced(module, lambda _, tensor: tensor.to(device)))
            for window, states in zip(range(rows.start, rows.stop), hidden, strict=True):
                logits = engine.head(states[None].to(device), device)
                sums.add(window, windows[window : window + 1].to(device), logits)
    return sums.result()

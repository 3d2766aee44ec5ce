"""How fast a model is, beside how fast it could be: times of prefill and decode, and the limits that follow from counts.

Reading a prompt is arithmetic: every weight is used for thousands of tokens. Appending tokens is memory traffic: every weight,
and the whole key-value cache, is read for one token of every row. So the least time of either is the larger of
FLOPs / rate and bytes / bandwidth, with rate and bandwidth measured on the same device in the same run. What a removed layer
saves is its share of that. The ratio of two limits is what the best implementation gains by removing layers; another one may
gain more, where what it wastes lies in the layers.

Times are taken in turn, each model once per round, so that a slow moment of the machine meets all of them.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunelib.models import DTYPES, decoder_layers, onednn, remove_layers
from prunelib.slicing.modeling import Diagonal
from prunelib.slicing.rotate import sliced_configuration
from prunelib.slicing.schedules import SlicePlan
from prunelib.speed.decoding import CacheShape, Decoder, head_size

# ----------------------------------------------------------------------------------------------------------------- shapes

_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8}
_LLAMA3 |= {"max_position_embeddings": 131072, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}

SHAPES: dict[str, dict[str, Any]] = {
    name: kind | dict(zip(("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"), sizes, strict=True))
    for name, kind, sizes in (
        ("llama-2-7b", _LLAMA2, (32, 4096, 11008, 32)),
        ("llama-2-13b", _LLAMA2, (40, 5120, 13824, 40)),
        ("llama-2-70b", _LLAMA2 | {"num_key_value_heads": 8}, (80, 8192, 28672, 64)),
        ("llama-3.1-8b", _LLAMA3, (32, 4096, 14336, 32)),
        ("llama-3.1-70b", _LLAMA3, (80, 8192, 28672, 64)),
        (
            "mistral-7b-v0.3",
            {"model_type": "mistral", "vocab_size": 32768, "num_key_value_heads": 8, "sliding_window": None},
            (32, 4096, 14336, 32),
        ),
        ("qwen2.5-0.5b", _QWEN | {"num_key_value_heads": 2}, (24, 896, 4864, 14)),
        ("qwen2.5-1.5b", _QWEN | {"num_key_value_heads": 2}, (28, 1536, 8960, 12)),
        ("qwen2.5-3b", _QWEN | {"num_key_value_heads": 2}, (36, 2048, 11008, 16)),
    )
}
"""Shapes of published models by name, to be filled with random weights: how fast a model is does not depend on its weights."""


def shape_configuration(name: str) -> PreTrainedConfig:
    """Configuration of one of `SHAPES`. Raises ValueError listing them for another name."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    return AutoConfig.for_model(**SHAPES[name])


def random_model(
    config: PreTrainedConfig, *, dtype: str = "float32", device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of random weights, made on the device itself, in evaluation mode: matrices N(0, 0.02), vectors as initialized.

    For measurements that depend on shapes alone; nothing it says means anything. Raises ValueError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    device = torch.device(device)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(usual)
    model = model.to(device=device, dtype=DTYPES[dtype])
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
    return onednn.use_onednn(model).requires_grad_(False)


def without_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model without `count` layers, the deepest but the last: which ones does not matter to speed. Weights are shared."""
    n_layers = len(decoder_layers(model))
    if not 0 <= count < n_layers:
        raise ValueError(f"cannot remove {count} of {n_layers} layers: at least one must stay")
    return remove_layers(model, range(n_layers - 1 - count, n_layers - 1))


def random_sliced(
    config: PreTrainedConfig, plan: SlicePlan, *, dtype: str = "float32", device: str | torch.device = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A sliced model of random weights, shaped as `slice_model` would make a dense one of this configuration."""
    return random_model(sliced_configuration(config, plan), dtype=dtype, device=device, seed=seed)


# ------------------------------------------------------------------------------------------------------------------ counts


@dataclass(frozen=True)
class Setting:
    """So many rows at a time, tokens of their prompts, and tokens to append to each (0: the prompts are only read)."""

    batch: int
    prompt: int
    new_tokens: int

    def __post_init__(self):
        if self.batch < 1 or self.prompt < 1 or self.new_tokens < 0 or self.new_tokens == 1:
            raise ValueError(f"{self}: give at least one row and one token, and no new tokens or at least 2")

    @staticmethod
    def parse(text: str) -> "Setting":
        """`16x4x2048`: batch, prompt, new tokens. Raises ValueError for other texts."""
        if not re.fullmatch(r"\d+x\d+x\d+", text):
            raise ValueError(f"setting {text!r} is not of the form batch x prompt x new tokens, such as 16x4x2048")
        return Setting(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}x{self.new_tokens}"

    @property
    def capacity(self) -> int:
        """Tokens of a row in the end, and so in its cache."""
        return self.prompt + max(self.new_tokens, 1)

    @property
    def steps(self) -> int:
        """Decode steps: the prefill has chosen the first of the new tokens."""
        return max(self.new_tokens - 1, 0)

    @property
    def mean_length(self) -> float:
        """Tokens that a step attends to, its own included, in the mean over all steps."""
        return self.prompt + (self.steps + 1) / 2


@dataclass(frozen=True)
class Roofline:
    """What a device reaches on the best of loads: bytes per second, and FLOPs per second in the dtype of the model."""

    bandwidth: float | int
    rate: float | int


@dataclass(frozen=True)
class Work:
    """The least that a computation must do: FLOPs, a multiplication and an addition as two, and bytes of memory it must move.

    FLOPs are those of matrix products: linear maps and attention. Bytes are weights (once for all rows; of embedding tables,
    what is looked up) and keys and values, read and written; activations could stay on the chip.
    """

    flops: float | int
    bytes: float | int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceiling: Roofline) -> float:
        """No implementation is faster on a device of this ceiling."""
        return max(self.flops / ceiling.rate, self.bytes / ceiling.bandwidth)


def step_work(model: PreTrainedModel, batch: int, length: float | int, *, read: int | None = None) -> Work:
    """One decode step: a token for each of `batch` rows, which attends to `length` tokens, its own included.

    read: tokens of a row's cache that an implementation reads, where it reads more (a masked static cache: all of it).
    """
    cache = CacheShape.of(model, batch, 1)
    itemsize = model.dtype.itemsize
    flops = batch * (_linear_flops(model) + length * _attention_flops(model))
    moved = cache.numel() * itemsize * ((read if read is not None else length - 1) + 1)
    return Work(flops, weight_bytes(model) + _looked_up_bytes(model, batch) + moved)


def prefill_work(model: PreTrainedModel, batch: int, prompt: int) -> Work:
    """Reading prompts into an empty cache, causally, with logits for the last token of each alone."""
    head = model.get_output_embeddings()
    body = _linear_flops(model) - _flops_of(head)
    seen = prompt * (prompt + 1) / 2
    flops = batch * (prompt * body + _flops_of(head) + seen * _attention_flops(model))
    written = CacheShape.of(model, batch, prompt).numel() * model.dtype.itemsize
    return Work(flops, weight_bytes(model) + _looked_up_bytes(model, batch * prompt) + written)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that every forward pass reads: all but tables of which it looks up rows."""
    tables = _tables(model)
    return sum(one.numel() * one.element_size() for one in model.parameters() if id(one) not in tables)


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _tables(model: PreTrainedModel) -> dict[int, nn.Parameter]:
    """Weights of embeddings that no matrix product uses (as a tied head does)."""
    used = {id(module.weight) for module in _matrices(model)}
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(table): table for table in tables if id(table) not in used}


def _looked_up_bytes(model: PreTrainedModel, tokens: int) -> int:
    return sum(tokens * table.shape[1] * table.element_size() for table in _tables(model).values())


def _matrices(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]


def _flops_of(module: nn.Module) -> int:
    # Packed weights have fewer numbers than features.
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return 2 * (features[0] * features[1] if None not in features else module.weight.numel())


def _linear_flops(model: PreTrainedModel) -> int:
    """FLOPs of one token in all linear maps, the head included."""
    diagonal = sum(module.weight.numel() for module in model.modules() if isinstance(module, Diagonal))
    return diagonal + sum(_flops_of(module) for module in _matrices(model))


def _attention_flops(model: PreTrainedModel) -> int:
    """FLOPs of one token for every token that it attends to, in all layers."""
    config = model.config.get_text_config(decoder=True)
    return 4 * config.num_attention_heads * head_size(config) * len(decoder_layers(model))


# ------------------------------------------------------------------------------------------------------------------- times


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Iterable[float | int]) -> "Spread":
        numbers = np.asarray(list(values), dtype=float)
        if not numbers.size:
            raise ValueError("no measurement: at least one round is needed")
        low, median, high = np.quantile(numbers, [0.25, 0.5, 0.75])
        return Spread(float(median), float(low), float(high), numbers.size)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: of the device between two events in its stream, or of the processor."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list]:
    """Seconds of every call in `rounds` rounds after `warmup` untimed ones; each round begins with another call than the last.

    `progress` is called after each of them. Raises ValueError without any round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in _turned(names, number):
            seconds = seconds_of(calls[name], device)
            progress()
            if number >= 0:
                times[name].append(seconds)
    return times


def _turned(names: Sequence[str], number: int) -> list[str]:
    first = number % len(names)
    return [*names[first:], *names[:first]]


@torch.no_grad()
def measured_ceiling(
    device: torch.device, dtype: torch.dtype, *, gib: float | None = None, size: int | None = None, rounds: int = 7
) -> dict[str, Spread]:
    """Bytes per second of reading (`read`) and copying (`copy`, both directions counted), FLOPs per second of a matrix product.

    Medians and quartiles of `rounds`, on random numbers: zeros may be faster. gib: memory of the buffer, far above the caches:
    4 on CUDA, 0.25 elsewhere, unless given. size: of the square matrices, 8192 on CUDA, 1024 elsewhere, unless given.
    """
    cuda = device.type == "cuda"
    gib, size = gib or (4.0 if cuda else 0.25), size or (8192 if cuda else 1024)
    numbers = int(gib * 2**30 / 4)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    calls = {
        "read": lambda: torch.sum(source),
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.matmul(left, right, out=product),
    }
    amounts = {"read": 4 * numbers, "copy": 8 * numbers, "matmul": 2 * size**3}
    times = interleaved(calls, rounds, device, warmup=2)
    return {name: Spread.of(amounts[name] / seconds for seconds in times[name]) for name in calls}


def ceiling_of(measured: Mapping[str, Spread]) -> Roofline:
    """The ceiling that limits are taken from: the faster of reading and copying, and the matrix product."""
    return Roofline(max(measured["read"].median, measured["copy"].median), measured["matmul"].median)


def prefill_seconds(
    decoders: Mapping[str, Decoder], setting: Setting, rounds: int, *, seed: int = 0, progress: bool = True
) -> dict[str, list]:
    """Seconds in which each model reads random prompts and chooses the next tokens, round by round."""
    decoder = next(iter(decoders.values()))
    prompts = random_tokens(decoder.model, setting, seed)
    calls = {name: lambda one=one: one.prefill(prompts) for name, one in decoders.items()}
    with tqdm(desc=f"prefill {setting}", total=(rounds + 1) * len(calls), unit="call", disable=not progress) as bar:
        return interleaved(calls, rounds, decoder.model.device, progress=bar.update)


def random_tokens(model: PreTrainedModel, setting: Setting, seed: int) -> torch.Tensor:
    """Prompts of random tokens, [batch, prompt], on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (setting.batch, setting.prompt), generator=generator).to(model.device)


def sampled_lengths(setting: Setting, segments: int, chunk: int) -> list[int]:
    """Tokens in the cache before the `chunk` steps that are timed, in the middle of each of `segments` parts of a generation.

    With as many steps as a segment has, every step is timed. The time of a step grows in proportion to the length of the cache,
    so that the mean over the middles is that over all steps. Raises ValueError when a segment has fewer steps.
    """
    width = setting.steps / segments if segments > 0 else 0
    if segments < 1 or chunk < 1 or chunk > width:
        raise ValueError(f"segments={segments}, steps={chunk}: {setting.steps} steps of {setting} have no such samples")
    return [setting.prompt + round((index + 0.5) * width - chunk / 2) for index in range(segments)]


def step_seconds(
    decoders: Mapping[str, Decoder],
    setting: Setting,
    rounds: int,
    *,
    segments: int,
    chunk: int,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "segment round"]]:
    """Seconds of one decode step of each model, in every segment of a generation and every round (`sampled_lengths`).

    What is in the cache stays as it is: fill it with random numbers (`Decoder.fill`) once before.
    """
    lengths = sampled_lengths(setting, segments, chunk)
    device = next(iter(decoders.values())).model.device
    found: dict[str, list[list[float]]] = {name: [] for name in decoders}

    def taken(decoder: Decoder, length: int) -> Callable[[], object]:
        def call() -> None:
            decoder.seek(length)
            decoder.steps(chunk)

        return call

    calls = (rounds + 1) * len(decoders) * segments
    with tqdm(desc=f"decode {setting}", total=calls, unit="call", disable=not progress) as bar:
        for length in lengths:
            ready = {name: taken(decoder, length) for name, decoder in decoders.items()}
            for name, times in interleaved(ready, rounds, device, progress=bar.update).items():
                found[name].append([seconds / chunk for seconds in times])
    return {name: np.array(times) for name, times in found.items()}


def whole_seconds(decoder: Decoder, setting: Setting, *, seed: int = 0) -> float:
    """Seconds of one generation, prefill and every step, as a check of what `step_seconds` puts together from samples."""
    prompts = random_tokens(decoder.model, setting, seed)
    decoder.prefill(prompts)  # graphs are captured before the clock starts
    if setting.steps:
        decoder.steps(1)

    def call() -> None:
        decoder.prefill(prompts)
        decoder.steps(setting.steps)

    return seconds_of(call, decoder.model.device)


@torch.no_grad()
def peak_memory(model: PreTrainedModel, setting: Setting) -> int | None:
    """Peak bytes of a generation: the model's parameters, its cache and everything in between; None without a CUDA device.

    Measured beside whatever else is on the device, which does not count. Plain steps: the first of them, and the last.
    """
    device = model.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    decoder = Decoder(model, setting.batch, setting.capacity, static=False)
    decoder.prefill(random_tokens(model, setting, 0))
    if setting.steps:
        decoder.steps(1)
        decoder.seek(setting.capacity - 1)
        decoder.steps(1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + parameter_bytes(model)


# -------------------------------------------------------------------------------------------------------------------- fits


@dataclass(frozen=True)
class Fit:
    """A line through points, by least squares: y = intercept + slope · x, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r2: float


def linear_fit(x: Iterable[float | int], y: Iterable[float | int]) -> Fit | None:
    """The line through at least three different x; None for fewer, and where all y are equal."""
    x, y = (np.asarray(list(values), dtype=float) for values in (x, y))
    if len(set(x.tolist())) < 3 or np.ptp(y) == 0:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (intercept + slope * x)
    return Fit(float(slope), float(intercept), float(1 - rest @ rest / np.sum((y - y.mean()) ** 2)))

"""Times of prefill and decode, taken in turn: each model once per round, so that a slow moment of the machine meets all."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, StaticCache

from prunelib.models import decoder_layers, parameter_count


@dataclass(frozen=True)
class Setting:
    """So many rows at a time, tokens of their prompts, and tokens to append to each (0: the prompts are only read)."""

    batch: int
    prompt: int
    new_tokens: int

    @staticmethod
    def parse(text: str) -> "Setting":
        """`16x4x2048`: batch, prompt, new tokens. Raises ValueError for other texts."""
        numbers = [int(number) for number in text.split("x")] if re.fullmatch(r"\d+x\d+x\d+", text) else [0, 0, 0]
        if min(numbers[:2]) < 1 or numbers[2] == 1:
            raise ValueError(f"setting {text!r} is not batch x prompt x new tokens (0, or from 2 on), such as 16x4x2048")
        return Setting(*numbers)

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

    def sampled_lengths(self, segments: int, chunk: int) -> list[int]:
        """Tokens in the cache before the `chunk` steps that are timed, in the middle of each of `segments` parts.

        The time of a step grows in proportion to the length of the cache, so that the mean over the middles is that over all
        steps. Raises ValueError when a segment has fewer steps than `chunk`.
        """
        if not 1 <= chunk * segments <= self.steps:
            raise ValueError(f"segments={segments}, steps={chunk}: {self.steps} steps of {self} have no such samples")
        return [self.prompt + round((index + 0.5) * self.steps / segments - chunk / 2) for index in range(segments)]


class Decoder:
    """Greedy generation with one model, a prefill and then steps, as transformers' `generate` does without its bookkeeping.

    compiled: a static cache, read whole in every step, and steps through torch.compile, which replays a CUDA graph on a GPU
    (`generate(cache_implementation="static")`); else a dynamic cache. beside: a decoder of a model with at least as many
    layers, whose cache is used: only one of the two generates at a time.
    """

    def __init__(self, model: PreTrainedModel, setting: Setting, *, compiled: bool = False, beside: "Decoder | None" = None):
        self.model, self.setting, self.compiled = model, setting, compiled
        self.tokens = torch.zeros(setting.batch, 1, dtype=torch.int64, device=model.device)
        self.forward, config = model, model.config
        if compiled:
            # Every model of a comparison compiles the same code, with another number of layers or other widths.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self.forward = torch.compile(model.forward, mode="reduce-overhead")
        cache = StaticCache(config=config, max_cache_len=setting.capacity) if compiled else DynamicCache(config=config)
        self.cache = cache if beside is None else beside.cache

    @torch.no_grad()
    def prefill(self, tokens: Int64[Tensor, "row token"]) -> None:
        """Read prompts into the empty cache, and choose the next token of every row (`self.tokens`)."""
        self.seek(0)
        # An index, not 1: of a slice of frozen weights torch makes a product for every row, each of which reads the whole head.
        last = torch.full((1,), tokens.shape[1] - 1, device=tokens.device)
        logits = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=last).logits
        self.tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    @torch.no_grad()
    def steps(self, count: int) -> None:
        """Append `count` tokens to every row: the one chosen last, and those that follow; the next one is in `self.tokens`."""
        for _ in range(count):
            logits = self.forward(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    def seek(self, length: int) -> None:
        """Continue as if the cache held `length` tokens, of those that are in it."""
        for layer in self.cache.layers:
            if self.compiled:
                layer.cumulative_length.fill_(length)
            elif layer.is_initialized and layer.get_seq_length() > length:
                layer.crop(length - layer.get_seq_length())

    @torch.no_grad()
    def fill(self, length: int) -> None:
        """Random keys, values and tokens in the first `length` places of the cache: times on zeros can be too good."""
        if not self.cache.layers or not self.cache.layers[0].is_initialized or not self.compiled:
            self.prefill(self.tokens)
        generator = torch.Generator(device=self.model.device).manual_seed(0)
        for layer in self.cache.layers[: len(decoder_layers(self.model))]:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old if self.compiled else old.new_empty(*old.shape[:2], length, old.shape[3])
                setattr(layer, name, new.normal_(generator=generator))
        self.seek(length)
        self.tokens.random_(0, self.model.config.get_text_config(decoder=True).vocab_size, generator=generator)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has done what it started."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begun


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every call in `rounds` rounds after `warmup` untimed ones; each round begins with another call than the last.

    `before` is called, untimed, with the name of each call. Raises ValueError without any round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in np.roll(names, -number).tolist():
            before(name)
            seconds = seconds_of(calls[name], device)
            if number >= 0:
                times[name].append(seconds)
    return times


def random_tokens(model: PreTrainedModel, setting: Setting) -> Int64[Tensor, "row token"]:
    """Prompts of random tokens, on the model's device."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (setting.batch, setting.prompt), generator=generator).to(model.device)


def prefill_seconds(decoders: Mapping[str, Decoder], rounds: int) -> dict[str, list[float]]:
    """Seconds in which each model reads random prompts and chooses the next tokens, round by round."""
    first = next(iter(decoders.values()))
    prompts = random_tokens(first.model, first.setting)
    calls = {name: lambda one=one: one.prefill(prompts) for name, one in decoders.items()}
    return interleaved(calls, rounds, first.model.device)


def step_seconds(
    decoders: Mapping[str, Decoder], rounds: int, *, segments: int, chunk: int, progress: bool = True
) -> dict[str, Float[np.ndarray, "segment round"]]:
    """Seconds of one decode step of each model, in every segment of a generation (`Setting.sampled_lengths`) and every round.

    The decoders use one cache; the first of them has the most layers.
    """
    first = next(iter(decoders.values()))
    calls = {name: lambda one=one: one.steps(chunk) for name, one in decoders.items()}
    warmup = 1 if not first.compiled else 3  # torch.compile runs once, and once more to capture a graph
    found: dict[str, list[list[float]]] = {name: [] for name in decoders}
    lengths = first.setting.sampled_lengths(segments, chunk)
    for length in tqdm(lengths, desc=f"decode {first.setting}", unit="segment", disable=not progress):
        first.fill(length)
        times = interleaved(calls, rounds, first.model.device, warmup=warmup, before=lambda name: decoders[name].seek(length))  # noqa: B023
        for name, seconds in times.items():
            found[name].append(seconds)
    return {name: np.array(times) / chunk for name, times in found.items()}


def whole_seconds(decoder: Decoder) -> float:
    """Seconds of one generation, prefill and every step, as a check of what `step_seconds` puts together from samples."""
    prompts = random_tokens(decoder.model, decoder.setting)

    def generate(steps: int) -> None:
        decoder.prefill(prompts)
        decoder.steps(steps)

    generate(min(3, decoder.setting.steps))  # the cache is there, and steps are compiled, before the clock starts
    return seconds_of(lambda: generate(decoder.setting.steps), decoder.model.device)


def peak_memory(model: PreTrainedModel, setting: Setting) -> int | None:
    """Peak bytes of a generation: the model's parameters, its cache and everything in between; None without a CUDA device.

    Measured beside whatever else is on the device, which does not count: the prefill, and the last step, uncompiled.
    """
    device = model.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    decoder = Decoder(model, setting)
    decoder.prefill(random_tokens(model, setting))
    if setting.steps:
        decoder.fill(setting.capacity - 1)
        decoder.steps(1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + parameter_count(model) * model.dtype.itemsize

"""Greedy generation into a key-value cache of fixed size: a prefill, then steps that a CUDA graph replays.

What `generate` does, without its bookkeeping, so that the device can be measured and not the host. A step is one call of
the model for the newest token of every row; the next token is chosen on the device. Two ways to take steps:

- plain (what a CPU does): the host knows the length, layers are handed the filled part of the cache;
- static (CUDA): the length is a number on the device, shapes never change, and the step is captured once and replayed.
  Where Triton is there, attention reads what is filled (`prunelib.speed.decode_attention`); else all of the cache, masked.
"""

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prunelib.models import UnsupportedModel, decoder_layers

STATIC_ATTENTION = "prunelib_decode"
"""Name, among transformers' attention implementations, of the one that reads the filled part of a static cache."""


# ---------------------------------------------------------------------------------------------------------------- the cache


@dataclass
class _Place:
    """Where generation is: tokens in the cache, on the host for plain steps, on the device for static ones."""

    length: int
    position: Tensor
    static: bool = False


class _FixedLayer(CacheLayerMixin):
    """Keys and values of one layer in tensors [sample, head, capacity, size] that never move."""

    is_sliding = False

    def __init__(self, place: _Place, keys: Tensor, values: Tensor):
        super().__init__()
        self.place, self.keys, self.values = place, keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.place.static and key_states.shape[2] == 1:
            self.keys.index_copy_(2, self.place.position, key_states)
            self.values.index_copy_(2, self.place.position, value_states)
            return self.keys, self.values
        start, end = self.place.length, self.place.length + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.place.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class CacheShape:
    """Key-value cache of a model: layers, heads of keys and values, size of a head, capacity in tokens, rows."""

    layers: int
    heads: int
    size: int
    rows: int
    capacity: int

    @staticmethod
    def of(model: PreTrainedModel, rows: int, capacity: int) -> "CacheShape":
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return CacheShape(len(decoder_layers(model)), heads, head_size(config), rows, capacity)

    def numel(self) -> int:
        """Numbers in the whole cache."""
        return 2 * self.layers * self.heads * self.size * self.rows * self.capacity

    def allocate(self, like: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, zeros, in the model's dtype on its device."""
        shape = (self.rows, self.heads, self.capacity, self.size)
        kind = {"dtype": like.dtype, "device": like.device}
        return [(torch.zeros(shape, **kind), torch.zeros(shape, **kind)) for _ in range(self.layers)]


def head_size(config: Any) -> int:
    """Numbers in one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ------------------------------------------------------------------------------------------------------------- attention


def _attend_static(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Static steps come with the position of their token in place of a mask; everything else is a prefill, causal."""
    if query.shape[2] == 1 and attention_mask is not None:
        from prunelib.speed.decode_attention import attend

        scale = options.get("scaling") or query.shape[3] ** -0.5
        return attend(query, key, value, attention_mask, float(scale)), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(STATIC_ATTENTION, _attend_static)


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def reads_filled_part(model: PreTrainedModel, *, static: bool) -> bool:
    """Whether a step reads what is filled of the cache (True), or all of it, masked."""
    if not static:
        return True
    if not _triton_is_there():
        return False
    from prunelib.speed.decode_attention import supported

    config = model.config.get_text_config(decoder=True)
    shape = CacheShape.of(model, 1, 1)
    return supported(shape.size, config.num_attention_heads // shape.heads)


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Another attention implementation for a while; None leaves the model as it is."""
    before = model.config._attn_implementation
    if name is not None and name != before:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name is not None and name != before:
            model.set_attn_implementation(before)


# -------------------------------------------------------------------------------------------------------------- decoding


class Decoder:
    """Greedy generation of `rows` sequences up to `capacity` tokens each with one model.

    static: steps and prefills of fixed shape, captured as CUDA graphs where the model is on a CUDA device (and run as they are
    elsewhere, for tests); False takes plain steps, as `generate` does. Unless given: on CUDA devices. compiled: the layers go
    through torch.compile before steps are captured, which fuses what lies between the matrix products; about a second for
    every layer, once for all models that share their shapes. This changes the layers of `model` for good. beside: another
    decoder, of a model with as many layers at least, whose memory is shared: only one of the two generates at a time.

    Raises ValueError for rows or a capacity below 1 and another decoder that does not fit, UnsupportedModel naming the model
    type for a model whose cache is not made of keys and values for all tokens, or that does not say which logits to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        capacity: int,
        *,
        static: bool | None = None,
        compiled: bool = False,
        beside: "Decoder | None" = None,
    ):
        shape = _checked(model, rows, capacity)
        self.model, self.rows, self.capacity = model, rows, capacity
        self.static = model.device.type == "cuda" if static is None else static
        self.storage = beside.storage if beside is not None else shape.allocate(model)
        wanted = (rows, shape.heads, capacity, shape.size)
        if len(self.storage) < shape.layers or tuple(self.storage[0][0].shape) != wanted:
            raise ValueError(f"the memory beside is of another model or size: {shape.layers} layers of {wanted} are needed")
        self.place = _Place(0, torch.zeros(1, dtype=torch.int64, device=model.device))
        # As many layers as the storage has: torch.compile takes up again what it made for a model of other length.
        self.cache = Cache(layers=[_FixedLayer(self.place, *pair) for pair in self.storage])
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self.short_reads = reads_filled_part(model, static=self.static)
        self._name = STATIC_ATTENTION if self.static and self.short_reads and model.device.type == "cuda" else None
        self._compiled = compiled
        if compiled:
            for layer in decoder_layers(model):
                layer.compile(dynamic=False)
        # Graphs that never run at the same time use the same memory for what they compute on the way.
        self._pool = beside._pool if beside is not None else None
        if self._pool is None and self.static and model.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}

    @torch.no_grad()
    def prefill(self, tokens: Int64[Tensor, "row token"]) -> None:
        """Read prompts into the empty cache, and choose the next token of every row (`self.tokens`).

        Raises ValueError when the prompts do not leave room for one more token, or are not of `rows` rows.
        """
        if len(tokens) != self.rows or not 0 < tokens.shape[1] < self.capacity:
            raise ValueError(f"prompts of shape {tuple(tokens.shape)} do not fit {self.rows} rows of {self.capacity} tokens")
        self.seek(0)
        if self.static and self.model.device.type == "cuda":
            length = tokens.shape[1]
            if length not in self._graphs:
                kept = tokens.clone()
                self._graphs[length] = (self._captured(lambda: self._read(kept)), kept)
            graph, kept = self._graphs[length]
            kept.copy_(tokens)
            graph.replay()
        else:
            with _attention(self.model, self._name):
                self._read(tokens)
        self.seek(tokens.shape[1])

    @torch.no_grad()
    def steps(self, count: int) -> None:
        """Append `count` tokens to every row: the one chosen last, and those that follow; the next one is in `self.tokens`.

        Raises ValueError when the cache cannot hold them.
        """
        if self.place.length + count > self.capacity:
            raise ValueError(f"{self.place.length} tokens and {count} more do not fit a cache of {self.capacity}")
        captured = self.static and self.model.device.type == "cuda"
        if captured and "step" not in self._graphs:
            here = self.place.length
            self._graphs["step"] = (self._captured(self._static_step), None)
            self.seek(here)
        with contextlib.nullcontext() if captured else _attention(self.model, self._name):
            for _ in range(count):
                if captured:
                    self._graphs["step"][0].replay()
                elif self.static:
                    self._static_step()
                else:
                    self._plain_step()
                self.place.length += 1
        self.place.position.fill_(self.place.length)

    def generate(self, tokens: Int64[Tensor, "row token"], count: int) -> Int64[Tensor, "row count"]:
        """The `count` tokens that greedy generation appends to prompts."""
        self.prefill(tokens)
        chosen = [self.tokens.clone()]
        for _ in range(count - 1):
            self.steps(1)
            chosen.append(self.tokens.clone())
        return torch.cat(chosen, dim=1)

    def seek(self, length: int) -> None:
        """Go on as if the cache held `length` tokens: what is in it stays."""
        if not 0 <= length <= self.capacity:
            raise ValueError(f"length={length}: the cache holds 0 to {self.capacity} tokens")
        self.place.length = length
        self.place.position.fill_(length)

    def fill(self, seed: int = 0) -> None:
        """Random keys, values and tokens: times on zeros can be too good."""
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        for pair in self.storage:
            for tensor in pair:
                tensor.normal_(generator=generator)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        self.tokens.random_(0, vocabulary, generator=generator)

    def _read(self, tokens: Tensor) -> None:
        # Only steps are compiled: a prefill would double the time that compilation takes, for every length of a prompt.
        # An index, not 1: of a slice of frozen weights torch makes a product for every row, each of which reads the whole head.
        last = torch.full((1,), tokens.shape[1] - 1, device=tokens.device)
        with torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext():
            self._choose(self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=last).logits)

    def _plain_step(self) -> None:
        self._read(self.tokens)

    def _static_step(self) -> None:
        position = self.place.position
        self.place.static = True
        try:
            if self._name is not None:
                mask = position.view(1, 1, 1, 1)
            else:
                mask = (torch.arange(self.capacity, device=position.device) <= position).view(1, 1, 1, -1)
                mask = mask.expand(self.rows, 1, 1, -1)
            logits = self.model(
                input_ids=self.tokens,
                position_ids=position.view(1, 1),
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        finally:
            self.place.static = False
        self._choose(logits)
        position += 1

    def _choose(self, logits: Tensor) -> None:
        self.tokens.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    def _captured(self, call: Any) -> torch.cuda.CUDAGraph:
        """A graph of `call`, which must not wait for the device; run before it is captured, so that libraries are set up."""
        many = 16 * len(self.storage)  # a compiled layer for every place in the cache, and then some
        limits = torch._dynamo.config.patch(recompile_limit=many, accumulated_recompile_limit=16 * many)
        with torch.cuda.device(self.model.device), _attention(self.model, self._name), limits:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            kept, length = self.tokens.clone(), self.place.length
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self.seek(length)
                    call()
            torch.cuda.current_stream().wait_stream(aside)
            self.seek(length)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                call()
            self.tokens.copy_(kept)
            return graph


def _checked(model: PreTrainedModel, rows: int, capacity: int) -> CacheShape:
    model_type, config = model.config.model_type, model.config.get_text_config(decoder=True)
    if rows < 1 or capacity < 1:
        raise ValueError(f"rows={rows}, capacity={capacity}: both are at least 1")
    known = inspect.signature(model.forward).parameters
    missing = [name for name in ("position_ids", "past_key_values", "logits_to_keep") if name not in known]
    if missing:
        raise UnsupportedModel(f"a {model_type} model takes no {missing[0]}: it cannot be timed step by step")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if "kv_lora_rank" in vars(config) or kinds - {"sliding_attention"}:
        raise UnsupportedModel(f"the cache of a {model_type} model is not made of keys and values: it cannot be timed here")
    if window is not None and capacity > window:
        raise UnsupportedModel(f"this {model_type} model attends to {window} tokens: {capacity} do not fit")
    return CacheShape.of(model, rows, capacity)

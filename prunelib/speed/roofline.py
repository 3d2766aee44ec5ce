"""How fast a model could be: the least time that follows from its FLOPs and bytes.

Reading a prompt is arithmetic: every weight is used for thousands of tokens. Appending tokens is memory traffic: every weight,
and the whole key-value cache, is read for one token of every row. So the least time of either is the larger of
FLOPs / rate and bytes / bandwidth, with rate and bandwidth measured on the same device in the same run. The ratio of two limits
is what the best implementation gains by removing layers; another one may gain more, where its overhead lies in the layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from prunelib.models import UnsupportedModel, decoder_layers
from prunelib.slicing.modeling import Diagonal
from prunelib.speed.timing import Quartiles, interleaved


@dataclass(frozen=True)
class Roofline:
    """What a device reaches on the best of loads: bytes per second, and FLOPs per second in the dtype of the model."""

    bandwidth: float | int
    rate: float | int

    @staticmethod
    def of(measured: Mapping[str, Quartiles]) -> "Roofline":
        """From `measured_roofline`: the faster of reading and copying, and the matrix product."""
        return Roofline(max(measured["read"].median, measured["copy"].median), measured["matmul"].median)


@dataclass(frozen=True)
class OpCount:
    """The least that a computation must do: FLOPs, a multiplication and an addition as two, and bytes of memory it must move.

    FLOPs are those of matrix products: linear maps and attention. Bytes are weights (once for all rows; of embedding tables,
    the rows looked up) and keys and values, read and written; activations could stay on the chip.
    """

    flops: float | int
    bytes: float | int

    def seconds(self, roofline: Roofline) -> float:
        """No implementation is faster on such a device."""
        return max(self.flops / roofline.rate, self.bytes / roofline.bandwidth)


def step_ops(model: PreTrainedModel, batch: int, length: float | int, *, read: int | None = None) -> OpCount:
    """One decode step: a token for each of `batch` rows, which attends to `length` tokens, its own included.

    read: tokens of a row's cache that an implementation reads, where it reads more (a static cache: all of it).
    """
    flops = batch * (_linear_flops(model) + length * _attention_flops(model))
    cached = batch * _cache_bytes(model) * ((read if read is not None else length - 1) + 1)
    return OpCount(flops, read_bytes(model, batch) + cached)


def prefill_ops(model: PreTrainedModel, batch: int, prompt: int) -> OpCount:
    """Reading prompts into an empty cache, causally, with logits for the last token of each alone."""
    head = _flops_of(model.get_output_embeddings())
    attention = prompt * (prompt + 1) / 2 * _attention_flops(model)
    flops = batch * (prompt * (_linear_flops(model) - head) + head + attention)
    return OpCount(flops, read_bytes(model, batch * prompt) + batch * prompt * _cache_bytes(model))


def read_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of weights that a forward pass over `tokens` tokens reads: of embedding tables, only the rows looked up."""
    used = {id(module.weight) for module in _matrices(model)}  # a tied head reads its table
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    tables = {id(module.weight): module.weight for module in modules if id(module.weight) not in used}
    weights = sum(one.numel() * one.element_size() for one in model.parameters() if id(one) not in tables)
    return weights + sum(tokens * table.shape[1] * table.element_size() for table in tables.values())


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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
    return 4 * config.num_attention_heads * _head_size(config) * len(decoder_layers(model))


def _cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token of one row, in all layers.

    Raises UnsupportedModel where the cache is not made of keys and values of all tokens.
    """
    config = model.config.get_text_config(decoder=True)
    if "kv_lora_rank" in vars(config) or not hasattr(config, "num_attention_heads"):
        kind = model.config.model_type
        raise UnsupportedModel(f"the cache of a {kind} model is not made of keys and values: its bytes cannot be counted")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * _head_size(config) * len(decoder_layers(model)) * model.dtype.itemsize


def _head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def measured_roofline(
    device: torch.device, dtype: torch.dtype, *, gib: float | None = None, size: int | None = None, rounds: int = 7
) -> dict[str, Quartiles]:
    """Bytes per second of reading (`read`) and copying (`copy`, both directions counted), FLOPs per second of a matrix product.

    On random numbers: zeros may be faster. gib: memory of the buffer, far above the caches: 4 on CUDA, 0.25 elsewhere, unless
    given. size: of the square matrices, 8192 on CUDA, 1024 elsewhere, unless given.
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
    return {name: Quartiles.of(amounts[name] / seconds for seconds in times[name]) for name in calls}

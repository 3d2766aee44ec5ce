"""How fast a model could be: the least time that follows from its FLOPs and bytes.

Reading a prompt is arithmetic: every weight is used for thousands of tokens. Appending tokens is memory traffic: every weight,
and the whole key-value cache, is read for one token of every row. So the least time of either is the larger of
FLOPs / rate and bytes / bandwidth, with rate and bandwidth measured on the same device in the same run. The ratio of two limits
is what the best implementation gains by removing layers; another one may gain more, where its overhead lies in the layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn
from transformers import PreTrainedModel

from prunelib.models import UnsupportedModel, decoder_layers
from prunelib.slicing.modeling import Diagonal
from prunelib.speed.timing import interleaved


@dataclass(frozen=True)
class Roofline:
    """What a device reaches on the best of loads: bytes per second, and FLOPs per second in the dtype of the model."""

    bandwidth: float
    rate: float

    @staticmethod
    def of(rates: Mapping[str, Float64[np.ndarray, " round"]]) -> "Roofline":
        """From `measured_rates`: the faster of reading and copying, and the matrix product, in the median."""
        read, copy, matmul = (float(np.median(rates[name])) for name in ("read", "copy", "matmul"))
        return Roofline(max(read, copy), matmul)


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
    attention, cached = _attention(model)
    flops = batch * (_linear_flops(model) + length * attention)
    return OpCount(flops, read_bytes(model, batch) + batch * cached * ((read if read is not None else length - 1) + 1))


def prefill_ops(model: PreTrainedModel, batch: int, prompt: int) -> OpCount:
    """Reading prompts into an empty cache, causally, with logits for the last token of each alone."""
    attention, cached = _attention(model)
    head = 2 * model.get_output_embeddings().weight.numel()
    flops = batch * (prompt * (_linear_flops(model) - head) + head + prompt * (prompt + 1) / 2 * attention)
    return OpCount(flops, read_bytes(model, batch * prompt) + batch * prompt * cached)


def read_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of weights that a forward pass over `tokens` tokens reads: of embedding tables, only the rows looked up."""
    used = {id(module.weight) for module in _matrices(model)}  # a tied head reads its table
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    tables = {id(module.weight): module.weight for module in modules if id(module.weight) not in used}
    weights = sum(one.numel() * one.element_size() for one in model.parameters() if id(one) not in tables)
    return weights + sum(tokens * table.shape[1] * table.element_size() for table in tables.values())


def _matrices(model: nn.Module) -> list[nn.Module]:
    other = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    return [module for module in other if getattr(getattr(module, "weight", None), "ndim", 0) == 2]


def _linear_flops(model: PreTrainedModel) -> int:
    """FLOPs of one token in all linear maps, the head included."""
    diagonal = sum(module.weight.numel() for module in model.modules() if isinstance(module, Diagonal))
    return diagonal + sum(2 * module.weight.numel() for module in _matrices(model))


def _attention(model: PreTrainedModel) -> tuple[int, int]:
    """In all layers: FLOPs of one token for every token that it attends to, and bytes of keys and values of one token of a row.

    Raises UnsupportedModel where the cache is not made of keys and values of all tokens.
    """
    config, layers = model.config.get_text_config(decoder=True), len(decoder_layers(model))
    if "kv_lora_rank" in vars(config) or not hasattr(config, "num_attention_heads"):
        kind = model.config.model_type
        raise UnsupportedModel(f"the cache of a {kind} model is not made of keys and values: its bytes cannot be counted")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 4 * heads * size * layers, 2 * groups * size * layers * model.dtype.itemsize


@torch.no_grad()
def measured_rates(device: torch.device, dtype: torch.dtype, *, rounds: int = 7) -> dict[str, Float64[np.ndarray, " round"]]:
    """Bytes per second of reading (`read`) and copying (`copy`, both directions counted), FLOPs per second of a matrix product.

    On random numbers: zeros may be faster. The buffer is far above the caches: 4 GiB on CUDA, 0.25 elsewhere; the matrices are
    square, of 8192 rows on CUDA, 1024 elsewhere.
    """
    numbers, size = (2**30, 8192) if device.type == "cuda" else (2**26, 1024)
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
    return {name: amounts[name] / np.array(times) for name, times in interleaved(calls, rounds, device, warmup=2).items()}

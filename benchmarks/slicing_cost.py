"""What slicing costs: wall time and peak memory of `prunelib.slicing.rotate.slice_model`, with the floor beside it.

    python benchmarks/slicing_cost.py                                    # the shape of the main reference model, on the CPU
    python benchmarks/slicing_cost.py --shape llama-2-7b --device cuda   # 128 samples of 2048 tokens, model on the CPU

Weights and tokens are random: no time depends on them. The floor is what no implementation of the method avoids, measured in
the same run on the same device: one forward pass over the calibration windows without the head, and one eigendecomposition in
float64 of every place's moments. Published for Llama-2-7B: 44 minutes on an H100, at 1,024 samples of 2,048 tokens.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from report import write_report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prunelib.slicing import count_parameters, slice_model
from prunelib.slicing.modeling import SHORTCUTS
from prunelib.slicing.schedules import constant

# hidden size, MLP size, layers, heads, heads of keys and values, vocabulary; samples, tokens, batch
SHAPES = {
    "reference": (160, 432, 32, 5, 5, 4096, 32, 256, 8),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 128, 2048, 8),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, 128, 2048, 8),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 128, 2048, 8),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, 128, 2048, 4),
}


def random_model(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, layers: int) -> PreTrainedModel:
    """A random Llama, made on `device`, where random numbers come fast, and handed over on the CPU."""
    hidden_size, mlp, _, heads, key_value_heads, vocabulary, *_ = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval().cpu()
    finally:
        torch.set_default_dtype(torch.float32)


class Clock:
    """Seconds and peak memory between two moments, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Clock":
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.gib = peak / 2**30


@torch.no_grad()
def floor(model: PreTrainedModel, windows: torch.Tensor, batch: int, device: torch.device, places: int) -> dict[str, float]:
    """Seconds of one forward pass without the head, and of the eigendecompositions; the model must fit on the device."""
    size = model.config.hidden_size
    moments = torch.randn(size, 2 * size, dtype=torch.float64, device=device)
    moments = moments @ moments.T
    torch.linalg.eigh(moments)  # the first call sets up the library
    with Clock(device) as eigen:
        for _ in range(3):
            torch.linalg.eigh(moments)
    model = model.to(device)
    model.model(windows[:batch].to(device), use_cache=False)
    with Clock(device) as forward:
        for rows in windows.split(batch):
            model.model(rows.to(device), use_cache=False)
    model.cpu()
    return {"forward_s": forward.seconds, "eigendecompositions_s": eigen.seconds / 3 * places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="reference")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's own")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where the work is done")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 elsewhere, unless given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, which feeds a GPU")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--slice", type=float, default=0.3)
    parser.add_argument("--shortcuts", choices=SHORTCUTS, default="folded")
    parser.add_argument("--activations-on-cpu", action="store_true")
    parser.add_argument("--no-floor", action="store_true", help="for models that do not fit on the device")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    shape = SHAPES[settings.shape]
    device = settings.device
    usual = dict(zip(("samples", "tokens", "batch"), shape[-3:], strict=True))
    usual |= {"layers": shape[2], "dtype": "float32" if device.type == "cpu" else "bfloat16"}
    for name, value in usual.items():  # the file of the numbers holds what was run, not what was left out
        setattr(settings, name, getattr(settings, name) or value)

    model = random_model(shape, device, getattr(torch, settings.dtype), settings.layers)
    windows = torch.randint(0, shape[5], (settings.samples, settings.tokens))
    plan = constant(model.config.num_hidden_layers, shape[0], settings.slice, multiple=8 if shape[0] % 8 == 0 else 1)
    report = {"removed": round(count_parameters(model.config, plan, shortcuts=settings.shortcuts).removed, 4)}
    if not settings.no_floor:
        report |= floor(model, windows, settings.batch, device, 2 * model.config.num_hidden_layers)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    with Clock(device) as slicing:
        slice_model(
            model,
            plan,
            windows,
            batch_size=settings.batch,
            device=device,
            activation_device="cpu" if settings.activations_on_cpu else None,
            shortcuts=settings.shortcuts,
        )
    report |= {"slicing_s": slicing.seconds, "peak_gib": slicing.gib}
    print(json.dumps(report, indent=1))
    write_report(settings.output, settings, report)


if __name__ == "__main__":
    main()

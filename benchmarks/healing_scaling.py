"""Healing on several GPUs (or processes): the same loss as on one, and how much faster.

    python benchmarks/healing_scaling.py                                        # two processes on CPU cores, a small shape
    python benchmarks/healing_scaling.py --shape 1b --device cuda --dtype bfloat16 --batch 32 --tokens 512 --micro-batch 8 \\
        --steps 10 100                                                          # two GPUs, through NCCL

A random model of the shape is saved and healed by `python -m prunelib.healing`, once by one process and once by several, as
`torchrun` starts them (`accelerate launch` does the same), on the same tokens in the same batches. Each is run twice, for a
few steps and for more: what one step takes is the difference, so that loading and the first collective count for nothing.
The scaling is the time of a step by one process over that by several; the limit is their number. The losses of both agree on
a CPU but for rounding; over bfloat16 weights those of the first step do, and later ones drift apart. Figures of two H200s, with
LoRA of rank 8 on all linear maps: `data/benchmarks/healing_scaling.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import write_report
from transformers import LlamaConfig, LlamaForCausalLM

from prunelib import models

TOKENIZER = "data/reference/ref-llama-32l"
# hidden size, MLP size, layers, heads, heads of keys and values; the vocabulary is the tokenizer's
SHAPES = {"small": (160, 432, 6, 5, 5), "1b": (2048, 5632, 22, 32, 4), "7b": (4096, 11008, 24, 32, 32)}


def save_random_model(shape: str, device: str, folder: Path) -> int:
    """Save a random Llama of the shape with its tokenizer; return its number of parameters."""
    hidden_size, mlp, n_layers, heads, key_value_heads = SHAPES[shape]
    tokenizer = models.load_tokenizer(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    models.save(model.bfloat16().cpu(), tokenizer, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def healed(model: Path, out: Path, processes: int, steps: int, settings: argparse.Namespace) -> dict:
    """What healing.json holds after one training."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    recipe = [f"steps={steps}", f"batch={settings.batch}", f"seq_len={settings.tokens}", "warmup_steps=1", "schedule=constant"]
    arguments = [
        str(model),
        str(out),
        "--corpus",
        settings.corpus,
        "--quiet",
        "--dtype",
        settings.dtype,
        "--device",
        settings.device,
    ]
    arguments += ["--micro-batch", str(settings.micro_batch), "--set", *recipe]
    visible = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 and settings.device == "cuda" else {}
    subprocess.run([*launch, "prunelib.healing", *arguments], env=os.environ | visible, check=True)
    return json.loads((out / "healing.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(models.DTYPES), default="float32", help="of the weights in memory")
    parser.add_argument("--corpus", default="pydocs")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, over all processes")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows that a process takes at once")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--steps", type=int, nargs=2, default=[4, 12], metavar=("FEW", "MORE"))
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    settings = parser.parse_args()
    few, more = settings.steps

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = save_random_model(settings.shape, settings.device, folder / "model")
        found = {
            (processes, steps): healed(folder / "model", folder / f"{processes}_{steps}", processes, steps, settings)
            for steps in (few, more)
            for processes in (1, settings.processes)
        }
    step = {
        processes: (found[processes, more]["seconds"] - found[processes, few]["seconds"]) / (more - few)
        for processes in (1, settings.processes)
    }
    losses = {
        processes: [entry["loss"] for entry in found[processes, more]["log"] if "loss" in entry]
        for processes in (1, settings.processes)
    }
    report = {
        "parameters": parameters,
        "trained": found[1, more]["trainable"],
        "backend": "nccl" if settings.device == "cuda" else "gloo",
        "tokens_a_step": settings.batch * settings.tokens,
        "seconds_a_step_one": step[1],
        "seconds_a_step_several": step[settings.processes],
        "scaling": step[1] / step[settings.processes],
        "largest_relative_loss_difference": max(
            abs(a / b - 1) for a, b in zip(losses[settings.processes], losses[1], strict=True)
        ),
        "losses_one": losses[1],
        "losses_several": losses[settings.processes],
    }
    print(json.dumps(report, indent=1))
    write_report(settings.output, settings, report, data=found[1, more]["data"])


if __name__ == "__main__":
    main()

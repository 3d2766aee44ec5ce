"""Healing on several GPUs (or processes): the same loss as on one, and how much faster.

    python benchmarks/healing_scaling.py                      # two processes on CPU cores, the shape of the reference model
    python benchmarks/healing_scaling.py --shape tinyllama-1.1b --device cuda --dtype bfloat16 --batch 32 --tokens 512 \\
        --micro-batch 8 --steps 10 100                        # two GPUs, through NCCL

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

from report import options, write_report

from prunelib import models
from prunelib.speed.shapes import random_model, shape_configuration

TOKENIZER = "data/reference/ref-llama-32l"


def healed(model: Path, out: Path, processes: int, steps: int, settings: argparse.Namespace) -> dict:
    """What healing.json holds after one training."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    recipe = [f"steps={steps}", f"batch={settings.batch}", f"seq_len={settings.tokens}", "warmup_steps=1", "schedule=constant"]
    arguments = [str(model), str(out), "--quiet"]
    for name in ("corpus", "dtype", "device", "micro_batch"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    arguments += ["--set", *recipe]
    visible = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 and settings.device == "cuda" else {}
    subprocess.run([*launch, "prunelib.healing", *arguments], env=os.environ | visible, check=True)
    return json.loads((out / "healing.json").read_text())


def main() -> None:
    sizes = {"processes": 2, "batch": 8, "micro_batch": 4, "tokens": 128}
    parser = options(__doc__, shape="ref-llama-32l", device="cpu", dtype="float32", corpus="pydocs", **sizes)
    parser.add_argument("--steps", type=int, nargs=2, default=[4, 12], metavar=("FEW", "MORE"))
    settings = parser.parse_args()
    (few, more), several = settings.steps, settings.processes

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = models.load_tokenizer(TOKENIZER)
        config = shape_configuration(settings.shape, vocab_size=len(tokenizer))
        model = random_model(config, dtype="bfloat16", device=settings.device)
        models.save(model.cpu(), tokenizer, folder / "model")
        found = {
            (processes, steps): healed(folder / "model", folder / f"{processes}_{steps}", processes, steps, settings)
            for steps in (few, more)
            for processes in (1, several)
        }
    seconds = {key: one["seconds"] for key, one in found.items()}
    step, steps = ((seconds[number, more] - seconds[number, few]) / (more - few) for number in (1, several))
    alone, together = ([entry["loss"] for entry in found[number, more]["log"]] for number in (1, several))
    report = {
        "parameters": models.parameter_count(model),
        "trained": found[1, more]["trainable"],
        "backend": "nccl" if settings.device == "cuda" else "gloo",
        "tokens_a_step": settings.batch * settings.tokens,
        "seconds_a_step_one": step,
        "seconds_a_step_several": steps,
        "scaling": step / steps,
        "largest_relative_loss_difference": max(abs(a / b - 1) for a, b in zip(together, alone, strict=True)),
        "losses_one": alone,
        "losses_several": together,
    }
    print(json.dumps(report, indent=1))
    write_report(settings.output, settings, report, data=found[1, more]["data"])


if __name__ == "__main__":
    main()

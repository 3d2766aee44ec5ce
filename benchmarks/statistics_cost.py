"""What the layer statistics cost: `prunelib.criteria.statistics.collect` against a plain forward pass, in one run.

    python benchmarks/statistics_cost.py                          # random weights in the shape of the main reference model
    python benchmarks/statistics_cost.py --model data/reference/<name>
    python benchmarks/statistics_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --samples 8 --seq-len 2048

Every repetition times the plain forward pass of the whole model, the forward pass without the LM head (which `collect` does not
run), `collect` itself and `collect` without the Triton kernel (where there is one), in turn. Printed are the medians and the
medians of the ratios within a repetition. The target is at most 1.03 times the plain forward pass on a GPU, 1.10 on a CPU. On a
busy machine only the CPU time with --threads 1 means anything: waiting threads count as busy ones.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from report import options, write_report

import prunelib.criteria.statistics
from prunelib.criteria.statistics import LayerStats, collect
from prunelib.models import load
from prunelib.speed.shapes import random_model, shape_configuration
from prunelib.speed.timing import interleaved


def largest_differences(found: LayerStats, expected: LayerStats) -> dict[str, float]:
    """Largest relative difference of any sum, by name; of the pairs those of different states."""
    upper = (slice(None), *np.triu_indices(found.n_layers + 1, 1))
    pairs = {"cosine": upper, "angle": upper}
    return {
        name: float(abs(getattr(found, name)[pairs.get(name, ...)] / getattr(expected, name)[pairs.get(name, ...)] - 1).max())
        for name in ("cosine", "angle", "squared_difference", "absolute_difference", "relative_magnitude", "norm")
    }


def main() -> None:
    sizes = {"samples": 16, "seq_len": 256, "batch_size": 8, "repeats": 15}
    parser = options(__doc__, shape="ref-llama-32l", device="cpu", dtype="float32", threads=2, **sizes)
    parser.add_argument("--model", help="folder or hub name of a model; random weights of the shape if left out")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    if args.model:
        model = load(args.model, dtype=args.dtype, device=args.device)
    else:
        model = random_model(shape_configuration(args.shape), dtype=args.dtype, device=args.device)
    windows = torch.randint(0, model.config.vocab_size, (args.samples, args.seq_len))

    @torch.inference_mode()
    def forward(module: torch.nn.Module) -> None:
        for batch in windows.split(args.batch_size):
            module(batch.to(args.device), use_cache=False)

    def ours() -> LayerStats:
        return collect(model, windows, batch_size=args.batch_size, progress=False)

    def plain() -> LayerStats:
        with mock.patch.object(prunelib.criteria.statistics, "_fused", lambda device: None):
            return ours()

    timed = {
        "forward": lambda: forward(model),
        "forward without LM head": lambda: forward(model.base_model),
        "collect": ours,
    }
    differences = None
    if cuda:
        timed["collect without kernel"] = plain
        differences = largest_differences(ours(), plain())
    cpu_seconds = {name: [] for name in timed}

    def with_cpu_time(name: str) -> Callable[[], None]:
        def run() -> None:
            started = time.process_time()
            timed[name]()
            cpu_seconds[name].append(time.process_time() - started)

        return run

    seconds = interleaved({name: with_cpu_time(name) for name in timed}, args.repeats, torch.device(args.device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_medians = {name: statistics.median(values[1:]) for name, values in cpu_seconds.items()}  # the first round warms up
    for name, median in medians.items():
        each = median / windows.numel() * 1e6
        print(f"{name:24s} {median:8.4f} s  {each:8.1f} us/token  cpu {cpu_medians[name]:.3f} s")
    ratios = {}
    for name, base in itertools.product(timed, ("forward", "forward without LM head")):
        if not name.startswith("forward"):
            pairs = zip(seconds[name], seconds[base], strict=True)
            ratios[f"{name} / {base}"] = ratio = statistics.median(mine / plain for mine, plain in pairs)
            cpu = cpu_medians[name] / cpu_medians[base]
            print(f"{name:24s} / {base:24s} median ratio {ratio:.3f}  of cpu {cpu:.3f}")
    if differences is not None:
        print("largest relative difference with and without the kernel:", differences)
    write_report(args.output, args, {"seconds": medians, "ratios": ratios, "relative_differences": differences})


if __name__ == "__main__":
    main()

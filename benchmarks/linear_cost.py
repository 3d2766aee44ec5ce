"""What `prunelib.models.onednn` saves: matrix products of linear layers, and a forward pass, with it and without.

    python benchmarks/linear_cost.py --output data/benchmarks/linear_cpu.json

Float32 on a processor. The shapes are the linear layers of both reference models, the rows those of a batch of the reference
profile (8 windows of 256 tokens); then one forward pass of such a batch by each model. With and without are timed in turn, so
that a slow moment of the machine meets both; the ratio is the median over the rounds of `nn.Linear` over `OneDnnLinear`.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from report import options, write_report
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prunelib.io import at_root
from prunelib.models import onednn
from prunelib.speed.timing import interleaved

MODELS = ("data/reference/ref-llama-32l", "data/reference/ref-neox-24l")


def compared(usual: Callable[[], object], ours: Callable[[], object], rounds: int, each: int = 1) -> dict[str, float]:
    """Medians of the seconds, each call `each` times in a row, and the ratio of both in the median and at its ends."""

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(each)]

    seconds = interleaved({"usual": repeated(usual), "onednn": repeated(ours)}, rounds, torch.device("cpu"))
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    medians = {f"{name}_seconds": statistics.median(values) / each for name, values in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


@torch.inference_mode()
def main() -> None:
    parser = options(__doc__, threads=1, windows=8, seq_len=256, rounds=15)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    products, passes = [], []
    for name in MODELS:
        config = AutoConfig.from_pretrained(at_root(name))
        usual = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        ours = onednn.use_onednn(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        shapes = {tuple(one.weight.shape) for one in usual.modules() if type(one) is nn.Linear}
        for outputs, inputs in sorted(shapes):
            plain = nn.Linear(inputs, outputs, bias=False)
            fast = onednn.use_onednn(nn.Sequential(nn.Linear(inputs, outputs, bias=False)))[0]
            rows = torch.randn(args.windows * args.seq_len, inputs)
            found = compared(lambda: plain(rows), lambda: fast(rows), args.rounds, each=20)  # noqa: B023
            products.append({"model": Path(name).name, "inputs": inputs, "outputs": outputs, **found})
        ids = torch.randint(0, config.vocab_size, (args.windows, args.seq_len))
        found = compared(lambda: usual(ids, use_cache=False), lambda: ours(ids, use_cache=False), args.rounds)  # noqa: B023
        passes.append({"model": Path(name).name, **found})
    for one in [*products, *passes]:
        what = f"{one['inputs']} x {one['outputs']}" if "inputs" in one else "forward pass"
        usual, ours = (f"{one[name] * 1e3:8.2f} ms" for name in ("usual_seconds", "onednn_seconds"))
        spread = f"{one['ratio']:.2f} ({one['least']:.2f} to {one['greatest']:.2f})"
        print(f"{one['model']:8s} {what:14s} {usual}, oneDNN {ours}: {spread}")
    write_report(args.output, args, {"products": products, "forward_passes": passes})


if __name__ == "__main__":
    main()

"""What a greedy search costs: the loop that runs every candidate by itself, and `prunelib.depth.greedy`, in one run.

    python benchmarks/search_cost.py                                  # random weights, the shape of the main reference model
    python benchmarks/search_cost.py --model data/reference/ref-llama-32l   # those of a model, on windows of its text
    python benchmarks/search_cost.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --windows 4 --seq-len 512

Both run from the dense model to K removed layers (SLEB: 32 layers and K = 8 take 212 evaluations), after a warm-up of each.
"naive" runs all layers of every candidate, with the others taken out of the list as SLEB's code does; "nll" and "kl" run the
layers that candidates have in common once, which about halves them. Printed are seconds, the ratio to the first variant, and
layer forwards in units of the whole calibration set. On a machine that is busy with other work compare the counts.
"""

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Int64
from report import measured, options, write_report
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from prunelib import models
from prunelib.depth import LayerSet, LayerSetLoss, greedy
from prunelib.evaluation import perplexity
from prunelib.speed.shapes import random_model, shape_configuration
from prunelib.text import corpora
from prunelib.text.windows import sample_windows


def naive(
    model: LlamaForCausalLM, layers_removed: int, windows: Int64[Tensor, "window position"], batch_size: int
) -> tuple[LayerSet, int]:
    """The removed layers and the layer forwards of SLEB's loop, which keeps the first and the last layer."""
    layers = list(models.decoder_layers(model))
    removed, forwards = (), 0
    for _ in range(layers_removed):
        best = (math.inf, removed)
        for layer in range(1, len(layers) - 1):
            if layer not in removed:
                candidate = tuple(sorted((*removed, layer)))
                model.model.layers = nn.ModuleList(one for index, one in enumerate(layers) if index not in candidate).eval()
                best = min(best, (perplexity(model, windows, batch_size=batch_size).nll, candidate))
                forwards += len(layers) - len(candidate)
        removed = best[1]
    model.model.layers = nn.ModuleList(layers).eval()
    return removed, forwards


def main() -> None:
    sizes = {"layers_removed": 8, "windows": 8, "seq_len": 128, "batch_size": 1}
    parser = options(__doc__, shape="ref-llama-32l", device="cpu", dtype="float32", threads=1, corpus="pydocs", **sizes)
    parser.add_argument("--model", help="folder or hub name of a model; random weights of the shape if left out")
    parser.add_argument("--only", nargs="+", help="some of the variants")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    count, length = args.windows, args.seq_len
    if args.model:
        model = models.load(args.model, dtype=args.dtype, device=args.device)
        text = corpora.load(args.corpus, "calibration")
        windows = sample_windows(text, models.load_tokenizer(args.model), count, length, seed=0, progress=False)
    else:
        model = random_model(shape_configuration(args.shape), dtype=args.dtype, device=args.device)
        windows = torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    n_layers = len(models.decoder_layers(model))

    def ours(metric: str) -> Callable[[int], tuple[LayerSet, int]]:
        def search(layers_removed: int) -> tuple[LayerSet, int]:
            loss = LayerSetLoss(model, windows, metric, batch_size=args.batch_size)
            return greedy(n_layers, layers_removed, loss, progress=False).removed, loss.layer_windows // len(windows)

        return search

    def plain(layers_removed: int) -> tuple[LayerSet, int]:
        return naive(model, layers_removed, windows, args.batch_size)

    variants = {"naive": plain, "nll": ours("nll"), "kl": ours("kl")}
    found, device = [], torch.device(args.device)
    for name in args.only or variants:
        variants[name](1)  # warm-up: kernels are chosen, memory is taken
        cpu_started = time.process_time()
        (removed, forwards), cost = measured(device, lambda: variants[name](args.layers_removed))  # noqa: B023
        cpu, seconds = time.process_time() - cpu_started, cost["seconds"]
        found.append({"variant": name, "seconds": seconds, "cpu_seconds": cpu, "layer_forwards": forwards, "removed": removed})
        gain, share = found[0]["seconds"] / seconds, forwards / found[0]["layer_forwards"]
        print(f"{name:6s} {seconds:8.2f} s, speed-up {gain:.2f}; {forwards} layer forwards, {share:.3f} of them; {removed}")
    write_report(args.output, args, {"variants": found})


if __name__ == "__main__":
    main()

"""What the layer statistics cost: `prunelib.statistics.collect` against a plain forward pass, in one run.

    python benchmarks/statistics_cost.py                          # random weights in the shape of the main reference model
    python benchmarks/statistics_cost.py --model data/reference/<name>

Every repetition times the plain forward pass of the whole model, the forward pass without the LM head (which `collect`
does not run) and `collect` itself, in turn, so that a machine that slows down slows all three. Printed are the medians and
the medians of the ratios within a repetition. The target is at most 1.10 times the plain forward pass. On a machine that is
busy with other work only the CPU time with --threads 1 means anything: waiting threads count as busy ones.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prunelib.models import load
from prunelib.statistics import collect


def reference_shape() -> PreTrainedModel:
    """Random weights in the shape of the main reference model: 32 layers of width 160."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=32,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a model; random weights if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = load(args.model, dtype=args.dtype, device=args.device) if args.model else reference_shape()
    model = model.to(args.device, getattr(torch, args.dtype))
    windows = torch.randint(0, model.config.vocab_size, (args.samples, args.seq_len))

    @torch.inference_mode()
    def forward(module: torch.nn.Module) -> None:
        for batch in windows.split(args.batch_size):
            module(batch.to(args.device), use_cache=False)

    timed = {
        "forward": lambda: forward(model),
        "forward without LM head": lambda: forward(model.base_model),
        "collect": lambda: collect(model, windows, batch_size=args.batch_size, progress=False),
    }
    seconds = {name: [] for name in timed}
    cpu_seconds = {name: [] for name in timed}
    for repeat in range(args.repeats + 1):
        for name, run in timed.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)

    tokens = windows.numel()
    print(
        f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}, {args.dtype} on {args.device}, "
        f"{args.threads} threads, {args.samples} x {args.seq_len} tokens, batch {args.batch_size}, {args.repeats} repetitions"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:24s} {median:8.3f} s  {median / tokens * 1e6:8.1f} us/token  fastest {min(values):.3f} s  "
            f"cpu {statistics.median(cpu_seconds[name]):.3f} s"
        )
    for name in ("forward", "forward without LM head"):
        ratios = [ours / plain for ours, plain in zip(seconds["collect"], seconds[name], strict=True)]
        fastest = min(seconds["collect"]) / min(seconds[name])
        cpu = statistics.median(cpu_seconds["collect"]) / statistics.median(cpu_seconds[name])
        print(f"collect / {name:24s} median ratio {statistics.median(ratios):.3f}  of fastest {fastest:.3f}  of cpu {cpu:.3f}")


if __name__ == "__main__":
    main()

"""What streaming costs: statistics and perplexity of `prunelib.scale.offload` against the resident model, in one run.

    python benchmarks/streaming_cost.py --make build/model --shape llama-3-8b --device cuda      # a random checkpoint
    python benchmarks/streaming_cost.py build/model --device cuda --dtype bfloat16 --device-limit 4
    python benchmarks/streaming_cost.py build/model --device cpu --dtype bfloat16 --host-limit 6 --samples 2 --only streamed

Times are of the passes: the resident model is loaded before its clock starts (its loading is reported), the streamed one reads
its weights while the clock runs. On a GPU both run once on a few windows first. Printed are times, ratios, planned and measured
peaks, and the largest differences of the results. Limits are in GiB; on a GPU the allocator is held to the limit. The paper's
calibration set has 512 samples of 2048 tokens. Peaks on a CPU are those of the whole process: use --only for them.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import write_report
from slicing_cost import SHAPES
from statistics_cost import largest_differences, random_model

from prunelib import evaluation, models
from prunelib.criteria import statistics
from prunelib.scale import offload as streaming

GIB = 2**30


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of the allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measured(device: torch.device, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a pass, its seconds and the peak of memory in GiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, {"seconds": time.perf_counter() - started, "peak_gib": peak_bytes(device) / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the checkpoint")
    parser.add_argument("--make", type=Path, help="write a random checkpoint of --shape to this folder, and stop")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, which feeds a GPU")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--perplexity-windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--resident-batch-size", type=int, default=8)
    parser.add_argument("--windows-at-once", type=int)
    parser.add_argument("--device-limit", type=float)
    parser.add_argument("--host-limit", type=float)
    parser.add_argument("--only", choices=("resident", "streamed"))
    parser.add_argument("--output", type=Path, help="JSON file of the report")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.make is not None:
        random_model(args.shape, str(args.device), getattr(torch, args.dtype)).save_pretrained(args.make, max_shard_size="4GB")
        return

    device = args.device
    torch.manual_seed(0)
    vocabulary = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    windows = torch.randint(0, vocabulary, (max(args.samples, args.perplexity_windows), args.seq_len))
    calibration, scored = windows[: args.samples], windows[: args.perplexity_windows]
    report: dict[str, Any] = {}
    results: dict[str, list[Any]] = {"statistics": [], "perplexity": []}

    if args.only != "streamed":
        started = time.perf_counter()
        model = models.load(args.folder, dtype=args.dtype, device=device)
        report["resident_load_seconds"] = time.perf_counter() - started
        batch = {"batch_size": args.resident_batch_size}
        passes = {
            "statistics": lambda windows: statistics.collect(model, windows, **batch, progress=False),
            "perplexity": lambda windows: evaluation.perplexity(model, windows, batch_size=1),
        }
        for name, given in (("statistics", calibration), ("perplexity", scored)):
            if len(given):
                if device.type == "cuda":
                    passes[name](given[: args.resident_batch_size])
                result, report[f"resident_{name}"] = measured(device, lambda: passes[name](given))  # noqa: B023
                results[name].append(result)
                print(f"resident {name}: {report[f'resident_{name}']}", flush=True)
        model = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    if args.only != "resident":
        if device.type == "cuda" and args.device_limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.device_limit * GIB / total)
        limits = {
            name: int(value * GIB)
            for name, value in (("device_limit", args.device_limit), ("host_limit", args.host_limit))
            if value is not None
        }
        started = time.perf_counter()
        streamed = streaming.OffloadedModel(args.folder, dtype=args.dtype, device=device, **limits)
        report["streamed_open_seconds"] = time.perf_counter() - started
        batch = {"batch_size": args.batch_size, "windows_at_once": args.windows_at_once, "progress": False}
        passes = {
            "statistics": lambda windows: streaming.collect(streamed, windows, **batch),
            "perplexity": lambda windows: streaming.perplexity(streamed, windows, **batch),
        }
        for name, given, kind in (("statistics", calibration, {"states": True}), ("perplexity", scored, {})):
            if len(given):
                setting = {"batch_size": args.batch_size, "windows_at_once": args.windows_at_once}
                at_once, peak = streamed.plan(*given.shape, **setting, **kind)
                print(f"{name}: {at_once} windows at once; {peak.describe()}", flush=True)
                if device.type == "cuda":
                    passes[name](given[:at_once])
                result, found = measured(device, lambda: passes[name](given))  # noqa: B023
                planned = peak.device if device.type == "cuda" else peak.host
                report[f"streamed_{name}"] = found | {"planned_peak_gib": planned / GIB, "windows_at_once": at_once}
                results[name].append(result)
                print(f"streamed {name}: {report[f'streamed_{name}']}", flush=True)

    for name, found in results.items():
        if len(found) == 2:
            resident, streamed_ = found
            report[f"ratio_{name}"] = report[f"streamed_{name}"]["seconds"] / report[f"resident_{name}"]["seconds"]
            if name == "statistics":
                report["largest_relative_differences"] = largest_differences(streamed_, resident)
            else:
                report["nats_resident"], report["nats_streamed"] = resident.nll, streamed_.nll
    print(json.dumps(report, indent=1))
    write_report(args.output, args, report, without=("make", "shape"))  # the shape is that of the checkpoint


if __name__ == "__main__":
    main()

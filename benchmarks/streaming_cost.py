"""What streaming costs: statistics and perplexity of `prunelib.scale.offload` against the resident model, in one run.

    python benchmarks/streaming_cost.py --make build/model --shape llama-3.1-8b --device cuda      # a random checkpoint
    python benchmarks/streaming_cost.py build/model --device cuda --dtype bfloat16 --device-limit 4 --windows-at-once 32

Times are of the passes: the resident model is loaded before its clock starts, the streamed one reads its weights while the
clock runs. On a GPU both run once on a few windows first, and the allocator is held to the limit, in GiB. The paper's
calibration set has 512 samples of 2048 tokens. Peaks on a CPU are those of the whole process, both models included.
"""

import json
from pathlib import Path
from typing import Any

import torch
from report import measured, options, write_report
from statistics_cost import largest_differences

from prunelib import evaluation, models
from prunelib.criteria import statistics
from prunelib.scale import offload
from prunelib.speed.shapes import random_model, shape_configuration

GIB = 2**30


def main() -> None:
    machine = {"device": torch.device("cpu"), "dtype": "bfloat16", "threads": torch.get_num_threads()}
    sizes = {"samples": 512, "perplexity_windows": 64, "seq_len": 2048, "batch_size": 4, "resident_batch_size": 8}
    parser = options(__doc__, shape="llama-3.1-8b", **machine, **sizes)
    parser.add_argument("folder", type=Path, nargs="?", help="of the checkpoint")
    parser.add_argument("--make", type=Path, help="write a random checkpoint of --shape to this folder, and stop")
    parser.add_argument("--windows-at-once", type=int)
    parser.add_argument("--device-limit", type=float)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, cuda = args.device, args.device.type == "cuda"
    if args.make is not None:
        model = random_model(shape_configuration(args.shape), dtype=args.dtype, device=device)
        model.save_pretrained(args.make, max_shard_size="4GB")
        return

    torch.manual_seed(0)
    vocabulary = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    windows = torch.randint(0, vocabulary, (max(args.samples, args.perplexity_windows), args.seq_len))
    given = {"statistics": windows[: args.samples], "perplexity": windows[: args.perplexity_windows]}
    report: dict[str, Any] = {}
    results: dict[str, list[Any]] = {name: [] for name in given}

    model = models.load(args.folder, dtype=args.dtype, device=device)
    resident = {
        "statistics": lambda some: statistics.collect(model, some, batch_size=args.resident_batch_size, progress=False),
        "perplexity": lambda some: evaluation.perplexity(model, some, batch_size=1),
    }
    for name, run in resident.items():
        if cuda:
            run(given[name][: args.resident_batch_size])
        result, report[f"resident_{name}"] = measured(device, lambda: run(given[name]))  # noqa: B023
        results[name].append(result)
    model = None
    if cuda:
        torch.cuda.empty_cache()
        if args.device_limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.device_limit * GIB / total)

    limit = None if args.device_limit is None else int(args.device_limit * GIB)
    streamed = offload.OffloadedModel(args.folder, dtype=args.dtype, device=device)
    streamed.device_limit = limit
    for name, run in (("statistics", offload.collect), ("perplexity", offload.perplexity)):
        setting = {"batch_size": args.batch_size, "windows_at_once": args.windows_at_once}
        at_once, peak = streamed.plan(*given[name].shape, **setting, states=name == "statistics")
        print(f"{name}: {at_once} windows at once; {peak.describe()}", flush=True)
        if cuda:
            run(streamed, given[name][:at_once], **setting, progress=False)
        result, found = measured(device, lambda: run(streamed, given[name], **setting, progress=False))  # noqa: B023
        planned = peak.device if cuda else peak.host
        report[f"streamed_{name}"] = found | {"planned_peak_gib": planned / GIB, "windows_at_once": at_once}
        report[f"ratio_{name}"] = found["seconds"] / report[f"resident_{name}"]["seconds"]
        results[name].append(result)
    report["largest_relative_differences"] = largest_differences(*reversed(results["statistics"]))
    report["nll_resident"], report["nll_streamed"] = (found.nll for found in results["perplexity"])
    print(json.dumps(report, indent=1))
    write_report(args.output, args, report, without=("make", "shape"))  # the shape is that of the checkpoint


if __name__ == "__main__":
    main()

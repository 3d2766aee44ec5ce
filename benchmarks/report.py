"""What benchmarks share: a clock, and the form of their files: settings, numbers, and what made them."""

import argparse
import resource
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from prunelib.io import write_json
from prunelib.lab.provenance import record


def measured(device: torch.device, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a call, its seconds, and the peak of memory in GiB: of its allocations on a GPU, else of the process."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result, {"seconds": seconds, "peak_gib": peak / 2**30}


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with an option for each of these, of the type of its default, and --output."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    return parser


def write_report(
    output: Path | None,
    given: argparse.Namespace,
    numbers: Mapping[str, Any],
    *,
    without: Collection[str] = (),
    data: Mapping[str, str] | None = None,
) -> None:
    """Write `output`, unless it is None: ``{"settings": …, **numbers, "provenance": …}``.

    Settings are the arguments of the command line but for `output` and those in `without`; what is no plain data stands there
    as the text that was given. `data` maps each corpus to its sha256. Raises what `write_json` raises.
    """
    if output is None:
        return
    settings = {
        name: value if isinstance(value, bool | int | float | str | list | None) else str(value)
        for name, value in vars(given).items()
        if name not in ("output", *without)
    }
    write_json(output, {"settings": settings, **numbers, "provenance": record(device=str(given.device), data=data)})

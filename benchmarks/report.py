"""The file of a benchmark, in one form for all: its settings, its numbers, and what made them."""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from prunelib.io import write_json
from prunelib.lab.provenance import record


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

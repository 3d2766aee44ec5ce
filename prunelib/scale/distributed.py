"""Layer statistics on several processes, each with a copy of the model: the same sums, bit for bit, as on one.

Any run of the statistics notebook is shared by as many processes as are started for it, on one machine or several:

    accelerate launch --multi_gpu --num_processes 4 -m prunelib.lab.run_notebook NOTEBOOK OUT.json …

Every process draws the same windows and passes its share of the batches through its model; then all of them add up the sums of
all batches in their order. The first writes the result.
"""

import os
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Float64, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.criteria import statistics
from prunelib.criteria.statistics import LayerStats
from prunelib.text.windows import windows_sha256

_ARRAYS = tuple(field.name for field in fields(LayerStats) if field.name != "hidden_size")


def collect(
    model: PreTrainedModel,
    windows: Int[Tensor, "sample token"],
    *,
    mask: Shaped[Tensor, "_ _"] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerStats:
    """`statistics.collect`, shared by the processes that ``accelerate launch`` or ``torchrun`` started; each returns all sums.

    Raises as that function, ValueError when there are fewer batches than processes, and RuntimeError when the processes were
    given different windows.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1 or windows.numel() == 0 or batch_size < 1:
        return statistics.collect(model, windows, mask=mask, batch_size=batch_size, progress=progress)
    starts = range(0, len(windows), batch_size)
    if len(starts) < n_processes:
        most = max(1, len(windows) // n_processes)
        raise ValueError(
            f"{len(windows)} windows make {len(starts)} batches of {batch_size}, too few for {n_processes} processes: take "
            f"batch_size={most} or smaller, or fewer processes"
        )
    from accelerate import PartialState
    from accelerate.utils import gather

    state = PartialState(cpu=model.device.type == "cpu")  # which else sees only processes on GPUs
    mark = torch.tensor([int(windows_sha256(windows)[:15], 16)], device=state.device)
    if len(gather(mark).unique()) > 1:
        raise RuntimeError("the processes calibrate on different windows: give all of them the same text, sizes and seed")

    found = []
    mine = starts[state.process_index :: n_processes]
    for start in tqdm(mine, desc="layer statistics", unit="batch", disable=not progress or state.process_index > 0):
        part = slice(start, min(start + batch_size, len(windows)))
        try:
            found.append(
                statistics.collect(
                    model,
                    windows[part],
                    mask=None if mask is None else mask[part],
                    batch_size=batch_size,
                    progress=False,
                )
            )
        except RuntimeError as error:
            raise RuntimeError(f"samples {part.start} to {part.stop - 1} of the windows, as batch 0: {error}") from error
    rows = torch.stack([torch.from_numpy(_row(stats)) for stats in found])
    most = -(-len(starts) // n_processes)
    # Gathering wants equal shapes; the missing last row of some processes is cut off again below.
    padded = torch.nn.functional.pad(rows, (0, 0, 0, most - len(rows))).to(state.device)
    every = gather(padded).view(n_processes, most, -1).transpose(0, 1).flatten(0, 1)[: len(starts)]
    return _added([_from_row(row, found[0]) for row in every.cpu().numpy()])


def _added(parts: Sequence[LayerStats]) -> LayerStats:
    """The sum in this order, as one process adds up its batches."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _row(stats: LayerStats) -> Float64[np.ndarray, " number"]:
    return np.concatenate([getattr(stats, name).ravel() for name in _ARRAYS])


def _from_row(row: Float64[np.ndarray, " number"], like: LayerStats) -> LayerStats:
    """What `_row` made of statistics of the shape of `like`."""
    shapes = [getattr(like, name).shape for name in _ARRAYS]
    pieces = np.split(row, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    return LayerStats(
        like.hidden_size, **{name: piece.reshape(shape) for name, piece, shape in zip(_ARRAYS, pieces, shapes, strict=True)}
    )

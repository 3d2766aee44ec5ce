"""Layer statistics on several processes, each with a copy of the model: the same sums, bit for bit, as on one.

Any run of the statistics notebook is shared by as many processes as are started for it, on one machine or several:

    accelerate launch --multi_gpu --num_processes 4 -m prunelib.lab.run_notebook NOTEBOOK OUT.json …

Every process draws the same windows and passes its share of the batches through its model; then all of them add up the sums of
all batches in their order. The first writes the result.
"""

import functools
import operator
import os

from jaxtyping import Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.criteria import statistics
from prunelib.criteria.statistics import LayerStats
from prunelib.text.windows import windows_sha256


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
    from accelerate.utils import gather_object

    state = PartialState(cpu=model.device.type == "cpu")  # which else sees only processes on GPUs
    if len(set(gather_object([windows_sha256(windows)]))) > 1:
        raise RuntimeError("the processes calibrate on different windows: give all of them the same text, sizes and seed")

    found = []
    mine = starts[state.process_index :: n_processes]
    for start in tqdm(mine, desc="layer statistics", unit="batch", disable=not progress or state.process_index > 0):
        part = slice(start, start + batch_size)
        masked = None if mask is None else mask[part]
        try:
            sums = statistics.collect(model, windows[part], mask=masked, batch_size=batch_size, progress=False)
        except RuntimeError as error:
            last = min(part.stop, len(windows)) - 1
            raise RuntimeError(f"samples {start} to {last} of the windows, as batch 0: {error}") from error
        found.append((start, sums))
    every = dict(gather_object(found))
    return functools.reduce(operator.add, (every[start] for start in starts))  # in the order of one process

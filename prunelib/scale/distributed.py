"""Layer statistics on several processes, each with a copy of the model: the same sums, bit for bit, as on one.

Any run of the statistics notebook is shared by as many processes as are started for it, on one machine or several:

    accelerate launch --multi_gpu --num_processes 4 -m prunelib.lab.run_notebook NOTEBOOK OUT.json …

Every process draws the same windows and passes its share of the batches through its model; then all of them add up the sums of
all batches in their order. The first writes the result.
"""

import functools
import operator
import os
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from prunelib.criteria import statistics
from prunelib.criteria.statistics import LayerStats
from prunelib.models import memory
from prunelib.text.windows import windows_sha256


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
def collect(model: PreTrainedModel, windows: Int[Tensor, "sample token"], *, batch_size: int = 8, **options: Any) -> LayerStats:
    """`statistics.collect`, shared by the processes that ``accelerate launch`` or ``torchrun`` started; each returns all sums.

    Raises as that function, ValueError when there are fewer batches than processes, and RuntimeError when the processes were
    given different windows.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1 or batch_size < 1:
        return statistics.collect(model, windows, batch_size=batch_size, **options)
    n_batches = -(-len(windows) // batch_size)
    if n_batches < n_processes:
        most = max(1, len(windows) // n_processes)
        raise ValueError(
            f"{len(windows)} windows make {n_batches} batches of {batch_size}, too few for {n_processes} processes: take "
            f"batch_size={most} or smaller, or fewer processes"
        )
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=model.device.type == "cpu")  # which else sees only processes on GPUs
    if len(set(gather_object([windows_sha256(windows)]))) > 1:
        raise RuntimeError("the processes calibrate on different windows: give all of them the same text, sizes and seed")
    if state.process_index > 0:
        options["progress"] = False
    share = slice(state.process_index, None, n_processes)
    sums = statistics.batch_sums(model, windows, batch_size=batch_size, share=share, **options)
    found = dict(gather_object(list(zip(range(n_batches)[share], sums, strict=True))))
    return functools.reduce(operator.add, (found[batch] for batch in range(n_batches)))  # in the order of one process

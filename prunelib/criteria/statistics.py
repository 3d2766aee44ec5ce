"""One streamed forward pass over calibration windows, reduced to sums: everything the layer criteria need.

The L decoder layers of a model have L + 1 hidden states: state i is the input of layer i and state L is the output of the
last layer *before* the final norm (``output_hidden_states`` reports it after the norm, which distorts every distance to it).
All sums run over tokens, in float64, for every pair of states at once, so block influence, angular distance of any block,
MSSD, MASD (with or without division by the width) and relative magnitude all follow from a single pass.
"""

import functools
import json
import operator
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import ModuleType

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.io import found as input_path
from prunelib.io import replacing
from prunelib.models import UnsupportedModel, memory
from prunelib.models.architectures import SLICED_MODEL_TYPE
from prunelib.models.layerwise import LayerwiseModel

SUBSETS = ("all", "without_first", "last")
"""Axis 0 of every array of `LayerStats`: all real tokens; all but the first real token of each sample (which often carries
massive activations); only the last real token of each sample (the one Gromov et al. use)."""

# Working memory of the reduction, per device type. On a CPU a chunk must stay in cache: 64 tokens of 33 states of width 160.
# On a GPU it must be large enough to hide the launches.
_CHUNK_BYTES = {"cpu": 5 << 19, "cuda": 256 << 20}
_PIECE = 256  # tokens that an accelerator adds up one after the other


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Sums over tokens of what happens between the L + 1 hidden states of a model; axis 0 of every array is `SUBSETS`.

    hidden_size: width D of the states, so that sums over D can be turned into means.
    count: number of tokens summed over.
    cosine: sum of cos(h_i, h_j); symmetric, the diagonal equals `count`. The cosine with a zero vector counts as 0.
    angle: sum of arccos(cos(h_i, h_j)) / pi, each term in [0, 1]; symmetric, zero diagonal.
    squared_difference: sum of sum_d (h_{i+1} - h_i)^2, the numerator of SimDiff's MSSD (arXiv 2604.19520, Eq. 3).
    absolute_difference: sum of sum_d |h_{i+1} - h_i|, the numerator of MASD (Eq. 4).
    relative_magnitude: sum of |h_{i+1} - h_i| / |h_{i+1}| (the ablation of ShortGPT, arXiv 2403.03853).
    norm: sum of |h_i| (l2).

    Statistics of disjoint token sets add up: ``a + b``.
    """

    hidden_size: int
    count: Float64[np.ndarray, "subset"]
    cosine: Float64[np.ndarray, "subset state state"]
    angle: Float64[np.ndarray, "subset state state"]
    squared_difference: Float64[np.ndarray, "subset layer"]
    absolute_difference: Float64[np.ndarray, "subset layer"]
    relative_magnitude: Float64[np.ndarray, "subset layer"]
    norm: Float64[np.ndarray, "subset state"]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return self.squared_difference.shape[-1]

    def __add__(self, other: "LayerStats") -> "LayerStats":
        """Statistics of the union of two disjoint token sets. Raises ValueError for models of different shape."""
        shapes = [f"{stats.n_layers} layers of width {stats.hidden_size}" for stats in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"cannot add statistics of {shapes[1]} to those of {shapes[0]}")
        return LayerStats(self.hidden_size, **{name: getattr(self, name) + getattr(other, name) for name in _ARRAYS})

    def save(self, path: str | os.PathLike, metadata: dict[str, str]) -> None:
        """Write one safetensors file, atomically: it appears complete or not at all. `metadata` are free strings.

        Equal statistics and metadata give equal bytes; safetensors writes several metadata fields in random order, hence one.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        arrays["hidden_size"] = np.array([self.hidden_size])
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors.numpy.save(arrays, metadata={"metadata": json.dumps(metadata, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LayerStats":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a file that is damaged or something else."""
        try:
            found = safetensors.numpy.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); delete it and collect again") from error
        if missing := {*_ARRAYS, "hidden_size"} - set(found):
            raise ValueError(f"{path} holds no layer statistics: {', '.join(sorted(missing))} missing; collect them again")
        return cls(int(found["hidden_size"][0]), **{name: found[name] for name in _ARRAYS})


_ARRAYS = tuple(field.name for field in fields(LayerStats) if field.name != "hidden_size")


def read_draws(runs: Iterable[str | os.PathLike], model: str) -> dict[tuple[str, int], LayerStats]:
    """Statistics by (text, seed) of their calibration windows, from run files of the statistics notebook.

    Raises ValueError for statistics of another model or a draw that is there twice, and as `LayerStats.load`.
    """
    draws: dict[tuple[str, int], LayerStats] = {}
    for path in (input_path(path).with_suffix(".safetensors") for path in runs):
        stats = LayerStats.load(path)
        with safe_open(path, framework="numpy") as file:
            made = json.loads(file.metadata()["metadata"])
        if made["model"] != model:
            raise ValueError(f"{path} holds statistics of {made['model']}, not of {model}")
        draw = made["corpus"], int(made["seed"])
        if draw in draws:
            raise ValueError(f"{path} holds another draw of {draw[0]} with seed {draw[1]}: give each once")
        draws[draw] = stats
    return draws


@memory.says_what_fits("batch_size", "shorter windows, a smaller dtype, or stream the model (prunelib.scale.offload)")
def collect(
    model: PreTrainedModel,
    windows: Int[Tensor, "sample token"],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerStats:
    """Statistics of a causal LM's hidden states over token windows, in one forward pass without the LM head.

    The hidden states of one batch (L + 1 times batch_size x tokens x D) are held on the model's device; the float64 work on
    them is done in chunks of tokens of bounded size. Raises ValueError as `perplexity`, RuntimeError naming the layer and the
    batch at the first NaN or infinity, and OutOfMemory with a setting that takes less.
    """
    return functools.reduce(operator.add, batch_sums(model, windows, batch_size=batch_size, progress=progress))


@torch.inference_mode()
def batch_sums(
    model: PreTrainedModel,
    windows: Int[Tensor, "sample token"],
    *,
    batch_size: int = 8,
    progress: bool = True,
    share: slice = slice(None),
) -> list[LayerStats]:
    """The statistics that `collect` adds up: of each batch, or of those in `share`."""
    check_collectable(model, windows, batch_size=batch_size)
    engine, buffer, found = LayerwiseModel(model), torch.empty(0), []
    starts = range(0, len(windows), batch_size)[share]
    for start in tqdm(starts, desc="layer statistics", unit="batch", disable=not progress):
        rows = slice(start, min(start + batch_size, len(windows)))
        buffer = _hidden_states(engine, windows[rows], buffer)
        found.append(from_states(buffer))
        check_finite(found[-1], rows, batch_size)
    return found


def check_collectable(model: PreTrainedModel, windows: Int[Tensor, "sample token"], *, batch_size: int = 1) -> None:
    """Raise as `check_windows`, and UnsupportedModel for a sliced model, before any work."""
    if model.config.model_type == SLICED_MODEL_TYPE:
        raise UnsupportedModel("this model is sliced, and its hidden states differ in width: collect those of the dense model")
    check_windows(model, windows, batch_size=batch_size)


@torch.inference_mode()
def influence_through_final_norm(model: PreTrainedModel, windows: Int[Tensor, "sample token"], *, batch_size: int = 8) -> float:
    """`block_influence` of the last layer as the released code of Dynamic LLM Slicing (arXiv 2411.03513) takes it.

    1 - mean over all tokens of cos(input of the last layer, its output after the final norm). A norm with unequal weights turns
    the states, so it is larger than the layer's own. Raises as `collect`.
    """
    check_collectable(model, windows, batch_size=batch_size)
    total = 0.0
    for batch in windows.split(batch_size):
        found = model.base_model(input_ids=batch.to(model.device), output_hidden_states=True, use_cache=False)
        before, after = (state.double() for state in found.hidden_states[-2:])
        total += float(torch.cosine_similarity(before.to(after.device), after, dim=-1).sum())
    if not np.isfinite(total):
        raise RuntimeError("NaN or infinity around the last layer; check the weights, or use a dtype of wider range")
    return 1 - total / windows.numel()


def from_states(states: Float[Tensor, "sample token state dim"], device: torch.device | None = None) -> LayerStats:
    """Statistics of L + 1 given hidden states, reduced in chunks of tokens whose float64 copy stays in cache.

    The work is done where the states are, or on `device`, to which they go chunk by chunk. NaN and infinity pass through into
    the sums. On a CUDA device `prunelib.criteria.fused` does most of it.
    """
    device, (samples, length, n_states, width) = device or states.device, states.shape
    weights = _subset_weights(samples, length).to(device)
    states = states.flatten(0, 1)
    products, token_bytes = _Plain(), 8 * n_states * width
    fused = _fused(device) if device.type == "cuda" else None
    if fused is not None and fused.usable(states):
        copied = 0 if states.device == device else states.itemsize * n_states * width
        products, token_bytes = fused.products, 16 * n_states**2 + copied
    chunk = max(1, _CHUNK_BYTES[device.type] // token_bytes)
    space = None if states.device == device else states.new_empty((n_states, min(chunk, len(states)), width), device=device)
    total: dict[str, Tensor] = {}
    for start in range(0, len(states), chunk):
        part = states[start : start + chunk]
        if space is not None:
            # State by state: each is one contiguous piece of memory where all states of a few tokens are not.
            for state in range(n_states):
                space[state, : len(part)].copy_(part[:, state], non_blocking=True)
            part = space[:, : len(part)].transpose(0, 1)
        sums = token_sums(*products(part), weights[:, start : start + chunk])
        total = {name: total[name] + value for name, value in sums.items()} if total else sums
    return LayerStats(width, **_arrays(total, n_states))


@functools.cache
def _fused(device: torch.device) -> ModuleType | None:
    """`prunelib.criteria.fused` where it works, else None, with a warning where it ought to."""
    try:
        from prunelib.criteria import fused
    except ImportError:  # Triton has no build for this platform
        return None
    problem = fused.problem(device)
    if problem is not None:
        warnings.warn(f"layer statistics without the Triton kernel, more slowly: {problem}", stacklevel=2)
    return fused if problem is None else None


class _Plain:
    """Gram matrices, lengths and absolute sums of the steps, in float64; its memory serves all chunks.

    Float32 Gram matrices would leave angles of 3e-4 between equal states.
    """

    def __init__(self):
        self.work: Tensor | None = None

    def __call__(self, states: Float[Tensor, "token state dim"]) -> tuple[Tensor, Tensor, Tensor]:
        if self.work is None:  # the first chunk is the largest
            self.work = torch.empty((2, *states.shape), dtype=torch.float64, device=states.device)
        wide, difference = self.work[0, : len(states)].copy_(states), self.work[1, : len(states), 1:]
        gram = torch.bmm(wide, wide.transpose(1, 2))
        torch.sub(wide[:, 1:], wide[:, :-1], out=difference)
        return gram, torch.linalg.vector_norm(difference, dim=-1), difference.abs_().sum(dim=-1)


def _hidden_states(
    engine: LayerwiseModel, ids: Int[Tensor, "sample token"], buffer: Tensor
) -> Float[Tensor, "sample token state dim"]:
    """The inputs of all layers and the output of the last, before the final norm, in `buffer` where they fit into it.

    Keeping the tensors themselves makes the forward pass allocate new memory for every layer, 10% slower on a CPU; and a later
    layer that works in place cannot change the copy.
    """
    hidden, n_states = engine.embed(ids), engine.n_layers + 1
    shape = (*hidden.shape[:2], n_states, hidden.shape[2])
    if buffer.shape != shape:
        if hidden.device.type == "cpu":  # chunks of tokens, with all of their states, then stay in cache
            buffer = torch.empty(shape, dtype=hidden.dtype)
        else:  # each state one piece of memory, which is copied fastest
            buffer = hidden.new_empty((n_states, *hidden.shape)).permute(1, 2, 0, 3)
    buffer[:, :, 0].copy_(hidden)
    for index in range(engine.n_layers):
        hidden = engine.run_layer(index, hidden)
        # Some models widen the residual stream on the way.
        buffer = buffer.to(torch.promote_types(buffer.dtype, hidden.dtype))
        buffer[:, :, index + 1].copy_(hidden)
    return buffer


def _subset_weights(samples: int, length: int) -> Float64[Tensor, "subset token"]:
    """1 where a token belongs to the subset, else 0; rows as in `SUBSETS`."""
    weights = torch.ones(len(SUBSETS), samples, length, dtype=torch.float64)
    weights[SUBSETS.index("without_first"), :, 0] = 0
    weights[SUBSETS.index("last"), :, :-1] = 0
    return weights.flatten(1)


def token_sums(
    gram: Float64[Tensor, "token state state"],
    step: Float64[Tensor, "token layer"],
    absolute: Float64[Tensor, "token layer"],
    weights: Float64[Tensor, "subset token"],
) -> dict[str, Float64[Tensor, "subset *_"]]:
    """Weighted sums over tokens of all quantities of `LayerStats`; pairs of states i < j as one axis, row by row.

    Taken are the Gram matrix of the raw states and, of each layer's step h_{i+1} - h_i, the length and the absolute sum.
    |h_i|^2 = G_ii, and for equal states G_ij = G_ii, so an identity layer has cosine 1 exactly.
    """
    n_states = gram.shape[1]
    tiny = torch.finfo(torch.float64).tiny
    first, second = torch.triu_indices(n_states, n_states, offset=1, device=gram.device)
    gram = gram.flatten(1)
    squared_norm = gram[:, :: n_states + 1].contiguous()
    norm = squared_norm.sqrt()
    # sqrt(a * a) is a again, while norm_i * norm_j would not give back G_ii. The clamp keeps zero vectors at cosine 0.
    scale = (squared_norm[:, first] * squared_norm[:, second]).sqrt_().clamp_(min=tiny)
    cosine = gram[:, first * n_states + second].div_(scale).clamp_(-1, 1)
    return {
        "count": weights.sum(dim=1),
        "cosine": _weighted(weights, cosine),
        "angle": _weighted(weights, cosine.acos_().div_(torch.pi)),
        "squared_difference": _weighted(weights, step.square()),
        "absolute_difference": _weighted(weights, absolute),
        "relative_magnitude": _weighted(weights, step / norm[:, 1:].clamp(min=tiny)),
        "norm": _weighted(weights, norm),
    }


def _weighted(weights: Float64[Tensor, "subset token"], values: Float64[Tensor, "token _"]) -> Float64[Tensor, "subset _"]:
    """Weighted sums over the tokens; on an accelerator in pieces side by side, as one long sum keeps few of its units busy."""
    whole = values.shape[0] // _PIECE * _PIECE if values.device.type != "cpu" else 0
    if whole == 0:
        return weights @ values
    pieces = torch.bmm(
        weights[:, :whole].unflatten(1, (-1, _PIECE)).transpose(0, 1), values[:whole].unflatten(0, (-1, _PIECE))
    ).sum(dim=0)
    return pieces + weights[:, whole:] @ values[whole:]


def check_finite(stats: LayerStats, rows: slice, batch_size: int) -> None:
    """Raise RuntimeError naming the first state that is not finite, and the batch, which holds the samples `rows`.

    Float64 squares of finite float32 numbers cannot overflow: a norm is finite exactly when its state is.
    """
    bad = np.flatnonzero(~np.isfinite(stats.norm[0]))
    if len(bad):
        state = "input of layer 0 (the embedding)" if bad[0] == 0 else f"output of layer {bad[0] - 1}"
        where = f"batch {rows.start // batch_size} (samples {rows.start} to {rows.stop - 1})"
        raise RuntimeError(f"NaN or infinity in the {state}, {where}; check the weights, or use a dtype of wider range")


def _arrays(total: dict[str, Tensor], n_states: int) -> dict[str, np.ndarray]:
    """Tensors of sums to arrays of `LayerStats`: unfold the pairs i < j to symmetric matrices."""
    arrays = {name: value.cpu().numpy() for name, value in total.items()}
    upper = np.triu_indices(n_states, 1)
    for name, diagonal in (("cosine", arrays["count"]), ("angle", np.zeros(len(SUBSETS)))):
        matrix = diagonal[:, None, None] * np.eye(n_states)
        matrix[:, *upper] = matrix.transpose(0, 2, 1)[:, *upper] = arrays[name]
        arrays[name] = matrix
    return arrays

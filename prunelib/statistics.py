"""One streamed forward pass over calibration windows, reduced to sums: everything the layer criteria need.

The L decoder layers of a model have L + 1 hidden states: state i is the input of layer i and state L is the output of the
last layer *before* the final norm (``output_hidden_states`` reports it after the norm, which distorts every distance to it).
All sums run over tokens, in float64, for every pair of states at once, so block influence, angular distance of any block,
MSSD, MASD (with or without division by the width) and relative magnitude all follow from a single pass.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Num
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelib.models import decoder_layers

SUBSETS = ("all", "without_first", "last")
"""Axis 0 of every array of `LayerStats`: all real tokens; all but the first real token of each sample (which often carries
massive activations); only the last real token of each sample (the one Gromov et al. use)."""

# Working memory of the reduction, per device type. On a CPU a chunk must stay in cache: 64 tokens of 33 states of width 160.
# On a GPU it must be large enough to hide the launches.
_CHUNK_BYTES = {"cpu": 5 << 19}
_CHUNK_BYTES_ACCELERATOR = 256 << 20


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

    Statistics of disjoint token sets add up: ``a + b``. Raises ValueError when the shapes do not belong together.
    """

    hidden_size: int
    count: Float64[np.ndarray, "subset"]
    cosine: Float64[np.ndarray, "subset state state"]
    angle: Float64[np.ndarray, "subset state state"]
    squared_difference: Float64[np.ndarray, "subset layer"]
    absolute_difference: Float64[np.ndarray, "subset layer"]
    relative_magnitude: Float64[np.ndarray, "subset layer"]
    norm: Float64[np.ndarray, "subset state"]

    def __post_init__(self):
        subsets, layers = len(SUBSETS), self.n_layers
        expected = {
            "count": (subsets,),
            "cosine": (subsets, layers + 1, layers + 1),
            "angle": (subsets, layers + 1, layers + 1),
            "squared_difference": (subsets, layers),
            "absolute_difference": (subsets, layers),
            "relative_magnitude": (subsets, layers),
            "norm": (subsets, layers + 1),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"LayerStats of {layers} layers needs {name} of shape {shape}, got {found}")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return self.squared_difference.shape[-1]

    def __add__(self, other: "LayerStats") -> "LayerStats":
        """Statistics of the union of two disjoint token sets. Raises ValueError for models of different shape."""
        if (self.n_layers, self.hidden_size) != (other.n_layers, other.hidden_size):
            raise ValueError(
                f"cannot merge statistics of {self.n_layers} layers of width {self.hidden_size} "
                f"with statistics of {other.n_layers} layers of width {other.hidden_size}"
            )
        return LayerStats(self.hidden_size, **{name: getattr(self, name) + getattr(other, name) for name in _ARRAYS})

    def save(self, path: str | os.PathLike, metadata: dict[str, str]) -> None:
        """Write one safetensors file, atomically: it appears complete or not at all. `metadata` are free strings."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(arrays | {"hidden_size": np.array([self.hidden_size])}, temporary, metadata=dict(metadata))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LayerStats":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a file that is damaged or something else."""
        with _opened(path) as file:
            missing = {*_ARRAYS, "hidden_size"} - set(file.keys())
            if missing:
                raise ValueError(f"{path} holds no layer statistics: {', '.join(sorted(missing))} missing; collect them again")
            return cls(int(file.get_tensor("hidden_size")[0]), **{name: file.get_tensor(name) for name in _ARRAYS})


_ARRAYS = tuple(field.name for field in fields(LayerStats) if field.name != "hidden_size")


def load_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings stored beside the statistics by `LayerStats.save`. Raises like `LayerStats.load`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[safe_open]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no layer statistics at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); delete it and collect again") from error


def collect(
    model: nn.Module,
    windows: Int[Tensor, "sample token"],
    *,
    mask: Num[Tensor, "sample token"] | Bool[Tensor, "sample token"] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LayerStats:
    """Statistics of a causal LM's hidden states over token windows, in one forward pass without the LM head.

    `mask` is 1 on real tokens and 0 on padding (either side); padding enters no sum. "First" and "last" are each sample's
    first and last real token. The hidden states of one batch (L + 1 times batch_size x tokens x D) are held on the model's
    device; the float64 work on them is done in chunks of tokens of bounded size.

    Raises ValueError for bad windows or masks, and RuntimeError naming the layer and the batch at the first NaN or infinity.
    """
    mask = _checked_mask(windows, mask)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    layers = decoder_layers(model)
    backbone = _backbone(model, layers)
    device = model.get_input_embeddings().weight.device
    batches = range(0, len(windows), batch_size)
    total: dict[str, Tensor] = {}
    hidden_size = 0
    for number, start in enumerate(tqdm(batches, desc="layer statistics", unit="batch", disable=not progress)):
        rows = slice(start, start + batch_size)
        with torch.inference_mode():
            states = _hidden_states(backbone, layers, windows[rows].to(device), mask[rows])
            sums = _batch_sums(states, mask[rows])
        _check_finite(sums["norm"], number, start, min(start + batch_size, len(windows)))
        total = {name: total[name] + value for name, value in sums.items()} if total else sums
        hidden_size = states[0].shape[-1]
    return LayerStats(hidden_size, **_arrays(total, len(layers) + 1))


def _checked_mask(windows: Tensor, mask: Tensor | None) -> Bool[Tensor, "sample token"]:
    if windows.numel() == 0:
        raise ValueError(f"no tokens to collect statistics from: windows have shape {tuple(windows.shape)}")
    if mask is None:
        return torch.ones(windows.shape, dtype=torch.bool)
    if mask.shape != windows.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, windows have {tuple(windows.shape)}: they must be equal")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must hold 1 for real tokens and 0 for padding, nothing else")
    mask = mask.bool().cpu()
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"samples {empty} consist of padding only; remove them")
    return mask


def _backbone(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """The model without its LM head, which the statistics do not need; the model itself where that cannot be told apart."""
    base = getattr(model, "base_model", None)
    holds_layers = isinstance(base, nn.Module) and any(module is layers for module in base.modules())
    return base if holds_layers else model


def _hidden_states(
    backbone: nn.Module, layers: nn.ModuleList, tokens: Int[Tensor, "sample token"], mask: Bool[Tensor, "sample token"]
) -> list[Float[Tensor, "sample token dim"]]:
    """Inputs of all layers and the output of the last, as the layers themselves see them (hence before the final norm)."""
    states = []
    output = None

    def before(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, result):
        nonlocal output
        # Decoder layers return a tensor in transformers 5 and a tuple before; [0] of a tensor would be the first sample.
        output = result[0] if isinstance(result, tuple) else result

    inputs = {"input_ids": tokens, "use_cache": False}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.long().to(tokens.device)
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            # Left padding must not shift the positions of the real tokens.
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    handles = []
    try:
        # A module may stand in two slots of a view of the model; it must not be hooked twice.
        for layer in dict.fromkeys(layers):
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        backbone(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(states) != len(layers):
        raise RuntimeError(f"the forward pass called {len(states)} decoder layers where the model has {len(layers)}")
    return [*states, output]


def _batch_sums(states: list[Float[Tensor, "sample token dim"]], mask: Bool[Tensor, "sample token"]) -> dict[str, Tensor]:
    """Sums of one batch, in chunks of tokens small enough for the float64 copy of all states to stay in cache."""
    device = states[0].device
    real = mask.flatten()
    chosen = None if bool(real.all()) else real.nonzero().flatten()
    weights = _subset_weights(mask)[:, real].to(device)
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    token_bytes = 8 * len(flat) * flat[0].shape[-1]
    chunk = max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ACCELERATOR) // token_bytes)
    total: dict[str, Tensor] = {}
    for start in range(0, weights.shape[1], chunk):
        if chosen is None:
            parts = [state[start : start + chunk] for state in flat]
        else:
            parts = [state.index_select(0, chosen[start : start + chunk].to(state.device)) for state in flat]
        block = torch.empty((len(parts[0]), len(flat), flat[0].shape[-1]), dtype=torch.float64, device=device)
        for index, part in enumerate(parts):
            block[:, index].copy_(part)  # also gathers the states of a model spread over several devices
        sums = token_sums(block, weights[:, start : start + chunk])
        total = {name: total[name] + value for name, value in sums.items()} if total else sums
    return total


def _subset_weights(mask: Bool[Tensor, "sample token"]) -> Float64[Tensor, "subset sample*token"]:
    """1 where a token belongs to the subset, else 0; rows as in `SUBSETS`."""
    samples = torch.arange(len(mask))
    without_first, last = mask.clone(), torch.zeros_like(mask)
    without_first[samples, mask.int().argmax(dim=1)] = False
    last[samples, mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)] = True
    return torch.stack([mask, without_first, last]).flatten(1).double()


def token_sums(
    states: Float64[Tensor, "token state dim"], weights: Float64[Tensor, "subset token"]
) -> dict[str, Float64[Tensor, "subset _"]]:
    """Weighted sums over tokens of all quantities of `LayerStats`; pairs of states i < j as one axis, row by row.

    The cosines come from the float64 Gram matrix of the raw states: |h_i|^2 = G_ii, and for equal states G_ij = G_ii, so an
    identity layer has cosine 1 exactly. Float32 Gram matrices would leave angles of about 3e-4 there.
    """
    n_states = states.shape[1]
    first, second = torch.triu_indices(n_states, n_states, offset=1, device=states.device)
    gram = torch.bmm(states, states.transpose(1, 2))
    squared_norm = gram.diagonal(dim1=1, dim2=2)
    norm = squared_norm.sqrt()
    # sqrt(a * a) == a in floating point, norm_i * norm_j would not give back G_ii. The clamp keeps zero vectors at cosine 0.
    scale = (squared_norm.index_select(1, first) * squared_norm.index_select(1, second)).sqrt_()
    cosine = gram.flatten(1).index_select(1, first * n_states + second)
    cosine.div_(scale.clamp_(min=torch.finfo(torch.float64).tiny)).clamp_(-1, 1)
    difference = states[:, 1:] - states[:, :-1]
    step = torch.linalg.vector_norm(difference, dim=-1)
    return {
        "count": weights.sum(dim=1, keepdim=True),
        "cosine": weights @ cosine,
        "angle": weights @ cosine.acos_().div_(torch.pi),
        "squared_difference": weights @ step.square(),
        "absolute_difference": weights @ difference.abs_().sum(dim=-1),
        "relative_magnitude": weights @ (step / norm[:, 1:].clamp(min=torch.finfo(torch.float64).tiny)),
        "norm": weights @ norm,
    }


def _check_finite(norm: Float64[Tensor, "subset state"], batch: int, start: int, stop: int) -> None:
    """Float64 squares of finite float32 numbers cannot overflow: a norm is finite exactly when its state is."""
    finite = torch.isfinite(norm[0]).tolist()
    if all(finite):
        return
    state = finite.index(False)
    where = "the input of layer 0 (the embedding)" if state == 0 else f"the output of layer {state - 1}"
    raise RuntimeError(
        f"NaN or infinity in {where}, in batch {batch} (samples {start} to {stop - 1}); "
        "check the weights, or use a wider dtype than the model's"
    )


def _arrays(total: dict[str, Tensor], n_states: int) -> dict[str, np.ndarray]:
    """Tensors of sums to arrays of `LayerStats`: unfold the pairs i < j to symmetric matrices."""
    arrays = {name: value.cpu().numpy() for name, value in total.items()}
    arrays["count"] = arrays["count"][:, 0]
    upper = np.triu_indices(n_states, 1)
    for name, diagonal in (("cosine", arrays["count"]), ("angle", np.zeros(len(SUBSETS)))):
        matrix = np.zeros((len(SUBSETS), n_states, n_states))
        matrix[:, *upper] = arrays[name]
        matrix += matrix.transpose(0, 2, 1)
        matrix += diagonal[:, None, None] * np.eye(n_states)
        arrays[name] = matrix
    return arrays

"""Rotate and slice (SliceGPT, arXiv 2401.15024), with a width for every layer (Dynamic LLM Slicing, arXiv 2411.03513).

RMSNorm commutes with an orthogonal Q, so the residual stream of a model may be expressed in any basis, at every place in
another one: matrices that read the stream take in Q, matrices that write to it Q^T, residual connections become Q_i^T Q_{i+1}.
In the basis of the principal axes of the stream, the last axes carry little, and are cut. (LayerNorm is RMSNorm behind a
subtraction of the mean, which the matrices that write to the stream take in.)

A cut model computes what the dense one does whose stream is projected onto the kept axes at every place. So the calibration
here runs the dense layers, unrotated, on a projected stream: attention and MLP of each layer once, and every place sees what
all cuts before it have done. Rotated weights are made once, when the bases on their sides are known.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, memory, onednn, parameter_count, with_layers
from prunelib.slicing.modeling import (
    Architecture,
    Diagonal,
    SlicedLayer,
    Sublayer,
    architecture_of,
    branch_output,
    classes,
    norm_eps,
    normalized,
    positions,
    shortcut_kinds,
)
from prunelib.slicing.registration import MODEL_TYPE
from prunelib.slicing.schedules import SlicePlan

DAMPING = 0.01
"""Added to the diagonal of the second moments, times its mean, as SliceGPT does: no eigenvector changes, but where the norms
subtract the mean, the direction of that mean is exempt and so comes last."""

Axes = Callable[[Tensor, int], Tensor]
"""From second moments [D, D] and a width to orthonormal columns [D, width], in float64."""

_ROWS = 8192  # of an embedding table that are rotated at once in float64
_BLOCK = 512  # rows of second moments that are added at once: large enough for an accelerator


# ----------------------------------------------------------------------------------------------------------------- axes


def principal_axes(moments: Float64[Tensor, "D D"], width: int) -> Float64[Tensor, "D width"]:
    """Eigenvectors of the largest eigenvalues, in descending order."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width]


def random_axes(seed: int) -> Axes:
    """Control: random directions, independent at every place, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def axes(moments: Tensor, width: int) -> Tensor:
        # The damped moments separate directions that can occur from the one that the subtracted mean excludes.
        drawn = torch.randn(len(moments), width, dtype=torch.float64, generator=generator).to(moments.device)
        values, vectors = torch.linalg.eigh(moments)
        possible = vectors[:, values > values[-1] * 1e-12]
        return torch.linalg.qr(possible @ (possible.T @ drawn)).Q if width < len(moments) else torch.linalg.qr(drawn).Q

    return axes


# -------------------------------------------------------------------------------------------------------------- slicing


@memory.says_what_fits(
    "batch_size", "activation_device='cpu', fewer or shorter windows, or prunelib.scale.shards.slice_checkpoint"
)
def slice_model(
    model: PreTrainedModel,
    plan: SlicePlan,
    windows: Int[Tensor, "sample token"],
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    activation_dtype: torch.dtype | None = None,
    activation_device: str | torch.device | None = None,
    shortcuts: str = "absorbed",
    subtract_mean: bool = False,
    axes: Axes = principal_axes,
    damping: float | int = DAMPING,
    weights: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """A new model whose residual stream has the widths of `plan`, calibrated on token windows; `model` stays as it is.

    The result is a `prunelib_sliced` model of the same dtype on the same device, its head untied from the embeddings: to save
    with `prunelib.models.save` or `save_pretrained`, to load with AutoModelForCausalLM wherever prunelib was imported.

    Work is done layer by layer on `device` (that of the model unless given; the model may then stay on the CPU), which holds
    one layer, one batch, a few D x D matrices in float64, and the stream of all windows: samples x tokens x D numbers of
    `activation_dtype` (the model's unless given), unless they are kept on `activation_device`. Moments, principal axes and
    rotations are float64, and the axes are those of the stream before the norms, not centered; the layers run in the model's
    dtype.

    shortcuts: "dense" keeps a matrix between each two places, as SliceGPT does, and rotates uncut places as well. "absorbed"
        computes the same with half of these parameters or less (`sliced_model.SHORTCUTS`). "none" gives the whole model one
        basis, the principal axes of the dense stream's moments at all places, each divided by its trace: no shortcut has
        parameters, so that more directions can be kept at equal size, which fit each place less well.
    subtract_mean: take the mean over D off the embeddings. SliceGPT's code does it to every model. It changes nothing where
        the norms do the same (LayerNorm), and changes the function of a model that has RMSNorm.
    axes: how directions are chosen; `random_axes` is a control.
    weights: an empty mapping that takes the new weights by name as they come, in the order of the layers (`shards.Shards`).

    Raises, before any work, UnsupportedModel naming the model type for a model that cannot be sliced, and ValueError for a
    plan of another model or windows that cannot calibrate it; RuntimeError naming the layer at the first NaN or infinity.
    """
    wiring = _checked(model, plan)
    check_windows(model, windows, batch_size=batch_size)
    widths = positions(plan.widths, len(wiring.steps(model.config)), plan.hidden_size)
    cut = [width for width in widths if width < plan.hidden_size]
    if cut and windows.numel() < max(cut):
        raise ValueError(
            f"{windows.numel()} calibration tokens cannot say which {max(cut)} of {plan.hidden_size} directions to keep: "
            "give more tokens than the widest layer keeps (many times as many, for good axes)"
        )
    device = torch.empty(0, device=device if device is not None else model.device).device  # with its index
    kinds = shortcut_kinds(widths, plan.hidden_size, shortcuts)
    calibration = _Calibration(
        model=model,
        wiring=wiring,
        widths=widths,
        windows=windows,
        batch_size=batch_size,
        device=device,
        storage_dtype=activation_dtype or model.dtype,
        storage_device=torch.device(activation_device) if activation_device is not None else device,
        everywhere=shortcuts != "absorbed",
        subtract_mean=subtract_mean,
        axes=axes,
        damping=float(damping),
        progress=progress,
    )
    with torch.no_grad():
        weights = {} if weights is None else weights
        _rotated(model, wiring, _BASES[shortcuts](calibration), kinds, subtract_mean, device, weights)
        return onednn.adopt_as(model, _assembled(model, plan, kinds, weights))


def _checked(model: PreTrainedModel, plan: SlicePlan) -> Architecture:
    """The wiring of a model that can be sliced by this plan; refuses everything else before any work."""
    wiring = architecture_of(model.config)
    model_type, config = model.config.model_type, model.config
    if not isinstance(model, classes(model_type)[1].__mro__[1]) or type(model).__module__.startswith("transformers_modules"):
        raise UnsupportedModel(f"{type(model).__name__} is not the causal language model of type {model_type!r}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"this {model_type} model is quantized; slice it unquantized, then quantize the sliced model")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModel(
            f"this {model_type} model is spread over several devices; load it on one (the CPU), and give slice_model a device"
        )
    layers = model.get_submodule(wiring.layers)
    branches = {branch for step in wiring.steps(config) for branch in step}
    for module, paths in [(model, (wiring.final_norm, wiring.head, *wiring.embeddings))] + [
        (layer, (branch.norm, branch.output, *branch.inputs)) for layer in layers for branch in branches
    ]:
        for path in paths:
            if not isinstance(_submodule(module, path), nn.Module):
                raise UnsupportedModel(f"this {model_type} model cannot be sliced: it has no {path}, or one of another kind")
    for path in wiring.embeddings:
        if model.get_submodule(path).weight.shape[1] != config.hidden_size:
            raise UnsupportedModel(f"this {model_type} model cannot be sliced: {path} is narrower than its hidden states")
    if plan.hidden_size != config.hidden_size:
        raise ValueError(f"the plan is for a hidden size of {plan.hidden_size}, this model has {config.hidden_size}")
    if plan.n_layers != len(layers):
        raise ValueError(f"the plan has the widths of {plan.n_layers} layers, this model has {len(layers)}")
    return wiring


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


# ---------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class _Calibration:
    """Everything that finding the bases needs; `everywhere` asks for axes where nothing is cut as well."""

    model: PreTrainedModel
    wiring: Architecture
    widths: list[int]
    windows: Tensor
    batch_size: int
    device: torch.device
    storage_dtype: torch.dtype
    storage_device: torch.device
    everywhere: bool
    subtract_mean: bool
    axes: Axes
    damping: float
    progress: bool

    @property
    def size(self) -> int:
        return self.model.config.hidden_size

    def wanted(self, place: int) -> bool:
        return self.everywhere or self.widths[place] < self.size

    def bases(self, basis: Callable[[Tensor, int], Tensor | None] | None = None) -> Iterator[Tensor | None]:
        """The axes [D, width] kept at each place, in order, None where nothing is cut; the stream moves on as they are taken.

        `basis` makes them of moments and a width, as `chosen` does unless given; where it returns None, nothing is cut.
        Raises RuntimeError for moments that are not finite.
        """
        basis = basis or self.chosen
        last = max((place for place in range(len(self.widths)) if self.wanted(place)), default=-1)
        places = self.places(last) if last >= 0 else ()
        with tqdm(desc="slicing", unit="place", total=last + 1, disable=not self.progress) as bar:
            found: Tensor | None = None
            place = 0
            for what, moments_after in places:
                moments = moments_after(found, self.no_moments(place))
                found = moments_after = None  # the layer behind it leaves the device before the next one comes
                if moments is not None:
                    if not bool(torch.isfinite(moments).all()):
                        raise RuntimeError(f"NaN or infinity in {what}; check the weights, or use a dtype of wider range")
                    found = basis(_mirrored(moments), self.widths[place])
                kept = None if found is None else found[:, : self.widths[place]]
                bar.update()
                place += 1  # noqa: SIM113 (enumerate would hold on to the layer)
                yield kept
        yield from (None for _ in self.widths[last + 1 :])

    def chosen(self, moments: Float64[Tensor, "D D"], width: int) -> Float64[Tensor, "D _"]:
        """The axes of moments that are damped here, in place: `width` to keep, then, where they come for free, those to cut."""
        floor = self.damping * float(moments.diagonal().mean())
        moments.diagonal().add_(floor)
        if self.wiring.centered:
            moments -= floor / self.size
        return self.axes(moments, self.size if self.axes is principal_axes else width)

    def places(self, last: int) -> Iterator[tuple[str, Callable[[Tensor | None, Tensor | None], Tensor | None]]]:
        """Each place up to `last`: its name, and what moves the stream there, given the basis of the place before, and fills in
        the moments."""
        states, arguments = self.embedded()
        place = 0
        yield "the embeddings", functools.partial(self.start, states)
        for index, dense in enumerate(self.model.get_submodule(self.wiring.layers)):
            if place == last:
                break
            layer = _on(dense, self.device)
            for step in self.wiring.steps(self.model.config):
                if place == last:
                    break
                width, place = self.widths[place], place + 1
                what = f"the hidden states after {' and '.join(branch.modules[0] for branch in step)} of layer {index}"
                yield what, functools.partial(self.advance, states, layer, step, arguments[index], width)
            del layer

    def embedded(self) -> tuple[list[Tensor], list[dict[int, dict[str, Any]]]]:
        """The stream before layer 0, by batch, and what each layer is called with beside it, by number of rows in the batch."""
        layers = self.model.get_submodule(self.wiring.layers)
        taps = [_Tap(layer) for layer in layers]
        backbone = with_layers(self.model, taps).base_model
        states = []
        for start in range(0, len(self.windows), self.batch_size):
            rows = self.windows[start : start + self.batch_size].to(self.model.device)
            backbone(input_ids=rows, use_cache=False)
            states.append(self.kept(taps[0].states))
        return states, [tap.arguments for tap in taps]

    def no_moments(self, place: int) -> Float64[Tensor, "D D"] | None:
        """Moments to fill for a place; None where no axes are wanted."""
        return torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device) if self.wanted(place) else None

    def kept(self, stream: Float[Tensor, "sample token D"]) -> Float[Tensor, "sample token D"]:
        """A copy for the time between two steps, in page-locked memory where an accelerator will read it from the CPU."""
        pinned = self.storage_device.type == "cpu" and self.device.type == "cuda"
        space = torch.empty(stream.shape, dtype=self.storage_dtype, device=self.storage_device, pin_memory=pinned)
        return space.copy_(stream.to(self.storage_dtype))

    def start(self, states: list[Tensor], basis: None, moments: Float64[Tensor, "D D"] | None) -> Float64[Tensor, "D D"] | None:
        """Prepare the embedded stream, in place, and sum up its moments, on and below the diagonal."""
        for state in states:
            stream = state.to(self.device)
            if self.wiring.centered or self.subtract_mean:
                stream = _centered(stream)
                state.copy_(stream)
            _add_moments(moments, stream)
        return moments

    def advance(
        self,
        states: list[Tensor],
        layer: nn.Module,
        step: tuple[Sublayer, ...],
        arguments: dict[int, dict[str, Any]],
        width: int,
        basis: Float64[Tensor, "D _"] | None,
        moments: Float64[Tensor, "D D"] | None,
    ) -> Float64[Tensor, "D D"] | None:
        """Project the stream onto the first `width` axes of `basis`, run one step on it, in place, and sum up the moments of
        what comes out, on and below the diagonal."""
        dtype = self.model.dtype
        arguments = {rows: _moved(values, self.device) for rows, values in arguments.items()}
        norms = {branch.norm: _norm_weights(layer.get_submodule(branch.norm), self.wiring, dtype) for branch in step}
        kept = None if basis is None or width == self.size else basis[:, :width].to(dtype)
        # To take off what is cut is less work than to keep what is kept, and rounds it less.
        cut = basis[:, width:].to(dtype) if kept is not None and basis.shape[1] == self.size < 2 * width else None
        for state in states:
            stream = state.to(self.device, non_blocking=self.device.type != "cpu").to(dtype)
            if cut is not None:
                stream = stream - (stream @ cut) @ cut.T
            elif kept is not None:
                stream = (stream @ kept) @ kept.T
            result = stream
            for branch in step:
                scale, shift, eps = norms[branch.norm]
                normed = normalized(stream, self.size, eps) * scale + shift
                result = result + branch_output(layer, branch, normed, arguments[len(stream)])
            if self.wiring.centered:
                result = _centered(result)
            state.copy_(result.to(self.storage_dtype))
            _add_moments(moments, result)
        return moments


class _Tap(nn.Module):
    """A decoder slot that keeps what it is called with and hands the hidden states on unchanged."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["_stands_for"] = layer
        self.states: Tensor | None = None
        self.arguments: dict[int, dict[str, Any]] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.states = hidden_states
        self.arguments[len(hidden_states)] = arguments
        return hidden_states

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)


def _add_moments(moments: Float64[Tensor, "D D"] | None, stream: Float[Tensor, "sample token D"]) -> None:
    """Sums of products, in blocks on and below the diagonal."""
    if moments is not None:
        flat = stream.flatten(0, 1).double()
        for first in range(0, len(moments), _BLOCK):
            rows = slice(first, first + _BLOCK)
            moments[rows, : rows.stop].addmm_(flat[:, rows].T, flat[:, : rows.stop])


def _mirrored(moments: Float64[Tensor, "D D"]) -> Float64[Tensor, "D D"]:
    """The symmetric matrix of one that is filled in on and below the diagonal."""
    return moments.tril_().add_(moments.tril(-1).T)


def _centered(stream: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return (wide - wide.mean(dim=-1, keepdim=True)).to(stream.dtype)


def _norm_weights(norm: nn.Module, wiring: Architecture, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float, float]:
    """Scale, shift and epsilon of a family's norm."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = 1.0 if weight is None else weight.to(dtype) + wiring.norm_offset
    return scale, 0.0 if bias is None else bias.to(dtype), norm_eps(norm)


def _on(layer: nn.Module, device: torch.device) -> nn.Module:
    """The layer itself where it is on the device already, else a copy there."""
    tensors = [*layer.parameters(), *layer.buffers()]
    if all(tensor.device == device for tensor in tensors):
        return layer
    # The memo makes deepcopy take these for copies of the layer's tensors, which are not copied on their own device first.
    return copy.deepcopy(layer, {id(tensor): _like(tensor, tensor.to(device)) for tensor in tensors})


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of a nested value on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, (tuple, list)) else value


# ------------------------------------------------------------------------------------------------- from axes to bases


def _absorbing(calibration: _Calibration) -> Iterator[Tensor]:
    return _turned(calibration.bases(), torch.eye(calibration.size, dtype=torch.float64, device=calibration.device))


def _separate(calibration: _Calibration) -> Iterator[Tensor]:
    return calibration.bases()


def _shared(calibration: _Calibration) -> Iterator[Tensor]:
    """The first directions of one basis at every place."""
    total = torch.zeros(calibration.size, calibration.size, dtype=torch.float64, device=calibration.device)

    def collect(moments: Tensor, width: int) -> None:
        # Divided by the trace, lest the deep layers, where the stream is largest, decide alone.
        total.add_(moments / moments.trace())

    for _ in calibration.bases(collect):
        pass
    axes = calibration.chosen(total, calibration.size)
    for width in calibration.widths:
        yield axes[:, :width]


_BASES: dict[str, Callable[[_Calibration], Iterator[Tensor]]] = {
    "absorbed": _absorbing,
    "dense": _separate,
    "none": _shared,
}


def _turned(bases: Iterable[Tensor | None], identity: Float64[Tensor, "D D"]) -> Iterator[Tensor]:
    """The bases, turned within what they span as `sliced_model.shortcut_kinds` says, and filled in where nothing is cut.

    It looks ahead by one place, and over uncut places at the beginning.
    """
    waiting, before = 0, None
    for basis in _paired(bases):
        if basis is not None:
            if waiting:
                yield from [_completed(basis)] * waiting
            waiting, before = 0, basis
            yield basis
        elif before is None:
            waiting += 1
        else:
            before = _completed(before)
            yield before
    for _ in range(waiting):
        yield identity


def _paired(bases: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Each two neighboring bases turned by the singular vectors of what lies between them, which becomes diagonal."""
    held = None
    for basis in bases:
        if held is None and basis is not None:
            held = basis
        elif held is None or basis is None:
            yield from (held, None) if held is not None else (None,)
            held = None
        else:
            left, right = _singular_vectors(held.T @ basis)
            yield held @ left
            yield basis @ right
            held = None
    if held is not None:
        yield held


def _singular_vectors(matrix: Float64[Tensor, "m n"]) -> tuple[Float64[Tensor, "m m"], Float64[Tensor, "n n"]]:
    """Orthogonal U and V that make U^T matrix V diagonal, its entries at least 0, to 1e-8 at worst for entries up to 1.

    By an eigendecomposition and a QR decomposition: on accelerators far faster than a singular value decomposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _singular_vectors(matrix.T)
        return left, right
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    left, upper = torch.linalg.qr(matrix @ right, mode="complete")
    left[:, : len(right)] *= torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return left, right


def _completed(basis: Float64[Tensor, "D width"]) -> Float64[Tensor, "D D"]:
    """The basis, and behind it an orthonormal basis of the rest of the space."""
    width = basis.shape[1]
    return torch.cat([basis, torch.linalg.qr(basis, mode="complete").Q[:, width:]], dim=1)


# ------------------------------------------------------------------------------------------------------ rotating weights


def _rotated(
    model: PreTrainedModel,
    wiring: Architecture,
    bases: Iterable[Tensor],
    shortcuts: Sequence[str],
    subtract_mean: bool,
    device: torch.device,
    weights: dict[str, Tensor],
) -> None:
    """Fill in the weights of the sliced model that differ from the dense model's, each as soon as its bases are known."""
    layers = model.get_submodule(wiring.layers)
    steps = wiring.steps(model.config)

    def put(name: str, value: Tensor, like: Tensor) -> None:
        weights[name] = value.to(like.device, like.dtype).contiguous()

    def reads(module: nn.Module, path: str, norm: nn.Module, name: str, basis: Tensor) -> None:
        """A linear map behind a norm takes in the norm's weights and the basis."""
        linear = module.get_submodule(path)
        weight = linear.weight.to(device).to(torch.float64)
        scale, shift, _ = _norm_weights(norm, wiring, torch.float64)
        put(f"{name}.weight", (weight * torch.as_tensor(scale).to(device)) @ basis, linear.weight)
        if linear.bias is not None or isinstance(shift, Tensor):
            bias = 0.0 if linear.bias is None else linear.bias.to(device).to(torch.float64)
            added = weight @ shift.to(device) if isinstance(shift, Tensor) else 0.0
            put(f"{name}.bias", bias + added, linear.weight)

    def writes(module: nn.Module, path: str, name: str, basis: Tensor) -> None:
        linear = module.get_submodule(path)
        target = _centered(basis.T).T if wiring.centered else basis
        put(f"{name}.weight", target.T @ linear.weight.to(device).to(torch.float64), linear.weight)
        if linear.bias is not None:
            put(f"{name}.bias", target.T @ linear.bias.to(device).to(torch.float64), linear.bias)

    before = None
    for place, basis in enumerate(bases):
        if place == 0:
            target = _centered(basis.T).T if wiring.centered or subtract_mean else basis
            for path in wiring.embeddings:
                table = model.get_submodule(path).weight
                parts = [rows.to(device).to(torch.float64) @ target for rows in table.split(_ROWS)]
                put(f"{path}.weight", torch.cat([part.to(table.dtype) for part in parts]), table)
        else:
            index, step = divmod(place - 1, len(steps))
            name = f"{wiring.layers}.{index}"
            for branch in steps[step]:
                writes(layers[index], branch.output, f"{name}.{branch.output}", basis)
            like = layers[index].get_submodule(steps[step][0].output).weight
            between = before.T @ basis
            if shortcuts[place - 1] == "dense":
                put(f"{name}.shortcuts.{step}.weight", between.T, like)
            elif shortcuts[place - 1] == "diagonal":
                put(f"{name}.shortcuts.{step}.weight", between.diagonal(), like)
        index, step = divmod(place, len(steps))
        if index < len(layers):
            for branch in steps[step]:
                for path in branch.inputs:
                    norm = layers[index].get_submodule(branch.norm)
                    reads(layers[index], path, norm, f"{wiring.layers}.{index}.{path}", basis)
        else:
            reads(model, wiring.head, model.get_submodule(wiring.final_norm), wiring.head, basis)
        before = basis


def _assembled(
    model: PreTrainedModel, plan: SlicePlan, shortcuts: Sequence[str], weights: dict[str, Tensor]
) -> PreTrainedModel:
    """The sliced model of these weights; what they leave out is copied from the dense model."""
    sliced = _skeleton(model.config, plan, shortcuts)
    dense = model.state_dict()
    for name in sliced.state_dict():
        if name not in weights:
            weights[name] = dense[name].clone()
    sliced.load_state_dict(weights, strict=True, assign=True)
    buffers = dict(model.named_buffers())
    for name, buffer in list(sliced.named_buffers()):
        if buffer.is_meta:  # rotary frequencies and the like, which no state dict holds
            owner, _, attribute = name.rpartition(".")
            setattr(sliced.get_submodule(owner), attribute, buffers[name].clone())
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced.eval()


def _skeleton(config: PreTrainedConfig, plan: SlicePlan, shortcuts: Sequence[str]) -> PreTrainedModel:
    """The sliced model without its weights, on the meta device."""
    with torch.device("meta"):
        return classes(config.model_type)[1](_sliced_configuration(config, plan, shortcuts))


def sliced_configuration(config: PreTrainedConfig, plan: SlicePlan, *, shortcuts: str = "absorbed") -> PreTrainedConfig:
    """Configuration of the model that `slice_model` makes of a dense one with this configuration.

    Raises ValueError for a plan of another model, and UnsupportedModel for a family that cannot be sliced.
    """
    widths = positions(plan.widths, len(architecture_of(config).steps(config)), plan.hidden_size)
    if (plan.hidden_size, plan.n_layers) != (config.hidden_size, config.num_hidden_layers):
        raise ValueError(
            f"the plan is for {plan.n_layers} layers of width {plan.hidden_size}, this model has "
            f"{config.num_hidden_layers} of width {config.hidden_size}"
        )
    return _sliced_configuration(config, plan, shortcut_kinds(widths, plan.hidden_size, shortcuts))


def _sliced_configuration(config: PreTrainedConfig, plan: SlicePlan, shortcuts: Sequence[str]) -> PreTrainedConfig:
    config_class, _ = classes(config.model_type)
    record = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    record["slicing"] = asdict(plan) | {
        "family": config.model_type,
        "shortcuts": list(shortcuts),
        "tied": bool(config.tie_word_embeddings),
    }
    record["tie_word_embeddings"] = False
    sliced = config_class.from_dict(record)
    sliced._attn_implementation = config._attn_implementation
    return sliced


# ------------------------------------------------------------------------------------------------------------ accounting


@dataclass(frozen=True)
class Account:
    """What a sliced model has and does, beside its dense model. FLOPs are per token, a multiplication and an addition as two.

    parameters includes `shortcut_parameters`, and the head, which is no longer tied to the embeddings. FLOPs are those of the
    linear maps, head and shortcuts included, and of attention over `context` earlier tokens; norms and activations are not
    counted. A token's embedding is a look-up.
    """

    dense_parameters: int
    parameters: int
    shortcut_parameters: int
    dense_flops: int
    flops: int
    context: int

    @property
    def removed(self) -> float:
        """Fraction of the parameters that is really gone; negative where shortcuts (or the untied head) outweigh the cuts."""
        return 1 - self.parameters / self.dense_parameters

    @property
    def flops_removed(self) -> float:
        """Fraction of the FLOPs that is really gone."""
        return 1 - self.flops / self.dense_flops


def account(
    config: PreTrainedConfig, plan: SlicePlan | None = None, *, shortcuts: str = "absorbed", context: int = 0
) -> Account:
    """Parameters and FLOPs per token of a sliced model, without slicing: counted on models that have no weights.

    `config` is that of a dense model with the `plan` it is to be sliced by, or of a sliced model. Raises ValueError when the
    plan is missing or does not fit, and UnsupportedModel as `slice_model`.
    """
    if config.model_type == MODEL_TYPE:
        if plan is not None:
            raise ValueError("this configuration is of a sliced model, which has its plan: give none, or the dense one")
        sliced_class = classes(config.slicing["family"])[1]
        dense_config = dense_configuration(config)
        with torch.device("meta"):
            sliced = sliced_class(copy.deepcopy(config))
    else:
        wiring = architecture_of(config)
        if plan is None:
            raise ValueError("a plan is needed to say how this model would be sliced")
        if (plan.hidden_size, plan.n_layers) != (config.hidden_size, config.num_hidden_layers):
            raise ValueError(
                f"the plan is for {plan.n_layers} layers of width {plan.hidden_size}, this model has "
                f"{config.num_hidden_layers} of width {config.hidden_size}"
            )
        widths = positions(plan.widths, len(wiring.steps(config)), plan.hidden_size)
        dense_config = config
        sliced = _skeleton(config, plan, shortcut_kinds(widths, plan.hidden_size, shortcuts))
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(dense_config))
    added = [shortcut for layer in sliced.modules() if isinstance(layer, SlicedLayer) for shortcut in layer.shortcuts]
    return Account(
        dense_parameters=parameter_count(dense),
        parameters=parameter_count(sliced),
        shortcut_parameters=sum(parameter_count(shortcut) for shortcut in added),
        dense_flops=_flops(dense, context),
        flops=_flops(sliced, context),
        context=context,
    )


def plan_of_size(
    config: PreTrainedConfig,
    removed: float | int,
    schedule: Callable[[float], SlicePlan],
    *,
    shortcuts: str = "absorbed",
    highest: float = 0.85,
    tolerance: float = 1e-3,
) -> SlicePlan:
    """The plan of a schedule that removes this fraction of a dense model's parameters, shortcuts included, to `tolerance`.

    `schedule` makes a plan of a slice percentage: ``lambda s: constant(32, 4096, s)``. The smallest one that removes enough is
    found by bisection up to `highest`. Raises ValueError when even that does not remove so much.
    """
    low, high = 0.0, highest
    plan, found = schedule(high), account(config, schedule(high), shortcuts=shortcuts).removed
    if not 0 <= removed <= found:
        raise ValueError(f"removed={removed}: this schedule removes 0 to {found:.3f} of the parameters, at slices up to {high}")
    while found - removed > tolerance and high - low > 1e-4:
        middle = (low + high) / 2
        candidate = schedule(middle)
        share = account(config, candidate, shortcuts=shortcuts).removed
        if share >= removed:
            high, plan, found = middle, candidate, share
        else:
            low = middle
    return plan


def dense_configuration(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the dense model behind that of a sliced one."""
    family_config = classes(config.slicing["family"])[0].__mro__[1]
    left_out = ("model_type", "architectures", "slicing")
    record = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return family_config.from_dict(record | {"tie_word_embeddings": config.slicing["tied"]})


def _flops(model: PreTrainedModel, context: int) -> int:
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    diagonal = sum(module.weight.numel() for module in model.modules() if isinstance(module, Diagonal))
    return linear + diagonal + 4 * context * heads * head_size * config.num_hidden_layers

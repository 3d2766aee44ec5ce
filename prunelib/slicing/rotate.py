"""Rotate and slice (SliceGPT, arXiv 2401.15024), with a width for every layer (Dynamic LLM Slicing, arXiv 2411.03513).

RMSNorm commutes with an orthogonal Q, so the residual stream may have another basis at every position: matrices that read the
stream absorb Q, matrices that write to it Q^T, residual connections become Q_i^T Q_{i+1}. In the basis of the principal axes
of the stream, the last axes carry little and are cut. (LayerNorm is RMSNorm after a subtraction of the mean, which the matrices
that write to the stream absorb.)

A sliced model computes what the dense one does when its stream is projected onto the kept axes at every position. So the
calibration runs the dense layers, unrotated, on a projected stream: every position sees the effect of all cuts before it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, memory
from prunelib.models.architectures import Architecture, Sublayer
from prunelib.models.layerwise import LayerwiseModel
from prunelib.models.onednn import use_onednn_like
from prunelib.slicing.modeling import (
    Normalize,
    architecture_of,
    classes,
    empty_model,
    norm_eps,
    positions,
    sliced_configuration,
    sublayer_output,
)
from prunelib.slicing.schedules import SlicePlan

DAMPING = 0.01
"""Added to the diagonal of the second moments, times its mean, as SliceGPT does: no eigenvector changes, but where the norms
subtract the mean, the direction of that mean is left out and so comes last."""

Axes = Callable[[Tensor, int], Tensor]
"""From second moments [D, D] and a width to orthonormal columns [D, width], in float64."""

_ROWS = 8192  # of an embedding table that are rotated at once in float64
_BLOCK = 512  # rows of second moments that are added at once: large enough for an accelerator


def principal_axes(moments: Float64[Tensor, "D D"], width: int) -> Float64[Tensor, "D width"]:
    """Eigenvectors of the largest eigenvalues, in descending order."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width]


def random_axes(seed: int) -> Axes:
    """Control: random directions, independent at every position, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def axes(moments: Tensor, width: int) -> Tensor:
        # The damped moments separate directions that can occur from the one that the subtracted mean excludes.
        drawn = torch.randn(len(moments), width, dtype=torch.float64, generator=generator).to(moments.device)
        values, vectors = torch.linalg.eigh(moments)
        possible = vectors[:, values > values[-1] * 1e-12]
        return torch.linalg.qr(possible @ (possible.T @ drawn)).Q if width < len(moments) else torch.linalg.qr(drawn).Q

    return axes


@memory.says_what_fits("batch_size", "fewer or shorter windows")
def slice_model(
    model: PreTrainedModel,
    plan: SlicePlan,
    windows: Int[Tensor, "sample token"],
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    shortcuts: str = "folded",
    subtract_mean: bool = False,
    axes: Axes = principal_axes,
    progress: bool = True,
) -> PreTrainedModel:
    """A new model whose residual stream has the widths of `plan`, calibrated on token windows; `model` stays as it is.

    The result is a `prunelib_sliced` model of the same dtype on the same device, its head untied from the embeddings. Save it
    with `prunelib.models.save` or `save_pretrained`; AutoModelForCausalLM loads it wherever prunelib was imported.

    Work is done layer by layer on `device` (that of the model unless given; the model may then stay on the CPU), which holds
    one layer, one batch, a few D x D matrices in float64, and the stream of all windows (samples x tokens x D numbers of the
    model's dtype). Moments, axes and rotations are float64, and the axes are those of the stream before the norms, not
    centered; the layers run in the model's dtype.

    shortcuts: one of `modeling.SHORTCUTS`. "full" keeps a matrix between each two positions, as SliceGPT does. "folded"
        computes the same with half of these parameters or less. "shared_basis" gives the whole model one basis, the principal
        axes of the dense stream's moments at all positions, each divided by its trace.
    subtract_mean: take the mean over D off the embeddings, as SliceGPT's code does for every model. It changes nothing where
        the norms do the same (LayerNorm), and changes the function of a model that has RMSNorm.
    axes: how directions are chosen; `random_axes` is a control.

    Raises, before any work, UnsupportedModel naming the model type for a model that cannot be sliced, and ValueError for a
    plan of another model or windows that cannot calibrate it; RuntimeError naming the layer at the first NaN or infinity.
    """
    config = sliced_configuration(model.config, plan, shortcuts=shortcuts)
    architecture = _checked(model)
    check_windows(model, windows, batch_size=batch_size)
    widths = positions(plan.widths, len(architecture.steps(model.config)), plan.hidden_size)
    widest = max((width for width in widths if width < plan.hidden_size), default=0)
    if windows.numel() < widest:
        raise ValueError(
            f"{windows.numel()} calibration tokens cannot say which {widest} of {plan.hidden_size} directions to keep: "
            "give more tokens than the widest layer keeps (many times as many, for good axes)"
        )
    calibration = _Calibration(
        model=model,
        architecture=architecture,
        widths=widths,
        windows=windows,
        batch_size=batch_size,
        device=torch.empty(0, device=model.device if device is None else device).device,  # with its index
        everywhere=shortcuts != "folded",
        subtract_mean=subtract_mean,
        axes=axes,
        progress=progress,
    )
    with torch.no_grad():
        weights = _rotated(calibration, _BASES[shortcuts](calibration), config.slicing["shortcuts"])
        return use_onednn_like(model, _assembled(model, config, weights))


def _checked(model: PreTrainedModel) -> Architecture:
    """The architecture of a model of a family that can be sliced; refuses what of it cannot be."""
    model_type, config = model.config.model_type, model.config
    architecture = architecture_of(config)
    if not isinstance(model, classes(model_type)[1].__mro__[1]) or type(model).__module__.startswith("transformers_modules"):
        raise UnsupportedModel(f"{type(model).__name__} is not the causal language model of type {model_type!r}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"this {model_type} model is quantized; slice it unquantized, then quantize the sliced model")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModel(
            f"this {model_type} model is spread over several devices; load it on one (the CPU), and give slice_model a device"
        )
    known = dict(model.named_modules())
    for path in (architecture.final_norm, *architecture.embeddings):  # OPT may be without, or project its embeddings
        if path not in known:
            raise UnsupportedModel(f"this {model_type} model cannot be sliced: it has no {path}")
        if path in architecture.embeddings and known[path].weight.shape[1] != config.hidden_size:
            raise UnsupportedModel(f"this {model_type} model cannot be sliced: {path} is narrower than its hidden states")
    return architecture


@dataclass(frozen=True)
class _Calibration:
    """What finding the bases needs; `everywhere` asks for axes where nothing is cut as well."""

    model: PreTrainedModel
    architecture: Architecture
    widths: list[int]
    windows: Tensor
    batch_size: int
    device: torch.device
    everywhere: bool
    subtract_mean: bool
    axes: Axes
    progress: bool

    @property
    def size(self) -> int:
        return self.model.config.hidden_size

    def bases(self, basis: Callable[[Tensor, int], Tensor | None] | None = None) -> Iterator[Tensor | None]:
        """The axes [D, width] kept at each position, in order, None where nothing is cut.

        `basis` makes them of moments and a width, as `chosen` does unless given; where it returns None, nothing is cut.
        Raises RuntimeError for moments that are not finite.
        """
        wanted = [self.everywhere or width < self.size for width in self.widths]
        last = max((place for place, axes in enumerate(wanted) if axes), default=-1)
        states, calls = self.embedded() if last >= 0 else ([], {})
        steps = self.architecture.steps(self.model.config)
        layers = self.model.get_submodule(self.architecture.layers)
        found = layer = None
        for place in tqdm(range(last + 1), desc="slicing", unit="position", disable=not self.progress):
            moments = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device) if wanted[place] else None
            index, step = divmod(place - 1, len(steps))
            if place == 0:
                what = "the embeddings"
                for state in states:
                    _add_moments(moments, state)
            else:
                what = f"the hidden states after {' and '.join(one.modules[0] for one in steps[step])} of layer {index}"
                layer = layer or _on(layers[index], self.device)
                arguments = {rows: send_to_device(of_layers[index][1], self.device) for rows, of_layers in calls.items()}
                self.advance(states, layer, steps[step], arguments, found, self.widths[place - 1], moments)
                if step == len(steps) - 1:
                    layer = None  # it leaves the device before the next one comes
            found = None
            if moments is not None:
                if not bool(torch.isfinite(moments).all()):
                    raise RuntimeError(f"NaN or infinity in {what}; check the weights, or use a dtype of wider range")
                moments.tril_().add_(moments.tril(-1).T)
                found = (basis or self.chosen)(moments, self.widths[place])
                del moments
            yield None if found is None else found[:, : self.widths[place]]
        yield from (None for _ in self.widths[last + 1 :])

    def chosen(self, moments: Float64[Tensor, "D D"], width: int) -> Float64[Tensor, "D _"]:
        """The axes of moments that are damped here, in place: `width` to keep, then, where they come for free, those to cut."""
        floor = DAMPING * float(moments.diagonal().mean())
        moments.diagonal().add_(floor)
        if self.architecture.centered:
            moments -= floor / self.size
        return self.axes(moments, self.size if self.axes is principal_axes else width)

    def embedded(self) -> tuple[list[Tensor], dict[int, list[tuple[tuple, dict]]]]:
        """The stream before layer 0, by batch, and what each layer is called with beside it, by number of rows in the batch."""
        engine, states, calls = LayerwiseModel(self.model), [], {}
        for rows in self.windows.split(self.batch_size):
            stream = engine.embed(rows).to(self.device)
            states.append(_centered(stream) if self.architecture.centered or self.subtract_mean else stream)
            calls[len(rows)] = engine.calls
        return states, calls

    def advance(
        self,
        states: list[Tensor],
        layer: nn.Module,
        step: tuple[Sublayer, ...],
        arguments: dict[int, dict[str, Any]],
        basis: Float64[Tensor, "D _"] | None,
        width: int,
        moments: Float64[Tensor, "D D"] | None,
    ) -> None:
        """Project the stream onto the first `width` axes of `basis`, run a step on it, and add up the moments of the result."""
        dtype, centered = self.model.dtype, self.architecture.centered
        norms = [layer.get_submodule(sublayer.norm) for sublayer in step]
        weights = [(Normalize(self.size, norm_eps(norm)), *_norm_weights(norm, self.architecture, dtype)) for norm in norms]
        kept = None if basis is None or width == self.size else basis[:, :width].to(dtype)
        # Subtracting what is cut is less work than projecting onto what is kept, and rounds less.
        cut = basis[:, width:].to(dtype) if kept is not None and basis.shape[1] == self.size < 2 * width else None
        for number, stream in enumerate(states):
            if cut is not None:
                stream = stream - (stream @ cut) @ cut.T
            elif kept is not None:
                stream = (stream @ kept) @ kept.T
            result = stream
            for sublayer, (normalize, scale, shift) in zip(step, weights, strict=True):
                normed = normalize(stream) * scale + shift
                result = result + sublayer_output(layer, sublayer, normed, arguments[len(stream)])
            states[number] = _centered(result) if centered else result
            _add_moments(moments, states[number])


def _add_moments(moments: Float64[Tensor, "D D"] | None, stream: Float[Tensor, "sample token D"]) -> None:
    """Add the sums of products, in blocks on and below the diagonal."""
    if moments is not None:
        flat = stream.flatten(0, 1).double()
        for first in range(0, len(moments), _BLOCK):
            rows = slice(first, first + _BLOCK)
            moments[rows, : rows.stop].addmm_(flat[:, rows].T, flat[:, : rows.stop])


def _centered(stream: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return (wide - wide.mean(dim=-1, keepdim=True)).to(stream.dtype)


def _norm_weights(norm: nn.Module, architecture: Architecture, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """Scale and shift of a family's norm."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = 1.0 if weight is None else weight.to(dtype) + architecture.norm_offset
    return scale, 0.0 if bias is None else bias.to(dtype)


def _on(layer: nn.Module, device: torch.device) -> nn.Module:
    """The layer with its tensors on the device, those that are there already shared."""
    # deepcopy takes the values of its memo for copies made before: no tensor is copied on its own device first.
    return copy.deepcopy(layer, {id(tensor): tensor.to(device) for tensor in (*layer.parameters(), *layer.buffers())})


def _shared(calibration: _Calibration) -> Iterator[Tensor]:
    """The first directions of one basis at every position."""
    total = torch.zeros(calibration.size, calibration.size, dtype=torch.float64, device=calibration.device)

    def add(moments: Tensor, width: int) -> None:
        total.add_(moments / moments.trace())  # the deep layers, where the stream is largest, must not decide alone

    for _ in calibration.bases(add):
        pass
    axes = calibration.chosen(total, calibration.size)
    for width in calibration.widths:
        yield axes[:, :width]


def _folded(calibration: _Calibration) -> Iterator[Tensor]:
    """The bases, rotated within what they span as `modeling.shortcut_kinds` says, and filled in where nothing is cut.

    It looks ahead by one position, and over uncut positions at the beginning.
    """
    waiting, before = 0, None
    for basis in _paired(calibration.bases()):
        if basis is not None:
            yield from [_completed(basis)] * waiting if waiting else ()
            waiting, before = 0, basis
            yield basis
        elif before is None:
            waiting += 1
        else:
            before = _completed(before)
            yield before
    for _ in range(waiting):
        yield torch.eye(calibration.size, dtype=torch.float64, device=calibration.device)


_BASES = {"folded": _folded, "full": _Calibration.bases, "shared_basis": _shared}


def _paired(bases: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Each two neighboring bases rotated by the singular vectors of what lies between them, which becomes diagonal."""
    held = None
    for basis in bases:
        if held is not None and basis is not None:
            left, right = _singular_vectors(held.T @ basis)
            yield held @ left
            yield basis @ right
            held = None
        elif basis is not None:
            held = basis
        else:
            yield from (held, None) if held is not None else (None,)
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
    """The basis, followed by an orthonormal basis of the rest of the space."""
    return torch.cat([basis, torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]], dim=1)


def _rotated(calibration: _Calibration, bases: Iterable[Tensor], shortcuts: list[str]) -> dict[str, Tensor]:
    """The weights of the sliced model that differ from the dense model's, each made as soon as its bases are known."""
    model, architecture, device = calibration.model, calibration.architecture, calibration.device
    layers, steps = model.get_submodule(architecture.layers), architecture.steps(model.config)
    weights: dict[str, Tensor] = {}

    def put(name: str, value: Tensor, like: Tensor) -> None:
        weights[name] = value.to(like.device, like.dtype).contiguous()

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(device).to(torch.float64)

    def reads(module: nn.Module, path: str, norm: nn.Module, name: str, basis: Tensor) -> None:
        """A linear map behind a norm absorbs the norm's weights and the basis."""
        linear = module.get_submodule(path)
        scale, shift = _norm_weights(norm, architecture, torch.float64)
        weight = wide(linear.weight)
        put(f"{name}.weight", (weight * torch.as_tensor(scale).to(device)) @ basis, linear.weight)
        if linear.bias is not None or isinstance(shift, Tensor):
            bias = 0.0 if linear.bias is None else wide(linear.bias)
            added = weight @ shift.to(device) if isinstance(shift, Tensor) else 0.0
            put(f"{name}.bias", bias + added, linear.weight)

    def writes(module: nn.Module, path: str, name: str, target: Tensor) -> None:
        linear = module.get_submodule(path)
        put(f"{name}.weight", target.T @ wide(linear.weight), linear.weight)
        if linear.bias is not None:
            put(f"{name}.bias", target.T @ wide(linear.bias), linear.bias)

    before = None
    for place, basis in enumerate(bases):
        centers = architecture.centered or (calibration.subtract_mean and place == 0)
        target = _centered(basis.T).T if centers else basis
        if place == 0:
            for path in architecture.embeddings:
                table = model.get_submodule(path).weight
                put(f"{path}.weight", torch.cat([(wide(rows) @ target).to(table.dtype) for rows in table.split(_ROWS)]), table)
        else:
            index, step = divmod(place - 1, len(steps))
            name = f"{architecture.layers}.{index}"
            for sublayer in steps[step]:
                writes(layers[index], sublayer.output, f"{name}.{sublayer.output}", target)
            like = layers[index].get_submodule(steps[step][0].output).weight
            if shortcuts[place - 1] != "identity":
                between = before.T @ basis
                value = between.diagonal() if shortcuts[place - 1] == "diagonal" else between.T
                put(f"{name}.shortcuts.{step}.weight", value, like)
        index, step = divmod(place, len(steps))
        if index == len(layers):
            reads(model, architecture.head, model.get_submodule(architecture.final_norm), architecture.head, basis)
            break
        for sublayer in steps[step]:
            for path in sublayer.inputs:
                norm = layers[index].get_submodule(sublayer.norm)
                reads(layers[index], path, norm, f"{architecture.layers}.{index}.{path}", basis)
        before = basis
    return weights


def _assembled(model: PreTrainedModel, config: PreTrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The sliced model of these weights; what they leave out is copied from the dense model."""
    sliced, dense = empty_model(config), model.state_dict()
    copied = {name: dense[name].clone() for name in sliced.state_dict() if name not in weights}
    sliced.load_state_dict(weights | copied, strict=True, assign=True)
    buffers = dict(model.named_buffers())
    for name, buffer in list(sliced.named_buffers()):
        if buffer.is_meta:  # rotary frequencies and the like, which no state dict holds
            owner, _, attribute = name.rpartition(".")
            setattr(sliced.get_submodule(owner), attribute, buffers[name].clone())
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced.eval()

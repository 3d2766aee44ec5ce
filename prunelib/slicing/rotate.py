"""Rotate and slice (SliceGPT, arXiv 2401.15024), with a width for every layer (Dynamic LLM Slicing, arXiv 2411.03513).

RMSNorm commutes with an orthogonal Q, so the residual stream may have another basis at every position: matrices that read the
stream absorb Q, matrices that write to it Q^T, residual connections become Q_i^T Q_{i+1}. In the basis of the principal axes
of the stream, the last axes carry little and are cut. (LayerNorm is RMSNorm after a subtraction of the mean, which the matrices
that write to the stream absorb.) Calibration runs the dense layers on a stream that is projected onto the kept axes at every
position, which is what the sliced model computes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, memory
from prunelib.models.architectures import Architecture
from prunelib.models.layerwise import LayerwiseModel
from prunelib.models.onednn import use_onednn_like
from prunelib.slicing import modeling
from prunelib.slicing.modeling import Normalize, norm_eps, sublayer_output
from prunelib.slicing.schedules import SlicePlan

# Added to the diagonal of the second moments, times its mean, as SliceGPT does: no eigenvector changes, but where the norms
# subtract the mean, the direction of that mean is left out and so comes last.
DAMPING = 0.01

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
@torch.no_grad()
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
    model's dtype). The axes are those of the stream before the norms, not centered.

    shortcuts: one of `modeling.SHORTCUTS`. axes: how directions are chosen; `random_axes` is a control. subtract_mean: take the
    mean over D off the embeddings, as SliceGPT's code does for every model, which changes the function of a model with RMSNorm.

    Raises, before any work, UnsupportedModel naming the model type for a model that cannot be sliced, and ValueError for a
    plan of another model or windows that cannot calibrate it; RuntimeError naming the layer at the first NaN or infinity.
    """
    config = modeling.sliced_configuration(model.config, plan, shortcuts=shortcuts)
    architecture = _checked(model)
    check_windows(model, windows, batch_size=batch_size)
    widths = modeling.positions(plan.widths, len(architecture.steps(model.config)), plan.hidden_size)
    widest = max((width for width in widths if width < plan.hidden_size), default=0)
    if windows.numel() < widest:
        what = f"{windows.numel()} calibration tokens cannot say which {widest} of {plan.hidden_size} directions to keep"
        raise ValueError(f"{what}: give more tokens than the widest layer keeps (many times as many, for good axes)")
    place = torch.empty(0, device=model.device if device is None else device).device  # with its index
    calibration = _Calibration(
        model, architecture, widths, windows, batch_size, place, shortcuts != "folded", subtract_mean, axes, progress
    )
    weights = _rotated(calibration, _BASES[shortcuts](calibration), config.slicing["shortcuts"])
    return use_onednn_like(model, _assembled(model, config, weights))


def _checked(model: PreTrainedModel) -> Architecture:
    """The architecture of a model of a family that can be sliced; refuses what of it cannot be."""
    model_type, config = model.config.model_type, model.config
    architecture = modeling.architecture_of(config)
    dense_class = modeling.classes(model_type)[1].__mro__[1]
    if not isinstance(model, dense_class) or type(model).__module__.startswith("transformers_modules"):
        raise UnsupportedModel(f"{type(model).__name__} is not the causal language model of type {model_type!r}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"this {model_type} model is quantized; slice it unquantized, then quantize the sliced model")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModel(f"this {model_type} model is spread over several devices; load it on the CPU, and give a device")
    known = dict(model.named_modules())
    for path in (architecture.final_norm, *architecture.embeddings):  # OPT may be without, or project its embeddings
        if path not in known:
            raise UnsupportedModel(f"this {model_type} model cannot be sliced: it has no {path}")
        if path in architecture.embeddings and known[path].weight.shape[1] != config.hidden_size:
            raise UnsupportedModel(f"this {model_type} model cannot be sliced: {path} is narrower than its hidden states")
    return architecture


@dataclass
class _Calibration:
    """The stream of all windows, which runs through the layers while the bases are found."""

    model: PreTrainedModel
    architecture: Architecture
    widths: list[int]
    windows: Tensor
    batch_size: int
    device: torch.device
    everywhere: bool  # axes are wanted where nothing is cut as well
    subtract_mean: bool
    axes: Axes
    progress: bool

    def __post_init__(self):
        engine, config = LayerwiseModel(self.model), self.model.config
        self.size, self.steps, self.layer = config.hidden_size, self.architecture.steps(config), None
        self.states: list[Tensor] = []
        self.calls = {}  # what each layer is called with beside the stream, by number of rows in the batch
        for rows in self.windows.split(self.batch_size):
            stream = engine.embed(rows).to(self.device)
            self.states.append(_centered(stream) if self.architecture.centered or self.subtract_mean else stream)
            self.calls[len(rows)] = engine.calls

    def zeros(self) -> Float64[Tensor, "D D"]:
        return torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)

    def bases(self, basis: Callable[[Tensor, int], Tensor | None] | None = None) -> Iterator[Tensor | None]:
        """The axes [D, width] kept at each position, in order, None where nothing is cut.

        `basis` makes them of moments and a width, as `chosen` does unless given; where it returns None, nothing is cut.
        """
        wanted = [self.everywhere or width < self.size for width in self.widths]
        last = max((place for place, axes in enumerate(wanted) if axes), default=-1)
        found = None
        for place in tqdm(range(last + 1), desc="slicing", unit="position", disable=not self.progress):
            if place > 0:
                self.advance(place, found)
            found = (basis or self.chosen)(self.moments(place), self.widths[place]) if wanted[place] else None
            yield None if found is None else found[:, : self.widths[place]]
        yield from (None for _ in self.widths[last + 1 :])

    def chosen(self, moments: Float64[Tensor, "D D"], width: int) -> Float64[Tensor, "D _"]:
        """The axes of moments that are damped here, in place: `width` to keep, then, where they come for free, those to cut."""
        floor = DAMPING * float(moments.diagonal().mean())
        moments.diagonal().add_(floor)
        if self.architecture.centered:
            moments -= floor / self.size
        return self.axes(moments, self.size if self.axes is principal_axes else width)

    def moments(self, place: int) -> Float64[Tensor, "D D"]:
        """The sums of products of the stream, in blocks on and below the diagonal, then above."""
        total = self.zeros()
        for stream in self.states:
            flat = stream.flatten(0, 1).double()
            for first in range(0, self.size, _BLOCK):
                rows = slice(first, first + _BLOCK)
                total[rows, : rows.stop].addmm_(flat[:, rows].T, flat[:, : rows.stop])
        if not bool(torch.isfinite(total).all()):
            index, step = divmod(place - 1, len(self.steps))
            after = f"hidden states after {' and '.join(one.modules[0] for one in self.steps[step])} of layer {index}"
            what = after if place > 0 else "embeddings"
            raise RuntimeError(f"NaN or infinity in the {what}; check the weights, or use a dtype of wider range")
        return total.tril_().add_(total.tril(-1).T)

    def advance(self, place: int, basis: Float64[Tensor, "D _"] | None) -> None:
        """Project the stream onto the first axes of `basis`, that of the position before, and run the step between the two."""
        index, number = divmod(place - 1, len(self.steps))
        step, width, dtype = self.steps[number], self.widths[place - 1], self.model.dtype
        if number == 0:
            self.layer = None  # it leaves the device before the next one comes
            self.layer = _on(self.model.get_submodule(self.architecture.layers)[index], self.device)
        arguments = {rows: send_to_device(of_layers[index][1], self.device) for rows, of_layers in self.calls.items()}
        norms = [self.layer.get_submodule(sublayer.norm) for sublayer in step]
        weights = [(Normalize(self.size, norm_eps(norm)), *_norm_weights(norm, self.architecture, dtype)) for norm in norms]
        kept = None if basis is None or width == self.size else basis[:, :width].to(dtype)
        # Subtracting what is cut is less work than projecting onto what is kept, and rounds less.
        cut = basis[:, width:].to(dtype) if kept is not None and basis.shape[1] == self.size < 2 * width else None
        for batch, stream in enumerate(self.states):
            if cut is not None:
                stream = stream - (stream @ cut) @ cut.T
            elif kept is not None:
                stream = (stream @ kept) @ kept.T
            result = stream
            for sublayer, (normalize, scale, shift) in zip(step, weights, strict=True):
                normed = normalize(stream) * scale + shift
                result = result + sublayer_output(self.layer, sublayer, normed, arguments[len(stream)])
            self.states[batch] = _centered(result) if self.architecture.centered else result


def _centered(stream: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return (wide - wide.mean(dim=-1, keepdim=True)).to(stream.dtype)


def _norm_weights(norm: nn.Module, architecture: Architecture, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """Scale and shift of a family's norm."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = 1.0 if weight is None else weight.to(dtype) + architecture.norm_offset
    return scale, 0.0 if bias is None else bias.to(dtype)


def _on(layer: nn.Module, device: torch.device) -> nn.Module:
    # deepcopy takes the values of its memo for copies made before: what is on the device already is shared.
    return copy.deepcopy(layer, {id(tensor): tensor.to(device) for tensor in (*layer.parameters(), *layer.buffers())})


def _shared(calibration: _Calibration) -> Iterator[Tensor]:
    """The first directions of one basis at every position."""
    total = calibration.zeros()

    def add(moments: Tensor, width: int) -> None:
        total.add_(moments / moments.trace())  # the deep layers, where the stream is largest, must not decide alone

    for _ in calibration.bases(add):
        pass
    axes = calibration.chosen(total, calibration.size)
    for width in calibration.widths:
        yield axes[:, :width]


def _folded(calibration: _Calibration) -> Iterator[Tensor]:
    """The bases, rotated within what they span as `modeling.shortcut_kinds` says, and filled in where nothing is cut."""
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
        yield calibration.zeros().fill_diagonal_(1)


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
        else:
            if held is not None:
                yield held
            if basis is None:
                yield None
            held = basis
    if held is not None:
        yield held


def _singular_vectors(matrix: Float64[Tensor, "m n"]) -> tuple[Float64[Tensor, "m m"], Float64[Tensor, "n n"]]:
    """Orthogonal U and V that make U^T matrix V diagonal, its entries at least 0; to 1e-8 at worst for entries up to 1."""
    # On accelerators far faster than a singular value decomposition.
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

    def wide(tensor: Tensor | float) -> Tensor:
        return torch.as_tensor(tensor).to(device).to(torch.float64)

    def reads(owner: nn.Module, prefix: str, path: str, norm: str, basis: Tensor) -> None:
        """A linear map behind a norm absorbs the norm's weights and the basis."""
        linear = owner.get_submodule(path)
        scale, shift = map(wide, _norm_weights(owner.get_submodule(norm), architecture, torch.float64))
        put(f"{prefix}{path}.weight", (wide(linear.weight) * scale) @ basis, linear.weight)
        if linear.bias is not None or shift.ndim:
            added = wide(linear.weight) @ shift if shift.ndim else 0.0
            put(f"{prefix}{path}.bias", wide(0.0 if linear.bias is None else linear.bias) + added, linear.weight)

    before = None
    for place, basis in enumerate(bases):
        centers = architecture.centered or (calibration.subtract_mean and place == 0)
        target = _centered(basis.T).T if centers else basis
        index, step = divmod(place - 1, len(steps))
        if place == 0:
            for path in architecture.embeddings:
                table = model.get_submodule(path).weight
                put(f"{path}.weight", torch.cat([(wide(rows) @ target).to(table.dtype) for rows in table.split(_ROWS)]), table)
        else:
            for path in (sublayer.output for sublayer in steps[step]):
                for kind, value in layers[index].get_submodule(path).named_parameters():
                    put(f"{architecture.layers}.{index}.{path}.{kind}", target.T @ wide(value), value)
            if shortcuts[place - 1] != "identity":
                between = before.T @ basis
                between = between.diagonal() if shortcuts[place - 1] == "diagonal" else between.T
                like = layers[index].get_submodule(steps[step][0].output).weight
                put(f"{architecture.layers}.{index}.shortcuts.{step}.weight", between, like)
        index, step = divmod(place, len(steps))
        if index == len(layers):
            reads(model, "", architecture.head, architecture.final_norm, basis)
            break
        for sublayer in steps[step]:
            for path in sublayer.inputs:
                reads(layers[index], f"{architecture.layers}.{index}.", path, sublayer.norm, basis)
        before = basis
    return weights


def _assembled(model: PreTrainedModel, config: PreTrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The sliced model of these weights; what they leave out is copied from the dense model."""
    sliced, dense = modeling.empty_model(config), model.state_dict()
    copied = {name: dense[name].clone() for name in sliced.state_dict() if name not in weights}
    sliced.load_state_dict(weights | copied, strict=True, assign=True)
    buffers = dict(model.named_buffers())
    for name, buffer in list(sliced.named_buffers()):
        if buffer.is_meta:  # rotary frequencies and the like, which no state dict holds
            owner, _, attribute = name.rpartition(".")
            setattr(sliced.get_submodule(owner), attribute, buffers[name].clone())
    sliced.generation_config = copy.deepcopy(model.generation_config)
    return sliced.eval()

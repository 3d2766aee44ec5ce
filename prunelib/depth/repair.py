"""Closed-form repair of removed layers: a least-squares map at each removed span, fused into weights that are there anyway.

Let x be the hidden states of the pruned model where layers were removed and y those of the dense model behind them. A repair
makes x more like y, by linear regression on calibration windows; what is kept are sums over tokens, in float64. Spans are
repaired from the bottom; each sees the repairs below it, and has the dense model's states as its target.

What an ordinary checkpoint can express. x = z + a, where a is what the last layer before the span writes last: its MLP output
or, in a layer with parallel sublayers, what its attention and its MLP write. The matrices that write a are free to change:
nothing but the residual stream behind the span reads a. z is not free: the same layer's MLP and all layers below read parts of
it. One number is: norms do not see a factor, so that a stream s x behind the span, to which the layers above add, is the
stream x to which they add 1 / s of it (exactly, but for the epsilon in the norms). Least squares shrinks what it cannot
predict, and so gives all later additions too much weight; the methods with a factor end by matching the norm of y. A span that
starts at layer 0 has no a, and no z: x is what the embedding tables hold, and any map of it can be taken in by them, unless
the output head shares the table. Maps of the whole stream (LinearPatch, Ghosted Layers) fit in no ordinary checkpoint.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, decoder_layers, memory, remove_layers
from prunelib.models.architectures import ARCHITECTURES, SLICED_MODEL_TYPE, Architecture
from prunelib.models.layerwise import LayerwiseModel

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""What `damping=None` chooses from."""

FOLDS = 4
"""Parts of the windows of which each is held out once when the damping is chosen; fewer when there are fewer windows."""


@dataclass(frozen=True)
class Method:
    """A way to repair.

    source: where it is from, and how it differs. regressors: which columns u the change is a map of: "outputs" of the MLP's
    last matrix; "inputs" of all matrices that write last; "none". scaled: the stream gets a factor, by least squares together
    with the change; then both are multiplied so that the sum of squares is that of y, which may raise the error. from_zero:
    damping shrinks the whole map I + change instead of the change.
    """

    source: str
    regressors: str
    scaled: bool = False
    from_zero: bool = False


METHODS: dict[str, Method] = {
    "replaceme": Method(
        "ReplaceMe, arXiv 2505.02819: the MLP output a becomes a T, T = (A^T A)^-1 A^T (Y - Z). Damping shrinks T towards I",
        "outputs",
    ),
    "replaceme_published": Method(
        "ReplaceMe, arXiv 2505.02819, with its damping, T = (A^T A + lambda I)^-1 A^T (Y - Z), which shrinks T towards 0",
        "outputs",
        from_zero=True,
    ),
    "scale": Method(
        "own: LinearPatch (arXiv 2505.24680) with one factor for all channels, |y| / |x|, put into the layers above",
        "none",
        scaled=True,
    ),
    "replaceme_scale": Method("own: `replaceme` and `scale` fitted together, z s + a T", "outputs", scaled=True),
    "refit": Method(
        "own: the last matrices before the span fitted again on their inputs, damped towards what they were. ReplaceMe's T "
        "is the special case that mixes their outputs. With parallel sublayers that of the attention too",
        "inputs",
    ),
    "refit_scale": Method("own: `refit` and `scale` fitted together", "inputs", scaled=True),
}
"""Methods of `repair`: the result is an ordinary checkpoint."""


@dataclass(frozen=True)
class PrunedSpan:
    """A run of removed layers and what was done about it. Layer indices are those of the dense model.

    before: the last layer that stays below; None when layer 0 is removed. removed: ascending, contiguous. error_before,
    error_after: |y - x| / |y| over all tokens (Frobenius norm), with the spans below repaired, without and with this repair; as
    the regression has it, before the new weights are rounded to their dtype. damping: added to the diagonal of the regressors'
    second moments, times its mean; None for a method without. scale: the factor s on the stream, 1 for a method without.
    """

    before: int | None
    removed: tuple[int, ...]
    error_before: float
    error_after: float
    damping: float | None
    scale: float


@dataclass(frozen=True)
class Repaired:
    """An ordinary model without the removed layers, which shares with the dense model the weights that are unchanged."""

    model: PreTrainedModel
    spans: tuple[PrunedSpan, ...]


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
def repair(
    dense: PreTrainedModel,
    removed: Collection[SupportsIndex],
    windows: Int[Tensor, "sample position"],
    *,
    method: str = "replaceme",
    damping: float | int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Repaired:
    """`dense` without the layers `removed`, repaired at every span of them; `dense` stays as it was.

    The result has the dense model's modules, dtype and device. It costs forward passes: for each span, of the dense model up to
    behind the span and of the pruned one up to it. In memory are one batch and the sums: 3 D x D numbers in float64 for
    `replaceme`, F x F and 2 F x D for `refit` (F the width of the MLP), `FOLDS` times when a damping is chosen. Where many
    factors meet in bfloat16 weights, calibrate in float32 and convert the result.

    Args:
        windows: token ids, all of them real tokens.
        method: a key of `METHODS`.
        damping: relative to the mean of the diagonal of the regressors' second moments; 0 is plain least squares, of all
            solutions the one nearest to no repair. None chooses one of `DAMPINGS` for each span, by the error on held-out
            windows (`FOLDS`), then fits on all windows.

    Raises, before any work: ValueError for an unknown method, damping out of range, layers that do not exist or windows that
    cannot calibrate; UnsupportedModel where it is not known how the family writes to the stream (`models.architectures`) or
    nothing can change: layer 0 removed while the head shares the embedding table; and as `models.remove_layers`.
    RuntimeError at the first NaN or infinity.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    damped = METHODS[method].regressors != "none"
    if damping is not None and not damped:
        raise ValueError(f"damping={damping}: method {method!r} has none, leave it out")
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: 0 (plain least squares) or a finite positive number, or None to choose it")
    architecture = _architecture(dense, removed)
    check_windows(dense, windows, batch_size=batch_size)
    if damping is None and damped and len(windows) < 2:
        raise ValueError("a damping cannot be chosen with 1 window, none could be held out: give more windows, or a damping")
    pruned = remove_layers(dense, removed)
    spans = _spans(removed)
    shared = dense.get_input_embeddings().weight is getattr(dense.get_output_embeddings(), "weight", None)
    if spans and spans[0][0] == 0 and damped and shared:
        raise UnsupportedModel(
            f"layer 0 of this {dense.config.model_type} model is removed, so that only the embedding table could take in the "
            "repair, but the output head shares it: keep layer 0, use method 'scale', or untie the head first"
        )
    job = _Job(dense, pruned, architecture, windows, METHODS[method], damping, batch_size, progress)
    found, factor = [], 1.0
    for below, removed_here in spans:
        fit, record = job.fitted(below, removed_here, factor)
        job.fuse(below, fit)
        factor *= fit.scale
        found.append(record)
    return Repaired(pruned, tuple(found))


def _spans(removed: Collection[SupportsIndex]) -> list[tuple[int, tuple[int, ...]]]:
    """(number of layers that stay below, removed layers) for each contiguous run, from the bottom."""
    gone = sorted(int(index) for index in removed)
    # Members of a run have the same difference between index and rank.
    runs = itertools.groupby(enumerate(gone), lambda item: item[1] - item[0])
    return [(below, tuple(index for _, index in run)) for below, run in runs]


def _architecture(model: PreTrainedModel, removed: Collection[SupportsIndex]) -> Architecture:
    """How the layers that stay write to the stream. Raises UnsupportedModel naming the model type when that is not known."""
    decoder_layers(model)
    model_type = model.config.model_type
    if model_type == SLICED_MODEL_TYPE:
        raise UnsupportedModel("this model is sliced: remove layers and repair first, then slice what is left")
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedModel(
            f"model type {model_type!r} cannot be repaired: to take in a repair, the last matrix of the MLP has to write to "
            "the stream directly, with no norm (Gemma 2, OLMo 2), factor or mixture of experts in between. Families known to "
            f"do so: {', '.join(sorted(ARCHITECTURES))}. Remove the layers without repair, and heal by training"
        )
    needed = [(model, path, nn.Module) for path in (architecture.final_norm, *architecture.embeddings)]
    for index, layer in enumerate(decoder_layers(model)):
        if index not in removed:
            needed += [(layer, sublayer.output, nn.Linear) for sublayer in (architecture.attn, architecture.mlp)]
    for owner, path, kind in needed:
        module = owner
        for name in path.split("."):
            module = getattr(module, name, None)
        if not isinstance(module, kind):
            raise UnsupportedModel(f"this {model_type} model cannot be repaired: it has no {path}, or one of another kind")
    return architecture


# ----------------------------------------------------------------------------------------------------------- regression


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x -> scale x + u change + constant, for regressors u."""

    scale: float
    change: Float64[Tensor, "P D"]
    constant: Float64[Tensor, " D"]


@dataclass
class _Sums:
    """Sums over tokens, in float64, of regressors u [token, P], states x and target y [token, D]."""

    tokens: int
    u: Tensor
    x: Tensor
    y: Tensor
    uu: Tensor
    ux: Tensor
    uy: Tensor
    xx: float
    xy: float
    yy: float

    @classmethod
    def of(cls, u: Float64[Tensor, "token P"], x: Float64[Tensor, "token D"], y: Float64[Tensor, "token D"]) -> "_Sums":
        squares = (float((left * right).sum()) for left, right in ((x, x), (x, y), (y, y)))
        return cls(len(u), u.sum(0), x.sum(0), y.sum(0), u.T @ u, u.T @ x, u.T @ y, *squares)

    def combined(self, other: "_Sums", sign: int = 1) -> "_Sums":
        return _Sums(**{name: value + sign * getattr(other, name) for name, value in vars(self).items()})

    def error(self, fit: LinearMap | None = None) -> float:
        """|y - fit| / |y|; without a fit |y - x| / |y|."""
        if fit is None:
            fit = LinearMap(1.0, torch.zeros_like(self.ux), torch.zeros_like(self.x))
        s, d, c = fit.scale, fit.change, fit.constant
        squared = self.yy - 2 * s * self.xy + s * s * self.xx
        squared += float((d * (self.uu @ d + 2 * (s * self.ux - self.uy))).sum())
        squared += float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x - self.y)))
        return math.sqrt(max(squared, 0.0) / self.yy) if self.yy else 0.0

    def matched(self, fit: LinearMap) -> LinearMap:
        """The fit times what makes its sum of squares that of y."""
        s, d, c = fit.scale, fit.change, fit.constant
        squared = s * s * self.xx + float((d * (self.uu @ d + 2 * s * self.ux)).sum())
        squared += float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x)))
        factor = math.sqrt(self.yy / squared) if self.yy > 0 and squared > 0 else 1.0
        return LinearMap(s * factor, d * factor, c * factor)


class _Regression:
    """Maps fitted to sums, for any damping: the eigenvalues of the second moments are found once."""

    def __init__(self, sums: _Sums, method: Method, intercept: bool):
        self.sums, self.method, self.intercept = sums, method, intercept
        self.uu, self.ux, self.uy = sums.uu, sums.ux, sums.uy
        self.xx, self.xy = sums.xx, sums.xy
        if intercept:
            n = sums.tokens
            self.uu = self.uu - torch.outer(sums.u, sums.u) / n
            self.ux = self.ux - torch.outer(sums.u, sums.x) / n
            self.uy = self.uy - torch.outer(sums.u, sums.y) / n
            self.xx = self.xx - float(sums.x @ sums.x) / n
            self.xy = self.xy - float(sums.x @ sums.y) / n
        self.values, self.vectors = torch.linalg.eigh(self.uu)
        largest = float(self.values[-1]) if len(self.values) else 0.0
        # Second moments square the singular values: what is below this is rounding of their float64 sums.
        self.seen = self.values > largest * len(self.values) * torch.finfo(torch.float64).eps
        self.mean = float(self.uu.diagonal().mean()) if len(self.values) else 0.0

    def fit(self, damping: float) -> LinearMap:
        """The minimum of |y - s x - u d - c|^2 + damping mean(diag(u^T u)) |d|^2, s = 1 unless scaled, c = 0 unless there is
        an intercept."""
        inverse = torch.where(self.seen, 1 / (self.values + damping * self.mean), 0.0)[:, None]
        px, py = self.vectors.T @ self.ux, self.vectors.T @ self.uy
        scale = self._scale(px, py, inverse) if self.method.scaled else 1.0
        target = py - scale * px
        if self.method.from_zero:
            # y - z on a, where z = x - a: the whole T is damped.
            target = target + self.vectors.T @ self.uu
        change = self.vectors @ (inverse * target)
        if self.method.from_zero:
            change = change - torch.eye(len(change), dtype=change.dtype, device=change.device)
        constant = torch.zeros_like(self.sums.x)
        if self.intercept:
            constant = (self.sums.y - scale * self.sums.x - self.sums.u @ change) / self.sums.tokens
        return LinearMap(scale, change, constant)

    def _scale(self, px: Tensor, py: Tensor, inverse: Tensor) -> float:
        """The best factor on x, when for each the best change comes with it. Positive: norms do see a sign."""
        unexplained = self.xx - float((inverse * px * px).sum())
        if unexplained <= 1e-10 * self.xx:
            return 1.0
        scale = (self.xy - float((inverse * px * py).sum())) / unexplained
        return scale if scale > 0 else 1.0


# -------------------------------------------------------------------------------------------------- calibration, fusing


class _Job:
    """Everything that finding and fusing the maps needs. `below` is always the number of layers below a span that stay."""

    def __init__(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        architecture: Architecture,
        windows: Int[Tensor, "sample position"],
        method: Method,
        damping: float | int | None,
        batch_size: int,
        progress: bool,
    ):
        self.dense, self.pruned, self.architecture = dense, pruned, architecture
        self.windows, self.method, self.damping = windows, method, damping
        self.batch_size, self.progress = batch_size, progress
        self.dense_engine, self.pruned_engine = LayerwiseModel(dense), LayerwiseModel(pruned)

    def writers(self, below: int) -> list[nn.Linear]:
        """The matrices that write last before the span, that of the MLP at the end; none above the embeddings."""
        if below == 0:
            return []
        layer = decoder_layers(self.pruned)[below - 1]
        return [layer.get_submodule(sublayer.output) for sublayer in self.architecture.steps(self.dense.config)[-1]]

    def states(self, below: int, removed: tuple[int, ...], folds: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """By batch: which fold of the windows, regressors u, states x, target y: [token, _] in float64."""
        name = f"the layers {removed[0]} to {removed[-1]}"
        edges = [fold * len(self.windows) // folds for fold in range(folds + 1)]
        written: dict[int, tuple[Tensor, Tensor]] = {}
        writers = self.writers(below)
        with ExitStack() as hooks, torch.no_grad():
            for place, writer in enumerate(writers):
                hook = writer.register_forward_hook(
                    lambda _, args, output, place=place: written.update({place: (args[0], output)})
                )
                hooks.callback(hook.remove)
            bar = tqdm(desc=f"repair of {name}", unit="window", total=len(self.windows), disable=not self.progress)
            hooks.enter_context(bar)
            for fold, (first, stop) in enumerate(itertools.pairwise(edges)):
                for start in range(first, stop, self.batch_size):
                    ids = self.windows[start : min(start + self.batch_size, stop)]
                    target = _behind(self.dense_engine, ids, removed[-1] + 1)
                    written.clear()
                    stream = _behind(self.pruned_engine, ids, below)
                    if not bool(torch.isfinite(target).all() and torch.isfinite(stream).all()):
                        raise RuntimeError(f"NaN or infinity at {name}; check the weights, or use a dtype of wider range")
                    columns = self._regressors(stream, [written[place] for place in range(len(writers))])
                    yield fold, *(item.double().flatten(0, 1) for item in (columns, stream, target))
                    bar.update(len(ids))

    def _regressors(self, stream: Tensor, written: list[tuple[Tensor, Tensor]]) -> Tensor:
        """From the stream and the last writers' (input, output); above the embeddings the stream itself is free."""
        if self.method.regressors == "none":
            return stream[..., :0]
        if not written:
            return stream
        columns = [written[-1][1]] if self.method.regressors == "outputs" else [read for read, _ in written]
        return torch.cat([column.reshape(*stream.shape[:2], -1) for column in columns], dim=-1)

    def fitted(self, below: int, removed: tuple[int, ...], factor: float) -> tuple[LinearMap, PrunedSpan]:
        """The map of a span, and its record; the target is divided by `factor`, that of the repairs below."""
        damped = self.method.regressors != "none"
        sums: dict[int, _Sums] = {}
        for fold, u, x, y in self.states(
            below, removed, min(FOLDS, len(self.windows)) if damped and self.damping is None else 1
        ):
            part = _Sums.of(u, x, y / factor)
            sums[fold] = sums[fold].combined(part) if fold in sums else part
        folds = list(sums.values())
        total = folds[0]
        for part in folds[1:]:
            total = total.combined(part)
        writers = self.writers(below)
        intercept = damped and bool(writers) and writers[-1].bias is not None
        damping = self.damping if len(folds) == 1 else self._best_damping(folds, total, intercept)
        fit = _Regression(total, self.method, intercept).fit(float(damping or 0.0))
        if self.method.scaled:
            fit = total.matched(fit)
        record = PrunedSpan(
            removed[0] - 1 if removed[0] else None,
            removed,
            total.error(),
            total.error(fit),
            None if damping is None else float(damping),
            fit.scale,
        )
        return fit, record

    def _best_damping(self, folds: list[_Sums], total: _Sums, intercept: bool) -> float:
        """The damping with the smallest error on held-out folds."""
        squared = dict.fromkeys(DAMPINGS, 0.0)
        for fold in folds:
            regression = _Regression(total.combined(fold, -1), self.method, intercept)
            weight = fold.yy / total.yy if total.yy else 0.0
            for damping in DAMPINGS:
                squared[damping] += weight * fold.error(regression.fit(damping)) ** 2
        return min(DAMPINGS, key=squared.__getitem__)

    def fuse(self, below: int, fit: LinearMap) -> None:
        """Put the map into the weights before the span, and its factor into the layers behind it."""
        change, constant = fit.change / fit.scale, fit.constant / fit.scale
        writers = self.writers(below)
        if self.method.regressors != "none" and not writers:
            # Positions, where they are learned, are part of the stream: the sum of the tables is mapped when each is.
            for path in self.architecture.embeddings:
                _change(self.pruned.get_submodule(path), lambda table: table + table @ change)
        elif self.method.regressors == "outputs":
            _change(
                writers[-1],
                lambda weight: weight + change.T @ weight,
                lambda bias: bias + change.T @ bias + constant,
            )
        elif self.method.regressors == "inputs":
            for writer, part in zip(writers, change.split([writer.in_features for writer in writers]), strict=True):
                added = constant if writer is writers[-1] else torch.zeros_like(constant)
                _change(writer, lambda weight, part=part: weight + part.T, lambda bias, added=added: bias + added)
        if fit.scale != 1.0:
            for layer in decoder_layers(self.pruned)[below:]:
                for sublayer in (self.architecture.attn, self.architecture.mlp):
                    _change(layer.get_submodule(sublayer.output), lambda weight: weight / fit.scale)


def _behind(engine: LayerwiseModel, ids: Int[Tensor, "batch position"], layers: int) -> Tensor:
    """The hidden states behind the first `layers` layers."""
    hidden = engine.embed(ids)
    for index in range(layers):
        hidden = engine.run_layer(index, hidden)
    return hidden


def _change(
    module: nn.Module, of_weight: Callable[[Tensor], Tensor], of_bias: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Give a module a new weight, and a new bias where it has one, computed in float64; the old tensors stay as they are."""
    for name, function in (("weight", of_weight), ("bias", of_bias or of_weight)):
        old = getattr(module, name, None)
        if old is not None:
            new = function(old.detach().double()).to(old.dtype).contiguous()
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))

"""Closed-form repair of removed layers: a least-squares map at each removed span, fused into weights that are there anyway.

Let x be the hidden states of the pruned model where layers were removed and y those of the dense model behind them. A repair
makes x more like y, by linear regression on calibration windows; what is kept are sums over tokens, in float64. Spans are
repaired from the bottom; each sees the repairs below it, and has the dense model's states as its target.

What an ordinary checkpoint can express. x = z + a, where a is what the last layer before the span writes last: its MLP output
or, in a layer with parallel sublayers, what its attention and its MLP write. The matrices that write a are free to change:
nothing but the residual stream behind the span reads a. z is not free: the same layer's MLP and all layers below read parts of
it. One number is: norms do not see a factor, so that a stream s x behind the span, to which the layers above add, is the
stream x to which they add 1 / s of it (exactly, but for the epsilon in the norms). Least squares shrinks what it cannot
predict, and so gives all later additions too much weight; the method with a factor ends by matching the norm of y. A span that
starts at layer 0 has no a, and no z: x is what the embedding tables hold, which can take in any map of it, unless the output
head shares the table. Maps of the whole stream (LinearPatch, Ghosted Layers) fit in no ordinary checkpoint.
"""

import functools
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


METHODS = ("replaceme", "refit", "refit_scale")
"""What `repair` fits. "replaceme" (arXiv 2505.02819): the MLP output a becomes a T, T = (A^T A)^-1 A^T (Y - Z); damping shrinks
T towards I here. "refit", own: the last matrices before the span fitted again on their inputs, damped towards what they were;
ReplaceMe's T is the special case that mixes their outputs. "refit_scale", own: with a factor on the stream, as LinearPatch
(arXiv 2505.24680) has for each channel, put into the layers above; then both are multiplied so that the sum of squares is that
of y, which may raise the error."""


@dataclass(frozen=True)
class PrunedSpan:
    """A run of removed layers and what was done about it.

    removed: indices in the dense model. error_before, error_after: |y - x| / |y| over all tokens (Frobenius norm), with the
    spans below repaired, without and with this repair, before the new weights are rounded to their dtype. damping: see
    `repair`. scale: the factor s on the stream, 1 for a method without.
    """

    removed: tuple[int, ...]
    error_before: float
    error_after: float
    damping: float
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

    It costs forward passes: for each span, of the dense model up to behind the span and of the pruned one up to it. In memory
    are one batch and the sums: 3 D x D numbers in float64 for `replaceme`, F x F and 2 F x D for `refit` (F the width of the
    MLP), `FOLDS` times when a damping is chosen. Where many factors meet in bfloat16 weights, calibrate in float32.

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
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: 0 (plain least squares) or a finite positive number, or None to choose it")
    architecture = _architecture(dense, removed)
    check_windows(dense, windows, batch_size=batch_size)
    if damping is None and len(windows) < 2:
        raise ValueError("a damping cannot be chosen with 1 window, none could be held out: give more windows, or a damping")
    pruned = remove_layers(dense, removed)
    gone = sorted(int(index) for index in removed)
    # Members of a contiguous run have the same difference between index and rank, the number of layers that stay below.
    runs = itertools.groupby(enumerate(gone), lambda item: item[1] - item[0])
    spans = [(below, tuple(index for _, index in run)) for below, run in runs]
    shared = dense.get_input_embeddings().weight is getattr(dense.get_output_embeddings(), "weight", None)
    if spans and spans[0][0] == 0 and shared:
        raise UnsupportedModel(
            f"layer 0 of this {dense.config.model_type} model is removed, so that only the embedding table could take in the "
            "repair, but the output head shares it: keep layer 0, or untie the head first"
        )
    engines = LayerwiseModel(dense), LayerwiseModel(pruned)
    repairs = _Repairs(*engines, architecture, windows, method, damping, batch_size, progress)
    return Repaired(pruned, tuple(repairs.repaired(below, removed_here) for below, removed_here in spans))


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


# --- regression -----------------------------------------------------------------------------------------------------------


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

    def centered(self) -> "_Sums":
        """The sums of u, x and y less their means over the tokens."""
        n = self.tokens
        return _Sums(
            n, self.u, self.x, self.y,
            uu=self.uu - torch.outer(self.u, self.u) / n,
            ux=self.ux - torch.outer(self.u, self.x) / n,
            uy=self.uy - torch.outer(self.u, self.y) / n,
            xx=self.xx - float(self.x @ self.x) / n,
            xy=self.xy - float(self.x @ self.y) / n,
            yy=self.yy,
        )  # fmt: skip

    def squared(self, fit: LinearMap) -> float:
        """Sum of squares of the fitted states."""
        s, d, c = fit.scale, fit.change, fit.constant
        total = s * s * self.xx + float((d * (self.uu @ d + 2 * s * self.ux)).sum())
        return total + float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x)))

    def error(self, fit: LinearMap | None = None) -> float:
        """|y - fit| / |y|; without a fit |y - x| / |y|."""
        if fit is None:
            fit = LinearMap(1.0, torch.zeros_like(self.ux), torch.zeros_like(self.x))
        product = fit.scale * self.xy + float((fit.change * self.uy).sum()) + float(fit.constant @ self.y)
        squared = self.yy - 2 * product + self.squared(fit)
        return math.sqrt(max(squared, 0.0) / self.yy) if self.yy else 0.0

    def matched(self, fit: LinearMap) -> LinearMap:
        """The fit times what makes its sum of squares that of y."""
        squared = self.squared(fit)
        factor = math.sqrt(self.yy / squared) if self.yy > 0 and squared > 0 else 1.0
        return LinearMap(fit.scale * factor, fit.change * factor, fit.constant * factor)


class _Regression:
    """Maps fitted to sums, for any damping: the eigenvalues of the second moments are found once."""

    def __init__(self, sums: _Sums, scaled: bool, intercept: bool):
        self.sums, self.scaled, self.intercept = sums, scaled, intercept
        self.moments = sums.centered() if intercept else sums
        self.values, self.vectors = torch.linalg.eigh(self.moments.uu)
        # Second moments square the singular values: what is below this is rounding of their float64 sums.
        self.seen = self.values > float(self.values[-1]) * len(self.values) * torch.finfo(torch.float64).eps
        self.mean = float(self.moments.uu.diagonal().mean())

    def fit(self, damping: float) -> LinearMap:
        """The minimum of |y - s x - u d - c|^2 + damping mean(diag(u^T u)) |d|^2.

        s = 1 unless scaled, c = 0 unless there is an intercept.
        """
        inverse = torch.where(self.seen, 1 / (self.values + damping * self.mean), 0.0)[:, None]
        px, py = self.vectors.T @ self.moments.ux, self.vectors.T @ self.moments.uy
        scale = self._scale(px, py, inverse) if self.scaled else 1.0
        change = self.vectors @ (inverse * (py - scale * px))
        constant = torch.zeros_like(self.sums.x)
        if self.intercept:
            constant = (self.sums.y - scale * self.sums.x - self.sums.u @ change) / self.sums.tokens
        return LinearMap(scale, change, constant)

    def _scale(self, px: Tensor, py: Tensor, inverse: Tensor) -> float:
        """The best factor on x, when for each the best change comes with it. Positive: norms do see a sign."""
        unexplained = self.moments.xx - float((inverse * px * px).sum())
        if unexplained <= 1e-10 * self.moments.xx:
            return 1.0
        scale = (self.moments.xy - float((inverse * px * py).sum())) / unexplained
        return scale if scale > 0 else 1.0


def _best_damping(folds: list[_Sums], total: _Sums, scaled: bool, intercept: bool) -> float:
    """The damping with the smallest error on held-out folds."""
    squared = dict.fromkeys(DAMPINGS, 0.0)
    for fold in folds:
        regression = _Regression(total.combined(fold, -1), scaled, intercept)
        weight = fold.yy / total.yy if total.yy else 0.0
        for damping in DAMPINGS:
            squared[damping] += weight * fold.error(regression.fit(damping)) ** 2
    return min(DAMPINGS, key=squared.__getitem__)


# --- calibration, fusing --------------------------------------------------------------------------------------------------


@dataclass
class _Repairs:
    """Finds and fuses the maps, span after span. `below` is always the number of layers below a span that stay.

    factor: that of the repairs so far; the target is divided by it.
    """

    dense: LayerwiseModel
    pruned: LayerwiseModel
    architecture: Architecture
    windows: Int[Tensor, "sample position"]
    method: str
    damping: float | int | None
    batch_size: int
    progress: bool
    factor: float = 1.0

    def repaired(self, below: int, removed: tuple[int, ...]) -> PrunedSpan:
        """Fit the map of a span and put it into the weights."""
        sums: dict[int, _Sums] = {}
        folds = min(FOLDS, len(self.windows)) if self.damping is None else 1
        for fold, u, x, y in self._states(below, removed, folds):
            part = _Sums.of(u, x, y / self.factor)
            sums[fold] = sums[fold].combined(part) if fold in sums else part
        total = functools.reduce(_Sums.combined, sums.values())
        writers = self._writers(below)
        options = {"scaled": self.method == "refit_scale", "intercept": bool(writers) and writers[-1].bias is not None}
        damping = _best_damping(list(sums.values()), total, **options) if self.damping is None else float(self.damping)
        fit = _Regression(total, **options).fit(damping)
        if options["scaled"]:
            fit = total.matched(fit)
        self._fuse(below, fit)
        self.factor *= fit.scale
        return PrunedSpan(removed, total.error(), total.error(fit), damping, fit.scale)

    def _writers(self, below: int) -> list[nn.Linear]:
        """The matrices that write last before the span, that of the MLP at the end; none above the embeddings."""
        if below == 0:
            return []
        sublayers = self.architecture.steps(self.dense.model.config)[-1]
        return [self.pruned.layers[below - 1].get_submodule(sublayer.output) for sublayer in sublayers]

    def _states(self, below: int, removed: tuple[int, ...], folds: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """By batch: which fold of the windows, regressors u, states x, target y: [token, _] in float64."""
        name = f"the layers {removed[0]} to {removed[-1]}"
        edges = [fold * len(self.windows) // folds for fold in range(folds + 1)]
        written: dict[int, tuple[Tensor, Tensor]] = {}
        writers = self._writers(below)
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
                    target = _behind(self.dense, ids, removed[-1] + 1)
                    written.clear()
                    stream = _behind(self.pruned, ids, below)
                    if not bool(torch.isfinite(target).all() and torch.isfinite(stream).all()):
                        raise RuntimeError(f"NaN or infinity at {name}; check the weights, or use a dtype of wider range")
                    if not writers:  # above the embeddings the stream itself is free
                        columns = [stream]
                    elif self.method == "replaceme":
                        columns = [written[len(writers) - 1][1]]
                    else:
                        columns = [written[place][0] for place in range(len(writers))]
                    u = torch.cat([column.reshape(*stream.shape[:2], -1) for column in columns], dim=-1)
                    yield fold, *(item.double().flatten(0, 1) for item in (u, stream, target))
                    bar.update(len(ids))

    def _fuse(self, below: int, fit: LinearMap) -> None:
        """Put the map into the weights before the span, and its factor into the layers behind it."""
        change, constant = fit.change / fit.scale, fit.constant / fit.scale
        writers = self._writers(below)
        if not writers:
            # Positions, where they are learned, are part of the stream: the sum of the tables is mapped when each is.
            for path in self.architecture.embeddings:
                _change(self.pruned.model.get_submodule(path), lambda table: table + table @ change)
        elif self.method == "replaceme":
            moved = lambda tensor: tensor + change.T @ tensor  # noqa: E731
            _change(writers[-1], moved, lambda bias: moved(bias) + constant)
        else:
            for writer, part in zip(writers, change.split([writer.in_features for writer in writers]), strict=True):
                added = constant if writer is writers[-1] else torch.zeros_like(constant)
                _change(writer, lambda weight, part=part: weight + part.T, lambda bias, added=added: bias + added)
        if fit.scale != 1.0:
            for layer in self.pruned.layers[below:]:
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

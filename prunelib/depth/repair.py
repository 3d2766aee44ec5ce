"""Closed-form repair of removed layers: a least-squares map at each removed span, fused into weights that are there anyway.

Let x be the hidden states of the pruned model where layers were removed and y those of the dense model behind them. A repair
makes x more like y, by linear regression on calibration windows, from sums over tokens in float64. Spans are repaired from the
bottom; each sees the repairs below it, and has the dense model's states as its target.

x = z + a, where a is what the last layer before the span writes last: its MLP output or, with parallel sublayers, what its
attention and its MLP write. Only the stream behind the span reads a: the matrices that write it are free to change. So is a
factor on the stream, which norms do not see: a stream s x to which the layers above add is the stream x to which they add 1 / s
of it. A span that starts at layer 0 has no a: the embedding tables take in the map of x, unless the output head shares them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import UnsupportedModel, decoder_layers, memory, remove_layers
from prunelib.models.architectures import ARCHITECTURES, Architecture
from prunelib.models.layerwise import LayerwiseModel

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""What `damping=None` chooses from."""

FOLDS = 4  # parts of the windows of which each is held out once when the damping is chosen; fewer when there are fewer windows

METHODS = ("replaceme", "refit", "refit_scale", "prune_comp")
"""What `repair` fits. "replaceme" (arXiv 2505.02819): the MLP output a becomes a T, T = (A^T A)^-1 A^T (Y - Z); damping shrinks
T towards I here. "refit", own: the last matrices before the span fitted again on their inputs, damped towards what they were.
"refit_scale", own: with a factor on the stream, as LinearPatch (arXiv 2505.24680) has for each channel, put into the layers
above. Least squares shrinks what it cannot predict, so both are then multiplied such that the sum of squares is that of y.
"prune_comp" (arXiv 2507.18212): the factor alone, the mean over channels of sum |y| / sum |x| over tokens. The paper multiplies
everything before the span by it, the embeddings too: of tied ones also the logits, and norms behind the sublayers undo it."""

SANDWICHED = {"gemma2": 1.0, "gemma3_text": 1.0}
"""Families with a norm behind each sublayer as well as before, which only "prune_comp" repairs: what it adds to its weight."""
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class PrunedSpan:
    """A run of removed layers and what was done about it.

    removed: indices in the dense model. error_before, error_after: |y - x| / |y| over all tokens (Frobenius norm), with the
    spans below repaired, without and with this repair. scale: the factor s on the stream, 1 for a method without.
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
@torch.no_grad()
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
    MLP), `FOLDS` times when a damping is chosen. damping: relative to the mean of the diagonal of the regressors' second
    moments; 0 is plain least squares. None chooses one of `DAMPINGS` for each span, by the error on held-out windows. A method
    that fits no matrix has none.

    Raises, before any work: ValueError for an unknown method, damping out of range, layers that do not exist or windows that
    cannot calibrate; UnsupportedModel where it is not known how the family writes to the stream (`models.architectures`), or
    layer 0 is removed while the head shares the embedding table. RuntimeError at the first NaN or infinity.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: 0 (plain least squares) or a finite positive number, or None to choose it")
    check_windows(dense, windows, batch_size=batch_size)
    scales_alone = method == "prune_comp"
    damping = 0.0 if scales_alone else damping
    if damping is None and len(windows) < 2:
        raise ValueError("a damping cannot be chosen with 1 window, none could be held out: give more windows, or a damping")
    pruned = remove_layers(dense, removed)
    architecture = None if scales_alone and pruned.config.model_type in SANDWICHED else _architecture(pruned)
    gone = sorted(int(index) for index in removed)
    # Members of a contiguous run have the same difference between index and rank, the number of layers that stay below.
    runs = itertools.groupby(enumerate(gone), lambda item: item[1] - item[0])
    spans = [(below, tuple(index for _, index in run)) for below, run in runs]
    shared = dense.get_input_embeddings().weight is getattr(dense.get_output_embeddings(), "weight", None)
    if spans and spans[0][0] == 0 and shared and not scales_alone:
        raise UnsupportedModel(
            f"layer 0 of this {dense.config.model_type} model is removed, so that only the embedding table could take in the "
            "repair, but the output head shares it: keep layer 0, or untie the head first"
        )
    engines = LayerwiseModel(dense), LayerwiseModel(pruned)
    repairs = _Repairs(*engines, architecture, windows, method, damping, batch_size, progress)
    return Repaired(pruned, tuple(repairs.repaired(*span) for span in spans))


def _architecture(pruned: PreTrainedModel) -> Architecture:
    """How the layers write to the stream. Raises UnsupportedModel naming the model type when that is not known."""
    model_type = pruned.config.model_type
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedModel(
            f"model type {model_type!r} cannot be repaired: its MLP does not write to the stream directly, as those of "
            f"{', '.join(sorted(ARCHITECTURES))} do. Remove the layers without repair, and heal by training (or, for "
            f"{' and '.join(sorted(SANDWICHED))}, take the method 'prune_comp')"
        )
    needed = [(pruned, path, nn.Module) for path in (architecture.final_norm, *architecture.embeddings)]
    writers = (architecture.attn.output, architecture.mlp.output)
    needed += [(layer, path, nn.Linear) for layer in decoder_layers(pruned) for path in writers]
    for owner, path, kind in needed:
        if not isinstance(dict(owner.named_modules()).get(path), kind):
            raise UnsupportedModel(f"this {model_type} model cannot be repaired: it has no {path}, or one of another kind")
    return architecture


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x -> scale x + u change + constant, for regressors u."""

    scale: float
    change: Float64[Tensor, "P D"]
    constant: Float64[Tensor, " D"]


@dataclass
class _Sums:
    """Sums over tokens, in float64, of regressors u [token, P], states x and target y [token, D]; `x_abs` is that of |x|."""

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
    x_abs: Tensor
    y_abs: Tensor

    @classmethod
    def of(cls, u: Float64[Tensor, "token P"], x: Float64[Tensor, "token D"], y: Float64[Tensor, "token D"]) -> "_Sums":
        squares = (float((left * right).sum()) for left, right in ((x, x), (x, y), (y, y)))
        absolute = x.abs().sum(0), y.abs().sum(0)
        return cls(len(u), u.sum(0), x.sum(0), y.sum(0), u.T @ u, u.T @ x, u.T @ y, *squares, *absolute)

    def combined(self, other: "_Sums", sign: int = 1) -> "_Sums":
        return _Sums(**{name: value + sign * getattr(other, name) for name, value in vars(self).items()})

    def centered(self) -> "_Sums":
        """The sums of u, x and y less their means over the tokens."""
        n = self.tokens
        return replace(
            self,
            uu=self.uu - torch.outer(self.u, self.u) / n,
            ux=self.ux - torch.outer(self.u, self.x) / n,
            uy=self.uy - torch.outer(self.u, self.y) / n,
            xx=self.xx - float(self.x @ self.x) / n,
            xy=self.xy - float(self.x @ self.y) / n,
        )

    def squared(self, fit: LinearMap) -> float:
        """Sum of squares of the fitted states."""
        s, d, c = fit.scale, fit.change, fit.constant
        total = s * s * self.xx + float((d * (self.uu @ d + 2 * s * self.ux)).sum())
        return total + float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x)))

    def error(self, fit: LinearMap) -> float:
        """|y - fit| / |y|."""
        product = fit.scale * self.xy + float((fit.change * self.uy).sum()) + float(fit.constant @ self.y)
        squared = self.yy - 2 * product + self.squared(fit)
        return math.sqrt(max(squared, 0.0) / self.yy) if self.yy else 0.0

    def matched(self, fit: LinearMap) -> LinearMap:
        """The fit times what makes its sum of squares that of y."""
        squared = self.squared(fit)
        factor = math.sqrt(self.yy / squared) if self.yy > 0 and squared > 0 else 1.0
        return LinearMap(fit.scale * factor, fit.change * factor, fit.constant * factor)


def _regression(sums: _Sums, scaled: bool, intercept: bool) -> Callable[[float], LinearMap]:
    """The fit for any damping: the minimum of |y - s x - u d - c|^2 + damping mean(diag(u^T u)) |d|^2.

    s = 1 unless scaled, c = 0 unless there is an intercept.
    """
    moments = sums.centered() if intercept else sums
    values, vectors = torch.linalg.eigh(moments.uu)
    # Second moments square the singular values: what is below this is rounding of their float64 sums.
    seen = values > float(values[-1]) * len(values) * torch.finfo(torch.float64).eps
    mean = float(moments.uu.diagonal().mean())
    px, py = vectors.T @ moments.ux, vectors.T @ moments.uy

    def fit(damping: float) -> LinearMap:
        inverse = torch.where(seen, 1 / (values + damping * mean), 0.0)[:, None]
        scale, unexplained = 1.0, moments.xx - float((inverse * px * px).sum())
        if scaled and unexplained > 1e-10 * moments.xx:
            # The best factor on x, when for each the best change comes with it. Positive: norms do see a sign.
            best = (moments.xy - float((inverse * px * py).sum())) / unexplained
            scale = best if best > 0 else 1.0
        change = vectors @ (inverse * (py - scale * px))
        left = (sums.y - scale * sums.x - sums.u @ change) / sums.tokens
        return LinearMap(scale, change, left if intercept else torch.zeros_like(left))

    return fit


def _factor(sums: _Sums) -> LinearMap:
    """The mean over channels of sum |y| / sum |x|, and no map."""
    seen = sums.x_abs > 0
    factor = float((sums.y_abs[seen] / sums.x_abs[seen]).mean())
    return LinearMap(factor, torch.zeros_like(sums.ux), torch.zeros_like(sums.x))


def _best_damping(folds: list[_Sums], total: _Sums, scaled: bool, intercept: bool) -> float:
    """The damping with the smallest error on held-out folds."""
    squared = dict.fromkeys(DAMPINGS, 0.0)
    for fold in folds:
        fit = _regression(total.combined(fold, -1), scaled, intercept)
        for damping in DAMPINGS:
            squared[damping] += fold.yy * fold.error(fit(damping)) ** 2
    return min(DAMPINGS, key=squared.__getitem__)


@dataclass
class _Repairs:
    """Finds and fuses the maps, span after span; `below` is always the number of layers below a span that stay."""

    dense: LayerwiseModel
    pruned: LayerwiseModel
    architecture: Architecture | None
    windows: Int[Tensor, "sample position"]
    method: str
    damping: float | int | None
    batch_size: int
    progress: bool
    factor: float = 1.0

    def repaired(self, below: int, removed: tuple[int, ...]) -> PrunedSpan:
        """Fit the map of a span and put it into the weights."""
        n, folds = len(self.windows), min(FOLDS, len(self.windows)) if self.damping is None else 1
        writers = self._writers(below)
        parts = self.windows.tensor_split([fold * n // folds for fold in range(1, folds)])
        batches = [(fold, ids) for fold, part in enumerate(parts) for ids in part.split(self.batch_size)]
        sums: dict[int, _Sums] = {}
        for fold, ids in tqdm(batches, desc=f"repair at layer {below}", unit="batch", disable=not self.progress):
            part = self._sums(below, removed, writers, ids)
            sums[fold] = sums[fold].combined(part) if fold in sums else part
        total = functools.reduce(_Sums.combined, sums.values())
        options = {"scaled": self.method == "refit_scale", "intercept": bool(writers) and writers[-1].bias is not None}
        damping = _best_damping(list(sums.values()), total, **options) if self.damping is None else float(self.damping)
        fit = _factor(total) if self.method == "prune_comp" else _regression(total, **options)(damping)
        if options["scaled"]:
            fit = total.matched(fit)
        self._fuse(below, writers, fit)
        self.factor *= fit.scale
        unrepaired = LinearMap(1.0, torch.zeros_like(fit.change), torch.zeros_like(fit.constant))
        return PrunedSpan(removed, total.error(unrepaired), total.error(fit), damping, fit.scale)

    def _writers(self, below: int) -> list[nn.Linear]:
        """The matrices to change, which write last before the span, that of the MLP at the end; none above the embeddings."""
        if below == 0 or self.method == "prune_comp":
            return []
        sublayers = self.architecture.steps(self.dense.model.config)[-1]
        writers = [self.pruned.layers[below - 1].get_submodule(sublayer.output) for sublayer in sublayers]
        return writers[-1:] if self.method == "replaceme" else writers

    def _sums(self, below: int, removed: tuple[int, ...], writers: list[nn.Linear], ids: Int[Tensor, "_ _"]) -> _Sums:
        """Sums over a batch; the target is divided by the factor of the repairs below."""
        regressors: list[Tensor] = []

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            regressors.append(output if self.method == "replaceme" else args[0])

        with ExitStack() as hooks:
            for writer in writers:
                hooks.callback(writer.register_forward_hook(note).remove)
            stream = _behind(self.pruned, ids, below)
        target = _behind(self.dense, ids, removed[-1] + 1)
        if not bool(torch.isfinite(target).all() and torch.isfinite(stream).all()):
            name = f"the layers {removed[0]} to {removed[-1]}"
            raise RuntimeError(f"NaN or infinity at {name}; check the weights, or use a dtype of wider range")
        if not writers:  # above the embeddings the stream itself is free, for a map of it
            regressors = [stream[..., :0] if self.method == "prune_comp" else stream]
        u = torch.cat([column.reshape(*stream.shape[:2], -1) for column in regressors], dim=-1)
        u, x, y = (item.double().flatten(0, 1) for item in (u, stream, target))
        return _Sums.of(u, x, y / self.factor)

    def _fuse(self, below: int, writers: list[nn.Linear], fit: LinearMap) -> None:
        """Put the map into the weights before the span, and its factor into the layers behind it."""
        change, constant = fit.change / fit.scale, fit.constant / fit.scale
        if not writers:
            # Positions, where they are learned, are part of the stream: the sum of the tables is mapped when each is.
            for table in map(self.pruned.model.get_submodule, self.architecture.embeddings if len(change) else ()):
                _set(table, "weight", table.weight.double() + table.weight.double() @ change)
        else:
            bias = writers[-1].bias
            if self.method == "replaceme":
                constant = constant if bias is None else constant + bias.double() @ change
                change = writers[0].weight.double().T @ change
            for writer, part in zip(writers, change.split([writer.in_features for writer in writers]), strict=True):
                _set(writer, "weight", writer.weight.double() + part.T)
            if bias is not None:
                _set(writers[-1], "bias", bias.double() + constant)
        if fit.scale != 1.0:
            last, offset = POST_NORMS, SANDWICHED.get(self.pruned.model.config.model_type, 0.0)
            if self.architecture is not None:
                last = self.architecture.attn.output, self.architecture.mlp.output
            for module in (layer.get_submodule(path) for layer in self.pruned.layers[below:] for path in last):
                for name, value in list(module.named_parameters()):
                    _set(module, name, (value.double() + offset) / fit.scale - offset)


def _behind(engine: LayerwiseModel, ids: Int[Tensor, "batch position"], layers: int) -> Tensor:
    """The hidden states behind the first `layers` layers."""
    hidden = engine.embed(ids)
    for index in range(layers):
        hidden = engine.run_layer(index, hidden)
    return hidden


def _set(module: nn.Module, name: str, value: Float64[Tensor, "..."]) -> None:
    """Give a module a new parameter; the old tensor, which the dense model shares, stays as it is."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))

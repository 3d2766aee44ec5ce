"""Closed-form repair of removed layers: a least-squares map across each cut, fused into weights that are there anyway.

Let x be the hidden states of the pruned model at a cut (a run of removed layers) and y those of the dense model behind it. A
repair makes x more like y, by linear regression on calibration windows, streamed: what is kept are sums over tokens, in
float64. Cuts are repaired from the bottom; each sees the repairs below it, and has the dense model's states as its target.

What an ordinary checkpoint can express. x = z + a, where a is what the last layer before the cut writes last: its MLP output
or, in a layer with parallel branches, what its attention and its MLP write. The matrices that write a are free to change:
nothing but the stream behind the cut reads a. z is not free: the same layer's MLP and all layers below read parts of it. One
number is: norms do not see a factor, so that a stream s x behind the cut, to which the layers above add, is the stream x to
which they add 1 / s of it (exactly, but for the epsilon in the norms). Least squares shrinks what it cannot predict, and so
gives all later additions too much weight; the methods with a factor end by matching the norm of y. A cut below every layer
has no a, and no z: x is what the embedding tables hold, and any map of it can be taken in by them, unless the output head
shares the table.

A map of the whole stream, x (I + M), has no place in a checkpoint anywhere else: put into everything that writes to the stream
below, it would be seen by norms, which it does not pass through unless it is orthogonal. Such maps (LinearPatch, Ghosted
Layers) can be fitted and measured in memory, to compare: `fit_unfused`, `unfused`. They bound nothing: `refit` can do better.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.evaluation.perplexity import check_windows
from prunelib.models import IdentityLayer, UnsupportedModel, decoder_layers, memory, remove_layers, with_layers
from prunelib.models.architectures import ARCHITECTURES, SLICED_MODEL_TYPE, Architecture, Sublayer

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""What `damping=None` chooses from."""

FOLDS = 4
"""Parts of the windows of which each is held out once when the damping is chosen; fewer when there are fewer windows."""


# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Cut:
    """A run of removed layers and what was done about it. Layer indices are those of the dense model.

    before: the last layer that stays below; None for a cut above the embeddings. removed: ascending, contiguous.
    tokens: calibrated on. error_before, error_after: |y - x| / |y| over all of them (root of summed squares, Frobenius norm),
        with the repairs of the cuts below in place, without and with this one's; as the regression has it, before the new
        weights are rounded to their dtype.
    held_out_before, held_out_after: the same on windows that the map was not fitted on (each in its turn), before the norm is
        matched: what the damping was chosen by. None where no damping was chosen.
    regressors: columns of the regression. gram_rank: rank of their second moments (centered, where a bias is fitted too); where
        it is smaller, of all maps that fit equally well the smallest change is taken.
    damping: added to the diagonal of these moments, times its mean; None for a method that has none.
    rank: limit on the rank of the change; None for no limit. scale: the factor s on the stream, 1 for a method without.
    """

    before: int | None
    removed: tuple[int, ...]
    tokens: int
    error_before: float
    error_after: float
    held_out_before: float | None
    held_out_after: float | None
    regressors: int
    gram_rank: int
    damping: float | None
    rank: int | None
    scale: float


@dataclass(frozen=True)
class Repaired:
    """An ordinary model without the removed layers, which shares with the dense model the weights that are unchanged."""

    model: PreTrainedModel
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, eq=False)
class StreamMap:
    """x -> x `matrix`, for the hidden states x behind the first `layers` layers of a model."""

    layers: int
    matrix: Float64[Tensor, "D D"]


@dataclass(frozen=True)
class Unfused:
    """A pruned model that is NOT repaired, and the maps that would do it if a checkpoint could hold them: see `unfused`."""

    model: PreTrainedModel
    cuts: tuple[Cut, ...]
    maps: tuple[StreamMap, ...]


# -------------------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True, eq=False)
class _Fit:
    """x -> scale x + u change + constant, for regressors u."""

    scale: float
    change: Float64[Tensor, "P D"]
    constant: Float64[Tensor, " D"]


@dataclass(frozen=True)
class Method:
    """A way to repair.

    source: where it is from, and how it differs. regressors: which columns u the change is a map of: "outputs" of the MLP's
    last matrix; "inputs" of all matrices that write last; "stream" x itself; "none". scaled: the stream gets a factor, by
    least squares together with the change; then both are multiplied so that the sum of squares is that of y, which may raise
    the error. from_zero: damping shrinks the whole map I + change instead of the change. damped: whether it has a damping.
    """

    source: str
    regressors: str
    scaled: bool = False
    from_zero: bool = False
    damped: bool = True


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
        damped=False,
    ),
    "replaceme_scale": Method("own: `replaceme` and `scale` fitted together, z s + a T", "outputs", scaled=True),
    "refit": Method(
        "own: the last matrices before the cut fitted anew on their inputs, damped towards what they were. ReplaceMe's T "
        "is the special case that mixes their outputs. With parallel branches that of the attention too",
        "inputs",
    ),
    "refit_scale": Method("own: `refit` and `scale` fitted together", "inputs", scaled=True),
}
"""Methods of `repair`: the result is an ordinary checkpoint."""

UNFUSED_METHODS: dict[str, Method] = {
    "ghosted": Method(
        "Ghosted Layers, arXiv 2605.15491: x (I + M), M = (X^T X + lambda I)^-1 X^T (Y - X); theirs is an absolute 1e-6",
        "stream",
    ),
    "linearpatch": Method(
        "LinearPatch, arXiv 2505.24680: x H diag(s) H^T, H of `hadamard`, s the mean over windows of mean |y H| / mean |x H|",
        "stream",
        damped=False,
    ),
}
"""Methods of `fit_unfused`: maps of the whole stream, which no ordinary checkpoint can hold."""


# --------------------------------------------------------------------------------------------------------------- repair


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
def repair(
    dense: PreTrainedModel,
    removed: Collection[SupportsIndex],
    windows: Int[Tensor, "sample position"],
    *,
    method: str = "replaceme",
    damping: float | int | None = None,
    rank: int | None = None,
    batch_size: int = 4,
    keep_states: bool = False,
    progress: bool = True,
) -> Repaired:
    """`dense` without the layers `removed`, repaired at every cut; `dense` stays as it was.

    The result has the dense model's modules, dtype and device. All it costs is forward passes: for each cut, of the dense
    model up to behind the cut and of the pruned one up to the cut. In memory are one batch and the sums: 3 D x D numbers in
    float64 for `replaceme`, F x F and 2 F x D for `refit` (F the width of the MLP), `FOLDS` times when a damping is chosen.
    Where many factors meet in bfloat16 weights, calibrate in float32 and convert the result.

    Args:
        windows: token ids, all of them real tokens.
        method: a key of `METHODS`.
        damping: relative to the mean of the diagonal of the regressors' second moments; 0 is plain least squares, of all
            solutions the one nearest to no repair. None chooses one of `DAMPINGS` for each cut, by the error at the cut on
            held-out windows (`FOLDS`), then fits on all windows.
        rank: limit on the rank of the change (of T - I), by reduced-rank regression; 0 leaves only a new bias and the factor.
            It saves nothing, the change is fused: it is another way to keep the map from fitting noise.
        keep_states: hold the hidden states of all windows, twice, on the CPU in the model's dtype, so that the next cut goes on
            from there. Of use for several cuts; the result is the same.

    Raises, before any work: ValueError for an unknown method, damping or rank out of range, layers that do not exist or windows
    that cannot calibrate; UnsupportedModel where the family's wiring is not known (`sliced_model.ARCHITECTURES`) or the cut leaves
    nothing to change: layer 0 removed while the head shares the embedding table; and as `models.remove_layers`.
    RuntimeError at the first NaN or infinity.
    """
    if method in UNFUSED_METHODS:
        raise ValueError(
            f"method {method!r} maps the whole stream, which an ordinary checkpoint cannot hold: measure it with fit_unfused() "
            f"and unfused(), or repair with one of: {', '.join(METHODS)}"
        )
    job = _prepared(METHODS, dense, removed, windows, method, damping, rank, batch_size, keep_states, progress)
    cuts, factor = [], 1.0
    for place in job.places:
        fit, cut = job.fitted(place, factor)
        if place.layers == 0 and job.method.regressors != "none":
            _fuse_into_embeddings(job, fit)
        else:
            _FUSE[job.method.regressors](job, place, fit)
        if fit.scale != 1.0:
            for layer in decoder_layers(job.pruned)[place.layers :]:
                for branch in (job.wiring.attn, job.wiring.mlp):
                    _change(layer.get_submodule(branch.output), lambda weight, scale=fit.scale: weight / scale)
        factor *= fit.scale
        cuts.append(cut)
    return Repaired(job.pruned, tuple(cuts))


def fit_unfused(
    dense: PreTrainedModel,
    removed: Collection[SupportsIndex],
    windows: Int[Tensor, "sample position"],
    *,
    method: str = "ghosted",
    damping: float | int | None = None,
    rank: int | None = None,
    batch_size: int = 4,
    keep_states: bool = False,
    progress: bool = True,
) -> Unfused:
    """Maps of the whole stream at every cut, to be measured with `unfused`: not a model that can be saved.

    Arguments and errors as `repair`, with a key of `UNFUSED_METHODS`; LinearPatch has neither damping nor rank.
    """
    job = _prepared(UNFUSED_METHODS, dense, removed, windows, method, damping, rank, batch_size, keep_states, progress)
    if method == "linearpatch" and rank is not None:
        raise ValueError(f"rank={rank}: method 'linearpatch' has none, leave it out")
    cuts, maps = [], []
    for place in job.places:
        with unfused(job.pruned, maps):
            fit, cut = _UNFUSED_FIT[method](job, place)
        maps.append(StreamMap(place.layers, torch.eye(job.size, dtype=torch.float64, device=fit.change.device) + fit.change))
        cuts.append(cut)
    return Unfused(job.pruned, tuple(cuts), tuple(maps))


@contextmanager
def unfused(model: PreTrainedModel, maps: Sequence[StreamMap]) -> Iterator[PreTrainedModel]:
    """`model` while the maps act on its stream, through hooks. For measuring: they are not part of what is saved."""
    layers = decoder_layers(model)
    with ExitStack() as hooks:
        for stream_map in maps:
            matrix = stream_map.matrix.to(model.device, model.dtype)
            if stream_map.layers == 0:

                def before(layer: nn.Module, args: tuple, kwargs: dict, matrix: Tensor = matrix) -> tuple[tuple, dict]:
                    if args:
                        return (args[0] @ matrix, *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": kwargs["hidden_states"] @ matrix}

                hooks.callback(layers[0].register_forward_pre_hook(before, with_kwargs=True).remove)
            else:

                def after(layer: nn.Module, args: tuple, output: Any, matrix: Tensor = matrix) -> Any:
                    return output @ matrix if isinstance(output, Tensor) else (output[0] @ matrix, *output[1:])

                hooks.callback(layers[stream_map.layers - 1].register_forward_hook(after).remove)
        yield model


def hadamard(size: int) -> Float64[Tensor, "size size"]:
    """Orthogonal and symmetric, entries +-1 / sqrt(b) or 0: Hadamard matrices (Sylvester) of size b down the diagonal, b the
    largest power of two that divides `size`. So it is one Hadamard matrix for powers of two, and the identity for odd sizes."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    return torch.block_diag(*[block / math.sqrt(len(block))] * (size // len(block)))


# ------------------------------------------------------------------------------------------------------------- the cuts


@dataclass(frozen=True)
class _Place:
    """A cut: behind so many layers of the pruned model, and of the dense one."""

    layers: int
    dense_layers: int
    before: int | None
    removed: tuple[int, ...]

    def __str__(self) -> str:
        return f"the cut at layers {self.removed[0]} to {self.removed[-1]}"


def _places(n_layers: int, removed: Collection[SupportsIndex]) -> tuple[_Place, ...]:
    gone = sorted(int(index) for index in removed)
    # Members of a run have the same difference between index and rank.
    runs = [tuple(index for _, index in run) for _, run in itertools.groupby(enumerate(gone), lambda item: item[1] - item[0])]
    places, lost = [], 0
    for run in runs:
        places.append(_Place(run[0] - lost, run[-1] + 1, run[0] - 1 if run[0] else None, run))
        lost += len(run)
    return tuple(places)


def _prepared(
    methods: dict[str, Method],
    dense: PreTrainedModel,
    removed: Collection[SupportsIndex],
    windows: Int[Tensor, "sample position"],
    method: str,
    damping: float | int | None,
    rank: int | None,
    batch_size: int,
    keep_states: bool,
    progress: bool,
) -> "_Job":
    """Everything checked, nothing run."""
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(methods)}")
    chosen = methods[method]
    if damping is not None and not chosen.damped:
        raise ValueError(f"damping={damping}: method {method!r} has none, leave it out")
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: 0 (plain least squares) or a finite positive number, or None to choose it")
    wiring = _wiring(dense, removed)
    size = dense.config.hidden_size
    if rank is not None and not 0 <= rank <= size:
        raise ValueError(f"rank={rank}: from 0 (no change) to the hidden size {size}, or None for no limit")
    if rank is not None and chosen.regressors == "none":
        raise ValueError(f"rank={rank}: method {method!r} has none, leave it out")
    check_windows(dense, windows, batch_size=batch_size)
    if damping is None and chosen.damped and len(windows) < 2:
        raise ValueError("a damping cannot be chosen with 1 window, none could be held out: give more windows, or a damping")
    pruned = remove_layers(dense, removed)
    places = _places(len(decoder_layers(dense)), removed)
    shared = dense.get_input_embeddings().weight is getattr(dense.get_output_embeddings(), "weight", None)
    if methods is METHODS and places and places[0].layers == 0 and chosen.regressors != "none" and shared:
        raise UnsupportedModel(
            f"layer 0 of this {dense.config.model_type} model is removed, so that only the embedding table could take in the "
            "repair, but the output head shares it: keep layer 0, use method 'scale', or untie the head first"
        )
    keep = keep_states and len(places) > 1
    walks = _Walk(dense, keep), _Walk(pruned, keep)
    return _Job(dense, pruned, wiring, places, windows, chosen, damping, rank, batch_size, progress, *walks)


def _wiring(model: PreTrainedModel, removed: Collection[SupportsIndex]) -> Architecture:
    """How the layers that stay write to the stream. Raises UnsupportedModel naming the model type when that is not known."""
    decoder_layers(model)
    model_type = model.config.model_type
    if model_type == SLICED_MODEL_TYPE:
        raise UnsupportedModel("this model is sliced: remove layers and repair first, then slice what is left")
    wiring = ARCHITECTURES.get(model_type)
    if wiring is None:
        raise UnsupportedModel(
            f"model type {model_type!r} cannot be repaired at a cut: to take in a repair, the last matrix of the MLP has to "
            "write to the stream directly, with no norm (Gemma 2, OLMo 2), factor or mixture of experts in between. Families "
            f"known to do so: {', '.join(sorted(ARCHITECTURES))}. Remove the layers without repair, and heal by training"
        )
    needed = [(model, path, nn.Module) for path in (wiring.final_norm, *wiring.embeddings)]
    for index, layer in enumerate(decoder_layers(model)):
        if index not in removed:
            needed += [(layer, branch.output, nn.Linear) for branch in (wiring.attn, wiring.mlp)]
    for owner, path, kind in needed:
        module = owner
        for name in path.split("."):
            module = getattr(module, name, None)
        if not isinstance(module, kind):
            raise UnsupportedModel(f"this {model_type} model cannot be repaired: it has no {path}, or one of another kind")
    return wiring


# ---------------------------------------------------------------------------------------------------------- calibration


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
        return cls(
            len(u), u.sum(0), x.sum(0), y.sum(0), u.T @ u, u.T @ x, u.T @ y, float((x * x).sum()), float((x * y).sum()),
            float((y * y).sum()),
        )  # fmt: skip

    def combined(self, other: "_Sums", sign: int = 1) -> "_Sums":
        return _Sums(**{name: value + sign * getattr(other, name) for name, value in vars(self).items()})

    def error(self, fit: _Fit) -> float:
        """|y - fit| / |y|."""
        s, d, c = fit.scale, fit.change, fit.constant
        squared = self.yy - 2 * s * self.xy + s * s * self.xx
        squared += float((d * (self.uu @ d + 2 * (s * self.ux - self.uy))).sum())
        squared += float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x - self.y)))
        return math.sqrt(max(squared, 0.0) / self.yy) if self.yy else 0.0

    def matched(self, fit: _Fit) -> _Fit:
        """The fit times what makes its sum of squares that of y."""
        s, d, c = fit.scale, fit.change, fit.constant
        squared = s * s * self.xx + float((d * (self.uu @ d + 2 * s * self.ux)).sum())
        squared += float(c @ (self.tokens * c + 2 * (self.u @ d + s * self.x)))
        factor = math.sqrt(self.yy / squared) if self.yy > 0 and squared > 0 else 1.0
        return _Fit(s * factor, d * factor, c * factor)

    def nothing(self) -> _Fit:
        """No repair."""
        return _Fit(1.0, torch.zeros_like(self.ux), torch.zeros_like(self.x))


class _Regression:
    """Maps fitted to sums, for any damping and rank: the eigenvalues of the second moments are found once."""

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

    @property
    def gram_rank(self) -> int:
        return int(self.seen.sum())

    def fit(self, damping: float, rank: int | None) -> _Fit:
        """The minimum of |y - s x - u d - c|^2 + damping mean(diag(u^T u)) |d|^2, s = 1 unless scaled, c = 0 unless there is
        an intercept, d of limited rank."""
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
        if rank is not None and rank < change.shape[1]:
            damped = self.uu @ change + damping * self.mean * change
            kept = torch.linalg.eigh(change.T @ damped).eigenvectors.flip(1)[:, :rank]
            change = change @ (kept @ kept.T)
        constant = torch.zeros_like(self.sums.x)
        if self.intercept:
            constant = (self.sums.y - scale * self.sums.x - self.sums.u @ change) / self.sums.tokens
        return _Fit(scale, change, constant)

    def _scale(self, px: Tensor, py: Tensor, inverse: Tensor) -> float:
        """The best factor on x, when for each the best change comes with it. Positive: norms do see a sign."""
        unexplained = self.xx - float((inverse * px * px).sum())
        if unexplained <= 1e-10 * self.xx:
            return 1.0
        scale = (self.xy - float((inverse * px * py).sum())) / unexplained
        return scale if scale > 0 else 1.0


@dataclass(frozen=True)
class _Job:
    """Everything that finding the maps needs."""

    dense: PreTrainedModel
    pruned: PreTrainedModel
    wiring: Architecture
    places: tuple[_Place, ...]
    windows: Tensor
    method: Method
    damping: float | int | None
    rank: int | None
    batch_size: int
    progress: bool
    dense_walk: "_Walk"
    pruned_walk: "_Walk"

    @property
    def size(self) -> int:
        return self.dense.config.hidden_size

    def writers(self, place: _Place) -> list[nn.Linear]:
        """The matrices that write last before the cut, that of the MLP at the end; none above the embeddings."""
        if place.layers == 0:
            return []
        layer = decoder_layers(self.pruned)[place.layers - 1]
        last: tuple[Sublayer, ...] = self.wiring.steps(self.dense.config)[-1]
        return [layer.get_submodule(branch.output) for branch in last]

    def states(self, place: _Place, factor: float = 1.0, folds: int = 1) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """By batch: which fold of the windows, regressors u, states x at the cut, target y: [sample, token, _] in float64."""
        regressors = _REGRESSORS[self.method.regressors]
        writers = self.writers(place)
        at_target = self.dense_walk.behind(place.dense_layers, [], last_may_change=False)
        at_cut = self.pruned_walk.behind(place.layers, writers, last_may_change=True)
        bar = tqdm(desc=f"repair of {place}", unit="window", total=len(self.windows), disable=not self.progress)
        edges = [fold * len(self.windows) // folds for fold in range(folds + 1)]
        with bar, at_target as dense, at_cut as pruned:
            for fold, (first, stop) in enumerate(itertools.pairwise(edges)):
                for start in range(first, stop, self.batch_size):
                    batch = self.windows[start : min(start + self.batch_size, stop)].to(self.dense.device)
                    target, _ = dense(start, batch)
                    stream, written = pruned(start, batch)
                    if not bool(torch.isfinite(target).all() and torch.isfinite(stream).all()):
                        raise RuntimeError(f"NaN or infinity at {place}; check the weights, or use a dtype of wider range")
                    stream = stream.double()
                    columns = regressors(stream, written).double().reshape(*stream.shape[:2], -1)
                    yield fold, columns, stream, target.double() / factor
                    bar.update(len(batch))

    def sums(self, place: _Place, factor: float = 1.0) -> list[_Sums]:
        """Those of each fold of windows; of all windows when no damping is to be chosen."""
        choose = self.method.damped and self.damping is None
        found: dict[int, _Sums] = {}
        for fold, *batch in self.states(place, factor, min(FOLDS, len(self.windows)) if choose else 1):
            part = _Sums.of(*(item.flatten(0, 1) for item in batch))
            found[fold] = found[fold].combined(part) if fold in found else part
        return list(found.values())

    def fitted(self, place: _Place, factor: float = 1.0) -> tuple[_Fit, Cut]:
        """The map of a cut, and its record; the target is divided by `factor`."""
        folds = self.sums(place, factor)
        total = folds[0]
        for part in folds[1:]:
            total = total.combined(part)
        writers = self.writers(place)
        fused = self.method.regressors in ("outputs", "inputs")
        intercept = fused and bool(writers) and writers[-1].bias is not None
        damping, held_out = self.damping, None
        if len(folds) > 1:
            damping, held_out = self._chosen(folds, total, intercept)
        regression = _Regression(total, self.method, intercept)
        fit = regression.fit(float(damping or 0.0), self.rank)
        if self.method.scaled:
            fit = total.matched(fit)
        return fit, self.record(place, total, fit, regression.gram_rank, damping, held_out)

    def _chosen(self, folds: list[_Sums], total: _Sums, intercept: bool) -> tuple[float, tuple[float, float]]:
        """The damping with the smallest error on held-out folds, and the errors without and with that repair."""
        squared = dict.fromkeys(DAMPINGS, 0.0)
        without = 0.0
        for fold in folds:
            regression = _Regression(total.combined(fold, -1), self.method, intercept)
            weight = fold.yy / total.yy if total.yy else 0.0
            for damping in DAMPINGS:
                squared[damping] += weight * fold.error(regression.fit(damping, self.rank)) ** 2
            without += weight * fold.error(fold.nothing()) ** 2
        best = min(DAMPINGS, key=squared.__getitem__)
        return best, (math.sqrt(without), math.sqrt(squared[best]))

    def record(
        self,
        place: _Place,
        sums: _Sums,
        fit: _Fit,
        gram_rank: int,
        damping: float | int | None,
        held_out: tuple[float, float] | None,
    ) -> Cut:
        return Cut(
            before=place.before,
            removed=place.removed,
            tokens=sums.tokens,
            error_before=sums.error(sums.nothing()),
            error_after=sums.error(fit),
            held_out_before=held_out and held_out[0],
            held_out_after=held_out and held_out[1],
            regressors=len(sums.uu),
            gram_rank=gram_rank,
            damping=None if damping is None else float(damping),
            rank=self.rank,
            scale=fit.scale,
        )


_Written = list[tuple[Tensor, Tensor]]

_REGRESSORS: dict[str, Callable[[Tensor, _Written], Tensor]] = {
    "outputs": lambda stream, written: written[-1][1] if written else stream,
    "inputs": lambda stream, written: (
        torch.cat([read.reshape(*stream.shape[:2], -1) for read, _ in written], dim=-1) if written else stream
    ),
    "stream": lambda stream, written: stream,
    "none": lambda stream, written: stream[..., :0],
}
"""From the stream and the last writers' (input, output); above the embeddings there are no writers, and the stream is free."""


class _Pass(IdentityLayer):
    """A skipped layer that need not run once to show what it returns: in every family of `ARCHITECTURES` it is the hidden states."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.returns = Tensor


class _Resumed(_Pass):
    """A decoder slot that hands on given states instead of its input."""

    states: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return super().forward(self.states, *args[1:], **kwargs)
        return super().forward(**kwargs | {"hidden_states": self.states})


class _Walk:
    """The stream of a model, from one place up to the next. The layers above it do not run; those below run from the start each
    time, unless `keep`: then the states of all windows are held in between, on the CPU, in the model's dtype."""

    def __init__(self, model: PreTrainedModel, keep: bool):
        self.model, self.keep = model, keep
        self.layers = decoder_layers(model)
        self.done = 0
        self.held: dict[int, Tensor] = {}

    @contextmanager
    def behind(
        self, count: int, writers: Sequence[nn.Linear], last_may_change: bool
    ) -> Iterator[Callable[[int, Tensor], tuple[Tensor, _Written]]]:
        """A function from the first row and the token ids of a batch to the hidden states behind the first `count` layers, and
        to what the `writers` took and gave on the way. If the last of these layers may change, the next place starts before it.
        """
        resumed = [_Resumed(layer) for layer in self.layers[: min(self.done, 1)]]
        below = [_Pass(layer) for layer in self.layers[1 : self.done]]
        slots = [*resumed, *below, *self.layers[self.done : count], *(_Pass(layer) for layer in self.layers[count:])]
        backbone = with_layers(self.model, slots).base_model
        seen: dict[int | str, Any] = {}
        held: dict[int, Tensor] = {}

        def before(name: str) -> Callable[[nn.Module, tuple, dict], None]:
            return lambda layer, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

        def after(layer: nn.Module, args: tuple, output: Any) -> None:
            seen["stream"] = output if isinstance(output, Tensor) else output[0]

        with ExitStack() as hooks:
            if count:
                hooks.callback(slots[count - 1].register_forward_pre_hook(before("last"), with_kwargs=True).remove)
                hooks.callback(slots[count - 1].register_forward_hook(after).remove)
            else:
                hooks.callback(slots[0].register_forward_pre_hook(before("stream"), with_kwargs=True).remove)
            for index, writer in enumerate(writers):

                def wrote(module: nn.Module, args: tuple, output: Tensor, index: int = index) -> None:
                    seen[index] = (args[0], output)

                hooks.callback(writer.register_forward_hook(wrote).remove)

            def run(row: int, ids: Tensor) -> tuple[Tensor, _Written]:
                for slot in resumed:
                    slot.states = self.held[row].to(ids.device)
                with torch.no_grad():
                    backbone(input_ids=ids, use_cache=False)
                if self.keep and count:
                    held[row] = seen["last" if last_may_change else "stream"].cpu()
                return seen["stream"], [seen[index] for index in range(len(writers))]

            yield run
        if self.keep:
            self.done, self.held = max(count - last_may_change, 0), held


# --------------------------------------------------------------------------------------------------------------- fusing


def _change(
    module: nn.Module, of_weight: Callable[[Tensor], Tensor], of_bias: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Give a module a new weight, and a new bias where it has one, computed in float64; the old tensors stay as they are."""
    for name, function in (("weight", of_weight), ("bias", of_bias or of_weight)):
        old = getattr(module, name, None)
        if old is not None:
            new = function(old.detach().double()).to(old.dtype).contiguous()
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _fuse_outputs(job: _Job, place: _Place, fit: _Fit) -> None:
    change, constant = fit.change / fit.scale, fit.constant / fit.scale
    _change(
        job.writers(place)[-1],
        lambda weight: weight + change.T @ weight,
        lambda bias: bias + change.T @ bias + constant,
    )


def _fuse_inputs(job: _Job, place: _Place, fit: _Fit) -> None:
    writers = job.writers(place)
    changes = (fit.change / fit.scale).split([writer.in_features for writer in writers])
    for writer, change in zip(writers, changes, strict=True):
        constant = fit.constant / fit.scale if writer is writers[-1] else torch.zeros_like(fit.constant)
        _change(writer, lambda weight, change=change: weight + change.T, lambda bias, constant=constant: bias + constant)


def _fuse_into_embeddings(job: _Job, fit: _Fit) -> None:
    # Positions, where they are learned, are part of the stream: the sum of the tables is mapped when each is.
    for path in job.wiring.embeddings:
        _change(job.pruned.get_submodule(path), lambda table: table + table @ (fit.change / fit.scale))


_FUSE: dict[str, Callable[[_Job, _Place, _Fit], None]] = {
    "outputs": _fuse_outputs,
    "inputs": _fuse_inputs,
    "none": lambda job, place, fit: None,
}


# --------------------------------------------------------------------------------------------------------------- unfused


def _linearpatch(job: _Job, place: _Place) -> tuple[_Fit, Cut]:
    total, ratios = None, 0.0
    turn = hadamard(job.size).to(job.dense.device)
    for _, _, x, y in job.states(place):
        before, after = ((states @ turn).abs().mean(dim=1) for states in (x, y))
        # A channel that is silent in a window says nothing: it counts as unchanged there.
        ratios = ratios + torch.where(before > 0, after / before.clamp(min=torch.finfo(torch.float64).tiny), 1.0).sum(0)
        part = _Sums.of(*(states.flatten(0, 1) for states in (x, x, y)))
        total = part if total is None else total.combined(part)
    matrix = (turn * (ratios / len(job.windows))) @ turn.T
    fit = replace(total.nothing(), change=matrix - torch.eye(job.size, dtype=torch.float64, device=matrix.device))
    return fit, job.record(place, total, fit, job.size, None, None)


_UNFUSED_FIT: dict[str, Callable[[_Job, _Place], tuple[_Fit, Cut]]] = {"ghosted": _Job.fitted, "linearpatch": _linearpatch}

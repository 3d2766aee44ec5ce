"""The loss of many layer sets of one model: what the searches of `prunelib.depth.search` minimize."""

from collections.abc import Sequence

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_perplexity
from prunelib.evaluation.perplexity import check_windows
from prunelib.models import decoder_layers
from prunelib.models.layerwise import LayerSet, layer_forwards_alone, shared_layer_forwards
from prunelib.models.sublayers import all_sublayers

METRICS = {"nll": layer_set_perplexity, "kl": layer_set_divergence}
UNITS = {"layer": range, "sublayer": all_sublayers}


class LayerSetLoss:
    """Loss of one model without sets of layers, on fixed windows, in nats per token.

    metric: "nll", the negative log-likelihood, or "kl", the divergence from the dense model. unit: what the sets are made of,
    "layer" or "sublayer", that is (layer, "attn" | "mlp"): BlockPruner (arXiv 2406.10594) is ``greedy(loss.units, 2 * k, loss,
    0, 0)`` with "nll", EvoPress (arXiv 2410.14649) ``evolutionary(loss.units, 2 * k, loss, len(windows), groups=2)`` with "kl".
    The sets of one call share the hidden states of their common first layers.

    ``units`` are all those to choose from. ``layer_windows`` adds up what all calls so far ran, in layers x windows (the dense
    model of "kl" included), ``layer_windows_alone`` what evaluating every set by itself would have run. Raises ValueError for
    an unknown metric or unit and windows that do not fit the model; a call raises the same errors as `layer_set_perplexity`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Int64[Tensor, "window position"],
        metric: str = "nll",
        *,
        batch_size: int = 8,
        unit: str = "layer",
    ):
        for name, value, known in (("metric", metric, METRICS), ("unit", unit, UNITS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; there are: {', '.join(known)}")
        check_windows(model, windows, batch_size=batch_size)
        self.model, self.windows, self.metric, self.batch_size = model, windows, metric, batch_size
        self.n_layers = len(decoder_layers(model))
        self.units = tuple(UNITS[unit](self.n_layers))
        self.layer_windows = self.layer_windows_alone = 0

    def __call__(self, sets: Sequence[LayerSet], rows: Sequence[int] | None = None) -> list[float]:
        """Nats per token without each of the sets, in their order; on the windows of the indices `rows` only, if given."""
        if not sets:
            return []
        windows = self.windows if rows is None else self.windows[list(rows)]
        found = METRICS[self.metric](self.model, windows, sets, batch_size=self.batch_size, progress=False)
        ran = list(dict.fromkeys([()] * (self.metric == "kl") + list(sets)))
        self.layer_windows += shared_layer_forwards(self.n_layers, ran) * len(windows)
        self.layer_windows_alone += layer_forwards_alone(self.n_layers, ran) * len(windows)
        return [getattr(found[removed], self.metric) for removed in sets]

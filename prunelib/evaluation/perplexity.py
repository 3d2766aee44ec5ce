"""Perplexity under a stated protocol.

Protocols move a perplexity more than many a method does: Llama-2-7B on WikiText-2 has 5.47 with windows of 2048 tokens,
5.12 with 4096, 12.19 with 128.
"""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelib.models import check_vocabulary, memory
from prunelib.text.corpora import Corpus
from prunelib.text.windows import consecutive_windows


@dataclass(frozen=True)
class PerplexityProtocol:
    """What a perplexity means: windows that do not overlap, of the documents joined by the end-of-text token.

    window: tokens of each. bos: the first one is the beginning-of-text token; it is never scored. dtype: of the weights and
    activations. limit: at most so many windows, evenly spaced over the whole text, None for all.
    """

    window: int = 2048
    bos: bool = False
    dtype: str = "float32"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.window < 2 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"window={self.window}, limit={self.limit}: windows of at least 2 tokens, at least 1 of them")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r}: name a torch type, such as float32, bfloat16 or float16")

    def windows(self, corpus: Corpus, tokenizer, *, progress: bool = True) -> Int64[Tensor, "window position"]:
        """The windows of a corpus; raises as `windows.consecutive_windows`."""
        return consecutive_windows(corpus, tokenizer, self.window, self.limit, self.bos, progress=progress)

    def measure(
        self, model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, batch_size: int = 8, progress: bool = False
    ) -> "Perplexity":
        """`perplexity` of windows that this protocol cut; ValueError where model and windows are not what it states."""
        if model.dtype != getattr(torch, self.dtype) or windows.shape[1] != self.window:
            stated = f"the protocol states {self.dtype} and windows of {self.window} tokens"
            raise ValueError(f"{stated}, these are {model.dtype} and {windows.shape[1]} tokens")
        if self.bos and not bool((windows[:, 0] == windows[0, 0]).all()):
            raise ValueError("the protocol states bos=True, but the windows do not begin with the same token")
        return perplexity(model, windows, batch_size=batch_size, progress=progress)

    def describe(self) -> dict:
        """Every part of the protocol, as JSON can hold it."""
        return asdict(self) | {
            "stride": self.window - int(self.bos),
            "join": "end-of-text token, else a blank line",
            "first_token_scored": False,
            "tail": "dropped",
            "likelihood": "float32, summed in float64",
        }


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood, in nats, of the scored tokens; ``correct`` of them were the model's first choice."""

    nll_sum: float
    tokens: int
    correct: int
    window_nll: tuple[float, ...] = field(repr=False)
    window_tokens: tuple[int, ...] = field(repr=False)

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.nll_sum / self.tokens

    @property
    def ppl(self) -> float:
        """exp(nll); infinite where that overflows."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


class NotFinite(RuntimeError):
    """A likelihood is NaN or infinite."""


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Token perplexity over windows; the first position of a window has no context and is not scored.

    Raises ValueError as `check_windows`, and NotFinite, naming the window, where the likelihood is not finite.
    """
    check_windows(model, windows, batch_size=batch_size)
    sums = NllAccumulator(windows)
    starts = range(0, len(windows), batch_size)
    for start in tqdm(starts, desc="perplexity", unit="batch", disable=not progress):
        ids = windows[start : start + batch_size].to(model.device)
        sums.add(start, ids, model(input_ids=ids, use_cache=False).logits)
    return sums.result()


def check_windows(model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, batch_size: int = 1) -> None:
    """Raise ValueError, before any work, when a loss of this model on these windows would make no sense."""
    count, length = windows.shape
    if count < 1 or length < 2 or batch_size < 1:
        given = f"windows of shape {tuple(windows.shape)}, batch_size={batch_size}"
        raise ValueError(f"{given}: windows of 2 tokens or more are needed, and batch_size from 1")
    if model.training:
        raise ValueError("the model is in training mode (dropout would blur the result): call model.eval() first")
    check_length(model, length)
    check_vocabulary(model, windows)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise ValueError when the model has fewer positions than `length`: beyond them it errs, or its numbers mean nothing."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"windows of {length} tokens exceed the {positions} positions of this model: take shorter windows")


def require_finite(values: np.ndarray, start: int, what: str) -> None:
    """Raise NotFinite, naming the window, unless all values of the windows from `start` on are finite."""
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{what} of window {start + int(np.argmin(np.isfinite(values)))} is not finite: NaN or infinite logits "
            "(damaged weights, or an overflow in float16: load it in bfloat16 or float32)"
        )


class NllAccumulator:
    """Sums per window, from one batch of logits after another."""

    def __init__(self, windows: Int64[Tensor, "window position"]):
        self.count, self.length = windows.shape
        self.nll = np.zeros(self.count, dtype=np.float64)
        self.correct = np.zeros(self.count, dtype=np.int64)

    def add(self, start: int, ids: Int64[Tensor, "batch position"], logits: Float[Tensor, "batch position vocabulary"]) -> None:
        """Add the windows ``start``, ``start + 1``, …"""
        sums = []
        # Window by window: a float32 copy of a whole batch of bfloat16 logits would treble the memory.
        for targets, predictions in zip(ids[:, 1:], logits[:, :-1], strict=True):
            predictions = predictions.float()
            nll = functional.cross_entropy(predictions, targets, reduction="none").double().sum()
            sums.append(torch.stack([nll, (predictions.argmax(-1) == targets).sum().double()]))
        values = torch.stack(sums).cpu().numpy()
        require_finite(values[:, 0], start, "the likelihood")
        self.nll[start : start + len(ids)] = values[:, 0]
        self.correct[start : start + len(ids)] = values[:, 1].astype(np.int64)

    def result(self) -> Perplexity:
        tokens = (self.length - 1,) * self.count
        return Perplexity(math.fsum(self.nll), sum(tokens), int(self.correct.sum()), tuple(self.nll.tolist()), tokens)

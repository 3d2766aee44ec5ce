"""Perplexity under a stated protocol.

Protocols move a perplexity more than many a method does (Llama-2-7B on WikiText-2: 5.47 with windows of 2048 tokens, 5.12
with 4096, 12.19 with 128), so `PerplexityProtocol` holds every part and `PerplexityProtocol.describe` goes into the results.
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
    """What a perplexity means.

    Attributes:
        window: tokens per window, bos included.
        stride: text tokens from one window to the next, None for windows that do not overlap. With overlap only the tokens
            that are new in a window are scored, each with at least ``window - stride`` tokens before it.
        bos: the beginning-of-text token stands at position 0 of every window. It is never scored.
        dtype: of the weights and activations; the log-likelihood is float32, its sums are float64 in any case.
        join: text between two documents, None for the tokenizer's end-of-text token (a blank line where it has none).
        limit: at most so many windows, evenly spaced over the whole text, None for all.
    """

    window: int = 2048
    stride: int | None = None
    bos: bool = False
    dtype: str = "float32"
    join: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window={self.window}: a window needs at least 2 tokens, the first is not scored")
        if self.stride is not None and not 1 <= self.stride <= self.window - int(self.bos):
            raise ValueError(f"stride={self.stride}: between 1 and the {self.window - int(self.bos)} text tokens of a window")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: keep at least 1 window, or None for all")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r}: name a torch type, such as float32, bfloat16 or float16")

    def windows(self, corpus: Corpus, tokenizer, *, progress: bool = True) -> Int64[Tensor, "window position"]:
        """The windows of a corpus; the tail that fills no window is dropped. Raises as `windows.consecutive_windows`."""
        return consecutive_windows(
            corpus, tokenizer, self.window, self.limit, self.bos, stride=self.stride, join=self.join, progress=progress
        )

    def measure(
        self, model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, batch_size: int = 8, progress: bool = False
    ) -> "Perplexity":
        """`perplexity` of windows that this protocol cut, after a check that model and windows are what it states.

        Raises:
            ValueError: another dtype or another window length; and as `perplexity`.
        """
        if model.dtype != getattr(torch, self.dtype):
            raise ValueError(
                f"the protocol states dtype={self.dtype}, the model is in {model.dtype}: load it in the stated one"
            )
        if windows.shape[1] != self.window:
            raise ValueError(f"the protocol states windows of {self.window} tokens, these have {windows.shape[1]}")
        if self.bos and not bool((windows[:, 0] == windows[0, 0]).all()):
            raise ValueError("the protocol states bos=True, but the windows do not begin with the same token")
        return perplexity(model, windows, stride=self.stride, batch_size=batch_size, progress=progress)

    def describe(self) -> dict:
        """Every part of the protocol in words and numbers that JSON can hold."""
        return asdict(self) | {
            "stride": self.stride or self.window - int(self.bos),
            "join": self.join if self.join is not None else "end-of-text token, else a blank line",
            "first_token_scored": False,
            "tail": "dropped",
            "likelihood": "float32, summed in float64",
        }


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood, in nats, of the scored tokens.

    ``nll_sum`` and ``tokens`` are sums; ``window_nll`` and ``window_tokens`` hold them by window, for paired tests. ``correct``
    counts the scored tokens that were the model's first choice.
    """

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
        """Fraction of the scored tokens that were the model's first choice."""
        return self.correct / self.tokens


class NotFinite(RuntimeError):
    """A likelihood is NaN or infinite."""


# --- one model -----------------------------------------------------------------------------------------------------------


@memory.says_what_fits("batch_size", "shorter windows or a smaller dtype")
@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "window position"],
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Token perplexity over windows.

    The first position of a window has no context and is not scored. With ``stride`` (the windows overlap: they were cut with
    the same stride), every window but the first scores its last ``stride`` positions only, so that each token counts once.
    No more than one batch of logits exists at a time.

    Raises:
        ValueError: no window, windows longer than the model's positions, ids outside its vocabulary, a model in training mode,
            ``batch_size`` or ``stride`` out of range.
        NotFinite: the likelihood is not finite; names the window.
    """
    check_windows(model, windows, stride=stride, batch_size=batch_size)
    sums = NllAccumulator(windows, stride)
    starts = range(0, len(windows), batch_size)
    for start in tqdm(starts, desc="perplexity", unit="batch", disable=not progress):
        ids = windows[start : start + batch_size].to(model.device)
        sums.add(start, ids, model(input_ids=ids, use_cache=False).logits)
    return sums.result()


def check_windows(
    model: PreTrainedModel, windows: Int64[Tensor, "window position"], *, stride: int | None = None, batch_size: int = 1
) -> None:
    """Raise ValueError, before any work, when a loss of this model on these windows would make no sense."""
    count, length = windows.shape
    if count < 1 or length < 2:
        raise ValueError(f"windows of shape {tuple(windows.shape)}: at least 1 window of at least 2 tokens is needed")
    if stride is not None and not 1 <= stride <= length:
        raise ValueError(f"stride={stride}: between 1 and the window's {length} tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    if model.training:
        raise ValueError("the model is in training mode (dropout would blur the result): call model.eval() first")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"windows of {length} tokens exceed the {positions} positions of this model: take shorter windows")
    check_vocabulary(model, windows)


class NllAccumulator:
    """Sums per window, from one batch of logits after another."""

    def __init__(self, windows: Int64[Tensor, "window position"], stride: int | None):
        self.count, self.length = windows.shape
        self.stride = stride
        self.nll = np.zeros(self.count, dtype=np.float64)
        self.correct = np.zeros(self.count, dtype=np.int64)

    def scored(self, window: int) -> int:
        """How many positions at the end of a window are scored."""
        everything = self.length - 1
        return everything if window == 0 or self.stride is None else min(self.stride, everything)

    def add(self, start: int, ids: Int64[Tensor, "batch position"], logits: Float[Tensor, "batch position vocabulary"]) -> None:
        """Add the windows ``start``, ``start + 1``, …"""
        sums = []
        # Window by window: a float32 copy of a whole batch of bfloat16 logits would treble the memory.
        for row in range(len(ids)):
            scored = self.scored(start + row)
            targets = ids[row, -scored:]
            predictions = logits[row, -scored - 1 : -1].float()
            nll = functional.cross_entropy(predictions, targets, reduction="none").double().sum()
            sums.append(torch.stack([nll, (predictions.argmax(-1) == targets).sum().double()]))
        values = torch.stack(sums).cpu().numpy()
        finite = np.isfinite(values[:, 0])
        if not finite.all():
            raise NotFinite(
                f"the likelihood of window {start + int(np.argmin(finite))} is not finite: NaN or infinite logits "
                "(damaged weights, or an overflow in float16: load it in bfloat16 or float32)"
            )
        self.nll[start : start + len(ids)] = values[:, 0]
        self.correct[start : start + len(ids)] = values[:, 1].astype(np.int64)

    def result(self) -> Perplexity:
        tokens = tuple(self.scored(window) for window in range(self.count))
        return Perplexity(
            nll_sum=math.fsum(self.nll),
            tokens=sum(tokens),
            correct=int(self.correct.sum()),
            window_nll=tuple(self.nll.tolist()),
            window_tokens=tokens,
        )

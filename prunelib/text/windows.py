"""Documents → deterministic windows of tokens.

`sample_windows` draws calibration windows, `consecutive_windows` cuts the windows that perplexity is measured on. Both join the
documents to one stream of tokens first (`token_stream`), so that no position is ever padded.
"""

import hashlib
import warnings

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from prunelib.text.corpora import BLANK_LINE, Corpus

TOKENIZED_AT_ONCE = 64  # documents


def token_stream(corpus: Corpus, tokenizer, *, join: str | None = None, progress: bool = True) -> Int64[np.ndarray, " token"]:
    """All documents as one stream of token ids, without the special tokens that the tokenizer would add.

    Args:
        join: text put between two documents before tokenizing. None puts the tokenizer's end-of-text token between them, or a
            blank line where it has none.
    """
    between = tokenizer.eos_token_id if join is None else None
    texts = list(corpus.documents)
    if between is None:
        texts = [(BLANK_LINE if join is None else join).join(texts)]
    pieces: list[np.ndarray] = []
    with tqdm(total=len(texts), desc=f"tokenize {corpus.name}", unit="document", disable=not progress, delay=3) as bar:
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            for ids in encode(tokenizer, texts[start : start + TOKENIZED_AT_ONCE]):
                if pieces:
                    pieces.append(np.array([between], dtype=np.int64))
                pieces.append(np.asarray(ids, dtype=np.int64))
                bar.update()
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _content_length(seq_len: int, tokenizer, bos: bool) -> int:
    """Text tokens per window: ``seq_len``, less one when position 0 is the beginning-of-text token."""
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: a window needs at least 2 tokens")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token: take bos=False, or set tokenizer.bos_token")
    return seq_len - int(bos)


def _windows(
    stream: Int64[np.ndarray, " token"], offsets: Int64[np.ndarray, " window"], content: int, tokenizer, bos: bool
) -> Int64[Tensor, "window position"]:
    windows = torch.from_numpy(stream[offsets[:, None] + np.arange(content)])
    if bos:
        windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id, dtype=torch.int64), windows], dim=1)
    return windows


def sample_windows(
    corpus: Corpus,
    tokenizer,
    n_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
    *,
    join: str | None = None,
    progress: bool = True,
) -> Int64[Tensor, "sample position"]:
    """Draw calibration windows of exactly ``seq_len`` tokens at random places of the joined documents.

    Every placement of ``n_samples`` windows that do not overlap is equally likely, and their order is random. A corpus that is
    too short for that gives independent offsets, so that windows overlap, and a warning. The generator is local: the same seed
    gives the same bytes.

    Args:
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).
        join: see `token_stream`.

    Raises:
        ValueError: fewer tokens than one window needs, no bos token, ``n_samples`` or ``seq_len`` too small, a negative seed.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: draw at least 1 window")
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is 0 or a positive integer")
    content = _content_length(seq_len, tokenizer, bos)
    stream = token_stream(corpus, tokenizer, join=join, progress=progress)
    _require_tokens(corpus, len(stream), content, seq_len)
    generator = np.random.default_rng(seed)
    slack = len(stream) - n_samples * content
    if slack >= 0:
        # Choosing n of slack + n slots, then widening each chosen slot to a window, is uniform over all such placements.
        slots = np.sort(generator.choice(slack + n_samples, size=n_samples, replace=False))
        offsets = generator.permutation(slots + np.arange(n_samples) * (content - 1))
    else:
        warnings.warn(
            f"{corpus.label} has {len(stream)} tokens, {n_samples} separate windows need {n_samples * content}: they overlap",
            stacklevel=2,
        )
        offsets = generator.integers(0, len(stream) - content + 1, size=n_samples)
    return _windows(stream, offsets, content, tokenizer, bos)


def consecutive_windows(
    corpus: Corpus,
    tokenizer,
    seq_len: int,
    limit: int | None = None,
    bos: bool = False,
    *,
    stride: int | None = None,
    join: str | None = None,
    progress: bool = True,
) -> Int64[Tensor, "window position"]:
    """Cut the joined documents into windows from their beginning; the tail that fills no window is dropped.

    Args:
        limit: keep at most so many windows, evenly spaced over the whole text (None: all). The first ones alone would stand
            for one source: a corpus is often sorted.
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).
        stride: text tokens from one window to the next; None means windows that do not overlap.
        join: see `token_stream`.

    Raises:
        ValueError: fewer tokens than one window needs (both numbers are named), no bos token, ``seq_len``, ``limit`` or
            ``stride`` out of range.
    """
    content = _content_length(seq_len, tokenizer, bos)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: keep at least 1 window, or None for all")
    step = content if stride is None else stride
    if not 1 <= step <= content:
        raise ValueError(f"stride={stride}: between 1 and the {content} text tokens of a window, else text would be skipped")
    stream = token_stream(corpus, tokenizer, join=join, progress=progress)
    _require_tokens(corpus, len(stream), content, seq_len)
    offsets = np.arange(0, len(stream) - content + 1, step)
    if limit is not None and limit < len(offsets):
        offsets = offsets[np.arange(limit) * len(offsets) // limit]
    return _windows(stream, offsets, content, tokenizer, bos)


def _require_tokens(corpus: Corpus, available: int, needed: int, seq_len: int) -> None:
    if available < needed:
        raise ValueError(
            f"{corpus.label} has {available} tokens; a window of {seq_len} needs {needed}: take more text or shorter windows"
        )


def windows_sha256(windows: Int64[Tensor, "window position"]) -> str:
    """Hash of a tensor of windows: its shape and its ids as little-endian 64-bit integers."""
    array = windows.cpu().numpy()
    state = hashlib.sha256(repr(array.shape).encode())
    state.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return state.hexdigest()

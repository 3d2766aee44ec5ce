"""Documents → deterministic windows of tokens, cut from one stream, so that no position is ever padded."""

import hashlib
import warnings

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from prunelib.text.corpora import BLANK_LINE, Corpus

TOKENIZED_AT_ONCE = 64  # documents


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def token_stream(corpus: Corpus, tokenizer, at_least: int = 0, *, progress: bool = True) -> Int64[np.ndarray, " token"]:
    """All documents as one stream of token ids; between them the tokenizer's end-of-text token, or a blank line without one.

    Raises ValueError where that gives fewer than `at_least` tokens.
    """
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = list(corpus.documents) if between else [BLANK_LINE.join(corpus.documents)]
    pieces: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    starts = range(0, len(texts), TOKENIZED_AT_ONCE)
    for start in tqdm(starts, desc=f"tokenize {corpus.name}", unit="batch", disable=not progress, delay=3):
        for ids in encode(tokenizer, texts[start : start + TOKENIZED_AT_ONCE]):
            pieces.append(np.array([*ids, *between], dtype=np.int64))
    stream = np.concatenate(pieces)[: -1 if between and texts else None]  # nothing behind the last document
    if len(stream) < at_least:
        have = f"{corpus.label} has {len(stream)} tokens"
        raise ValueError(f"{have}; a window needs {at_least} of them: take more text or shorter windows")
    return stream


def check_draw(tokenizer, seq_len: int, bos: bool, count: int, seed: int) -> None:
    """Raise ValueError where no rows of so many tokens can be made: too small numbers, or no bos token."""
    if count < 1 or seq_len < 2 or seed < 0:
        raise ValueError(f"{count} rows of {seq_len} tokens, seed={seed}: at least 1 row of at least 2 tokens, seed from 0")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token: take bos=False, or set tokenizer.bos_token")


def prepend_bos(rows: Int64[Tensor, "row position"], tokenizer) -> Int64[Tensor, "row longer"]:
    """The beginning-of-text token at position 0 of every row."""
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id, dtype=torch.int64), rows], dim=1)


def sample_windows(
    corpus: Corpus, tokenizer, n_samples: int, seq_len: int, seed: int, bos: bool = False, *, progress: bool = True
) -> Int64[Tensor, "sample position"]:
    """Calibration windows of exactly ``seq_len`` tokens (with `bos`, the first is that token) from the joined documents.

    Every placement of ``n_samples`` windows that do not overlap is equally likely, and their order is random. A corpus that is
    too short for that gives independent offsets, so that windows overlap, and a warning. The generator is local: the same seed
    gives the same bytes. Raises ValueError for fewer tokens than one window needs, and as `check_draw`.
    """
    check_draw(tokenizer, seq_len, bos, n_samples, seed)
    content = seq_len - int(bos)
    stream = token_stream(corpus, tokenizer, content, progress=progress)
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
    windows = torch.from_numpy(stream[offsets[:, None] + np.arange(content)])
    return prepend_bos(windows, tokenizer) if bos else windows


def consecutive_windows(
    corpus: Corpus, tokenizer, seq_len: int, limit: int | None = None, bos: bool = False, *, progress: bool = True
) -> Int64[Tensor, "window position"]:
    """The joined documents cut into windows (with `bos`, each begins with that token); a tail that fills none is dropped.

    limit: keep at most so many, evenly spaced over the whole text: the first ones alone would stand for one source of a sorted
    corpus. Raises ValueError for fewer tokens than one window needs, and as `check_draw`.
    """
    check_draw(tokenizer, seq_len, bos, 1 if limit is None else limit, 0)
    content = seq_len - int(bos)
    stream = token_stream(corpus, tokenizer, content, progress=progress)
    windows = torch.from_numpy(stream[: len(stream) // content * content].reshape(-1, content))
    if limit is not None and limit < len(windows):
        windows = windows[torch.arange(limit) * len(windows) // limit]
    return prepend_bos(windows, tokenizer) if bos else windows


def windows_sha256(windows: Int64[Tensor, "window position"]) -> str:
    """Hash of a tensor of windows: its shape and its ids as little-endian 64-bit integers."""
    array = windows.cpu().numpy()
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()

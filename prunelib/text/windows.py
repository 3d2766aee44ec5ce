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


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def token_stream(corpus: Corpus, tokenizer, *, progress: bool = True) -> Int64[np.ndarray, " token"]:
    """All documents as one stream of token ids, without the special tokens that the tokenizer would add.

    The tokenizer's end-of-text token stands between two documents, or a blank line where it has none.
    """
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = list(corpus.documents) if between else [BLANK_LINE.join(corpus.documents)]
    pieces: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    with tqdm(total=len(texts), desc=f"tokenize {corpus.name}", unit="document", disable=not progress, delay=3) as bar:
        for start in range(0, len(texts), TOKENIZED_AT_ONCE):
            for ids in encode(tokenizer, texts[start : start + TOKENIZED_AT_ONCE]):
                pieces.append(np.array([*ids, *between], dtype=np.int64))
                bar.update()
    return np.concatenate(pieces)[: -1 if between and texts else None]  # nothing behind the last document


def check_draw(tokenizer, seq_len: int, bos: bool, count: int, seed: int) -> None:
    """Raise ValueError where no rows of so many tokens can be made."""
    if count < 1 or seq_len < 2 or seed < 0:
        raise ValueError(f"{count} rows of {seq_len} tokens, seed={seed}: at least 1 row of at least 2 tokens, seed from 0")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos_token: take bos=False, or set tokenizer.bos_token")


def prepend_bos(rows: Int64[Tensor, "row position"], tokenizer) -> Int64[Tensor, "row longer"]:
    """The beginning-of-text token at position 0 of every row."""
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id, dtype=torch.int64), rows], dim=1)


def _stream(corpus: Corpus, tokenizer, content: int, progress: bool) -> Int64[np.ndarray, " token"]:
    """`token_stream`, refused where it does not fill one window of so many tokens of text."""
    stream = token_stream(corpus, tokenizer, progress=progress)
    if len(stream) < content:
        raise ValueError(
            f"{corpus.label} has {len(stream)} tokens; a window needs {content} of them: take more text or shorter windows"
        )
    return stream


def sample_windows(
    corpus: Corpus, tokenizer, n_samples: int, seq_len: int, seed: int, bos: bool = False, *, progress: bool = True
) -> Int64[Tensor, "sample position"]:
    """Draw calibration windows of exactly ``seq_len`` tokens at random places of the joined documents.

    Every placement of ``n_samples`` windows that do not overlap is equally likely, and their order is random. A corpus that is
    too short for that gives independent offsets, so that windows overlap, and a warning. The generator is local: the same seed
    gives the same bytes.

    Args:
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).

    Raises:
        ValueError: fewer tokens than one window needs, no bos token, ``n_samples`` or ``seq_len`` too small, a negative seed.
    """
    check_draw(tokenizer, seq_len, bos, n_samples, seed)
    content = seq_len - int(bos)
    stream = _stream(corpus, tokenizer, content, progress)
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
    """Cut the joined documents into windows from their beginning; the tail that fills no window is dropped.

    Args:
        limit: keep at most so many windows, evenly spaced over the whole text (None: all). The first ones alone would stand
            for one source: a corpus is often sorted.
        bos: put the beginning-of-text token at position 0 of every window (``seq_len`` counts it).

    Raises:
        ValueError: fewer tokens than one window needs, no bos token, ``seq_len`` or ``limit`` too small.
    """
    check_draw(tokenizer, seq_len, bos, 1 if limit is None else limit, 0)
    content = seq_len - int(bos)
    stream = _stream(corpus, tokenizer, content, progress)
    windows = torch.from_numpy(stream[: len(stream) // content * content].reshape(-1, content))
    if limit is not None and limit < len(windows):
        windows = windows[torch.arange(limit) * len(windows) // limit]
    return prepend_bos(windows, tokenizer) if bos else windows


def windows_sha256(windows: Int64[Tensor, "window position"]) -> str:
    """Hash of a tensor of windows: its shape and its ids as little-endian 64-bit integers."""
    array = windows.cpu().numpy()
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()

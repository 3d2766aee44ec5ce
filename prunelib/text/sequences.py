"""The rows of tokens that a healing trains on, drawn from a corpus: packed, or one document each."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from tqdm.auto import tqdm

from prunelib.text.corpora import BLANK_LINE, Corpus
from prunelib.text.windows import TOKENIZED_AT_ONCE, check_draw, encode, prepend_bos, windows_sha256

IGNORED = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class TrainingRows:
    """Rows of tokens to train on, in their order; ``labels`` are `IGNORED` where nothing is to be predicted, ``mask`` is False
    at padding and None where nothing is padded."""

    input_ids: Int64[Tensor, "row position"] = field(repr=False)
    labels: Int64[Tensor, "row position"] = field(repr=False)
    mask: Bool[Tensor, "row position"] | None = field(repr=False)
    source: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sha256(self) -> str:
        """Hash of shapes and contents."""
        tensors = (self.input_ids, self.labels) + (() if self.mask is None else (self.mask.long(),))
        return hashlib.sha256("".join(map(windows_sha256, tensors)).encode()).hexdigest()

    def real_tokens(self, rows: int) -> int:
        """Tokens that are no padding in the first so many rows."""
        return self.input_ids[:rows].numel() if self.mask is None else int(self.mask[:rows].sum())


def packed_rows(
    corpus: Corpus, tokenizer, count: int, seq_len: int, seed: int, bos: bool = False, *, progress: bool = True
) -> TrainingRows:
    """`count` rows of exactly `seq_len` tokens (with `bos` the first of each is that token), nothing padded, all trained.

    Documents in random order are joined by the end-of-text token (by a blank line where the tokenizer has none), cut into rows,
    and the rows are shuffled. No more text is tokenized than is needed; where it is used up, another pass begins in another
    order. Raises ValueError for less text than one row, and as `check_draw`.
    """
    check_draw(tokenizer, seq_len, bos, count, seed)
    end = tokenizer.eos_token_id
    between = encode(tokenizer, [BLANK_LINE])[0] if end is None else [end]
    generator = np.random.default_rng(seed)
    content = seq_len - int(bos)
    pieces: list[np.ndarray] = []
    found, order = 0, generator.permutation(len(corpus.documents))
    with tqdm(total=count * content, desc=f"tokenize {corpus.name}", unit="token", disable=not progress, delay=3) as bar:
        while found < count * content:
            if not len(order):  # the text is used up
                if found < content:
                    raise ValueError(f"{corpus.label} has {found} tokens, fewer than one row of {seq_len}: take more text")
                order = generator.permutation(len(corpus.documents))
            now, order = order[:TOKENIZED_AT_ONCE], order[TOKENIZED_AT_ONCE:]
            for ids in encode(tokenizer, [corpus.documents[index] for index in now]):
                pieces.append(np.array([*ids, *between], dtype=np.int64))
                found += len(pieces[-1])
                bar.update(len(pieces[-1]))
    ids = torch.from_numpy(np.concatenate(pieces)[: count * content].reshape(count, content)[generator.permutation(count)])
    ids = prepend_bos(ids, tokenizer) if bos else ids
    return TrainingRows(ids, ids, None, f"{corpus.label}, packed, seed {seed}")


def document_rows(corpus: Corpus, tokenizer, count: int, seq_len: int, seed: int, *, progress: bool = True) -> TrainingRows:
    """`count` rows of one document each, cut at `seq_len` tokens or padded on the right; padding is not trained.

    Documents begin with the special tokens that the tokenizer gives them and get no end-of-text token, and every token of the
    text is trained: SimDiff's setting for Alpaca (train_on_inputs true, add_eos false; Table 6). The order is random; where
    the documents are used up, another pass begins. Documents of fewer than two tokens are left out; ValueError where all are.
    """
    check_draw(tokenizer, seq_len, False, count, seed)
    generator = np.random.default_rng(seed)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = torch.full((count, seq_len), pad, dtype=torch.int64)
    mask = torch.zeros((count, seq_len), dtype=torch.bool)
    filled, order = 0, generator.permutation(len(corpus.documents))
    with tqdm(total=count, desc=f"tokenize {corpus.name}", unit="document", disable=not progress, delay=3) as bar:
        while filled < count:
            if not len(order):
                if not filled:
                    raise ValueError(f"{corpus.label} has no document of at least 2 tokens: take more text")
                order = generator.permutation(len(corpus.documents))
            text, order = corpus.documents[order[0]], order[1:]
            # Special tokens behind the text, which some tokenizers add, are not of it.
            encoded, bare = tokenizer(text, verbose=False)["input_ids"], encode(tokenizer, [text])[0]
            begins = (start for start in range(len(encoded)) if encoded[start : start + len(bare)] == bare)
            encoded = encoded[: min(next(begins, seq_len) + len(bare), seq_len)]
            if len(encoded) >= 2:
                ids[filled, : len(encoded)] = torch.tensor(encoded)
                mask[filled, : len(encoded)] = True
                filled += 1
                bar.update()
    return TrainingRows(ids, ids.masked_fill(~mask, IGNORED), mask, f"{corpus.label}, one document a row, seed {seed}")

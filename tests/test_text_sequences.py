"""The rows of tokens that a healing trains on: text in order, none twice, padding not trained."""

import pytest
import torch

from prunelib.text.corpora import Corpus
from prunelib.text.sequences import IGNORED, document_rows, packed_rows
from prunelib.text.windows import TOKENIZED_AT_ONCE


class Letters:
    """A tokenizer of one token per letter; 0 begins a document, 1 ends it."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, None

    def __call__(self, texts, truncation=False, max_length=None, add_special_tokens=True, **_):
        def encode(text):
            ids = [0] * add_special_tokens + [ord(letter) for letter in text]
            return ids[:max_length] if truncation else ids

        return {"input_ids": encode(texts) if isinstance(texts, str) else [encode(text) for text in texts]}


def corpus(*documents):
    return Corpus("letters", "train", documents, "here")


TEXTS = ["".join(chr(200 + 7 * i + j) for j in range(7)) for i in range(200)]


def test_packed_rows_repeat_no_text_before_all_of_it_was_read():
    rows = packed_rows(corpus(*TEXTS), Letters(), 160, 10, seed=3, progress=False)  # 200 documents of 8 tokens, the end counted
    once = rows.input_ids
    assert once.shape == (160, 10) and torch.equal(rows.labels, once)
    letters, counts = once.unique(return_counts=True)
    assert letters.tolist() == [1, *range(200, 1600)]  # all of the text, and the end of a document
    assert counts.tolist() == [200] + [1] * 1400
    steps = once.diff(dim=1)[(once[:, 1:] != 1) & (once[:, :-1] != 1)]
    assert (steps == 1).all()  # within a document in order
    again = packed_rows(corpus(*TEXTS), Letters(), 480, 10, seed=3, progress=False).input_ids
    assert again.unique(return_counts=True)[1].tolist() == [600] + [3] * 1400  # three passes


def test_little_text_is_tokenized_for_few_rows_and_the_seed_decides():
    seen = []

    def tokenizer(texts, **options):
        seen.append(len(texts))
        return Letters()(texts, **options)

    tokenizer.eos_token_id = 1
    rows = packed_rows(corpus(*TEXTS), tokenizer, 4, 10, 3, progress=False)
    assert seen == [TOKENIZED_AT_ONCE]
    same, other = (packed_rows(corpus(*TEXTS), Letters(), 4, 10, seed, progress=False) for seed in (3, 4))
    assert rows.sha256 == same.sha256 != other.sha256


def test_packed_rows_begin_with_the_bos_token_when_asked():
    rows = packed_rows(corpus("abcdefghijklmnop"), Letters(), 2, 5, 0, bos=True, progress=False)
    assert rows.input_ids[:, 0].tolist() == [0, 0] and (rows.input_ids[:, 1:] >= ord("a")).all()


def test_document_rows_are_cut_and_padded_and_padding_is_not_trained():
    rows = document_rows(corpus("abc", "defghijkl", ""), Letters(), 4, 6, seed=0, progress=False)
    # The empty document has nothing to predict.
    found = {tuple(row[mask].tolist()) for row, mask in zip(rows.input_ids, rows.mask, strict=True)}
    assert found == {(0, *map(ord, "abc")), (0, *map(ord, "defgh"))}  # no end-of-text token
    assert torch.equal(rows.labels == IGNORED, ~rows.mask)
    assert torch.equal(rows.labels[rows.mask], rows.input_ids[rows.mask])  # train_on_inputs
    assert rows.real_tokens(4) == 2 * 4 + 2 * 6


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (packed_rows, ("abc", 1, 10, 0), r"has 4 tokens, fewer than one row of 10"),
        (packed_rows, ("abc", 0, 2, 0), "0 rows"),
        (packed_rows, ("abc", 1, 2, -1), "seed=-1"),
        (document_rows, ("", 1, 10, 0), "no document of at least 2 tokens"),
    ],
)
def test_bad_requests_are_refused(rows, arguments, message):
    text, *numbers = arguments
    with pytest.raises(ValueError, match=message):
        rows(corpus(text), Letters(), *numbers, progress=False)

"""A small project on disk for the tests of notebooks: a tiny model, its tokenizer of whole words, and a text."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunelib import models
from prunelib.lab import runs

END = "<|endoftext|>"


def drawn_words(n_words: int, count: int = 4000) -> list[int]:
    """Numbers of words, drawn at random: nothing to learn from."""
    return torch.randint(1, n_words, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def write_project(folder: Path, *, n_layers: int, words: Iterable[int], n_words: int = 60, bos: bool = False) -> Path:
    """Write `folder`/model, a random Llama with the words w1, w2, … and END, and text.txt, the words of these numbers."""
    known = {END: 0} | {f"w{index}": index for index in range(1, n_words)}
    tokenizer = Tokenizer(WordLevel(known, unk_token=END))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"eos_token": END, "unk_token": END} | ({"bos_token": END} if bos else {})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=n_words, hidden_size=32, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=2
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    models.save(LlamaForCausalLM(config).eval(), fast, folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{index}" for index in words))
    return folder


def write_choices(folder: Path, sets: dict[int, tuple[int, ...]], method: str = "angular") -> None:
    """Write `folder`/choices.json: what a run of blocks.ipynb chose for `folder`/model, by number of layers."""
    chosen = [{"method": method, "size": size, "removed_layers": " ".join(map(str, layers))} for size, layers in sets.items()]
    rows = [{**one, "role": "choice", "metric": "nll", "value": 1.0} for one in chosen]
    run = {"experiment": "blocks", "parameters": {"model": str(folder / "model")}, "rows": rows}
    runs.write_run(folder / "choices.json", **run, provenance={}, seconds=0.0)

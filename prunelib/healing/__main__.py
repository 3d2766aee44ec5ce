"""Heal a pruned or sliced model and save it as an ordinary checkpoint.

``accelerate launch -m prunelib.healing MODEL OUT …`` uses several GPUs. A second call with the same arguments resumes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunelib import models
from prunelib.healing import RECIPES, Recipe, gromov, heal
from prunelib.io import write_json
from prunelib.text import corpora
from prunelib.text.sequences import document_rows, packed_rows

ROWS = {"packed": packed_rows, "documents": document_rows}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m prunelib.healing", description=__doc__)
    parser.add_argument("model", help="folder of the pruned model, with its tokenizer")
    parser.add_argument("out", type=Path, help="folder for checkpoints, healing.json and the healed model (OUT/healed)")
    parser.add_argument("--recipe", default="lora", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--gromov", metavar="MODEL", help="the recipe of that paper for one of its models, as Llama-2-13B")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe, as steps=64")
    parser.add_argument("--corpus", default="pydocs", help="a corpus of prunelib.text.corpora, or a text file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", help="offline copy of the corpus")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--rows", choices=sorted(ROWS), default="packed", help="one document a row is Alpaca's setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", help="folder of the dense model, for distillation")
    parser.add_argument("--removed", type=int, nargs="*", help="layers removed from the dense model, to match hidden states")
    parser.add_argument("--dtype", choices=sorted(models.DTYPES), default="float32", help="of the weights in memory")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one, for each process its own")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; by default five minutes")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)

    process = int(os.environ.get("LOCAL_RANK", 0))
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = {"dtype": given.dtype, "device": f"cuda:{process}" if device == "cuda" else device}
    kept = ("removed", "seed", "micro_batch", "save_every", "bf16", "gradient_checkpointing")
    try:
        base = gromov(given.gromov) if given.gromov else RECIPES[given.recipe]
        recipe = dataclasses.replace(base, **dict(_setting(text) for text in given.set))
        tokenizer = models.load_tokenizer(given.model)
        corpus = corpora.load(given.corpus, given.split, data_dir=given.data_dir, max_documents=given.max_documents)
        progress = not given.quiet and process == 0
        rows = ROWS[given.rows](corpus, tokenizer, recipe.rows, recipe.seq_len, given.seed, progress=progress)
        pruned = models.load(given.model, **place)
        dense = models.load(given.dense, **place) if given.dense else None
        options = {name: getattr(given, name) for name in kept}
        healed = heal(pruned, rows, recipe, given.out / "training", dense=dense, progress=progress, **options)
        if int(os.environ.get("RANK", 0)) == 0:
            models.save(healed.model, tokenizer, given.out / "healed", overwrite=True)
            data = {corpus.label: corpus.sha256}
            write_json(given.out / "healing.json", healed.summary() | {"rows": rows.source, "data": data})
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """``name=value`` of a setting of `Recipe`: a number or null as in JSON, else words; those of modules with commas."""
    name, _, value = text.partition("=")
    if name not in {item.name for item in dataclasses.fields(Recipe)} or not value:
        raise ValueError(f"--set {text}: give NAME=VALUE with a setting of a recipe, as steps=64")
    if name == "modules":
        return name, tuple(value.split(","))
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
from prunelib.healing import RECIPES, Recipe, heal
from prunelib.io import write_json
from prunelib.models.saving import rehearse
from prunelib.text import corpora
from prunelib.text.sequences import document_rows, packed_rows

ROWS = {"packed": packed_rows, "documents": document_rows}
KEPT = ("removed", "seed", "micro_batch", "save_every", "bf16", "gradient_checkpointing")  # as `heal` takes them


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m prunelib.healing", description=__doc__)
    parser.add_argument("model", help="folder of the pruned model, with its tokenizer")
    parser.add_argument("out", type=Path, help="folder for checkpoints, healing.json and the healed model (OUT/healed)")
    parser.add_argument("--recipe", default="lora", help=f"one of {', '.join(RECIPES)}, or gromov:MODEL, as gromov:Llama-2-13B")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe, as steps=64")
    parser.add_argument("--corpus", default="pydocs", help="a corpus of prunelib.text.corpora, or a text file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", help="offline copy of the corpus")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--rows", choices=sorted(ROWS), default="packed", help="one document a row is Alpaca's setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", help="folder of the dense model, for distillation")
    removed = "layers that the dense model lost, for cut_adjacent"
    parser.add_argument("--removed", nargs="*", type=int, default=[], metavar="LAYER", help=removed)
    parser.add_argument("--dtype", choices=sorted(models.DTYPES), default="float32", help="of the weights in memory")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one, for each process its own")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)

    process = int(os.environ.get("LOCAL_RANK", 0))
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = {"dtype": given.dtype, "device": f"cuda:{process}" if device == "cuda" else device}
    try:
        recipe = dataclasses.replace(RECIPES[given.recipe], **dict(map(_setting, given.set)))
        tokenizer = models.load_tokenizer(given.model)
        corpus = corpora.load(given.corpus, given.split, data_dir=given.data_dir, max_documents=given.max_documents)
        progress = not given.quiet and process == 0
        rows = ROWS[given.rows](corpus, tokenizer, recipe.rows, recipe.seq_len, given.seed, progress=progress)
        pruned = models.load(given.model, **place)
        dense = models.load(given.dense, **place) if given.dense else None
        rehearse(pruned, tokenizer, given.out / "healed")
        options = {name: getattr(given, name) for name in KEPT}
        healed = heal(pruned, rows, recipe, given.out / "training", dense=dense, progress=progress, **options)
        if int(os.environ.get("RANK", 0)) == 0:
            models.save(healed.model, tokenizer, given.out / "healed", overwrite=True)
            found = {name: value for name, value in vars(healed).items() if name != "model"}
            found |= {"recipe": dataclasses.asdict(recipe), "rows": rows.source, "data": {corpus.label: corpus.sha256}}
            write_json(given.out / "healing.json", found)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in Recipe.__dataclass_fields__ or not value:
        raise ValueError(f"--set {text}: give NAME=VALUE with a setting of a recipe, as steps=64 or modules=mlp,attention")
    if name == "modules":
        return name, tuple(value.split(","))
    with contextlib.suppress(ValueError):  # else a number
        return name, json.loads(value)
    return name, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Plans for the 6-layer models of `architectures`, and how far two models are apart."""

import torch

from prunelib.slicing import SlicePlan, slice_model

FAMILIES = [
    "llama",
    "llama_tied",
    "mistral",
    "ministral",
    "qwen2",
    "qwen2_sliding",
    "qwen3",
    "smollm3",
    "gemma",
    "phi3",
    "phi",
    "gpt_neox",
    "opt",
]
FULL = SlicePlan(32, (32,) * 6, "test")
CUT = SlicePlan(32, (28, 20, 24, 16, 16, 30), "test")
UNCUT_LAYERS = SlicePlan(32, (32, 20, 32, 32, 16, 32), "test")


def sliced(model, plan, tokens, **options):
    return slice_model(model, plan, tokens, batch_size=2, progress=False, **options)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def difference(a, b, tokens) -> float:
    return float((logits(a, tokens) - logits(b, tokens)).abs().max())

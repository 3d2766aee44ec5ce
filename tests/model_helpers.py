"""What tests of small models share: windows, layers that do nothing, slice plans, and how far two results are apart."""

import numpy as np
import torch

from prunelib.criteria import LayerStats
from prunelib.models import decoder_layers
from prunelib.models.architectures import ARCHITECTURES
from prunelib.slicing import SlicePlan, slice_model

ARRAYS = ("count", "cosine", "angle", "squared_difference", "absolute_difference", "relative_magnitude", "norm")

SLICED_FAMILIES = [
    *("llama", "llama_tied", "mistral", "ministral", "qwen2", "qwen2_sliding", "qwen3", "smollm3"),
    *("gemma", "phi3", "phi", "gpt_neox", "opt"),
]
# Plans for the 6-layer models of `architectures`.
FULL = SlicePlan(32, (32,) * 6, "test")
CUT = SlicePlan(32, (28, 20, 24, 16, 16, 30), "test")
UNCUT_LAYERS = SlicePlan(32, (32, 20, 32, 32, 16, 32), "test")


def random_windows(count: int = 4, length: int = 16, vocabulary: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def silence(model, *indices: int) -> None:
    """Make layers identities: they add nothing."""
    architecture = ARCHITECTURES[model.config.model_type]
    for index in indices:
        for sublayer in (architecture.attn, architecture.mlp):
            for parameter in decoder_layers(model)[index].get_submodule(sublayer.output).parameters():
                torch.nn.init.zeros_(parameter)


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits


def difference(a, b, windows) -> float:
    return float((logits(a, windows) - logits(b, windows)).abs().max())


def sliced(model, plan, windows, **options):
    return slice_model(model, plan, windows, batch_size=2, progress=False, **options)


def assert_close(found: LayerStats, expected: LayerStats, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert (found.hidden_size, found.n_layers) == (expected.hidden_size, expected.n_layers)
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=atol, err_msg=name)

"""One pass over tiny random models against a slow, separate computation, and the ways a pass can go wrong."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from model_helpers import ARRAYS, assert_close, silence
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from prunelib.criteria import statistics
from prunelib.criteria.statistics import SUBSETS, LayerStats, collect, from_states, read_draws
from prunelib.models import decoder_layers, final_norm


def naive(states: np.ndarray, tokens: list[tuple[int, int]]) -> SimpleNamespace:
    """Sums over the given (sample, position) tokens of states [state, sample, position, dim], one token after the other."""
    states = states.astype(np.float64)
    sums = SimpleNamespace(
        count=0.0, cosine=0.0, angle=0.0, squared_difference=0.0, absolute_difference=0.0, relative_magnitude=0.0, norm=0.0
    )
    for sample, position in tokens:
        h = states[:, sample, position]
        unit = h / np.linalg.norm(h, axis=1, keepdims=True)
        cosine = np.clip(unit @ unit.T, -1, 1)
        np.fill_diagonal(cosine, 1)
        step = h[1:] - h[:-1]
        sums.count += 1
        sums.cosine += cosine
        sums.angle += np.arccos(cosine) / np.pi
        sums.squared_difference += (step**2).sum(axis=1)
        sums.absolute_difference += np.abs(step).sum(axis=1)
        sums.relative_magnitude += np.linalg.norm(step, axis=1) / np.linalg.norm(h[1:], axis=1)
        sums.norm += np.linalg.norm(h, axis=1)
    return sums


@torch.no_grad()
def reference_states(model, windows, mask=None, position_ids=None) -> np.ndarray:
    """[state, sample, position, dim] from the library's own `output_hidden_states`, the last state from a hook."""
    last = []
    extra = {} if position_ids is None else {"position_ids": position_ids}
    hook = decoder_layers(model)[-1].register_forward_hook(lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o))
    output = model(windows, attention_mask=mask, output_hidden_states=True, use_cache=False, **extra)
    hook.remove()
    assert len(output.hidden_states) == len(decoder_layers(model)) + 1
    # What makes the hook necessary: the library reports the last state after the final norm.
    torch.testing.assert_close(final_norm(model)(last[0]), output.hidden_states[-1])
    return torch.stack([*output.hidden_states[:-1], last[0]]).float().numpy()


def subset_tokens(mask: torch.Tensor) -> dict[str, list[tuple[int, int]]]:
    rows = [[(sample, position) for position in row.nonzero().flatten().tolist()] for sample, row in enumerate(mask)]
    return {
        "all": list(chain.from_iterable(rows)),
        "without_first": list(chain.from_iterable(row[1:] for row in rows)),
        "last": [row[-1] for row in rows],
    }


def assert_equals_naive(stats: LayerStats, states: np.ndarray, mask: torch.Tensor, rtol: float = 1e-9) -> None:
    for index, (name, tokens) in enumerate(subset_tokens(mask).items()):
        assert SUBSETS[index] == name
        expected = naive(states, tokens)
        for array in ARRAYS:
            found = getattr(stats, array)[index]
            np.testing.assert_allclose(found, getattr(expected, array), rtol=rtol, atol=1e-12, err_msg=f"{name} {array}")


def test_agrees_with_naive_float64(tiny_llama):
    windows = torch.randint(3, 97, (5, 17))
    stats = collect(tiny_llama, windows, batch_size=2, progress=False)
    # The same batches: float32 matrix products may round differently for another batch size.
    states = np.concatenate([reference_states(tiny_llama, part) for part in windows.split(2)], axis=1)
    assert stats.n_layers == 6
    assert stats.hidden_size == 32
    assert stats.count.tolist() == [85, 80, 5]
    assert_equals_naive(stats, states, torch.ones_like(windows))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture(name):
    """Inputs by position or keyword, outputs as tensor or tuple, in-place layers: the states are the library's own."""
    model = build(name)
    windows = torch.randint(3, 97, (2, 9))
    stats = collect(model, windows, progress=False)
    assert_equals_naive(stats, reference_states(model, windows), torch.ones_like(windows), rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_enters_no_sum(name, side):
    """A padded batch gives the sum of its samples alone, also where positions are learned vectors."""
    model = build(name)
    samples = [torch.randint(3, 97, (1, length)) for length in (3, 1, 8, 5)]
    windows, mask = torch.full((4, 8), 60), torch.zeros(4, 8, dtype=torch.long)
    for row, sample in enumerate(samples):
        real = slice(0, sample.shape[1]) if side == "right" else slice(8 - sample.shape[1], 8)
        windows[row, real], mask[row, real] = sample[0], 1
    padded = collect(model, windows, mask=mask, batch_size=3, progress=False)
    alone = [collect(model, sample, progress=False) for sample in samples]
    assert padded.count.tolist() == [17, 13, 4]
    assert_close(padded, alone[0] + alone[1] + alone[2] + alone[3], rtol=1e-4, atol=1e-4)
    other_pads = torch.where(mask.bool(), windows, 7)
    assert_close(collect(model, other_pads, mask=mask, batch_size=3, progress=False), padded, rtol=1e-5, atol=1e-5)


def test_chunks_equal_one_pass(monkeypatch):
    states = torch.randn(4, 11, 7, 16).cumsum(2)
    mask = torch.ones(4, 11, dtype=torch.bool)
    mask[1, 7:] = mask[2, :3] = False
    whole = from_states(states, mask)
    for tokens in (1, 2, 5, 38):
        monkeypatch.setattr(statistics, "_CHUNK_BYTES", {"cpu": tokens * 8 * 7 * 16})
        assert_close(from_states(states, mask), whole, rtol=1e-12, atol=1e-14)


def test_batch_size_does_not_matter(tiny_llama):
    model = tiny_llama.double()
    windows = torch.randint(3, 97, (7, 10))
    whole = collect(model, windows, batch_size=7, progress=False)
    for batch_size in (1, 3, 100):
        assert_close(collect(model, windows, batch_size=batch_size, progress=False), whole, rtol=1e-10, atol=1e-12)
    halves = collect(model, windows[:2], progress=False) + collect(model, windows[2:], progress=False)
    assert_close(halves, whole, rtol=1e-10, atol=1e-12)


def test_an_identity_layer_has_cosine_one_and_angle_zero(tiny_llama):
    silence(tiny_llama, 2)
    stats = collect(tiny_llama, torch.randint(3, 97, (4, 16)), progress=False)
    for sums in (stats.squared_difference, stats.absolute_difference, stats.relative_magnitude):
        assert (sums[:, 2] == 0).all()
    np.testing.assert_allclose(stats.cosine[:, 2, 3], stats.count, rtol=1e-15)
    assert (stats.angle[:, 2, 3] <= 1e-7 * stats.count).all()
    assert (stats.angle[:, 1, 2] > 1e-3 * stats.count).all()


def test_known_vectors():
    # Float32 cosines lose angles below 3e-4; here 1e-5 must come out right to 1e-5 of itself.
    angle = 1e-5
    states = torch.tensor([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], dtype=torch.float64).reshape(1, 1, 2, 2)
    assert from_states(states).angle[0, 0, 1] == pytest.approx(angle / np.pi, rel=1e-5)
    # Orthogonal and opposite.
    states = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, -2.0]]).reshape(1, 1, 3, 2)
    stats = from_states(states)
    np.testing.assert_allclose(stats.angle[0], [[0, 0.5, 0.5], [0.5, 0, 1], [0.5, 1, 0]], atol=1e-15)
    np.testing.assert_allclose(stats.cosine[0], [[1, 0, 0], [0, 1, -1], [0, -1, 1]], atol=1e-15)
    assert stats.relative_magnitude[0].tolist() == pytest.approx([10**0.5 / 3, 2.5])
    # A zero vector counts as cosine 0.
    stats = from_states(torch.tensor([[0.0, 0.0], [0.0, 3.0]]).reshape(1, 1, 2, 2))
    assert stats.cosine[0, 0, 1] == 0
    assert stats.angle[0, 0, 1] == 0.5
    assert stats.norm[0].tolist() == [0, 3]


class Keyword(PreTrainedModel):
    """In the manner of older libraries: layers take their input by keyword and return tuples; the base model is the model."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states, scale):
            return hidden_states + scale * self.linear(hidden_states), "attention"

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.model = nn.Module()
        self.model.embed = nn.Embedding(11, 8)
        self.model.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def get_input_embeddings(self):
        return self.model.embed

    def forward(self, input_ids, use_cache):
        assert not use_cache
        hidden = self.model.embed(input_ids)
        for layer in self.model.layers:
            hidden = layer(scale=0.5, hidden_states=hidden)[0]
        return hidden


def test_keyword_inputs_tuple_outputs_and_work_in_place():
    model = Keyword()
    windows = torch.randint(0, 11, (2, 4))
    with torch.no_grad():
        states = [model.model.embed(windows)]
        for layer in model.model.layers:
            states.append(layer(states[-1], 0.5)[0])
    # Layers that work in place do not change earlier states.
    for layer in model.model.layers:
        layer.forward = lambda hidden_states, scale, linear=layer.linear: (hidden_states.add_(scale * linear(hidden_states)),)
    assert_equals_naive(collect(model, windows, progress=False), torch.stack(states).numpy(), torch.ones_like(windows))


def test_a_stream_that_widens_on_the_way_is_not_rounded():
    model = Keyword()
    model.model.embed.to(torch.bfloat16)
    windows = torch.randint(0, 11, (2, 4))
    model.model.layers[0].forward = lambda hidden_states, scale, linear=model.model.layers[0].linear: (
        hidden_states + scale * linear(hidden_states.float()),
    )
    stats = collect(model, windows, progress=False)
    last = []
    model.model.layers[2].register_forward_hook(lambda module, args, output: last.append(output[0]))
    with torch.no_grad():
        model(windows, use_cache=False)
    assert last[0].dtype == torch.float32
    assert stats.norm[0, 3] == pytest.approx(last[0].double().norm(dim=-1).sum().item(), rel=1e-12)


def test_nan_and_infinity_name_the_layer_and_the_batch(tiny_llama):
    windows = torch.randint(3, 50, (5, 8))
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[50] = float("nan")
    collect(tiny_llama, windows, batch_size=2, progress=False)
    windows[4, 2] = 50
    with pytest.raises(RuntimeError, match=r"input of layer 0 \(the embedding\), batch 2 \(samples 4 to 4\)"):
        collect(tiny_llama, windows, batch_size=2, progress=False)
    with torch.no_grad():
        tiny_llama.model.layers[3].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"output of layer 3, batch 0 \(samples 0 to 1\)"):
        collect(tiny_llama, windows[:4], batch_size=2, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": torch.zeros(0, 5, dtype=torch.long)}, r"shape \(0, 5\)"),
        ({"mask": torch.ones(3, 4)}, r"mask has shape \(3, 4\)"),
        ({"mask": torch.full((3, 5), 0.5)}, "1 for real tokens and 0 for padding"),
        ({"mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])}, r"samples \[1\] consist of padding only"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_windows_and_masks(tiny_llama, arguments, message):
    arguments = {"windows": torch.randint(3, 97, (3, 5)), "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        collect(tiny_llama, **arguments)


def test_save_and_load(tiny_llama, tmp_path):
    stats = collect(tiny_llama, torch.randint(3, 97, (2, 8)), progress=False)
    path, made = tmp_path / "runs" / "stats.safetensors", {"corpus": "pydocs", "seed": "3", "model": "tiny"}
    stats.save(path, made)
    assert_close(LayerStats.load(path), stats)
    assert_close(read_draws([path], "tiny")["pydocs", 3], stats)
    with pytest.raises(ValueError, match="holds statistics of tiny, not of another"):
        read_draws([path], "another")
    first = path.read_bytes()
    stats.save(path, dict(reversed(made.items())))
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]
    path.write_bytes(first[:-20])
    with pytest.raises(ValueError, match=r"stats\.safetensors is not a complete safetensors file"):
        LayerStats.load(path)
    tiny_llama.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no layer statistics: absolute_difference"):
        LayerStats.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        LayerStats.load(tmp_path / "none.safetensors")


def test_statistics_of_different_models_do_not_merge():
    with pytest.raises(ValueError, match="statistics of 4 layers of width 8 to those of 3 layers of width 8"):
        from_states(torch.randn(1, 3, 4, 8)) + from_states(torch.randn(1, 3, 5, 8))

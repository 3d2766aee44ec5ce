"""One pass over tiny random models against a slow, separate computation, and the ways a pass can go wrong."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from model_helpers import ARRAYS, assert_close, silence

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
def reference_states(model, windows) -> np.ndarray:
    """[state, sample, position, dim] from the library's own `output_hidden_states`, the last state from a hook."""
    last = []
    hook = decoder_layers(model)[-1].register_forward_hook(lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o))
    output = model(windows, output_hidden_states=True, use_cache=False)
    hook.remove()
    assert len(output.hidden_states) == len(decoder_layers(model)) + 1
    # What makes the hook necessary: the library reports the last state after the final norm.
    torch.testing.assert_close(final_norm(model)(last[0]), output.hidden_states[-1])
    return torch.stack([*output.hidden_states[:-1], last[0]]).float().numpy()


def assert_equals_naive(stats: LayerStats, states: np.ndarray, rtol: float) -> None:
    samples, length = range(states.shape[1]), states.shape[2]
    places = {"all": range(length), "without_first": range(1, length), "last": [length - 1]}
    for index, name in enumerate(SUBSETS):
        expected = naive(states, list(product(samples, places[name])))
        for array in ARRAYS:
            found = getattr(stats, array)[index]
            np.testing.assert_allclose(found, getattr(expected, array), rtol=rtol, atol=1e-12, err_msg=f"{name} {array}")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture(name):
    """Inputs by position or keyword, outputs as tensor or tuple, in-place layers: the states are the library's own."""
    model = build(name)
    windows = torch.randint(3, 97, (2, 9))
    stats = collect(model, windows, progress=False)
    assert stats.count.tolist() == [18, 16, 2]
    assert_equals_naive(stats, reference_states(model, windows), rtol=1e-6)


def test_chunks_equal_one_pass(monkeypatch):
    states = torch.randn(4, 11, 7, 16).cumsum(2)
    whole = from_states(states)
    for tokens in (1, 2, 5, 38):
        monkeypatch.setattr(statistics, "_CHUNK_BYTES", {"cpu": tokens * 8 * 7 * 16})
        assert_close(from_states(states), whole, rtol=1e-12, atol=1e-14)


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


def test_bad_windows(tiny_llama):
    for windows, batch_size in ((torch.zeros(0, 5, dtype=torch.long), 8), (torch.zeros(3, 5, dtype=torch.long), 0)):
        with pytest.raises(ValueError, match=rf"windows of shape \({len(windows)}, 5\), batch_size={batch_size}"):
            collect(tiny_llama, windows, batch_size=batch_size, progress=False)


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
    with pytest.raises(ValueError, match="statistics of 4 layers of width 8 to those of 3 layers of width 8"):
        from_states(torch.randn(1, 3, 4, 8)) + from_states(torch.randn(1, 3, 5, 8))

"""Early stopping changes no choice: against the full search, on tables of losses and on models, in every order."""

import itertools
import math

import numpy as np
import pytest
import torch
from architectures import build
from prunelib.depth.stopping import finals

from prunelib.depth import LayerSetLoss, beam, exhaustive, greedy, swap_descent
from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_perplexity
from prunelib.models import decoder_layers
from prunelib.models.layerwise import SharedPrefixEvaluator, shared_layer_forwards


def random_windows(count: int = 6, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


class Table:
    """Losses of candidates on parts, drawn so that ties, near ties and hopeless candidates all occur; counts what is asked."""

    def __init__(self, seed: int, candidates: int, parts: int, windows: int):
        rng = np.random.default_rng(seed)
        scale = rng.choice([1.0, 1.0, 1.0000001, 1.2, 3.0, 50.0], size=(candidates, 1, 1))
        table = scale * (rng.integers(0, 4, size=(candidates, parts, windows)) / 10 if seed % 2 else rng.random((1, parts, 1)))
        self.table = np.broadcast_to(table, (candidates, parts, windows))
        self.count, self.asked = parts * windows, 0

    def __call__(self, some, part):
        self.asked += len(some)
        return [self.table[candidate, part].tolist() for candidate in some]

    def values(self):
        return [math.fsum(losses.flatten().tolist()) / self.count for losses in self.table]


@pytest.mark.parametrize("seed", range(40))
def test_the_lowest_survive_with_their_values_in_any_order(seed):
    rng = np.random.default_rng(1000 + seed)
    candidates, parts, width = int(rng.integers(1, 12)), int(rng.integers(1, 7)), int(rng.integers(1, 4))
    table = Table(seed, candidates, parts, int(rng.integers(1, 4)))
    everything = table.values()
    for bound in (math.inf, float(np.median(everything)), min(everything)):
        table.asked = 0
        found = finals(range(candidates), rng.permutation(parts).tolist(), table, table.count, width, bound)
        assert found.values == {one: everything[one] for one in found.values}  # to the last bit
        assert list(found.values) == sorted(found.values)
        kept = sorted(value for value in everything if value <= bound)
        last = kept[:width][-1]
        assert {one for one, value in enumerate(everything) if value <= last} <= set(found.values)
        best = min(found.values, key=found.values.get)
        assert best == everything.index(min(everything))
        assert found.evaluated == table.asked <= candidates * parts
        assert math.fsum(found.part_sums.values()) / table.count == pytest.approx(everything[best])


def test_what_is_hopeless_is_not_evaluated_to_the_end():
    """Ten parts; the others lose 2, 4 or 1000 times as much as the best: they go after 6, 3 and 1 of them."""
    losses = {"best": 1.0, "double": 2.0, "quadruple": 4.0, "ruined": 1000.0}
    asked = []

    def one_part(some, part):
        asked.extend((candidate, part) for candidate in some)
        return [[losses[candidate]] for candidate in some]

    found = finals(list(losses), range(10), one_part, 10)
    assert found.values == {"best": 1.0}
    assert [sum(candidate == name for candidate, _ in asked) for name in losses] == [10, 6, 3, 1]
    assert len(set(asked)) == len(asked) == found.evaluated == 20
    # A known bound spares the leader its lonely run, and can leave nobody.
    assert finals(list(losses), range(10), one_part, 10, bound=0.5).values == {}
    assert finals(list(losses), range(10), one_part, 10, bound=2.0).values == {"best": 1.0, "double": 2.0}


def test_finals_refuses_what_has_no_bound():
    with pytest.raises(RuntimeError, match=r"b lost -0.09.* in part 1: only losses from 0 can be bounded"):
        finals(["a", "b"], [0, 1], lambda some, part: [[0.5 - 0.6 * part * (c == "b")] for c in some], 2)
    with pytest.raises(RuntimeError, match="a lost nan in part 0"):
        finals(["a"], [0], lambda some, part: [[math.nan]], 1)
    for wrong in ({"parts": []}, {"width": 0}, {"count": 0}):
        with pytest.raises(ValueError, match="at least one of each"):
            finals(["a"], **{"parts": [0], "losses": lambda some, part: [[1.0]], "count": 1, **wrong})
    assert finals([], [0], lambda some, part: [[1.0]], 1).values == {}


# --- on models


def with_uneven_layers(family: str, seed: int):
    """Layers of very different weight, so that some candidates are hopeless; a twin of layer 3 makes an exact tie likely."""
    model = build(family, num_hidden_layers=7)
    scales = torch.logspace(-1.5, 0.5, 7)[torch.randperm(7, generator=torch.Generator().manual_seed(seed))]
    with torch.no_grad():
        for layer, scale in zip(decoder_layers(model), scales, strict=True):
            for name, weight in layer.named_parameters():
                if weight.ndim == 2:
                    weight.mul_(scale if "down" in name or "o_proj" in name or "dense" in name else 1.0)
        # Two layers that do nothing: removing either gives the same model, and the same loss to the last bit.
        for idle in (decoder_layers(model)[2], decoder_layers(model)[4]):
            for name, weight in idle.named_parameters():
                if any(part in name for part in ("o_proj", "down_proj", "attention.dense", "dense_4h_to_h")):
                    weight.zero_()
    return model


@pytest.mark.parametrize("metric", ["nll", "kl"])
@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("gpt_neox", 3)])
def test_searches_find_the_same_with_and_without_stopping(family, seed, metric):
    model, windows = with_uneven_layers(family, seed), random_windows(seed=seed)
    full, stopped = (LayerSetLoss(model, windows, metric, batch_size=2) for _ in range(2))
    for search, options in ((greedy, {}), (beam, {"width": 3}), (exhaustive, {"chunk": 5})):
        whole = search(7, 3, full, **options, progress=False)
        short = search(7, 3, stopped, **options, finalists=stopped.finalists, progress=False)
        assert (short.removed, short.value, short.evaluations) == (whole.removed, whole.value, whole.evaluations)
        assert short.steps == whole.steps
        assert short.values.items() <= whole.values.items()
    start = (0, 3, 5)
    whole = swap_descent(7, start, full, progress=False)
    short = swap_descent(7, start, stopped, finalists=stopped.finalists, progress=False)
    assert (short.removed, short.value, [step.removed for step in short.steps]) == (
        whole.removed,
        whole.value,
        [step.removed for step in whole.steps],
    )
    if metric == "kl":
        assert whole.values[start] > 0 and stopped.layer_windows < stopped.layer_windows_unstopped


def test_layers_that_are_saved_are_counted():
    model, windows = with_uneven_layers("llama", 0), random_windows(8)
    calls = [0]
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _, args, output: calls.__setitem__(0, calls[0] + len(args[0])))
    loss = LayerSetLoss(model, windows, "kl", batch_size=1)
    loss([(1,)])  # looks at the layers once
    calls[0], before = 0, (loss.layer_windows, loss.layer_windows_unstopped)
    sets = [(layer,) for layer in range(7)]
    found = loss.finalists(sets)
    assert min(found, key=found.get) == (2,)  # does nothing, as (4,) does: the shallower one
    assert found[(2,)] == found[(4,)] == 0
    assert len(found) == 2
    assert loss.layer_windows - before[0] == calls[0]
    assert loss.layer_windows_unstopped - before[1] == 8 * shared_layer_forwards(7, [(), *sets])
    assert calls[0] <= 0.75 * 8 * shared_layer_forwards(7, [(), *sets])
    assert loss.finalists([]) == {}


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_the_dense_model_runs_once_where_its_logits_are_kept(unit):
    model, windows = build("llama"), random_windows(5)
    calls = [0]
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _, args, output: calls.__setitem__(0, calls[0] + len(args[0])))
    again, kept = (LayerSetLoss(model, windows, "kl", batch_size=2, unit=unit, keep_dense=keep) for keep in (False, True))
    sets = [(0,), (1, 3), (5,)]
    assert kept(sets) == again(sets)  # to the last bit
    assert kept(sets, [4, 0]) == pytest.approx(again(sets, [4, 0]), rel=1e-5)  # other batches than those that were kept
    assert kept.finalists(sets, 2) == again.finalists(sets, 2)
    if unit == "layer":
        calls[0], before = 0, kept.layer_windows
        kept(sets[:2])
        assert calls[0] == kept.layer_windows - before == 5 * shared_layer_forwards(6, sets[:2])
    assert kept([()]) == [0]
    assert LayerSetLoss(model, windows, "nll", keep_dense=True)(sets) == LayerSetLoss(model, windows, "nll")(sets)


def test_the_winners_hardest_batch_comes_first():
    model, windows = build("llama"), random_windows(6)
    loss = LayerSetLoss(model, windows, "nll", batch_size=2)
    found = loss.finalists([(1,), (2,), (3,)])
    best = min(found, key=found.get)
    by_window = layer_set_perplexity(model, windows, [best], batch_size=2, progress=False)[best].window_nll
    sums = [by_window[start] + by_window[start + 1] for start in range(0, 6, 2)]
    assert loss._starts == [2 * part for part in np.argsort(sums)[::-1].tolist()]


# --- several branches in one call of a layer


@pytest.mark.parametrize("together", [2, 3, 100])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt", "mixtral"])
def test_branches_together_give_what_they_give_alone(family, together):
    model, windows = build(family), random_windows(5)
    sets = [(), (5,), (4, 5), (0,), (1, 5), (0, 1, 2), (2,)]
    alone = layer_set_perplexity(model, windows, sets, batch_size=2, progress=False)
    joint = layer_set_perplexity(model, windows, sets, batch_size=2, progress=False, together=together)
    assert list(joint) == list(alone)
    for removed in sets:
        np.testing.assert_allclose(joint[removed].window_nll, alone[removed].window_nll, rtol=2e-6)
    assert joint.layer_forwards == alone.layer_forwards
    kl = [layer_set_divergence(model, windows, sets[1:], batch_size=2, progress=False, together=n) for n in (1, together)]
    for removed in sets[1:]:
        assert kl[1][removed].kl == pytest.approx(kl[0][removed].kl, rel=1e-4)
        assert math.fsum(kl[0][removed].window_kl) == kl[0][removed].kl


def test_sublayers_together():
    model, windows = build("llama"), random_windows(4)
    sets = [(), (1,), (0, 4), (2, 3), (11,), (1, 7)]
    runs = [
        SharedPrefixEvaluator(model, windows, sets, batch_size=2, progress=False, unit="sublayer", together=together)
        for together in (1, 4)
    ]
    alone, joint = ({(start, removed): logits for start, _, removed, logits in run} for run in runs)
    assert list(alone) != list(joint)  # another way through the same branches
    for key in itertools.product((0, 2), sets):
        torch.testing.assert_close(joint[key], alone[key], rtol=1e-4, atol=1e-5)
    assert runs[0].layer_forwards == runs[1].layer_forwards


def test_fewer_calls_of_layers_together():
    model, windows = build("llama"), random_windows(3)
    calls = [0]
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    loss = LayerSetLoss(model, windows, batch_size=3, together=8)
    found = greedy(6, 2, loss, progress=False)
    assert calls[0] == 11  # every layer once in each of two rounds; the last one of a set that lacks it does not run
    assert found.removed == greedy(6, 2, LayerSetLoss(model, windows, batch_size=3), progress=False).removed
    with pytest.raises(ValueError, match="together=0: at least 1 branch"):
        LayerSetLoss(model, windows, together=0)([(1,)])

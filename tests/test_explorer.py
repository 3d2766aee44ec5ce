"""The explorer: what follows from a setting, the pictures, the sliders, and its notebook on a tiny model."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from word_model import drawn_words, write_project

from prunelib import models
from prunelib.apps import explorer
from prunelib.criteria import CRITERIA, criterion
from prunelib.criteria.statistics import collect
from prunelib.depth import LayerSetLoss, lowest
from prunelib.evaluation import perplexity
from prunelib.figures import style as figures
from prunelib.lab import runs as results
from prunelib.lab.run_notebook import run_notebook
from prunelib.slicing import count_parameters
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def windows():
    return torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def stats(tiny_llama, windows):
    return collect(tiny_llama, windows, progress=False)


@pytest.fixture
def losses(tiny_llama, windows):
    return explorer.Losses(LayerSetLoss(tiny_llama, windows), 6)


def additive(sets):
    """Losses that add up: layer l costs l + 1 over a dense loss of 2."""
    return [2.0 + sum(layer + 1 for layer in removed) for removed in sets]


# ---------------------------------------------------------------------------------------------------------------- losses


def test_every_set_is_measured_once_and_kept_in_a_file(tmp_path):
    asked = []

    def evaluate(sets):
        asked.append(sets)
        return additive(sets)

    losses = explorer.Losses(evaluate, 6, folder=tmp_path, key="one")
    assert losses([(0,), (1, 2), (0,)]) == [3.0, 7.0, 3.0]
    assert losses([(1, 2)]) == [7.0]
    assert asked == [[(0,), (1, 2)]]

    def refuse(sets):
        raise AssertionError(f"{sets} are in the file")

    again = explorer.Losses(refuse, 6, folder=tmp_path, key="one")
    assert again([(1, 2), (0,)]) == [7.0, 3.0]
    assert explorer.Losses(additive, 6, folder=tmp_path, key="two").known == {}, "another key is another file"
    for damaged in ("", "[]", '{"key": "one"}', '{"key": "two", "losses": [[[0], 9.0]]}'):
        again.file.write_text(damaged)
        assert explorer.Losses(additive, 6, folder=tmp_path, key="one")([(0,)]) == [3.0]


def test_the_prediction_is_the_sum_of_single_costs(losses):
    exact = explorer.Losses(additive, 6)
    assert exact.predicted((1, 3, 4)) == exact([(1, 3, 4)])[0] == 2.0 + 2 + 4 + 5
    assert losses.predicted(()) == losses.dense
    assert losses.predicted((4,)) == pytest.approx(losses([(4,)])[0])
    dense, one, other = losses([(), (1,), (3,)])
    assert losses.predicted((1, 3)) == pytest.approx(one + other - dense)


# ---------------------------------------------------------------------------------------------------------------- layers


def test_a_choice_is_that_of_the_criterion_and_costs_what_the_pruned_model_loses(tiny_llama, windows, stats, losses):
    choice = explorer.choose_layers(stats, losses, "block_influence", 2)
    assert choice.removed == lowest(CRITERIA["block_influence"](stats), 2)
    assert choice.alpha is None
    assert choice.path == ()
    pruned = models.remove_layers(tiny_llama, choice.removed)
    assert choice.measured == pytest.approx(perplexity(pruned, windows).nll, abs=1e-6)
    assert choice.dense == pytest.approx(perplexity(tiny_llama, windows).nll, abs=1e-6)
    assert 5 not in explorer.choose_layers(stats, losses, "deepest", 3).removed, "protected as published"


def test_the_path_of_alpha_holds_the_choice_at_every_alpha(stats, losses):
    for size in (1, 3):
        for alpha in np.linspace(0.003, 0.997, 15):
            choice = explorer.choose_layers(stats, losses, "simdiff_masd", size, float(alpha))
            here = [
                part for part in zip(choice.path, choice.path_measured, strict=True) if part[0].low <= alpha <= part[0].high
            ]
            assert (choice.removed, choice.measured) in [(interval.removed, nats) for interval, nats in here]
        edges = [interval.low for interval in choice.path]
        assert edges[0] == 0
        assert edges == sorted(edges)


def test_what_was_measured_ahead_is_all_that_sliders_ask_for(stats, losses):
    names = ["block_influence", "simdiff_mssd", "deepest"]
    losses.measure_ahead(stats, [2, 3], names)
    losses.evaluate = lambda sets: pytest.fail(f"{sets} were not measured ahead")
    for name, size, alpha in itertools.product(names, (2, 3), (0.0, 0.31, 1.0)):
        explorer.choose_layers(stats, losses, name, size, alpha)


def test_pictures_show_the_numbers_of_their_tables(stats, losses, tmp_path):
    for name in ("simdiff_mssd", "relative_magnitude"):
        choice = explorer.choose_layers(stats, losses, name, 2, 0.4)
        figure, table = explorer.draw_layers(choice), choice.table()
        top, bottom = figure.axes
        heights = [bar.get_height() for bar in top.patches]
        assert heights == pytest.approx(table[table["what"] == "importance"]["value"].tolist())
        assert [layer for layer, bar in enumerate(top.patches) if bar.get_alpha() == 0.3] == list(choice.removed)
        if choice.path:
            solid = bottom.patches[0].get_data().values
            measured = table[table["what"] == "measured nats on the path"]["value"]
            assert solid == pytest.approx(np.exp(measured.to_numpy(dtype=float)))
        else:
            widths = [bar.get_width() for bar in bottom.patches]
            assert widths == pytest.approx([math.exp(nats) for nats in (choice.dense, choice.predicted, choice.measured)])
        assert " ".join(map(str, choice.removed)) in choice.summary()
        figures.save(figure, "own_explorer_layers", tmp_path, data=table, provenance={})
    ruined = explorer.Losses(lambda sets: [800.0 * len(removed) for removed in sets], 6)
    assert explorer.draw_layers(explorer.choose_layers(stats, ruined, "block_influence", 3)).axes, "no overflow"


# ---------------------------------------------------------------------------------------------------------------- slices


def test_slices_are_those_of_the_schedule_and_the_account(tiny_llama, stats, tmp_path):
    choice = explorer.choose_slices(stats, tiny_llama.config, 0.25, 0.125)
    assert choice.plan.mean_slice == pytest.approx(0.25)
    assert choice.counted.removed == count_parameters(tiny_llama.config, choice.plan).removed
    table = choice.table()
    assert table[table["what"] == "slice"]["value"].tolist() == list(choice.plan.slices)
    figure = explorer.draw_slices(choice)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx(choice.plan.slices)
    figures.save(figure, "own_explorer_slices", tmp_path, data=table, provenance={})
    with pytest.raises(ValueError, match=r"slice_base=0.4: it lies between 0 and slice_percentage=0.25"):
        explorer.choose_slices(stats, tiny_llama.config, 0.25, 0.4)


# ------------------------------------------------------------------------------------------------------ a criterion more


@pytest.fixture
def own_criterion():
    @criterion(title="odd layers first", source="test")
    def odd_first(stats):
        return np.arange(stats.n_layers) % 2 == 0

    yield odd_first
    CRITERIA.pop("odd_first")


def test_a_new_criterion_is_compared_at_once(stats, own_criterion):
    losses = explorer.Losses(additive, 6)
    table = explorer.compare(stats, losses, ["block_influence", "odd_first"], [1, 2], random_seeds=[0, 1])
    mine = table[table["method"] == "odd_first"].set_index("layers_removed")
    assert mine["removed_layers"].to_dict() == {1: "1", 2: "1 3"}
    assert mine["value"].to_dict() == {1: 2.0, 2: 6.0}
    assert len(table[table["method"] == "random"]) == 4
    axes = explorer.draw_comparison(table).axes[0]
    widths = {line.get_label(): line.get_linewidth() for line in axes.lines}
    assert widths["odd layers first"] > widths["cosine (block influence)"]
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    assert len({colors["odd layers first"], colors["cosine (block influence)"]}) == 2


def test_a_cell_that_defines_a_criterion_may_run_twice():
    def define(value):
        def typed(stats):
            return np.full(stats.n_layers, value)

        typed.__module__ = "__main__"
        return criterion(title="typed", source="a cell")(typed)

    try:
        define(1.0)
        latest = define(2.0)
        assert CRITERIA["typed"] is latest
    finally:
        CRITERIA.pop("typed", None)
    taken = CRITERIA["block_influence"]

    def block_influence(stats):
        return np.zeros(stats.n_layers)

    block_influence.__module__ = "__main__"
    with pytest.raises(ValueError, match="'block_influence' exists already"):
        criterion(title="mine", source="a cell")(block_influence)
    assert CRITERIA["block_influence"] is taken


# --------------------------------------------------------------------------------------------------------------- sliders


def named(widget):
    """Controls by their label; then the sentence and the picture."""
    *controls, sentence, picture = widget.children[1:]
    return {control.description: control for control in controls}, sentence, picture


def test_sliders_follow_and_an_impossible_setting_is_said(tiny_llama, stats, losses):
    pytest.importorskip("ipywidgets")
    controls, sentence, picture = named(explorer.layer_sliders(stats, losses, layers_removed=2))
    first = bytes(picture.value)
    assert first.startswith(b"\x89PNG")
    assert not controls["alpha"].disabled
    controls["K"].value = 3
    expected = explorer.choose_layers(stats, losses, "simdiff_mssd", 3)
    assert sentence.value == expected.summary()
    assert bytes(picture.value) != first
    controls["criterion"].value = "deepest"
    assert controls["alpha"].disabled
    assert "layers 2 3 4 go" in sentence.value
    controls["K"].value = 5
    assert "layers 0 1 2 3 4 go" in sentence.value

    controls, sentence, picture = named(explorer.slice_sliders(stats, tiny_llama.config))
    controls["S_B"].value = 0.5
    assert "slice_base=0.5: it lies between 0 and slice_percentage=0.3" in sentence.value
    assert picture.layout.visibility == "hidden"
    controls["S_P"].value = 0.6
    assert picture.layout.visibility == "visible"
    mean = explorer.choose_slices(stats, tiny_llama.config, 0.6, 0.5).plan.mean_slice
    assert f"{mean:.1%} in the mean" in sentence.value
    assert not plt.get_fignums(), "pictures are closed once they are drawn"


def test_nobody_is_there_in_a_test():
    assert not explorer.attended()


# -------------------------------------------------------------------------------------------------------------- notebook


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("explorer"), n_layers=6, words=drawn_words(60))


def test_the_notebook_draws_static_pictures_of_any_model(place):
    text = str(place / "text.txt")
    values = {"model": str(place / "model"), "corpus": text, "report_corpus": text, "figures": str(place / "figures")}
    values |= {"n_samples": 8, "report_windows": 4, "seq_len": 16, "sizes": [1, 2, 3], "layers_removed": 2}
    output = run_notebook(
        "notebooks/09_explorer.ipynb", place / "run.json", losses_folder=str(place / "losses"), random_seeds=[0, 1], **values
    )
    run = results.read_run(output)
    drawn = {path.name for path in (place / "figures").glob("*.png")}
    assert drawn == {"own_explorer_layers.png", "own_explorer_slices.png", "own_new_criterion.png"}
    executed = json.loads(output.with_suffix(".ipynb").read_text())
    assert "widgets" not in executed["metadata"]
    assert "widget-view" not in json.dumps(executed["cells"]), "pictures alone, nobody was there"
    assert "progress" not in CRITERIA, "what a notebook registers stays in its kernel"

    dense, tokenizer = models.load(place / "model"), models.load_tokenizer(place / "model")
    held_out = consecutive_windows(corpora.load(text), tokenizer, 16, 4)
    value = {(row["method"], row["metric"]): row["value"] for row in run["rows"]}
    assert value["dense", "nll"] == pytest.approx(perplexity(dense, held_out).nll, abs=1e-6)
    assert {row["layers_removed"] for row in run["rows"] if row["method"] == "progress"} == {1, 2, 3}

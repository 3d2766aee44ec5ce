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
from prunelib.criteria import CRITERIA, collect, criterion
from prunelib.depth import LayerSetLoss, lowest
from prunelib.evaluation.perplexity import perplexity
from prunelib.figures import Chapter
from prunelib.figures import explorer as draw
from prunelib.lab.run_notebook import run_notebook
from prunelib.lab.runs import read_run
from prunelib.slicing import count_parameters, dynamic, layer_redundancy


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
    return explorer.Losses(LayerSetLoss(tiny_llama, windows))


def additive(sets):
    """Losses that add up: layer l costs l + 1 over a dense loss of 2."""
    return [2.0 + sum(layer + 1 for layer in removed) for removed in sets]


def value_of(table, what):
    return table[table["what"] == what]["value"].tolist()


def test_every_set_is_measured_once_and_single_costs_add_up():
    asked = []
    losses = explorer.Losses(lambda sets: asked.append(sets) or additive(sets))
    assert losses([(0,), (1, 2), (0,)]) == [3.0, 7.0, 3.0]
    assert losses([(1, 2)]) == [7.0]
    assert asked == [[(0,), (1, 2)]]
    assert losses.predicted((1, 3, 4)) == losses([(1, 3, 4)])[0] == 2.0 + 2 + 4 + 5
    assert losses.predicted(()) == 2.0


def test_a_choice_is_that_of_the_criterion_and_costs_what_the_pruned_model_loses(tiny_llama, windows, stats, losses):
    table = explorer.choose_layers(stats, losses, "block_influence", 2)
    removed = lowest(CRITERIA["block_influence"](stats), 2)
    assert table[table["what"] == "measured nats"]["removed_layers"].item() == " ".join(map(str, removed))
    assert value_of(table, "measured nats")[0] == pytest.approx(
        perplexity(models.remove_layers(tiny_llama, removed), windows).nll, abs=1e-6
    )
    assert value_of(table, "dense nats")[0] == pytest.approx(perplexity(tiny_llama, windows).nll, abs=1e-6)
    assert value_of(table, "measured nats on the path") == []


def test_the_path_of_alpha_holds_the_choice_at_every_alpha_and_is_measured_ahead(stats, losses):
    names = ["block_influence", "simdiff_masd"]
    losses.measure_ahead(stats, [1, 3], names)
    losses.evaluate = lambda sets: pytest.fail(f"{sets} were not measured ahead")
    for name, size, alpha in itertools.product(names, (1, 3), (0.003, 0.31, 0.997)):
        table = explorer.choose_layers(stats, losses, name, size, alpha)
        if name == "simdiff_masd":
            path = table[table["what"] == "measured nats on the path"]
            here = path[(path["alpha_low"] <= alpha) & (alpha <= path["alpha_high"])]
            chosen = table[table["what"] == "measured nats"]
            assert chosen["removed_layers"].item() in set(here["removed_layers"])
            assert path["alpha_low"].tolist() == sorted(path["alpha_low"])
            assert path["alpha_low"].iloc[0] == 0


def test_pictures_show_the_numbers_of_their_tables(tiny_llama, stats, losses, tmp_path):
    table = explorer.choose_layers(stats, losses, "simdiff_mssd", 2, 0.4)
    drawing = draw.explorer_layers(Chapter(tmp_path), data=table)
    top, below = drawing.figure.axes
    assert [bar.get_height() for bar in top.patches] == pytest.approx(value_of(table, "importance"))
    removed = table[table["what"] == "measured nats"]["removed_layers"].item()
    assert " ".join(str(layer) for layer, bar in enumerate(top.patches) if bar.get_alpha() == 0.3) == removed
    assert f"layers {removed} go" in drawing.text
    assert f"becomes {math.exp(value_of(table, 'measured nats')[0]):.2f}" in drawing.text
    path = np.exp(value_of(table, "measured nats on the path"))
    assert below.patches[0].get_data().values == pytest.approx(path)
    assert (tmp_path / "own_explorer_layers.png").is_file()
    huge = explorer.Losses(lambda sets: [800.0 * len(removed) for removed in sets])
    without_path = draw.layers_drawing(explorer.choose_layers(stats, huge, "block_influence", 3))  # nor an overflow
    assert len(without_path.figure.axes) == 1

    slices = explorer.choose_slices(stats, tiny_llama.config, 0.25, 0.125)
    plan = dynamic(layer_redundancy(stats), tiny_llama.config.hidden_size, 0.25, 0.125)
    assert value_of(slices, "slice") == list(plan.slices)
    assert value_of(slices, "parameters removed")[0] == count_parameters(tiny_llama.config, plan).removed
    bars = draw.slices_drawing(slices).figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(plan.slices)


def test_a_new_criterion_is_compared_at_once(stats, tmp_path):
    @criterion(title="odd layers first", source="test")
    def odd_first(stats):
        return np.arange(stats.n_layers) % 2 == 0

    try:
        losses = explorer.Losses(additive)
        table = explorer.compare(stats, losses, ["block_influence", "odd_first"], [1, 2], random_seeds=[0, 1])
    finally:
        CRITERIA.pop("odd_first")
    mine = table[table["method"] == "odd_first"].set_index("layers_removed")
    assert mine["removed_layers"].to_dict() == {1: "1", 2: "1 3"}
    assert mine["value"].to_dict() == {1: 2.0, 2: 6.0}
    assert len(table[table["method"] == "random"]) == 4
    axes = draw.new_criterion(Chapter(tmp_path), data=table).figure.axes[0]
    assert {"odd layers first", "cosine (block influence)"} <= set(axes.get_legend_handles_labels()[1])


def test_what_models_make_of_a_sentence(tmp_path):
    place = write_project(tmp_path, n_layers=3, words=drawn_words(60))
    dense, tokenizer = models.load(str(place / "model")), models.load_tokenizer(str(place / "model"))
    candidates = {"dense": dense, "pruned": models.remove_layers(dense, [1]), "same": models.remove_layers(dense, [])}
    table = explorer.read(candidates, tokenizer, "w1 w2", "w3 w4 w5 w6", tokens=4)
    ids = tokenizer("w3 w4 w5 w6", return_tensors="pt").input_ids
    for name in candidates:
        mine = table[table["model"] == name]
        assert np.mean(value_of(mine, "loss")) == pytest.approx(perplexity(candidates[name], ids).nll, abs=1e-6)
        assert [token for token, what in zip(mine["token"], mine["what"], strict=True) if what == "loss"] == ["w4", "w5", "w6"]
        assert len(value_of(mine, "continuation")) == 4
        assert all(0 < value <= math.log(60) for value in value_of(mine, "entropy"))
    drawing = draw.explorer_tokens(Chapter(tmp_path), data=table.replace("w4", "<$4>"), prompt="w1 w2")
    assert "&lt;&#36;4&gt;" in drawing.text, "a token is text, neither a tag nor a formula"
    assert "loss over dense</td><td>pruned" in drawing.text
    assert "loss over dense</td><td>same" not in drawing.text, "what does not differ is left out"
    with pytest.raises(ValueError, match="sentence='w3'"):
        explorer.read(candidates, tokenizer, "w1", "w3")


def test_sliders_follow_and_an_impossible_setting_is_named(tiny_llama, stats, losses):
    pytest.importorskip("ipywidgets")
    widget = explorer.layer_sliders(stats, losses)
    rule, size, *_ = widget.children
    rule.value, size.value = "deepest", 3
    widget.update()
    assert "layers 2 3 4 go" in widget.result
    widget = explorer.slice_sliders(stats, tiny_llama.config)
    widget.children[1].value = 0.5
    widget.update()
    assert "slice_base=0.5" in widget.result
    assert not plt.get_fignums(), "pictures are closed once they are drawn"
    assert not explorer.attended()


@pytest.mark.slow
def test_the_notebook_draws_static_pictures_of_any_model(tmp_path):
    place = write_project(tmp_path, n_layers=6, words=drawn_words(60))
    text = str(place / "text.txt")
    values = {"model": str(place / "model"), "corpus": text, "report_corpus": text, "figures": str(place / "figures")}
    values |= {"n_samples": 8, "report_windows": 4, "seq_len": 16, "sizes": [1, 2, 3], "layers_removed": 2}
    values |= {"prompt": "w1 w2", "sentence": "w3 w4 w5"}
    output = run_notebook("notebooks/09_explorer.ipynb", place / "run.json", random_seeds=[0, 1], **values)
    drawn = {path.name for path in (place / "figures").glob("*.png")}
    assert drawn == {"own_explorer_layers.png", "own_explorer_slices.png", "own_new_criterion.png"}
    assert "widget-view" not in json.dumps(json.loads(output.with_suffix(".ipynb").read_text())["cells"])
    rows = read_run(output)["rows"]
    assert {row["size"] for row in rows if row["method"] == "progress"} == {1, 2, 3}
    value = {row["metric"]: row["value"] for row in rows if row["method"] == "simdiff_mssd"}
    assert value["dense_nll"] > 0
    assert {row["method"] for row in rows if row["metric"] == "sentence_loss"} == {"dense", "pruned", "repaired"}


@pytest.mark.slow
def test_the_quickstart_runs_on_any_model(tmp_path):
    place = write_project(tmp_path, n_layers=6, words=drawn_words(60))
    values = {"model": str(place / "model"), "corpus": str(place / "text.txt"), "prompt": "w1 w2", "layers_removed": 2}
    values |= {"n_samples": 4, "report_windows": 4, "seq_len": 16, "pruned_folder": str(place / "pruned")}
    rows = read_run(run_notebook("notebooks/00_quickstart.ipynb", place / "run.json", **values))["rows"]
    assert {row["method"] for row in rows} == {"dense", "block_influence", "simdiff_mssd", "random"}
    assert len(json.loads((place / "pruned" / "plan.json").read_text())["removed"]) == 2

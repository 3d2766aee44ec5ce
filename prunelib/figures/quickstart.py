"""Chapter 00: what the perplexity of one small model is before and after four layers are removed."""

import pandas as pd

from prunelib.figures import style as fig
from prunelib.figures.save import Chapter, Drawing, figure

CHAPTER = "00_quickstart"


@figure("own_quickstart", reads={})
def quickstart(chapter: Chapter, *, data: pd.DataFrame, n_layers: int) -> Drawing:
    """Perplexity (`ppl`) of the dense model and of each `method` in `data`, measured in the notebook itself."""
    titles = [f"{chapter['layers_removed']} of {n_layers} layers removed"]
    grid = fig.Panels(data.assign(all=""), "all", titles=titles, height=1.9)
    for axes, part in grid:
        looks = [fig.METHODS[name] for name in part["method"]]
        axes.scatter(part["ppl"], range(len(part)), color=[look.color for look in looks], zorder=2)
        fig.titled_rows(axes, [f"{look.title}: {ppl:,.1f}" for look, ppl in zip(looks, part["ppl"], strict=True)])
        fig.log_scale(axes, "x")
    rows = pd.DataFrame(columns=["run", "code"])
    return grid.done(rows, x=f"perplexity on {chapter['corpus']} (log scale)", keep=["method", "ppl"])

"""Chapter 00: what the perplexity of one small model is before and after four layers are removed."""

import pandas as pd

from prunelib.figures.save import Chapter, Drawing, figure
from prunelib.figures.style import METHODS, log_scale, panels

CHAPTER = "00_quickstart"


@figure("own_quickstart", reads={})
def quickstart(chapter: Chapter, *, data: pd.DataFrame, n_layers: int) -> Drawing:
    """Perplexity (`ppl`) of the dense model and of each `method` in `data`, measured in the notebook itself."""
    drawn, axes = panels(height=2.4, width=5.2)
    looks = [METHODS[name] for name in data["method"]]
    bars = axes.barh([look.title for look in looks], data["ppl"], color=[look.color for look in looks])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    log_scale(axes, "x")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.set_title(f"{chapter['layers_removed']} of {n_layers} layers removed")
    axes.set_xlabel(f"perplexity on {chapter['corpus']} (log scale)")
    return Drawing(drawn, data, pd.DataFrame(columns=["run", "code"]))

"""How does a figure look? One function per figure, named by its stem: `simdiff.fig4a_alpha_mssd(chapter)`."""

from prunelib.figures.save import FIGURES, Chapter, Drawing, FigureError, figure, pick
from prunelib.figures.style import METHODS, use_style

__all__ = ["FIGURES", "METHODS", "Chapter", "Drawing", "FigureError", "figure", "pick", "use_style"]

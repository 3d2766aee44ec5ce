"""Draw one figure: `python -m prunelib.figures STEM FOLDER name=value …`, with the parameters of its chapter as values."""

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence

import prunelib.figures
from prunelib.figures.save import FIGURES, Chapter
from prunelib.figures.style import use_style


def main(arguments: Sequence[str]) -> int:
    """Draw the figure of a stem into a folder; a value that is JSON, such as a list of run files, is read as JSON."""
    for module in pkgutil.iter_modules(prunelib.figures.__path__):
        importlib.import_module(f"prunelib.figures.{module.name}") if module.name != "__main__" else None
    stem, folder, *pairs = arguments
    if stem not in FIGURES:
        print(f"there is no figure {stem!r}; there are: {', '.join(sorted(FIGURES))}", file=sys.stderr)
        return 2
    use_style()
    FIGURES[stem].draw(Chapter(folder, {name: _value(text) for name, _, text in (pair.partition("=") for pair in pairs)}))
    return 0


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

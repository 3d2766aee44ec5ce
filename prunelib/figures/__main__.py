"""Draw one figure: `python -m prunelib.figures STEM FOLDER name=value …`, with the parameters of its chapter as values."""

import json
import sys
from collections.abc import Sequence

from prunelib.figures.save import Chapter, registry
from prunelib.figures.style import use_style


def main(arguments: Sequence[str]) -> int:
    """Draw the figure of a stem into a folder; a value that is JSON, such as a list of run files, is read as JSON."""
    figures = registry()
    stem, folder, *pairs = arguments
    if stem not in figures:
        print(f"there is no figure {stem!r}; there are: {', '.join(sorted(figures))}", file=sys.stderr)
        return 2
    use_style()
    figures[stem].draw(Chapter(folder, {name: _value(text) for name, _, text in (pair.partition("=") for pair in pairs)}))
    return 0


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Put the claims table of the default profile between two comment lines of a document.

`python -m prunelib.claims README.md`
"""

import sys
from pathlib import Path

import yaml

from prunelib.claims import BEGIN, END, Tables, counts, markdown, outcomes
from prunelib.io import at_root, write_text
from prunelib.lab import profile
from prunelib.lab.runs import PAPERS

CHAPTER = "08_claims"


def main(document: Path) -> None:
    """Replace what stands between the comment lines. Raises ValueError when they are not there, once each and in order."""
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{document} needs the line {BEGIN} and, below it, the line {END}")
    settings = yaml.safe_load(at_root("profiles/smollm2.yaml").read_text(encoding="utf-8"))
    found = outcomes(Tables(profile.chapter_values(profile.read(settings), CHAPTER)))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(document, f"{before}{BEGIN}\n\n{markdown(found, PAPERS)}\n\n{END}{after}")
    print(f"{document}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts(found).items()))


if __name__ == "__main__":
    main(at_root(sys.argv[1]))

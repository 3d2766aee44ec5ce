"""What does a paper say, and what do the tables say to it? `published` and `measures` of each paper have an entry per claim."""

from prunelib.claims.judge import PRINTED, ClaimError, Tables, load, pick
from prunelib.claims.table import BEGIN, END, MARKS, VERDICTS, counts, markdown, number, outcomes

__all__ = ["BEGIN", "END", "MARKS", "PRINTED", "VERDICTS", "ClaimError", "Tables", "counts", "load", "markdown"]
__all__ += ["number", "outcomes", "pick"]

"""What does a paper say, and what do the tables say to it? One function per claim, marked with `claim`."""

from prunelib.claims import deeper_layers, simdiff, slicing  # noqa: F401 (each enters its claims)
from prunelib.claims.judge import CLAIMS, PRINTED, VERDICTS, ClaimError, Outcome, Tables, claim, load, outcomes, pick
from prunelib.claims.table import BEGIN, END, MARKS, counts, frame, markdown, number

__all__ = ["BEGIN", "CLAIMS", "END", "MARKS", "PRINTED", "VERDICTS", "ClaimError", "Outcome", "Tables", "claim", "counts"]
__all__ += ["frame", "load", "markdown", "number", "outcomes", "pick"]

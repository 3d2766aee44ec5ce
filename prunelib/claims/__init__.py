"""What does a paper say, and what do the tables say to it? `measures` of each paper has an entry per claim."""

from prunelib.claims.judge import PRINTED, ClaimError, Tables, load, pick
from prunelib.claims.table import MARKS, VERDICTS, changes, markdown, models, number, outcomes, page, summary

__all__ = ["MARKS", "PRINTED", "VERDICTS", "ClaimError", "Tables", "changes", "load", "markdown", "models"]
__all__ += ["number", "outcomes", "page", "pick", "summary"]

"""Which tokens does a number stand on?"""

from prunelib.text.corpora import Corpus, check_held_out, load, named
from prunelib.text.near_duplicates import deduplicate
from prunelib.text.sequences import document_rows, packed_rows
from prunelib.text.windows import consecutive_windows, sample_windows, token_stream, windows_sha256

__all__ = [
    "Corpus",
    "check_held_out",
    "consecutive_windows",
    "deduplicate",
    "document_rows",
    "load",
    "named",
    "packed_rows",
    "sample_windows",
    "token_stream",
    "windows_sha256",
]

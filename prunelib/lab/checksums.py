"""sha256 of every committed file below ``data/``: ``make hashes`` writes them, ``make verify`` compares.

``data/SHA256SUMS`` is also read by ``sha256sum --check data/SHA256SUMS``, in the root of the clone.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath

from prunelib.io import at_root, file_sha256, from_root, project_root, write_text

SUMS = "data/SHA256SUMS"
UPDATE = "make hashes"

# What `make figures` writes anew: times among the numbers make these differ from run to run.
REMADE = "data/*.csv"

# Nothing may lie beside a model that was not committed: transformers would read an adapter or a tokenizer file it finds there.
CLOSED = "data/reference/*/*"


def committed_files() -> list[str]:
    """The files below ``data/`` that git knows (`git add` a new one first), by path from the root, without the list itself.

    Raises RuntimeError outside of a git clone: what lies in a folder does not say what belongs to the project.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "data"],
            cwd=project_root(),
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise RuntimeError(f"{SUMS} is made of what git knows: run `{UPDATE}` in a git clone") from None
    return sorted(path for path in set(listed.split("\0")) if path and path != SUMS and at_root(path).is_file())


def read() -> dict[str, str]:
    """The committed hashes, by path from the root. Raises ValueError for a line that is none."""
    found = {}
    for number, line in enumerate(at_root(SUMS).read_text(encoding="utf-8").splitlines(), 1):
        digest, separator, path = line.partition("  ")
        if not separator or len(digest) != 64 or path in found:
            raise ValueError(f"{SUMS}, line {number} is not `<sha256>  <path>`, or names a file again: git checkout -- {SUMS}")
        found[path] = digest
    return found


def here() -> dict[str, str]:
    """The hashes of the files named in `SUMS`, as far as they are there, and of everything that lies beside the models."""
    paths = {path for path in read() if at_root(path).is_file()}
    paths |= {from_root(path) for path in project_root().glob(CLOSED) if path.is_file()}
    return {path: file_sha256(at_root(path)) for path in sorted(paths)}


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for every file that is missing, changed or not expected."""
    lines = [f"{path} is missing: git checkout -- {path}" for path in sorted(expected.keys() - found.keys())]
    lines += [f"{path} is not one of the committed files" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        if expected[path] != found[path]:
            was, now = expected[path][:12], found[path][:12]
            lines.append(f"{path} was altered: sha256 {now}… instead of {was}…; git checkout -- {path}")
    return lines


def remade(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The tables that differ from the committed ones; no error, see `REMADE`."""
    both = sorted(expected.keys() & found.keys())
    return [path for path in both if PurePosixPath(path).match(REMADE) and expected[path] != found[path]]


def differences() -> tuple[list[str], list[str]]:
    """One line for every file that is not the committed one, and apart from them the tables that were made anew."""
    expected, found = read(), here()
    own = remade(expected, found)
    for path in own:
        del expected[path], found[path]
    return compare(expected, found), own


def update() -> int:
    """Write `SUMS` anew; the number of files in it."""
    files = committed_files()
    write_text(at_root(SUMS), "".join(f"{file_sha256(at_root(path))}  {path}\n" for path in files))
    return len(files)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--update"]):
        print(f"usage: python -m prunelib.lab.checksums [--update]; got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if arguments:
        print(f"{SUMS}: {update()} files")
        return 0
    lines, own = differences()
    print("\n".join([*lines, *(f"{path} was made anew" for path in own)]) or f"{SUMS}: all files are the committed ones")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

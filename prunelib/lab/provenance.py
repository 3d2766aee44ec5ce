"""Who, what and where of a number: files by hash, the code, the libraries, the machine.

Nothing here imports torch: a chapter that only draws figures stays light. The record of a run holds no
wall clock and no machine path, so that the same run on the same machine gives the same bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prunelib.io import at_root, file_sha256, project_root

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "datasets",
    "accelerate",
    "peft",
    "lm-eval",
    "papermill",
    "snakemake",
)

HASHED_BYTES = 200 * 2**20

# What decides a result; data/ and figures/ are left out because the batch itself rewrites them.
CODE = ("prunelib", "notebooks", "profiles", "Snakefile", "pyproject.toml", "requirements.lock")


def model_source(name: str) -> str:
    """Where to load a model from: the folder, absolute, when `name` is one (below the project root or anywhere), else the
    hub name as it is.
    """
    folder = at_root(name)
    return str(folder) if folder.is_dir() else name


def model_fingerprint(name: str) -> str:
    """Hash that changes with the weights of a local model folder; a hub name stands for itself.

    Folders above `HASHED_BYTES` are told apart by the names and sizes of their files alone.
    """
    folder = at_root(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    small = sum(path.stat().st_size for path in files) <= HASHED_BYTES
    lines = [f"{path.name} {file_sha256(path) if small else path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def source_sha256(folder: str | os.PathLike | None = None) -> str:
    """One sha256 over names and bytes of all Python files in `folder` (default: this package)."""
    folder = Path(folder) if folder is not None else Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        # Line endings are normalized: a checkout with autocrlf is the same code.
        content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def notebook_source_sha(path: str | os.PathLike) -> str:
    """sha256 over the code cells of a notebook, tags included, outputs and metadata left out.

    Saving a notebook after running it by hand keeps this hash; editing its code changes it. Cells that papermill
    injected are left out, so a notebook and its executed copy agree.
    """
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if cell["cell_type"] == "code" and "injected-parameters" not in tags:
            source = cell["source"]  # a string or a list of lines: nbformat allows both
            cells.append([source if isinstance(source, str) else "".join(source), "parameters" in tags])
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def record(*, data: Mapping[str, str] | None = None, model: Mapping | None = None, device: str = "cpu") -> dict:
    """Everything but the parameters that a result depends on.

    `data` maps the name of each corpus or file to its sha256, `model` describes the model (name, revision, hash), `device`
    is the torch device that computed. What cannot be found out (no git, library not installed) is None.
    """
    return {
        "git": _git(),
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device_name(device),
        "threads": _threads(),
        "data": dict(data or {}),
        "model": dict(model or {}),
    }


def cpu_name() -> str | None:
    """The processor as its maker calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def device_name(device: str) -> str:
    """`cpu`, or the device with the name of the accelerator behind it, as in `cuda (NVIDIA H200)`."""
    if device.startswith("cuda"):
        import torch  # only a caller that computed with it comes here

        if torch.cuda.is_available():
            return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def peak_bytes(device: str = "cpu") -> int:
    """Largest memory in bytes so far: of the process on a CPU, of the allocator on an accelerator ("auto": on all together)."""
    if device == "auto":
        import torch

        if torch.cuda.is_available():
            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, hence here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _git() -> dict | None:
    """Commit and whether the code differs from it; None without git, or when the clone is an unpacked archive."""
    root = project_root()
    # Inside a git hook, GIT_DIR and its kind point at another place than `root`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        # An archive unpacked inside some other repository must not take that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> int | None:
    """Threads of torch where it is loaded: sums depend on their number in the last digits."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None

"""Provenance of a result: its data by hash, the code, the libraries, the machine.

A record holds no wall clock and no machine path: the same run on the same machine gives the same bytes. torch is used where it
is imported already, so that drawing stays light.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from prunelib.io import CONVERTED, at_root, file_sha256, found, project_root

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pandas", "matplotlib", "datasets")
LIBRARIES += ("accelerate", "peft", "lm-eval", "papermill", "snakemake")
# What decides a result; data/ and figures/ are left out because the batch itself rewrites them.
CODE = ("prunelib", "notebooks", "profiles", "Snakefile", "pyproject.toml", "requirements.lock")
TITLES = json.loads(at_root("data/models/titles.json").read_text(encoding="utf-8"))  # of models, by name
PACKAGE = Path(__file__).resolve().parents[1]


def model_source(name: str) -> str:
    """What `models.load` takes: the absolute path when `name` is a folder or file (as `io.found`), else `name`."""
    path = found(name)
    return str(path.absolute()) if path.exists() else name


def model_title(name: str) -> str:
    """A model as figures and cards name it; one that is not of this repository by its own name."""
    return TITLES.get(Path(name).name, Path(name).name)


def model_fingerprint(name: str) -> str:
    """Hash of the weights of a local folder or GGUF file; of a hub model the commit that its client holds.

    The name of a packaged model, whose sha256 is fixed, stands for itself.
    """
    folder = found(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        lines = [f"{path.name} {file_sha256(path)}" for path in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    if folder.is_file():
        return file_sha256(folder)[:12]
    with contextlib.suppress(ValueError):  # no name of the hub
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name[:12] if isinstance(cached, str) else name
    return name


def model_description(name: str) -> dict:
    """Name, title and fingerprint of a model; `dequantized_from` where its weights were those of a quantized GGUF file."""
    described = {"name": name, "title": model_title(name), "fingerprint": model_fingerprint(name)}
    for config in (found(name) / "config.json", at_root(CONVERTED) / name / "config.json"):
        if config.is_file() and (source := json.loads(config.read_text(encoding="utf-8")).get("dequantized_from")):
            return described | {"dequantized_from": source}
    return described


def source_sha256(folder: Path = PACKAGE) -> str:
    """sha256 over names and bytes of all Python files in `folder`, line endings normalized."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def code_cells(notebook: str | os.PathLike) -> list[tuple[str, list[str]]]:
    """Source and tags of every code cell. Raises ValueError for a file that is no notebook."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a notebook: {type(error).__name__}: {error}") from None


def notebook_source_sha(path: str | os.PathLike) -> str:
    """sha256 over the code cells of a notebook, whatever their outputs; an executed copy has that of its notebook."""
    cells = [[source, "parameters" in tags] for source, tags in code_cells(path) if "injected-parameters" not in tags]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def record(*, data: Mapping[str, str] | None = None, model: Mapping | None = None, device: str = "cpu") -> dict:
    """Everything but the parameters that a result depends on.

    data: name of each text or file → its sha256. model: its description. device: the torch device that computed.
    """
    torch = sys.modules.get("torch")
    accelerator = torch is not None and device.startswith("cuda") and torch.cuda.is_available()
    return {
        "git": _git(),
        "source_sha256": source_sha256(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if accelerator else device,
        "threads": torch.get_num_threads() if torch is not None else None,  # sums depend on it in the last digits
        "data": dict(data or {}),
        "model": dict(model or {}),
    }


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory in bytes so far: of the process on a CPU, of the allocator on an accelerator ("auto": sum over all)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (device == "auto" or device.startswith("cuda")):
        devices = range(torch.cuda.device_count()) if device == "auto" else [device]
        return sum(map(torch.cuda.max_memory_allocated, devices))
    import resource  # not on Windows, hence here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _cpu() -> str:
    with contextlib.suppress(OSError, TypeError):  # of Linux
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    return platform.processor() or platform.machine()


def _git() -> dict | None:
    """Commit and whether the code differs from it; None without git, or outside a clone."""
    root = project_root()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in a git hook

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:  # else unpacked inside some other repository
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *CODE))}
    return None


def _version(name: str) -> str | None:
    """None where it is not installed: a GPU machine may have less than the lock, and this runs after the computation."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None

"""The model card of a pruned model, from its run alone: `python -m prunelib.apps.model_card RUN.json` prints it."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd

from prunelib.figures.save import markdown
from prunelib.io import found as input_path
from prunelib.lab.profile import arguments
from prunelib.lab.provenance import model_title
from prunelib.lab.runs import read_run
from prunelib.models.gguf import PACKAGED, is_gguf

NOTEBOOK = "notebooks/own_model.ipynb"
CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")
STATES = {"dense": "before", "pruned": "pruned", "repaired": "pruned and repaired", "healed": "pruned and healed"}
PRIVATE = ("output", "push_to", "push_private")  # parameters that say nothing about the model


def base(model: str, hub: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What the card says of the base model: its name on the `hub`, None for one that is not there, and its `license`."""
    local = input_path(model).exists() or is_gguf(model)
    return {"hub": hub or (None if local else model), "license": license_of(model, revision)}


def license_of(model: str, revision: str | None = None) -> dict[str, str]:
    """The license of a packaged model, or in the card of a folder or of a name on the hub, as front matter; else empty."""
    if model in PACKAGED:
        name = PACKAGED[model].license
        return {"license": "other", "license_name": name} if " " in name else {"license": name.lower()}
    if is_gguf(model):
        return {}
    try:
        folder = input_path(model)
        path = folder / CARD if folder.is_dir() else Path(huggingface_hub.hf_hub_download(model, CARD, revision=revision))
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # whatever its prose is written in
        found = huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, one that is no YAML, no network, a gated model: the license is unknown, and the card says so
        return {}
    return {name: found[name] for name in LICENSE if isinstance(found.get(name), str)}


def card(run: Mapping[str, Any]) -> str:
    """The model card of a run of `notebooks/own_model.ipynb`. Raises ValueError when the run holds no pruned model."""
    about = run.get("extra", {}).get("card")
    if not about:
        raise ValueError(f"a run of {run.get('experiment')!r} made no model that a card could describe; run {NOTEBOOK}")
    values = {name: _portable(value) for name, value in run["parameters"].items()}
    healing = about["healing"]
    data = huggingface_hub.ModelCardData(
        **about["license"],
        base_model=about["hub"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["prunelib", "pruned", "depth-pruning", *(["healed"] if healing else [])],
    )
    command = arguments({name: value for name, value in values.items() if name not in PRIVATE})
    return str(
        huggingface_hub.ModelCard.from_template(
            data,
            template_path=str(Path(__file__).with_suffix(".md")),
            **about,
            run=values,
            title=model_title(values["model"]),
            name=values.get("push_to") or Path(values["folder"]).name,
            recipe=healing["recipe"] if healing else {},
            losses=_losses(run["rows"]),
            tasks=_tasks(run["rows"]),
            texts=list(dict.fromkeys(row["text"] for row in run["rows"] if "text" in row)),
            origin=run["provenance"],
            seconds=run["seconds"],
            peak_bytes=run.get("peak_bytes"),
            command=f"python -m prunelib.lab.run_notebook {NOTEBOOK} OUTPUT.json \\\n    {command}",
        )
    )


def _losses(rows: list[dict]) -> str:
    """One line per text and state: nats per token, perplexity, and its ratio to the base model's with the interval."""
    found = {(row["state"], row["text"], row["metric"]): row for row in rows if "text" in row}
    lines = []
    for state, text, metric in found:
        if metric == "nll":
            ppl, gap = found.get((state, text, "ppl")), found.get((state, text, "nats_over_dense"))
            line = {"text": text, "model": STATES[state], "nats per token": f"{found[state, text, metric]['value']:.4f}"}
            line["perplexity"] = f"{ppl['value']:.2f}" if ppl else "too large"
            ratio = _interval({end: math.exp(min(gap[end], 300.0)) for end in ("value", "low", "high")}) if gap else "1"
            lines.append(line | {"perplexity over the base model's": ratio, "tokens scored": found[state, text, metric]["n"]})
    return markdown(pd.DataFrame(lines))


def _tasks(rows: list[dict]) -> str:
    """One line per task: the accuracy of every state beside chance, and the difference to the base model."""
    found = {(row["task"], row["metric"], row["state"]): row for row in rows if "task" in row}
    lines = []
    for (task, metric, state), row in found.items():
        if state == "dense" and "stderr" in row:
            scores = {name: found[task, metric, name] for name in STATES if (task, metric, name) in found}
            gap = next((one for (name, kind, _), one in found.items() if (name, kind) == (task, f"{metric}_over_dense")), None)
            chance = found.get((task, "chance", state))
            line = {STATES[name]: f"{one['value']:.3f} ± {one['stderr']:.3f}" for name, one in scores.items()}
            ends = {"difference": _interval(gap) if gap else "–", "chance": f"{chance['value']:.3f}" if chance else "–"}
            lines.append({"task": task, "metric": metric, **line, **ends, "items": row["n"]})
    return markdown(pd.DataFrame(lines)) if lines else ""


def _portable(value: Any) -> Any:
    """Folders of one machine by their last name: a published card names no other part of a path."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


if __name__ == "__main__":
    print(card(read_run(Path(sys.argv[1]).absolute())), end="")

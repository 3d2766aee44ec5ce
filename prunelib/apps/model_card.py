"""The README.md of a pruned model, written from the run that made it and from nothing else.

`python -m prunelib.apps.model_card RUN.json` prints it. What the run does not hold is not in the card: a licence is that of the base
model's own card or none, a number has the run's interval or none. Nothing here imports torch.
"""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prunelib.io import at_root
from prunelib.lab.profile import arguments
from prunelib.lab.runs import read_run

NOTEBOOK = "notebooks/own_model.ipynb"
CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")
STATES = {"dense": "before", "pruned": "pruned", "repaired": "pruned and repaired", "healed": "pruned and healed"}
PRIVATE = ("output", "push_to", "push_private")  # parameters that say nothing about the model


class CardError(ValueError):
    """A run that holds too little for a card."""


# ------------------------------------------------------------------------------------------------------ the base's card


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two lines `---` of a model card; empty where there is none, or it is no mapping."""
    found = re.match(r"\A---\s*\n(.*?)\n---\s*$", card, re.DOTALL | re.MULTILINE)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def licence_of(model: str, revision: str | None = None) -> dict[str, str]:
    """What the card of a model says about its licence, as front matter; empty when it has no card, or the card says nothing.

    `model` is a folder, or a name on the hub, which is asked (or its cache). A licence is never guessed.
    """
    folder = at_root(model)
    if folder.is_dir():
        card = folder / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    else:
        import huggingface_hub

        try:
            text = Path(huggingface_hub.hf_hub_download(model, CARD, revision=revision)).read_text(encoding="utf-8")
        except Exception:  # no card, no network, a gated model: the licence is then unknown, and said to be
            text = ""
    found = front_matter(text)
    return {name: found[name] for name in LICENCE if isinstance(found.get(name), str)}


# ------------------------------------------------------------------------------------------------------------- the card


def card(run: Mapping[str, Any]) -> str:
    """The model card of a run of `notebooks/own_model.ipynb`. Raises CardError when the run holds no pruned model."""
    about = run.get("extra", {}).get("card")
    if not about:
        raise CardError(f"a run of {run.get('experiment')!r} made no model that a card could describe; run {NOTEBOOK}")
    base = about["base"]
    # License first and base next, as cards on the hub have them; sorted keys would put base_model in front.
    head: dict[str, Any] = {name: base["licence"][name] for name in LICENCE if name in base["licence"]}
    if base["hub"]:
        head["base_model"] = base["hub"]
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _tags(about)}
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {about['name']}",
        _summary(about),
        "## What was removed",
        _removed(about),
        "## How it was healed",
        _healed(about),
        "## What it costs",
        _losses(run),
        *_tasks(run),
        "## Use",
        _use(about),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(run, about)),
        "## How it was made",
        _made(run),
    ]
    return "\n\n".join(sections) + "\n"


def _tags(about: Mapping[str, Any]) -> list[str]:
    return ["prunelib", "pruned", "depth-pruning", *(["healed"] if about["healing"] else [])]


def _summary(about: Mapping[str, Any]) -> str:
    base, count = about["base"], len(about["removed"])
    name = f"[{base['hub']}](https://huggingface.co/{base['hub']})" if base["hub"] else f"the model `{base['label']}`"
    trained = ", then trained a little to recover" if about["healing"] else ", not trained any further"
    return (
        f"{name[0].upper() + name[1:] if not base['hub'] else name} without {count} of its {about['n_layers']} decoder layers "
        f"({about['removed_fraction']:.1%} of its parameters){trained}. An ordinary checkpoint: no code beside transformers is "
        "needed. This card was written by prunelib from the run that made the model; every number below is from that run."
    )


def _removed(about: Mapping[str, Any]) -> str:
    rows = [
        ("layers removed (0-based)", " ".join(map(str, about["removed"]))),
        ("chosen by", f"`{about['method']}` ({about['method_source']})"),
        ("on", about["calibration"]),
        ("asked for", about["asked"]),
        ("parameters", f"{about['parameters']['dense']:,} before, {about['parameters']['final']:,} now"),
        ("layers", f"{about['n_layers']} before, {about['n_layers'] - len(about['removed'])} now"),
    ]
    if about["repair"]:
        rows.append(("closed-form repair of the cut", f"`{about['repair']['method']}` ({about['repair']['source']})"))
    return _table(["", ""], rows)


def _healed(about: Mapping[str, Any]) -> str:
    healing = about["healing"]
    if not healing:
        return "It was not: the remaining weights are those of the base model" + (
            ", except what the repair changed." if about["repair"] else "."
        )
    recipe = healing["recipe"]
    adapters = f"rank {recipe['rank']}, alpha {recipe['alpha']:g}, on {' and '.join(recipe['modules'])}; merged afterwards"
    rows = [
        ("recipe", f"`{recipe['name']}` ({'a recipe of prunelib' if recipe['source'] == 'own' else recipe['source']})"),
        ("trains", f"adapters (LoRA): {adapters}" if recipe["trains"] == "lora" else recipe["trains"].replace("_", " ")),
        ("text", healing["text"]),
        ("tokens", f"{healing['tokens']:,} in {recipe['steps']:,} steps of {recipe['batch']} × {recipe['seq_len']}"),
        ("learning rate", f"{recipe['learning_rate']:g}, {recipe['schedule']}, {recipe['warmup_steps']} steps of warm-up"),
        ("weights trained", f"{healing['trainable']:,}"),
        ("time", f"{_minutes(healing['seconds'])} on {healing['device']}"),
    ]
    return _table(["", ""], rows)


def _losses(run: Mapping[str, Any]) -> str:
    rows = [row for row in run["rows"] if "text" in row]
    states = [state for state in STATES if any(row["state"] == state for row in rows)]
    found = {(row["state"], row["text"], row["metric"]): row for row in rows}
    lines = []
    for text in dict.fromkeys(row["text"] for row in rows):
        for state in states:
            ppl, gap = found.get((state, text, "ppl")), found.get((state, text, "nats_over_dense"))
            lines.append(
                (
                    text,
                    STATES[state],
                    f"{found[state, text, 'nll']['value']:.4f}",
                    f"{ppl['value']:.2f}" if ppl else "beyond numbers",
                    _interval(gap, math.exp) if gap else "1",
                )
            )
    levels = sorted({row["level"] for row in rows if "level" in row})
    counts = {row["text"]: row["n"] for row in rows if row["metric"] == "nll"}
    scored = ", ".join(f"{text}: {count:,}" for text, count in counts.items())
    protocol = run["extra"]["card"]["protocol"]
    return (
        _table(["text", "model", "nats per token", "perplexity", "perplexity, times the base model's"], lines)
        + f"\n\nIn brackets the {levels[0]:.0%} interval of a paired bootstrap over windows, the same windows for both models. "
        f"Windows of {protocol['window']} tokens, the first not scored; tokens scored: {scored}. No reported text is one on "
        "which layers were chosen or weights trained; texts and splits are named as prunelib loads them."
    )


def _tasks(run: Mapping[str, Any]) -> list[str]:
    rows = [row for row in run["rows"] if "task" in row]
    if not rows:
        return []
    states = [state for state in STATES if any(row["state"] == state for row in rows)]
    lines = []
    for row in rows:
        if "stderr" not in row or row["state"] != states[0]:
            continue
        values = [one for one in rows if (one["task"], one["metric"]) == (row["task"], row["metric"])]
        cells = [next((_score(one) for one in values if one["state"] == state), "–") for state in states]
        gap = next((one for one in rows if one["task"] == row["task"] and one["metric"] == f"{row['metric']}_over_dense"), None)
        chance = next((one["value"] for one in rows if one["task"] == row["task"] and one["metric"] == "chance"), None)
        lines.append(
            (
                row["task"],
                row["metric"],
                *cells,
                _interval(gap) if gap else "–",
                f"{chance:.3f}" if chance is not None else "–",
                f"{row['n']:,}",
            )
        )
    header = ["task", "metric", *(STATES[state] for state in states), "difference [interval]", "chance", "items"]
    return ["## Tasks", _table(header, lines) + "\n\n± standard error over items; differences are paired."]


def _use(about: Mapping[str, Any]) -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'name = "{about["name"]}"  # this repository, or the folder\n'
        f'model = AutoModelForCausalLM.from_pretrained(name, dtype="{about["dtype"]}")\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n```\n\n"
        "The saved checkpoint was loaded again before this card was written: no missing or unexpected weight, and the same "
        f"loss on the reported text (they differ by {about['reload_difference']:.2g} nats per token)."
    )


def _limits(run: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    base, rows = about["base"], run["rows"]
    lines = ["Everything that the base model's own card warns of holds here too."] if base["hub"] else []
    texts = list(dict.fromkeys(row["text"] for row in rows if "text" in row))
    lines.append(f"Measured on {', '.join(texts)} alone; what other text costs is not known.")
    if not any("task" in row for row in rows):
        lines.append("No task was run: what the loss of layers does to answers, reasoning or instructions is not known.")
    lines.append("Whether what the base model was taught about safety survived was not measured.")
    lines.append(
        "The intervals are over the windows of the reported text. Layers were chosen on one draw of calibration windows"
        + (", and the training was run with one seed" if about["healing"] else "")
        + ": another draw gives somewhat other numbers."
    )
    if about["healing"]:
        lines.append(
            f"What healing won back was won on {about['healing']['text']}; on text unlike that it may have won less, or lost."
        )
    if not base["licence"]:
        lines.append(
            "The run found no licence in the base model's card: ask its authors before using or passing on this model."
        )
    else:
        lines.append(
            f"The licence is that of the base model ({base['licence'].get('license_name') or base['licence']['license']})."
        )
    return lines


def _made(run: Mapping[str, Any]) -> str:
    about, origin = run["extra"]["card"], run["provenance"]
    values = {name: _portable(value) for name, value in run["parameters"].items() if name not in PRIVATE}
    git, libraries = origin.get("git"), origin.get("libraries", {})
    code = f"commit `{git['commit'][:12]}`" + (" with changes" if git["dirty"] else "") if git else "no commit known"
    rows = [
        ("code", f"prunelib, {code}, source sha256 `{(origin.get('source_sha256') or 'unknown')[:12]}…`"),
        (
            "libraries",
            ", ".join(f"{name} {libraries[name]}" for name in ("torch", "transformers", "peft") if libraries.get(name)),
        ),
        ("device", f"{origin.get('device')}; {origin.get('cpu')}"),
        ("time", f"{_minutes(run['seconds'])} in all"),
    ]
    if run.get("peak_bytes"):
        rows.append(("peak memory", f"{run['peak_bytes'] / 2**30:.1f} GiB"))
    if base := about["base"].get("revision"):
        rows.append(("base model's revision", f"`{base}`"))
    rows += [(f"sha256 of {name}", f"`{value[:16]}…`") for name, value in origin.get("data", {}).items()]
    return (
        _table(["", ""], rows)
        + f"\n\n```bash\npython -m prunelib.lab.run_notebook {NOTEBOOK} OUTPUT.json \\\n    {arguments(values)}\n```"
    )


def _portable(value: Any) -> Any:
    """Folders of one machine by their last name: a published card names no other part of a path."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return value


def _interval(row: Mapping[str, Any], scale: Any = float) -> str:
    value, low, high = (scale(min(row[name], 300.0)) for name in ("value", "low", "high"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.3f} ± {row['stderr']:.3f}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments_: Sequence[str]) -> int:
    """`python -m prunelib.apps.model_card RUN.json`: print the card of a run."""
    if len(arguments_) != 1:
        print("usage: python -m prunelib.apps.model_card RUN.json", file=sys.stderr)
        return 2
    try:
        print(card(read_run(Path(arguments_[0]).absolute())), end="")
    except (ValueError, OSError) as error:
        print(f"model card: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

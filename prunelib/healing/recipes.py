"""Recipes of healing: how a paper trained a pruned model, down to the number of tokens."""

import csv
import math
from dataclasses import dataclass, replace

from prunelib.io import at_root

ROLES = ("attention", "mlp")
CHOICES = {
    "trains": ("lora", "all", "last_layers", "beside_cuts"),
    "base": ("full", "nf4"),
    "objective": ("next_token", "distillation"),
    "schedule": ("cosine", "linear", "constant"),
    "modules": ROLES,
}
MIN = {"batch": 1, "seq_len": 2, "steps": 1, "rank": 1, "alpha": 1e-9, "last_layers": 1, "warmup_steps": 0, "learning_rate": 0}
BELONGS = {"modules": "lora", "rank": "lora", "alpha": "lora", "last_layers": "last_layers"}  # setting → `trains` that needs it


@dataclass(frozen=True)
class Recipe:
    """How to heal. `dataclasses.replace` gives another one with other settings.

    Attributes:
        source: paper and place that state the settings; "own" where no paper does.
        trains: "lora" (adapters on the linear maps of `modules`), "all" (every weight), "last_layers" (the last so many
            layers, the final norm and the head; a head that is tied to the embeddings stays tied, and trains them too) or
            "beside_cuts" (the layers below and above each run of removed ones).
        batch: rows of `seq_len` tokens in one optimizer step, over all processes.
        modules: sublayers that get adapters: "mlp", "attention".
        rank, alpha, dropout: of the adapters, which add alpha / rank times their product to a weight.
        base: weights under the adapters: as they are ("full"), or in 4 bits ("nf4", QLoRA).
        objective: "next_token" (cross-entropy) or "distillation" (Kullback-Leibler divergence from the dense model's
            next-token distribution).
        schedule: of the learning rate after `warmup_steps` of linear warm-up to `learning_rate`.

    Raises ValueError naming the setting that is wrong or does not belong to the others.
    """

    name: str
    source: str
    trains: str
    learning_rate: float | int
    batch: int
    seq_len: int
    steps: int
    modules: tuple[str, ...] = ()
    rank: int | None = None
    alpha: float | int | None = None
    dropout: float | int = 0.0
    base: str = "full"
    objective: str = "next_token"
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float | int = 0.0
    last_layers: int | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, why: str) -> None:
            raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)!r} {why}")

        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not set(value if name == "modules" else [value]) <= set(known):
                refuse(name, f"is not one of {', '.join(known)}")
        for name, trains in BELONGS.items():
            if bool(getattr(self, name)) != (self.trains == trains) and getattr(self, name) != 0:
                refuse(name, f"with trains={self.trains!r}: {'give a value' if self.trains == trains else 'leave it out'}")
        if self.trains != "lora" and self.base != "full":
            refuse("base", f"with trains={self.trains!r}: only adapters train above other weights")
        for name, least in MIN.items():
            if getattr(self, name) is not None and not least <= getattr(self, name) < math.inf:
                refuse(name, f"is no finite number from {least}")
        if self.warmup_steps > self.steps:
            refuse("warmup_steps", f"is more than steps={self.steps}")

    @property
    def rows(self) -> int:
        """Rows of `seq_len` tokens that the training reads."""
        return self.batch * self.steps

    @property
    def tokens(self) -> int:
        """Tokens that the training reads, padding included."""
        return self.rows * self.seq_len


class Recipes(dict[str, Recipe]):
    """Recipes by name, ``gromov:MODEL`` those of that paper. An unknown name raises ValueError listing the known ones."""

    def __missing__(self, name: str) -> Recipe:
        if name.startswith("gromov:"):
            return gromov(name.removeprefix("gromov:"))
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(sorted(self))}")


def gromov(model_name: str) -> Recipe:
    """How "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887, Table 2) healed one of its seven models.

    QLoRA on the MLP of every layer, alpha = rank, on C4. (On Qwen-1 the paper names the maps w1, w2 and c_proj, and the output
    of attention is called c_proj as well; here the MLP alone is trained, as the paper says.) Raises ValueError listing them.
    """
    with open(at_root("data/published/deeper_layers_healing.csv"), encoding="utf-8", newline="") as file:
        rows = {row["model"].lower(): row for row in csv.DictReader(file)}
    if model_name.lower() not in rows:
        names = ", ".join(row["model"] for row in rows.values())
        raise ValueError(f"the paper healed no model {model_name!r}; it healed: {names}")
    row = rows[model_name.lower()]
    sizes = {"rank": int(row["lora_rank"]), "alpha": int(row["lora_alpha"]), "seq_len": int(row["seq_len"])}
    source = f"deeper_layers Table 2, {row['model']}"
    return replace(RECIPES["gromov_qlora"], source=source, learning_rate=float(row["peak_lr"]), **sizes)


_SMALL = {"batch": 16, "seq_len": 256, "steps": 64, "warmup_steps": 4}
_GROMOV = {"batch": 16, "seq_len": 2048, "steps": 5000, "warmup_steps": 100}
_QLORA = {"trains": "lora", "modules": ("mlp",), "rank": 2, "alpha": 2, "dropout": 0.05, "base": "nf4"}
# Table 6 says 0.003, appendix A 3e-4, which is taken here; `replace(recipe, learning_rate=3e-3)` is the other one.
# One epoch of Alpaca less 2,000 held-out items is 50,002 / 32 = 1,562 full batches. Not stated there: schedule,
# warm-up and weight decay (here the Trainer's defaults).
_SIMDIFF = {"batch": 32, "seq_len": 256, "steps": 1562, "schedule": "linear", "learning_rate": 3e-4}
_LORA = {"trains": "lora", "modules": ROLES, "rank": 8, "alpha": 16}
_ALL = (
    Recipe("gromov_qlora", "deeper_layers Table 2, Llama-2-7B", learning_rate=3e-4, **_QLORA, **_GROMOV),
    Recipe("simdiff_lora", "simdiff Table 6; learning rate of its appendix A", dropout=0.05, **_LORA, **_SIMDIFF),
    Recipe("lora", "own", learning_rate=3e-3, **_LORA, **_SMALL),
    Recipe("full", "own", "all", 3e-4, **_SMALL),
    Recipe("last_layers", "own, after LLM-Streamline, which trains few layers", "last_layers", 3e-4, last_layers=2, **_SMALL),
    Recipe("last3_head", "arXiv 2411.15558 (last three layers and head)", "last_layers", 3e-4, last_layers=3, **_SMALL),
    Recipe("cut_adjacent", "arXiv 2510.23652 (the layers beside a cut)", "beside_cuts", 3e-4, **_SMALL),
    Recipe("distillation", "own", learning_rate=3e-3, objective="distillation", **_LORA, **_SMALL),
)
RECIPES = Recipes({recipe.name: recipe for recipe in _ALL})
"""The recipes by name. Their sizes are those of the papers, or, where the source is "own", for the reference models."""

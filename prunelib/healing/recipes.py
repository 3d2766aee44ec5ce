"""Recipes of healing: how a paper trained a pruned model, down to the number of tokens. `prunelib.healing.train` follows them."""

import csv
import math
from dataclasses import dataclass

from prunelib.io import at_root

ROLES = ("attention", "mlp")
"""Sublayers that may get adapters."""

WORDS = {
    "trains": ("lora", "all", "last_layers"),
    "base": ("full", "nf4"),
    "objective": ("next_token", "distillation"),
    "schedule": ("cosine", "linear", "constant"),
}
"""Settings of a recipe that are words → those `prunelib.healing.train` knows."""


@dataclass(frozen=True)
class Recipe:
    """How to heal. `dataclasses.replace` gives another one with other settings.

    Attributes:
        source: paper and place that state the settings; "own" where no paper does.
        trains: "lora" (adapters on the linear maps of `modules`), "all" (every weight) or "last_layers" (the last so many
            layers, the final norm and the head; a head that is tied to the embeddings trains them too).
        modules: sublayers that get adapters: "mlp", "attention".
        rank, alpha, dropout: of the adapters, which add alpha / rank times their product to a weight.
        base: what the adapters are trained on: weights as they are ("full"), or 4-bit ones ("nf4", QLoRA).
        objective: "next_token" (cross-entropy) or "distillation" (temperature² times the Kullback-Leibler divergence from the
            dense model's next-token distribution at that temperature).
        hidden_weight: in distillation, the weight of the relative squared distance to the dense model's hidden states behind
            the cut.
        schedule: of the learning rate after `warmup_steps` of linear warm-up to `learning_rate`: one of `WORDS`.
        batch: rows of `seq_len` tokens in one optimizer step, over all processes.
        last_layers: how many layers "last_layers" trains.

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
    hidden_weight: float | int = 0.0
    temperature: float | int = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float | int = 0.0
    last_layers: int | None = None

    def __post_init__(self) -> None:
        for name, known in WORDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("batch", "seq_len", "steps"):
            least = 2 if name == "seq_len" else 1
            if getattr(self, name) < least:
                raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)} must be at least {least}")
        adapters = {"modules": self.modules or None, "rank": self.rank, "alpha": self.alpha}
        for name, value in adapters.items():
            if (value is None) == (self.trains == "lora"):
                need = "needs" if self.trains == "lora" else "has no"
                raise ValueError(f"recipe {self.name}: trains={self.trains!r} {need} {name}, got {getattr(self, name)!r}")
        unknown = sorted(set(self.modules) - set(ROLES))
        if unknown:
            raise ValueError(f"recipe {self.name}: modules {', '.join(unknown)} unknown; there are: {', '.join(ROLES)}")
        if self.trains == "lora" and (self.rank < 1 or self.alpha <= 0):
            raise ValueError(f"recipe {self.name}: rank={self.rank} must be at least 1 and alpha={self.alpha} positive")
        if self.trains != "lora" and (self.base != "full" or self.dropout):
            raise ValueError(
                f"recipe {self.name}: base={self.base!r} and dropout={self.dropout} are settings of adapters alone"
            )
        if (self.last_layers is None) == (self.trains == "last_layers") or (self.last_layers or 1) < 1:
            raise ValueError(
                f"recipe {self.name}: last_layers={self.last_layers} with trains={self.trains!r}; give a number of at least 1 "
                "with 'last_layers', and none otherwise"
            )
        if self.objective != "distillation" and (self.hidden_weight or self.temperature != 1):
            raise ValueError(f"recipe {self.name}: hidden_weight and temperature are settings of distillation alone")
        bounds = {
            "dropout": 0 <= self.dropout < 1,
            "hidden_weight": self.hidden_weight >= 0,
            "temperature": 0 < self.temperature < math.inf,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "weight_decay": self.weight_decay >= 0,
        }
        for name, fine in bounds.items():
            if not fine:
                raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)} is out of range (steps={self.steps})")

    @property
    def rows(self) -> int:
        """Rows of `seq_len` tokens that the training reads."""
        return self.batch * self.steps

    @property
    def tokens(self) -> int:
        """Tokens that the training reads, padding included."""
        return self.rows * self.seq_len


class Recipes(dict[str, Recipe]):
    """Recipes by name; an unknown name raises ValueError listing the known ones."""

    def __missing__(self, name: str) -> Recipe:
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(sorted(self))}")


def gromov(model_name: str) -> Recipe:
    """The settings with which "The Unreasonable Ineffectiveness of the Deeper Layers" healed one of its seven models.

    Arxiv 2403.17887, Table 2: QLoRA on the MLP of every layer, alpha = rank, C4. Read from
    data/published/deeper_layers_healing.csv; capitals do not matter. (On Qwen-1 the paper names the maps w1, w2 and c_proj, and
    the output of attention is called c_proj as well; here the MLP alone is trained, as the paper says.)

    Raises ValueError listing the seven models.
    """
    with open(at_root("data/published/deeper_layers_healing.csv"), encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    found = [row for name, row in rows.items() if name.lower() == model_name.lower()]
    if not found:
        raise ValueError(f"the paper healed no model {model_name!r}; it healed: {', '.join(rows)}")
    (row,) = found
    return Recipe(
        name="gromov_qlora",
        source=f"deeper_layers Table 2, {row['model']}",
        trains="lora",
        modules=("mlp",),
        rank=int(row["lora_rank"]),
        alpha=int(row["lora_alpha"]),
        dropout=float(row["lora_dropout"]),
        base="nf4",
        learning_rate=float(row["peak_lr"]),
        schedule=row["lr_schedule"],
        warmup_steps=int(row["warmup_steps"]),
        steps=int(row["steps"]),
        batch=int(row["global_batch"]),
        seq_len=int(row["seq_len"]),
    )


_SMALL = {"batch": 16, "seq_len": 256, "steps": 64, "warmup_steps": 4}

RECIPES = Recipes(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                name="gromov_qlora",
                source="deeper_layers Table 2, Llama-2-7B; `gromov` gives the other models",
                trains="lora",
                modules=("mlp",),
                rank=2,
                alpha=2,
                dropout=0.05,
                base="nf4",
                learning_rate=3e-4,
                warmup_steps=100,
                batch=16,
                seq_len=2048,
                steps=5000,
            ),
            # Table 6 says 0.003, appendix A 3e-4, which is taken here; `replace(recipe, learning_rate=3e-3)` is the other one.
            # One epoch of Alpaca less 2,000 held-out items is 50,002 / 32 = 1,562 full batches. Not stated there: schedule,
            # warm-up and weight decay (here the Trainer's defaults).
            Recipe(
                name="simdiff_lora",
                source="simdiff Table 6; learning rate of its appendix A",
                trains="lora",
                modules=ROLES,
                rank=8,
                alpha=16,
                dropout=0.05,
                learning_rate=3e-4,
                schedule="linear",
                batch=32,
                seq_len=256,
                steps=1562,
            ),
            Recipe("lora", "own", "lora", 3e-3, modules=ROLES, rank=8, alpha=16, **_SMALL),
            Recipe("full", "own", "all", 3e-4, **_SMALL),
            Recipe(
                "last_layers",
                "own, after LLM-Streamline, which trains few layers",
                "last_layers",
                3e-4,
                last_layers=2,
                **_SMALL,
            ),
            Recipe("distillation", "own", "lora", 3e-3, modules=ROLES, rank=8, alpha=16, objective="distillation", **_SMALL),
        )
    }
)
"""The recipes by name. Their sizes are those of the papers, or, where the source is "own", for the reference models."""

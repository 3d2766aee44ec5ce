"""Recipes of healing: how a paper trained a pruned model, down to the number of tokens."""

import csv
import math
from dataclasses import dataclass

from prunelib.io import at_root

ROLES = ("attention", "mlp")
"""Sublayers that may get adapters."""

CHOICES = {
    "trains": ("lora", "all", "last_layers"),
    "base": ("full", "nf4"),
    "objective": ("next_token", "distillation"),
    "schedule": ("cosine", "linear", "constant"),
}


@dataclass(frozen=True)
class Recipe:
    """How to heal. `dataclasses.replace` gives another one with other settings.

    Attributes:
        source: paper and place that state the settings; "own" where no paper does.
        trains: "lora" (adapters on the linear maps of `modules`), "all" (every weight) or "last_layers" (the last so many
            layers, the final norm and the head; a head that is tied to the embeddings trains them too).
        batch: rows of `seq_len` tokens in one optimizer step, over all processes.
        modules: sublayers that get adapters: "mlp", "attention".
        rank, alpha, dropout: of the adapters, which add alpha / rank times their product to a weight.
        base: weights under the adapters: as they are ("full"), or in 4 bits ("nf4", QLoRA).
        objective: "next_token" (cross-entropy) or "distillation" (temperature² times the Kullback-Leibler divergence from the
            dense model's next-token distribution at that temperature).
        hidden_weight: in distillation, the weight of the relative squared distance to the dense model's hidden states after
            the first removed layer.
        schedule: of the learning rate after `warmup_steps` of linear warm-up to `learning_rate`.
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
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        adapters, distills = self.trains == "lora", self.objective == "distillation"
        belongs = {  # name: (it is given, it has to be, it may be)
            "modules": (bool(self.modules), adapters, adapters),
            "rank": (self.rank is not None, adapters, adapters),
            "alpha": (self.alpha is not None, adapters, adapters),
            "dropout": (self.dropout != 0, False, adapters),
            "base": (self.base != "full", False, adapters),
            "last_layers": (self.last_layers is not None, self.trains == "last_layers", self.trains == "last_layers"),
            "hidden_weight": (self.hidden_weight != 0, False, distills),
            "temperature": (self.temperature != 1, False, distills),
        }
        for name, (given, needed, allowed) in belongs.items():
            if given < needed or given > allowed:
                what = f"{name}={getattr(self, name)!r} with trains={self.trains!r} and objective={self.objective!r}"
                raise ValueError(f"recipe {self.name}: {what}: {'give a value' if needed else 'leave it out'}")
        bounds = {
            "batch": self.batch >= 1,
            "seq_len": self.seq_len >= 2,
            "steps": self.steps >= 1,
            "modules": set(self.modules) <= set(ROLES),
            "rank": self.rank is None or self.rank >= 1,
            "alpha": self.alpha is None or self.alpha > 0,
            "last_layers": self.last_layers is None or self.last_layers >= 1,
            "dropout": 0 <= self.dropout < 1,
            "hidden_weight": self.hidden_weight >= 0,
            "temperature": 0 < self.temperature < math.inf,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup_steps": 0 <= self.warmup_steps <= self.steps,
            "weight_decay": self.weight_decay >= 0,
        }
        for name, fine in bounds.items():
            if not fine:
                limits = f"steps={self.steps}, modules are among {', '.join(ROLES)}"
                raise ValueError(f"recipe {self.name}: {name}={getattr(self, name)!r} is out of range ({limits})")

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

    Arxiv 2403.17887, Table 2: QLoRA on the MLP of every layer, alpha = rank, C4; read from
    data/published/deeper_layers_healing.csv. (On Qwen-1 the paper names the maps w1, w2 and c_proj, and the output of attention
    is called c_proj as well; here the MLP alone is trained, as the paper says.) Raises ValueError listing the seven models.
    """
    with open(at_root("data/published/deeper_layers_healing.csv"), encoding="utf-8", newline="") as file:
        rows = {row["model"].lower(): row for row in csv.DictReader(file)}
    if model_name.lower() not in rows:
        names = ", ".join(row["model"] for row in rows.values())
        raise ValueError(f"the paper healed no model {model_name!r}; it healed: {names}")
    row = rows[model_name.lower()]
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
_QLORA = {"trains": "lora", "modules": ("mlp",), "rank": 2, "alpha": 2, "dropout": 0.05, "base": "nf4"}
_LORA = {"trains": "lora", "modules": ROLES, "rank": 8, "alpha": 16}

RECIPES = Recipes(
    gromov_qlora=Recipe(
        name="gromov_qlora",
        source="deeper_layers Table 2, Llama-2-7B; `gromov` gives the other models",
        **_QLORA,
        learning_rate=3e-4,
        warmup_steps=100,
        batch=16,
        seq_len=2048,
        steps=5000,
    ),
    # Table 6 says 0.003, appendix A 3e-4, which is taken here; `replace(recipe, learning_rate=3e-3)` is the other one.
    # One epoch of Alpaca less 2,000 held-out items is 50,002 / 32 = 1,562 full batches. Not stated there: schedule,
    # warm-up and weight decay (here the Trainer's defaults).
    simdiff_lora=Recipe(
        name="simdiff_lora",
        source="simdiff Table 6; learning rate of its appendix A",
        **_LORA,
        dropout=0.05,
        learning_rate=3e-4,
        schedule="linear",
        batch=32,
        seq_len=256,
        steps=1562,
    ),
    lora=Recipe("lora", "own", learning_rate=3e-3, **_LORA, **_SMALL),
    full=Recipe("full", "own", "all", 3e-4, **_SMALL),
    last_layers=Recipe(
        "last_layers", "own, after LLM-Streamline, which trains few layers", "last_layers", 3e-4, last_layers=2, **_SMALL
    ),
    distillation=Recipe("distillation", "own", learning_rate=3e-3, objective="distillation", **_LORA, **_SMALL),
)
"""The recipes by name. Their sizes are those of the papers, or, where the source is "own", for the reference models."""

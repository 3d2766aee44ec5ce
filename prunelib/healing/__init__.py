"""How is a pruned model trained back?"""

from prunelib.healing.recipes import RECIPES, Recipe, gromov
from prunelib.healing.train import Healed, HealingError, check_training, heal

__all__ = ["RECIPES", "Healed", "HealingError", "Recipe", "check_training", "gromov", "heal"]

"""How is a pruned model trained back?"""

from prunelib.healing.recipes import RECIPES, Recipe, gromov
from prunelib.healing.stages import heal_in_stages
from prunelib.healing.train import Healed, HealingError, check_training, heal

__all__ = ["RECIPES", "Healed", "HealingError", "Recipe", "check_training", "gromov", "heal", "heal_in_stages"]

"""What is lost?"""

from prunelib.evaluation.generation import continuations, generated
from prunelib.evaluation.intervals import mcnemar, paired_bootstrap
from prunelib.evaluation.layer_sets import layer_set_divergence, layer_set_likelihoods, layer_set_perplexity
from prunelib.evaluation.perplexity import NotFinite, Perplexity, PerplexityProtocol, check_length, check_windows, perplexity
from prunelib.evaluation.tasks import compare, evaluate_layer_sets, evaluate_tasks

__all__ = [
    "NotFinite",
    "Perplexity",
    "PerplexityProtocol",
    "check_length",
    "check_windows",
    "compare",
    "continuations",
    "evaluate_layer_sets",
    "evaluate_tasks",
    "generated",
    "layer_set_divergence",
    "layer_set_likelihoods",
    "layer_set_perplexity",
    "mcnemar",
    "paired_bootstrap",
    "perplexity",
]

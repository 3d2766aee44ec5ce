"""ROUGE for the tasks beside this file; ``rouge_score`` comes with lm-eval."""

from rouge_score.rouge_scorer import RougeScorer

_SCORER = RougeScorer(["rouge1"], use_stemmer=True)


def rouge1(doc: dict, results: list[str]) -> dict[str, float]:
    """ROUGE-1 F measure of the first generated line against ``summary``."""
    return {"rouge1": _SCORER.score(doc["summary"], results[0].strip())["rouge1"].fmeasure}

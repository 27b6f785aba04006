"""Evaluation: metrics, simple rules, splits, figures, and adapters for what other tools predict."""

from scperturbdiff.evaluation import adapters, baselines, metrics, pl, splits
from scperturbdiff.evaluation.metrics import evaluate, summarize_evaluation

__all__ = ["adapters", "baselines", "evaluate", "metrics", "pl", "splits", "summarize_evaluation"]

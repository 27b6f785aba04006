"""Evaluation: metrics, simple rules, splits and figures."""

from scperturbdiff.evaluation import baselines, metrics, pl, splits
from scperturbdiff.evaluation.metrics import evaluate, summarize_evaluation

__all__ = ["baselines", "evaluate", "metrics", "pl", "splits", "summarize_evaluation"]

"""Figures."""

from spatiaflow.pl._calibration import calibration
from spatiaflow.pl._expression import expression
from spatiaflow.pl._scores import gene_scores

__all__ = ["calibration", "expression", "gene_scores"]

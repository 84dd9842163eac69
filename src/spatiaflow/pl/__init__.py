"""Figures."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.pl._benchmark import benchmark
    from spatiaflow.pl._calibration import calibration
    from spatiaflow.pl._composition import composition
    from spatiaflow.pl._crops import crops
    from spatiaflow.pl._expression import expression
    from spatiaflow.pl._generation import morphology_dose, profile_shift, transition
    from spatiaflow.pl._grid import tissue
    from spatiaflow.pl._imputation import imputation
    from spatiaflow.pl._levels import attention, levels
    from spatiaflow.pl._niches import niche_stability
    from spatiaflow.pl._profile import profile
    from spatiaflow.pl._regions import regions
    from spatiaflow.pl._scores import gene_scores
    from spatiaflow.pl._transitions import pairs

__all__ = [
    "attention",
    "benchmark",
    "calibration",
    "composition",
    "crops",
    "expression",
    "gene_scores",
    "imputation",
    "levels",
    "morphology_dose",
    "niche_stability",
    "pairs",
    "profile",
    "profile_shift",
    "regions",
    "tissue",
    "transition",
]

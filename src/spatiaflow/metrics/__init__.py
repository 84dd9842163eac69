"""Scores of predicted expression and of generated cells, as used in benchmarks, tutorials and figures."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.metrics._bootstrap import bootstrap_blocks, paired_pearson_difference, spatial_blocks
    from spatiaflow.metrics._ceiling import noise_ceiling
    from spatiaflow.metrics._conformal import conformal_factor
    from spatiaflow.metrics._correlation import gene_correlation_agreement, pearson, rmse, spearman
    from spatiaflow.metrics._distribution import (
        crps_ensemble,
        crps_normal,
        energy_score,
        interval_coverage,
        interval_score,
        pit,
    )
    from spatiaflow.metrics._generation import (
        effect_recovery,
        energy_distance,
        feature_distances,
        frechet_distance,
        kernel_distance,
        memorised,
    )
    from spatiaflow.metrics._images import image_features
    from spatiaflow.metrics._spatial import morans_agreement, morans_i

__all__ = [
    "bootstrap_blocks",
    "conformal_factor",
    "crps_ensemble",
    "crps_normal",
    "effect_recovery",
    "energy_distance",
    "energy_score",
    "feature_distances",
    "frechet_distance",
    "gene_correlation_agreement",
    "image_features",
    "interval_coverage",
    "interval_score",
    "kernel_distance",
    "memorised",
    "morans_agreement",
    "morans_i",
    "noise_ceiling",
    "paired_pearson_difference",
    "pearson",
    "pit",
    "rmse",
    "spatial_blocks",
    "spearman",
]

"""The verbs: check the input, gather arrays, run a model, write slots."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.tl._clusters import cluster_cells
    from spatiaflow.tl._expression import predict_expression, train_stflow
    from spatiaflow.tl._generation import generate_morphology
    from spatiaflow.tl._imputation import impute_genes, train_imputation
    from spatiaflow.tl._labels import annotate
    from spatiaflow.tl._morphology import train_morphology
    from spatiaflow.tl._niches import cluster_niches
    from spatiaflow.tl._regions import summarize_expression
    from spatiaflow.tl._samples import sample_expression
    from spatiaflow.tl._spatia import embed_spatia, train_spatia
    from spatiaflow.tl._transitions import pair_transitions

__all__ = [
    "annotate",
    "cluster_cells",
    "cluster_niches",
    "embed_spatia",
    "generate_morphology",
    "impute_genes",
    "pair_transitions",
    "predict_expression",
    "sample_expression",
    "summarize_expression",
    "train_imputation",
    "train_morphology",
    "train_spatia",
    "train_stflow",
]

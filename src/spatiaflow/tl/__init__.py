"""The verbs: check the input, gather arrays, run a model, write slots."""

from spatiaflow.tl._expression import predict_expression, train_stflow

__all__ = ["predict_expression", "train_stflow"]

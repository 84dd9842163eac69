"""The verbs: check the input, gather arrays, run a model, write slots."""

from spatiaflow.tl._expression import predict_expression, train_stflow
from spatiaflow.tl._spatia import embed_spatia, train_spatia

__all__ = ["embed_spatia", "predict_expression", "train_spatia", "train_stflow"]

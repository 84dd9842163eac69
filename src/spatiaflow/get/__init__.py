"""Results as plain AnnData objects."""

from spatiaflow.get._expression import expression

__all__ = ["expression"]

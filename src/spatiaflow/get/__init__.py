"""Results as plain AnnData objects."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.get._expression import expression

__all__ = ["expression"]

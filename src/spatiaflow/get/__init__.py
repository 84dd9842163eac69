"""Results as plain AnnData objects and DataFrames."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.get._expression import expression
    from spatiaflow.get._niches import niche_composition

__all__ = ["expression", "niche_composition"]

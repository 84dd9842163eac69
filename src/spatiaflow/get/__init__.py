"""Results as objects, tables and files that other packages open."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.get._draws import draws
    from spatiaflow.get._export import geojson, spatialdata
    from spatiaflow.get._expression import expression
    from spatiaflow.get._niches import niche_composition

__all__ = ["draws", "expression", "geojson", "niche_composition", "spatialdata"]

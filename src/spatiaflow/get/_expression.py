"""Array slots with their gene names, as an AnnData that scanpy, squidpy and spatialdata-plot draw."""

from __future__ import annotations

from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb


@verb
def expression(data: AnnData | SpatialData, *, key: str = "stflow", table_key: str = "table") -> AnnData:
    """Return an array slot and its gene names as an AnnData.

    Parameters
    ----------
    data
        Object that a verb such as :func:`spatiaflow.tl.predict_expression` wrote into.
    key
        The slot: ``.obsm[key]`` with names in ``.uns[key]["genes"]``, such as ``"stflow"`` or ``"imputed"``.
    table_key
        Table of a SpatialData.

    Returns
    -------
    AnnData (n_obs x genes): X the values, ``layers["std"]`` where there is one, ``obs``, ``obsm["spatial"]``,
    ``uns["spatial"]`` and ``uns["spatialdata_attrs"]`` of the source; of predictions ``var["skill"]`` and ``var["trusted"]``, of
    imputation ``var["reliability"]`` and ``var["denoised"]``.

    Raises
    ------
    KeyError
        The slot or its names are missing.

    Examples
    --------
    >>> predicted = sf.get.expression(adata)
    >>> predicted.var_names.tolist()
    ['TYPE_epithelial1', 'NICHE_gland1', 'STATE1']
    >>> import squidpy as sq
    >>> sq.pl.spatial_scatter(predicted, color="STATE1", shape=None)
    """
    _, table = _io.unpack(data, table_key)
    return _io.slot_as_anndata(table, key)

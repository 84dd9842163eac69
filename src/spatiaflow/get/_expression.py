"""Array slots with their gene names, as an AnnData that scanpy, squidpy and spatialdata-plot draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb


@verb
@_io.each_object
def expression(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    key: str = "stflow",
    table_key: str = "table",
) -> AnnData | list[AnnData] | dict[str, AnnData]:
    """Return an array slot and its gene names as an AnnData.

    Parameters
    ----------
    data
        One object, or a list or dict of objects, with the result of a function such as
        :func:`spatiaflow.tl.predict_expression`.
    key
        The slot: ``.obsm[key]`` with names in ``.uns[key]["genes"]``, such as ``"stflow"`` or ``"imputed"``. A result of many
        genes, which has a table of its own, is returned as it is.
    table_key
        Table of a SpatialData.

    Returns
    -------
    AnnData (n_obs x genes), or a list or dict of them:

    ``.X`` : the values
    ``.layers["std"]`` : their standard deviations, if there are any
    ``.layers["rate"]`` : of :func:`spatiaflow.tl.predict_expression`, the share of each gene in the counts of a spot
    ``.var`` : ``skill`` and ``trusted`` of predicted genes; ``reliability`` and ``denoised`` of imputed genes
    ``.obs``, ``.obsm["spatial"]``, ``.uns["spatial"]``, ``.uns["spatialdata_attrs"]`` : those of ``data``

    Raises
    ------
    KeyError
        The slot or its gene names are missing. The message tells which function writes them.
    ValueError
        The list or dict is empty.

    Examples
    --------
    >>> predicted = sf.get.expression(adata)
    >>> predicted.var_names.tolist()
    ['TYPE_epithelial1', 'NICHE_gland1', 'STATE1']
    >>> import squidpy as sq
    >>> sq.pl.spatial_scatter(predicted, color="STATE1", shape=None)
    """
    _io.text(key=key)
    data, table = _io.unpack(data, table_key)
    own = _io.own_result(data, table, key)
    return _io.slot_as_anndata(table, key) if own is None else own.copy()

"""Write the small Sphinx inventories that the docs link to: the names used here, and where they are documented."""

import zlib
from pathlib import Path

PAGES = {
    "anndata": {"anndata.AnnData": "generated/anndata.AnnData.html#$"},
    "lightning": {"lightning.Trainer": "common/trainer.html#lightning.pytorch.trainer.trainer.Trainer"},
    "numpy": {"numpy.ndarray": "reference/generated/numpy.ndarray.html#$"},
    "pandas": {"pandas.DataFrame": "reference/api/pandas.DataFrame.html#$"},
    "spatialdata": {"spatialdata.SpatialData": "api/SpatialData.html#$"},
    "torch": {"torch.device": "tensor_attributes.html#$", "torch.Tensor": "tensors.html#$"},
}

for project, pages in PAGES.items():
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    body = "".join(f"{name} py:class 1 {uri} -\n" for name, uri in pages.items())
    Path(__file__).with_name(f"{project}.inv").write_bytes(head.encode() + zlib.compress(body.encode(), 9))

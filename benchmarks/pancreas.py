"""Assemble ``pancreas.zarr``, on which the other benchmarks train and test: the part x < 22528 px of the Xenium slide.

    git clone https://github.com/broadinstitute/celldega_Xenium_human_Pancreas_FFPE tiles
    git -C tiles checkout 4bf798b
    python benchmarks/pancreas.py tiles/Landscape_Xenium_V1_human_Pancreas_FFPE_outs_webp pancreas.zarr

By the code that assembles ``datasets.xenium_pancreas()``, which is a corner of this part at the same commit.
"""

import argparse
from pathlib import Path

from spatiaflow.datasets._xenium import write_region

PART = 0, 0, 22528, 13770  # x0, y0, x1, y1 in full-resolution pixels; 13770 is the height of the slide


def assemble(folder: Path, store: Path, region: tuple[int, int, int, int] = PART) -> None:
    """Write a region of the publishers' folder as a SpatialData store."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    write_region(store, files, region)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    a = parser.parse_args()
    assemble(a.folder, a.store)

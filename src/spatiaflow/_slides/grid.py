"""Positions on a bare image: squares of a grid, the tissue under them, a small copy of the picture, and annotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spatiaflow._slides.patches import CELLS, Tissue, cut

PIXELS = 2 * CELLS  # side of a square when tissue is looked for
BLOCK = 4096  # pixels of the image that are in memory at a time, along each side


def squares(shape: tuple[int, int], step: float) -> np.ndarray:
    """Column and row of the squares of a grid whose centres lie in an image of ``shape`` (height, breadth), n x 2."""
    rows, columns = (max(1, int(side / step + 0.5)) for side in shape)
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)


def tissue_of(
    image: Any, xy: np.ndarray, width: float, *, channels_first: bool, progress: Callable[[int], Any]
) -> Tissue:
    """Look at the tissue in squares ``width`` pixels wide around points (n x 2, pixels) of a picture (uint8)."""
    size = image.shape[1:] if channels_first else image.shape[:2]
    tissue = Tissue(xy, width, size)
    for rows, patches in cut(image, xy, width, PIXELS, channels_first=channels_first, batch_size=256):
        tissue.add(rows, patches[:, :3])
        progress(len(rows))
    return tissue


def shrunk(image: Any, longest: int, *, channels_first: bool) -> tuple[np.ndarray, int]:
    """Return a copy of a picture (uint8) of at most ``longest`` pixels a side, each the mean of a square of pixels.

    Returns
    -------
    The copy (y x x x 3), and how many pixels of the picture a pixel of it is wide.
    """
    height, breadth = image.shape[1:] if channels_first else image.shape[:2]
    factor = max(1, -(-max(height, breadth) // longest))
    side = max(1, BLOCK // factor) * factor
    out = np.empty((height // factor, breadth // factor, 3), np.uint8)
    for y in range(0, len(out) * factor, side):
        for x in range(0, out.shape[1] * factor, side):
            rows, columns = (
                slice(start, min(start + side, n * factor)) for start, n in ((y, out.shape[0]), (x, out.shape[1]))
            )
            block = np.asarray(
                image[(slice(0, 3), rows, columns)] if channels_first else image[(rows, columns, slice(0, 3))]
            )
            block = block.transpose(1, 2, 0) if channels_first else block
            small = block.reshape(block.shape[0] // factor, factor, block.shape[1] // factor, factor, 3).mean((1, 3))
            out[y // factor : y // factor + len(small), x // factor : x // factor + small.shape[1]] = small.round()
    return out, factor


def annotation_of(path: str | Path, xy: np.ndarray) -> np.ndarray:
    """Name of the annotated region that each point (n x 2, pixels of the full resolution) lies in; None outside of all.

    Parameters
    ----------
    path
        GeoJSON, as QuPath exports it: polygons in pixels, named by their classification, or else by their name. Where regions
        lie over one another, the smallest counts.

    Raises
    ------
    ValueError
        The file is no GeoJSON, has no polygons, or none of the points lies in any of them.
    """
    import shapely
    from shapely.geometry import shape

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"region={str(path)!r} is no GeoJSON: {error}. In QuPath: File, Export objects as GeoJSON."
        ) from error
    features = found.get("features", [found]) if isinstance(found, dict) else found
    regions = []
    for number, feature in enumerate(features if isinstance(features, list) else ()):
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        if isinstance(geometry, dict) and geometry.get("type") in ("Polygon", "MultiPolygon"):
            regions.append((_name(feature.get("properties") or {}, number), shapely.make_valid(shape(geometry))))
    if not regions:
        raise ValueError(
            f"region={str(path)!r} has no polygons; annotations are features of type Polygon or MultiPolygon."
        )
    out = np.full(len(xy), None, object)
    for name, polygon in sorted(regions, key=lambda one: -one[1].area):
        out[shapely.contains_xy(polygon, xy[:, 0], xy[:, 1])] = name
    if len(xy) and not any(name is not None for name in out):
        bounds = shapely.total_bounds([polygon for _, polygon in regions])
        raise ValueError(
            f"no square of tissue lies in a region of {str(path)!r}: its polygons span x {bounds[0]:.0f} to {bounds[2]:.0f} "
            f"and y {bounds[1]:.0f} to {bounds[3]:.0f}, squares x {xy[:, 0].min():.0f} to {xy[:, 0].max():.0f} and y "
            f"{xy[:, 1].min():.0f} to {xy[:, 1].max():.0f}. They must be in pixels of this very image."
        )
    return out


def _name(properties: dict, number: int) -> str:
    classification = properties.get("classification")
    found = classification.get("name") if isinstance(classification, dict) else classification
    return str(found or properties.get("name") or f"region {number + 1}")

"""A section on glass, saved in every kind of file."""

from types import SimpleNamespace

import numpy as np
import spatialdata as sd
import tifffile
from PIL import Image

GLASS, MPP = 235, 2.0


def section(height=300, width=500, glass=GLASS, bits=8):
    """Glass with a tissue of pink and purple in x 100 to 300, y 40 to 240."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), glass, float)
    image[40:240, 100:300] = [190, 110, 170]
    image[40:240:7, 100:300] = [90, 60, 140]
    image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255)
    return image.astype(np.uint8) if bits == 8 else (image * 257).astype(np.uint16)


def saved(folder, kind, pixels=None):
    pixels = section() if pixels is None else pixels
    path = folder / f"my section.{kind}"
    if kind in ("jpg", "png"):
        Image.fromarray(pixels).save(path)
    elif kind == "ome.tif":
        meta = {"PhysicalSizeX": MPP, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": MPP, "PhysicalSizeYUnit": "µm"}
        tifffile.imwrite(path, pixels, photometric="rgb", metadata={"axes": "YXS", **meta}, tile=(64, 64))
    elif kind == "svs":
        text = f"Aperio Image Library v12\r\n500x300 |AppMag = 20|MPP = {MPP}"
        tifffile.imwrite(path, pixels, photometric="rgb", description=text, metadata=None, tile=(64, 64))
    elif kind == "imagej.tif":
        tifffile.imwrite(
            path, pixels, imagej=True, resolution=(1 / MPP, 1 / MPP), metadata={"unit": "um", "axes": "YXS"}
        )
    elif kind == "tif":
        tifffile.imwrite(
            path, pixels, photometric="rgb", resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER"
        )
    return path


class Wsi(sd.SpatialData):
    """What is used of a WSIData; wsidata is not installed. Its version 0.12.0 was tried by hand."""

    def __init__(self, file, shape=(300, 500), mpp=None, **elements):
        super().__init__(**elements)
        self.reader, self.properties = SimpleNamespace(file=str(file)), SimpleNamespace(mpp=mpp, shape=list(shape))

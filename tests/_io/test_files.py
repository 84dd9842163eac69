"""Image files: complete and upright, or an error that says what is wrong."""

import uuid

import numpy as np
import pytest
import tifffile
from PIL import Image

from spatiaflow import _io

PIXELS = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)


def read(path):
    image, channels_first, _ = _io.open_image(path, False)
    whole = np.asarray(image[tuple(slice(0, n) for n in image.shape)])
    return whole.transpose(1, 2, 0) if channels_first else whole


def test_a_file_of_the_set_is_missing(tmp_path):
    ids = [uuid.uuid4() for _ in range(3)]
    parts = "".join(
        f'<TiffData FirstC="{i}" IFD="0" PlaneCount="1"><UUID FileName="c{i}.ome.tif">urn:uuid:{one}</UUID></TiffData>'
        for i, one in enumerate(ids)
    )
    for i in range(3):
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{ids[i]}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
            f'SizeX="60" SizeY="50" SizeC="3" SizeZ="1" SizeT="1">{parts}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / f"c{i}.ome.tif", np.full((50, 60), 10 * i + 1, np.uint8), description=xml.encode(), metadata=None
        )
    assert read(tmp_path / "c0.ome.tif").mean((0, 1)).tolist() == [1, 11, 21]
    (tmp_path / "c2.ome.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"c2.ome.tif is not in"):
        read(tmp_path / "c0.ome.tif")


@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_a_tiff_that_is_cut_off(tmp_path, tile):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, tile=tile, photometric="rgb")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="cut.tif is cut off"):
        read(tmp_path / "cut.tif")


def test_the_largest_picture_of_a_file_is_read(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        out.write(PIXELS[::10, ::10].copy(), photometric="rgb")
        out.write(PIXELS, photometric="rgb")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_orientation_is_applied(tmp_path, orientation, kind):
    path = tmp_path / f"a.{kind}"
    smooth = np.add.outer(np.arange(40) * 3, np.arange(60) * 2)[..., None].repeat(3, 2).astype(np.uint8)
    if kind == "tif":
        tifffile.imwrite(path, smooth, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(smooth).save(path, exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    expected = {
        1: smooth, 2: smooth[:, ::-1], 3: smooth[::-1, ::-1], 4: smooth[::-1], 5: smooth.swapaxes(0, 1),
        6: np.rot90(smooth, -1), 7: np.rot90(smooth, 2).swapaxes(0, 1), 8: np.rot90(smooth),
    }[orientation]  # fmt: skip
    np.testing.assert_allclose(read(path).astype(float), expected, atol=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.czi", b"ZISRAWFILE" + bytes(99), "a format that is not known"),
        ("a.tif", b"not a tiff", "no TIFF"),
        ("a.png", b"", "a format that is not known"),
    ],
)
def test_formats_that_are_not_known(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=message):
        read(tmp_path / name)
    with pytest.raises(OSError, match="is a folder"):
        read(tmp_path)


def test_a_picture_that_is_cut_off(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:5000])
    with pytest.raises(OSError, match="cut.jpg is damaged or cut off"):
        read(tmp_path / "cut.jpg")


def test_axes_that_are_no_picture(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((5, 20, 30), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match="axes QYX .5 x 20 x 30."):
        read(tmp_path / "a.tif")


def test_a_stack_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 2, 32, 32), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(ValueError, match="ZCYX"):
        read(tmp_path / "stack.tif")

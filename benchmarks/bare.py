"""From a bare picture: tissue, a very large slide, and the same correlation from a grid as at the spots.

python benchmarks/bare.py tissue     which spots under tissue are kept, and which spots on glass are left out, of every section
python benchmarks/bare.py blur       right halves of the her2st sections out of focus: which squares are named blurred
python benchmarks/bare.py stain      bundled weights on sections whose stain was changed, before and after squidpy's normalisation
python benchmarks/bare.py large      grid, features and prediction of a slide of 100,000 x 80,000 px: seconds and memory
python benchmarks/bare.py held-out   each section left out: correlation from a grid over the picture against that at the spots
"""

import argparse
import json
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import cKDTree

import results
import spatiaflow as sf
from joint import FFPE, N_GENES, SECTIONS
from spatiaflow._slides import gather
from spatiaflow._slides.artefacts import COARSEST_UM, NO_TISSUE, artefacts_of, at_cells
from spatiaflow._slides.grid import tissue_of
from spatiaflow._slides.patches import BLACK, optical_density
from spatiaflow.models.regression import gene_pearson
from spatiaflow.models.slide import MIN_TISSUE
from stflow_weights import RECIPES, load

WIDTH, HEIGHT, TILE, MPP = 100_000, 80_000, 512, 0.25
HELD_OUT = ("breast", *FFPE)
BLOCK_UM = 500.0  # of the bootstrap


def sections():
    """Name, picture, positions in its pixels, whether each is under tissue, and µm per pixel, of every section with H&E."""
    for name in RECIPES["breast"].sections:
        (library,) = sf.datasets.her2st(name).uns["spatial"].values()
        table, scale = sf.datasets.her2st(name), library["scalefactors"]["tissue_hires_scalef"]
        xy = table.obsm["spatial"] * scale
        yield (
            f"her2st {name}",
            library["images"]["hires"],
            xy,
            np.ones(len(xy), bool),
            library["metadata"]["microns_per_pixel"] / scale,
        )
    for path in sorted((Path(str(sf.settings.mirror)) / "visium_ffpe").rglob("tissue_positions_list.csv")):
        spots = pd.read_csv(path, header=None)
        scale = json.loads((path.parent / "scalefactors_json.json").read_text())["tissue_hires_scalef"]
        picture = np.asarray(Image.open(path.parent / "tissue_hires_image.png"))[..., :3]
        xy = spots[[5, 4]].to_numpy(float) * scale
        mpp = 100 / np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
        yield f"{path.parts[-4]} {path.parts[-3][-2:]}", picture, xy, spots[1].to_numpy() == 1, mpp


def tissue(table: results.Table) -> None:
    """Shares of spots, squares of 100 µm."""
    for name, picture, xy, under, mpp in sections():
        patches = tissue_of(picture, xy + 0.5, 100 / mpp, channels_first=False, progress=lambda _: None)
        codes = at_cells(artefacts_of(picture, mpp), xy + 0.5, 100 / mpp)
        spoilt = (codes > 0) & (codes <= NO_TISSUE)
        found = patches.share(without=spoilt) >= MIN_TISSUE
        scores = {"spots under tissue kept": found[under].mean()}
        if not under.all():
            scores["spots on glass left out"] = (~found[~under]).mean()
            grid = sf.pp.grid(picture, mpp=mpp)
            beyond = cKDTree(xy).query(grid.obsm["spatial"])[0] * mpp > 150
            scores["squares kept beyond the spots"] = beyond.sum()
        table.add("tissue", name, 0, "grid", scores)


def blur(table: results.Table) -> None:
    """Shares of squares of 100 µm that are named blurred, left and right, where the right half is smoothed."""
    for name in RECIPES["breast"].sections:
        (library,) = sf.datasets.her2st(name).uns["spatial"].values()
        mpp = library["metadata"]["microns_per_pixel"]
        if mpp > COARSEST_UM:
            continue
        whole = np.asarray(Image.open(library["metadata"]["source_image_path"]).convert("RGB"))
        middle = int(np.median(sf.datasets.her2st(name).obsm["spatial"][:, 0]))
        for sigma in (0, 1, 2, 4):  # µm
            picture = whole.copy()
            if sigma:
                picture[:, middle:] = np.stack(
                    [ndimage.gaussian_filter(whole[:, middle:, i], sigma / mpp) for i in range(3)], -1
                )
            grid = sf.pp.grid(picture, mpp=mpp)
            x, named = grid.obsm["spatial"][:, 0], (grid.obs["artefact"] == "blurred").to_numpy()
            side = 100 / mpp / 2
            scores = {"right": named[x > middle + side].mean(), "left": named[x < middle - side].mean()}
            table.add("blur", f"her2st {name}", 0, f"{sigma} µm", {f"{k}, share named": v for k, v in scores.items()})


CHANGES = {"none": (1, 1, 1), "density x 1.4": (1.4, 1.4, 1.4), "density x .7": (0.7, 0.7, 0.7), "hue": (1.25, 1, 0.8)}


def pictured(picture: np.ndarray, mpp: float):
    """A SpatialData with a picture and its mask of tissue, as normalize_stains wants it."""
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, Labels2DModel

    known = picture.max(-1) >= BLACK
    density, threshold = optical_density(picture, known)
    mask = (known & (density > threshold) & (artefacts_of(picture, mpp) == 0)).astype(np.int32)
    return SpatialData(
        {"he": Image2DModel.parse(picture.transpose(2, 0, 1), dims=("c", "y", "x"))},
        {"he_tissue": Labels2DModel.parse(mask, dims=("y", "x"))},
    )


def stain(table: results.Table, model_name: str) -> None:
    """Correlation at the spots on pictures of 3.4 µm per pixel. The reference is C2, and C3 for C2 itself."""
    import squidpy as sq

    model = sf.models.load(sf.datasets.weights(model_name))
    slides = {name: sf.datasets.her2st(name) for name in RECIPES["breast"].sections}
    pictures = {name: next(iter(slide.uns["spatial"].values()))["images"]["hires"] for name, slide in slides.items()}
    for name, slide in slides.items():
        (key,), (library,) = slide.uns["spatial"], slide.uns["spatial"].values()
        y, scale = truth(slide, model), library["scalefactors"]["tissue_hires_scalef"]
        mpp = library["metadata"]["microns_per_pixel"] / scale
        references = {
            method: sq.experimental.im.fit_stain_reference(
                pictured(pictures["C3" if name == "C2" else "C2"], mpp), "he", method=method
            )
            for method in ("reinhard", "macenko")
        }
        for change, factors in CHANGES.items():
            whole = np.minimum(255 * (pictures[name] / 255) ** factors, 255).round().astype(np.uint8)
            found = {"as it is": whole}
            for method, reference in references.items():
                try:
                    normal = sq.experimental.im.normalize_stains(pictured(whole, mpp), "he", reference, inplace=False)
                except RuntimeError as error:  # squidpy's StainFittingError: the two stains are not told apart
                    print(f"{name}, {change}, {method}: {error}")
                    continue
                found[method] = np.asarray(normal.transpose("y", "x", "c")).astype(np.uint8)
            for method, picture in found.items():
                one = slide.copy()
                one.uns["spatial"] = {key: {"images": {"hires": picture}, "scalefactors": library["scalefactors"],
                                            "metadata": {"microns_per_pixel": mpp * scale}}}  # fmt: skip
                sf.pp.encode_patches(one, model=model, image_key="hires")
                sf.tl.predict_expression(one, model=model, random_state=0)
                scores = {
                    "pearson": pearson(y, one.obsm["stflow"]),
                    "spots with ood above .95": (one.obs["stflow_ood"] > 0.95).mean(),
                    "mean absolute error": np.abs(y - one.obsm["stflow"]).mean(),
                }
                table.add(f"stain: {change}", f"her2st {name}", 0, method, scores)


def encoded(pixels: np.ndarray) -> bytes:
    """A tile as JPEG."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80, subsampling=0)
    return out.getvalue()


def write_large(path: Path) -> None:
    """A pyramidal TIFF: an ellipse of breast tissue, cut from a section and repeated, on glass."""
    import tifffile

    (library,) = sf.datasets.her2st("C2").uns["spatial"].values()
    whole = np.asarray(Image.open(library["metadata"]["source_image_path"]).convert("RGB"))
    spots = sf.datasets.her2st("C2").obsm["spatial"].astype(int)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(6):
            width, height = WIDTH >> level, HEIGHT >> level
            side = max(int(TILE * MPP * 2**level / library["metadata"]["microns_per_pixel"]), 8)
            rng = np.random.default_rng(level)
            corners = np.minimum(spots[rng.integers(0, len(spots), 60)], np.array(whole.shape[1::-1]) - side)
            cuts = [Image.fromarray(whole[y : y + side, x : x + side]) for x, y in corners]
            tiles = [encoded(np.asarray(cut.resize((TILE, TILE)))) for cut in cuts]
            glass = encoded(np.full((TILE, TILE, 3), 235, np.uint8))
            columns, rows = -(-width // TILE), -(-height // TILE)

            def segments(columns=columns, rows=rows, tiles=tiles, glass=glass):
                for i in range(rows):
                    for j in range(columns):
                        inside = ((j + 0.5) / columns - 0.5) ** 2 + ((i + 0.5) / rows - 0.5) ** 2 < 0.18
                        yield tiles[(7 * i + 13 * j) % len(tiles)] if inside else glass

            file.write(
                segments(), shape=(height, width, 3), dtype=np.uint8, tile=(TILE, TILE), compression="jpeg", photometric="rgb",
                subifds=5 if level == 0 else None, subfiletype=0 if level == 0 else 1,
                resolution=(1e4 / (MPP * 2**level),) * 2, resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip


def large(table: results.Table, model: str, folder: Path) -> None:
    """Every step on one large slide."""
    path = folder / "large.tif"
    if not path.exists():
        write_large(path)
    start, scores = results.peak_gb(), {"file, GB": path.stat().st_size / 1e9}
    clock = time.perf_counter()
    grid = sf.pp.grid(path)
    scores |= {
        "squares of tissue": len(grid),
        "seconds grid": time.perf_counter() - clock,
        "GB grid": results.peak_gb() - start,
    }
    clock = time.perf_counter()
    sf.pp.encode_patches(grid, model=model)
    scores |= {"seconds features": time.perf_counter() - clock, "GB features": results.peak_gb() - start}
    clock = time.perf_counter()
    sf.tl.predict_expression(grid, model=model)
    scores |= {"seconds prediction": time.perf_counter() - clock, "GB prediction": results.peak_gb() - start}
    print({name: round(value, 2) for name, value in scores.items()})
    table.add("large", f"{WIDTH} x {HEIGHT} px", 0, "grid", scores)


def sections_of(name: str):
    """Sections that share a task with their features, and the column of their donors."""
    if name in RECIPES:
        return {section: load(name, section) for section in RECIPES[name].sections}, RECIPES[name].donor_key
    slides = {section: sf.datasets.visium_ffpe(f"{FFPE[name]}_{section}") for section in SECTIONS[name]}
    sf.pp.encode_patches(slides)
    return slides, None


def held_out(table: results.Table, name: str, seeds: int) -> None:
    """Each section left out: the model's prediction at the spots, and read from a grid, nearest square or interpolated."""
    (slides, donor_key), difference = sections_of(name), "interpolated minus spots"
    for seed in range(seeds):
        for section, test in slides.items():
            if not table.lacks(name, section, seed, "grid of 200 µm", difference):
                continue
            rest = [slide for other, slide in slides.items() if other != section]
            model = sf.tl.train_stflow(rest, genes=N_GENES, donor_key=donor_key, random_state=seed)
            (library,) = test.uns["spatial"].values()
            path = library["metadata"].get("source_image_path")
            picture, scale = (
                (path, 1.0) if path else (library["images"]["hires"], library["scalefactors"]["tissue_hires_scalef"])
            )
            (slide,), spots = gather(test, need=("counts",)), test.obsm["spatial"] * scale
            mpp = float(np.linalg.norm(np.ptp(slide.xy, axis=0)) / np.linalg.norm(np.ptp(spots, axis=0)))
            y, at_spots = truth(test, model), test.copy()
            sf.tl.predict_expression(at_spots, model=model, random_state=seed)
            table.add(name, section, seed, "spots", {"pearson": pearson(y, at_spots.obsm["stflow"])})
            for step in (100, 200):
                grid = sf.pp.grid(picture, mpp=mpp, step_um=step)
                sf.pp.encode_patches(grid, model=model)
                sf.tl.predict_expression(grid, model=model, random_state=seed)
                distance, nearest = cKDTree(grid.obsm["spatial"]).query(spots)
                near = distance * mpp < step
                nearest, own = grid.obsm["stflow"][nearest[near]], at_spots.obsm["stflow"][near]
                between = LinearNDInterpolator(grid.obsm["spatial"], grid.obsm["stflow"])(spots[near])
                between = np.where(np.isfinite(between), between, nearest)  # at the border of the tissue
                blocks = sf.metrics.spatial_blocks(slide.xy[near], BLOCK_UM)
                apart = sf.metrics.paired_pearson_difference(y[near], between, own, blocks)
                scores = {
                    "pearson": pearson(y[near], nearest),
                    "pearson, interpolated": pearson(y[near], between),
                    "pearson at the same spots": pearson(y[near], own),
                    "spots read": near.mean(),
                } | {f"{difference}{end}": value for end, value in zip(("", ", low", ", high"), apart)}
                table.add(name, section, seed, f"grid of {step} µm", scores)


def truth(test, model) -> np.ndarray:
    """Log-normalised expression of the model's genes, spots x genes."""
    (slide,) = gather(test, need=("counts",))
    return slide.align(model.genes).log_normalized().toarray()


def pearson(y: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.nanmean(gene_pearson(y, predicted)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = results.parser(__doc__)
    out.add_argument("what", choices=("tissue", "blur", "stain", "large", "held-out"))
    out.add_argument("--names", nargs="+", choices=HELD_OUT, default=list(HELD_OUT))
    out.add_argument("--model", default="stflow-breast-small")
    out.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    out.add_argument("--seeds", type=int, default=1)
    return out


def main() -> None:
    """Run the command."""
    args = parser().parse_args()
    table = results.Table("bare", again=args.again)
    if args.what == "tissue":
        tissue(table)
    elif args.what == "blur":
        blur(table)
    elif args.what == "stain":
        stain(table, args.model)
    elif args.what == "large":
        large(table, args.model, args.folder)
    else:
        for name in args.names:
            held_out(table, name, args.seeds)


if __name__ == "__main__":
    main()

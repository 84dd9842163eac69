"""The runners read folders laid out as the two public benchmarks are; the test writes tiny ones."""

import dataclasses
import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import hest
import results
import spatiaflow as sf
from scored import Scored


def tissue(rng, n=36):
    """Patches whose redness drives half of the genes."""
    level = rng.uniform(0, 1, n)
    patches = np.clip(rng.normal(200 - 120 * level[:, None, None, None], 10, (n, 32, 32, 3)), 0, 255).astype(np.uint8)
    rate = np.exp(np.where(np.arange(60) % 2, 2.5 * level[:, None], 0.5 * np.ones((n, 1))))
    side = int(np.sqrt(n))
    coords = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 224.0
    return patches, rng.poisson(rate).astype(np.float32), coords


@pytest.fixture(scope="module")
def hest_root(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("hest"), np.random.default_rng(0)
    task = root / "IDC"
    for name in ("splits", "adata", "patches"):
        (task / name).mkdir(parents=True)
    genes = [f"G{i}" for i in range(60)]
    for sample in ("A", "B", "C"):
        patches, counts, coords = tissue(rng)
        barcodes = [f"bc{i}" for i in range(36)]
        shuffled = rng.permutation(36)  # the two files need not be in one order
        ad.AnnData(
            counts[shuffled], obs=pd.DataFrame(index=[barcodes[i] for i in shuffled]), var=pd.DataFrame(index=genes)
        ).write_h5ad(task / "adata" / f"{sample}.h5ad")
        with h5py.File(task / "patches" / f"{sample}.h5", "w") as file:
            file["img"], file["coords"] = patches, coords
            file["barcode"] = np.array([[b.encode()] for b in barcodes])
    (task / "var_50genes.json").write_text(json.dumps({"genes": genes[:50]}))
    for fold, test in enumerate("AC"):
        for kind, samples in (("train", [s for s in "ABC" if s != test]), ("test", [test])):
            rows = [
                {"sample_id": s, "patches_path": f"patches/{s}.h5", "expr_path": f"adata/{s}.h5ad"} for s in samples
            ]
            pd.DataFrame(rows).to_csv(task / "splits" / f"{kind}_{fold}.csv", index=False)
    return root


@pytest.fixture(autouse=True, scope="module")
def quick():
    named = sf.models.STFlowConfig.named
    with pytest.MonkeyPatch.context() as patch:
        for name, config in list(named.items()):
            small = dataclasses.replace(config, width=16, n_heads=2, max_epochs=1, regions=2)
            patch.setitem(named, name, small)
        yield


def measured(folder, *words) -> pd.DataFrame:
    """Run the script into a folder; returns all scores there, wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPATIAFLOW_RESULTS", str(folder))
        hest.main([*map(str, words), "--cache", str(folder / "features")])
        return results.pivot(results.read("hest"), ["data", "split", "method"]).reset_index()


@pytest.fixture(scope="module")
def once(hest_root, quick, tmp_path_factory):
    """The folder of a run, and its scores."""
    folder = tmp_path_factory.mktemp("results")
    return folder, measured(folder, "--root", hest_root)


def test_hest_folder_is_matched_by_barcode(once):
    table = once[1]
    assert set(table["data"]) == {"hest:IDC, texture"}
    assert set(table["split"]) == {"fold 0", "fold 1"}
    assert set(table["method"]) == {"ridge", "ridge + smoothing", "STFlow default"}
    ridge = table[table["method"] == "ridge"]["pearson_pooled"]
    assert (ridge > 0.2).all()  # half of the genes follow the patch; 0 if rows were mismatched


def test_a_fold_that_is_held_is_not_fitted_again(once, hest_root, monkeypatch):
    fitted = []
    monkeypatch.setattr(hest, "run_fold", lambda *_: fitted.append(0) or {})
    measured(once[0], "--root", hest_root)
    assert not fitted
    measured(once[0], "--root", hest_root, "--again")
    assert len(fitted) == 2


def test_pooled_and_per_slide_differ_as_they_should():
    rng = np.random.default_rng(0)
    y = [rng.normal(size=(50, 3)), rng.normal(size=(50, 3)) + 10]
    slides = [Scored(sf.models.Slide(str(i), np.arange(50)), v) for i, v in enumerate(y)]
    guess = [np.zeros((50, 3)) + rng.normal(0, 0.1, (50, 3)), np.full((50, 3), 10.0) + rng.normal(0, 0.1, (50, 3))]
    found = hest.scores(slides, guess)
    assert found["pearson_pooled"] > 0.9
    assert abs(found["pearson_per_slide"]) < 0.3


def test_stimage_folder(tmp_path):
    rng, folder = np.random.default_rng(1), tmp_path / "root" / "Visium"
    for name in ("image", "coord", "gene_exp"):
        (folder / name).mkdir(parents=True)
    for sample in ("s1", "s2", "s3", "s4"):
        patches, counts, _ = tissue(rng)
        image = np.full((300, 300, 3), 240, np.uint8)
        rows = []
        for i, patch in enumerate(patches):
            x, y = 40 * (i % 6) + 40, 40 * (i // 6) + 40
            image[y - 16 : y + 16, x - 16 : x + 16] = patch
            rows.append({"yaxis": y, "xaxis": x, "r": 11})
        Image.fromarray(image).save(folder / "image" / f"{sample}.png")
        spots = [f"{sample}_{i}" for i in range(36)]
        pd.DataFrame(rows, index=spots).to_csv(folder / "coord" / f"{sample}_coord.csv")
        pd.DataFrame(counts, index=spots, columns=[f"G{i}" for i in range(60)]).to_csv(
            folder / "gene_exp" / f"{sample}_count.csv"
        )
    table = measured(tmp_path, "--layout", "stimage", "--root", tmp_path / "root", "--genes", "20")
    assert (table["pearson_pooled"] > 0.1).any()
    assert len(table) == 3

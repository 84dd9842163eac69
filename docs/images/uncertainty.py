"""Draw the figure of docs/uncertainty.md: differences between two regions of a slide, predicted and measured.

python docs/images/uncertainty.py     # trains on three sections (25 MB, or reads settings.mirror); two minutes
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

import spatiaflow as sf


def measured(adata, genes, contrast):
    """Mean log1p expression of each gene in the first region minus that in the second."""
    counts = adata[:, genes].X.toarray()
    y = np.log1p(counts / adata.obs["total_counts"].to_numpy()[:, None] * 1e4)
    first, second = (y[(adata.obs["region"] == region).to_numpy()].mean(0) for region in contrast)
    return dict(zip(genes, first - second))


def panel(adata, model, contrast, new_donor, title):
    """Figure of a slide, as an image."""
    adata.obs["total_counts"] = np.asarray(adata.X.sum(1)).ravel()
    table = sf.tl.summarize_expression(
        adata,
        model=model,
        groupby="region",
        contrast=contrast,
        depth="total_counts",
        new_donor=new_donor,
        random_state=0,
    )
    truth = measured(adata, model.genes, contrast)
    inside = sum(row.lower <= truth[row.gene] <= row.upper for row in table.itertuples())
    print(f"{title}: {inside} of {len(table)} inside, {table['trusted'].sum()} trusted")
    figure = sf.pl.regions(table, return_fig=True)
    (ax,) = figure.axes
    for row, gene in enumerate(tick.get_text() for tick in ax.get_yticklabels()):
        ax.plot(truth[gene], row, "x", ms=4, mew=1, color="black", zorder=4)
    ax.set_title(f"{title}\n{contrast[0]} - {contrast[1]}", fontsize=7)
    ax.text(0.98, 0.02, f"{inside} of {len(table)} inside", transform=ax.transAxes, ha="right", fontsize=6)
    handles = [Line2D([], [], ls="", marker="x", ms=4, color="black", label="measured")]
    for legend in figure.legends:
        handles += legend.legend_handles
        legend.remove()
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=6, frameon=False)
    figure.savefig(image := BytesIO(), dpi=200)
    return Image.open(image)


train = [sf.datasets.her2st(section) for section in ("C3", "C4", "C5")]
known, new = sf.datasets.her2st("C2"), sf.datasets.her2st("A1")
sf.pp.encode_patches([*train, known, new], patch_um=155)
model = sf.tl.train_stflow(train, genes=20, random_state=0)
look = KMeans(2, random_state=0, n_init=10).fit_predict(StandardScaler().fit_transform(known.obsm["X_texture"]))
known.obs["region"] = np.where(look == np.bincount(look).argmax(), "region 1", "region 2")
new.obs["region"] = new.obs["annotation"].astype(str)
images = [
    panel(known, model, ("region 1", "region 2"), False, "C2, further section of a known donor"),
    panel(new, model, ("invasive cancer", "connective tissue"), True, "A1, section of a new donor"),
]
width, height = sum(image.width for image in images), max(image.height for image in images)
figure = Image.new("RGB", (width, height), "white")
for i, image in enumerate(images):
    figure.paste(image.convert("RGB"), (i * images[0].width, 0))
figure.quantize(64).save(Path(__file__).with_suffix(".png"), optimize=True)

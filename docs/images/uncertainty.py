"""Draw the figure of docs/uncertainty.md: differences between two regions of a new donor, predicted and measured.

python docs/images/uncertainty.py     # trains on four sections (19 MB, or reads settings.mirror); some minutes
"""

from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

import spatiaflow as sf

REGIONS = "invasive cancer", "connective tissue"


def measured(adata, genes):
    """Mean log1p expression of each gene in the first region minus that in the second."""
    counts = adata[:, genes].X.toarray()
    y = np.log1p(counts / adata.obs["total_counts"].to_numpy()[:, None] * 1e4)
    first, second = (y[(adata.obs["annotation"] == region).to_numpy()].mean(0) for region in REGIONS)
    return dict(zip(genes, first - second))


train, test = [sf.datasets.her2st(section) for section in ("B4", "C2", "C3", "C4")], sf.datasets.her2st("A1")
sf.pp.encode_patches([*train, test], patch_um=155)
model = sf.tl.train_stflow(train, genes=20, donor_key="donor")
test.obs["total_counts"] = np.asarray(test.X.sum(1)).ravel()
table = sf.tl.summarize_expression(test, model=model, groupby="annotation", contrast=REGIONS, depth="total_counts")
truth = measured(test, model.genes)
inside = [row.lower <= truth[row.gene] <= row.upper for row in table.itertuples()]
print(table.drop(columns=["region", "donor_effect"]).assign(measured=table["gene"].map(truth)).round(2).to_string())
print(f"{sum(inside)} of {len(inside)} measured differences lie in their interval")

figure = sf.pl.regions(table, return_fig=True)
(ax,) = figure.axes
for row, gene in enumerate(tick.get_text() for tick in ax.get_yticklabels()):
    ax.plot(truth[gene], row, "x", ms=4, mew=1, color="black", zorder=4)
(old,) = figure.legends or [None]
handles = [*(old.legend_handles if old else []), Line2D([], [], ls="", marker="x", ms=4, color="black", label="measured")]
if old:
    old.remove()
figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=6, frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=200)

"""Niches, clusters of cells and annotation, as the verbs find them, against labels that they do not see.

    python benchmarks/niches.py starmap simulated
    python benchmarks/niches.py pancreas --store pancreas.zarr
    python benchmarks/niches.py others [--only CellCharter]     published methods on STARmap, where they are installed

STARmap: three mice jointly, gold layers and types; pixels of .08 µm (docs/levels.md). "carried": niches of two mice in the
third. "halves": a mouse cut along y into two samples, against the whole. Layers by a linear probe on Gaussian means, and
types by annotate, are of the mouse that is left out. Pancreas: labels are clusters that the publishers made from the same
counts, not gold. What a run of the same seed has measured is not measured again. "others": three mice jointly, 4 niches, as
the default has it; "tuned", with that of four values of a setting that is best by the layers of the two other mice; and
"number chosen", of their own number.
"""

import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, f1_score

import peers
import results
import spatiaflow as sf
from probes import Classifier
from spatiaflow._slides import gather
from spatiaflow.models.levels import gaussian_levels, joint_axes, standardised, usual_um
from spatiaflow.models.preprocess import usual_depth

MPP = 0.08  # of STARmap
FEWEST = 15  # counts of a cell of the pancreas


def layer_f1(mice: ad.AnnData) -> dict[str, float]:
    """Macro-F1 of layers of each mouse, by a probe on the niche level of the two others."""
    slides = gather(mice, sf._io.Where(library_key="mouse", mpp=MPP), need=["counts"])
    z = [standardised(slide, usual_depth(slides)) for slide in slides]
    axes, niche_um = joint_axes(z), usual_um(slides)
    level = {s.name: gaussian_levels(s.xy, part @ axes, niche_um) for s, part in zip(slides, z)}
    label = {s.name: mice.obs["layer"].astype(str).to_numpy()[s.rows] for s in slides}
    out = {}
    for name in level:
        others = [other for other in level if other != name]
        x, y = (np.concatenate([part[other] for other in others]) for part in (level, label))
        out[name] = Classifier(x, y, np.repeat(others, [len(label[o]) for o in others])).macro_f1(
            level[name], label[name]
        )
    return out


def starmap(a, table: results.Table) -> None:
    mice = sf.datasets.starmap_mpfc()
    names, options = list(mice.obs["mouse"].cat.categories), {"mpp": MPP}
    for seed in range(a.seeds):
        if not table.lacks("starmap", names[-1], seed, "cluster_niches, halves"):
            continue
        for method, n in (("cluster_niches, 4", 4), ("cluster_niches, number chosen", None)):
            sf.tl.cluster_niches(mice, n_clusters=n, library_key="mouse", random_state=seed, **options)
            for name in names:
                one = mice.obs[mice.obs["mouse"] == name]
                named = one.groupby("niche", observed=True)["layer"].transform(lambda s: s.mode()[0]).astype(str)
                right = float((named == one["layer"].astype(str)).mean())
                table.add("starmap", name, seed, method, {
                    "layer ARI": adjusted_rand_score(one["layer"], one["niche"]), "niches": one["niche"].cat.categories.size,
                    "mean confidence": one["niche_confidence"].mean(), "layer accuracy": right,
                })  # fmt: skip
        for name, score in layer_f1(mice).items() if seed == 0 else ():
            table.add("starmap", name, seed, "niche level, linear probe", {"layer F1": score})
        for name in names:
            test, others = (mice[which].copy() for which in (mice.obs["mouse"] == name, mice.obs["mouse"] != name))
            sf.tl.annotate(
                test,
                labels="cell_type",
                reference=others,
                library_key="mouse",
                use_rep="X",
                threshold=0.0,
                random_state=seed,
            )
            truth, found = (test.obs[column].astype(str) for column in ("cell_type", "annotation"))
            table.add("starmap", name, seed, "annotate, genes", {"type F1": f1_score(truth, found, average="macro")})
            sf.tl.cluster_niches(others, n_clusters=4, library_key="mouse", random_state=seed, **options)
            sf.tl.cluster_niches(test, model=others, **options)
            score = adjusted_rand_score(test.obs["layer"], test.obs["niche"])
            table.add("starmap", name, seed, "cluster_niches, carried", {"layer ARI": score})
            sf.tl.cluster_niches(test, n_clusters=4, random_state=seed, **options)
            y = test.obsm["spatial"][:, 1]
            parts = [test[y < np.median(y)].copy(), test[y >= np.median(y)].copy()]
            sf.tl.cluster_niches(parts, n_clusters=4, random_state=seed, **options)
            found = ad.concat(parts).obs["niche"][test.obs_names]
            score = adjusted_rand_score(test.obs["niche"], found)
            table.add("starmap", name, seed, "cluster_niches, halves", {"ARI with the whole": score})


def simulated(a, table: results.Table) -> None:
    for seed in range(a.seeds):
        if not table.lacks("simulated", "test", seed, "cluster_niches, 3"):
            continue
        slides = [sf.datasets.simulated_tissue(1500, seed=10 * seed + i) for i in range(4)]
        sf.tl.cluster_niches(slides, n_clusters=3, key_added="found", random_state=seed)
        score = [adjusted_rand_score(s["table"].obs["niche"], s["table"].obs["found"]) for s in slides]
        table.add("simulated", "test", seed, "cluster_niches, 3", {"niche ARI": np.mean(score)})


def pancreas(a, table: results.Table) -> None:
    import spatialdata as sd

    cells = sd.read_zarr(a.store)["table"]
    cells = cells[cells.obs["x_px"] > 19500, ~cells.var["control"].to_numpy(bool)]
    cells = cells[np.asarray(cells.X.sum(1)).ravel() >= FEWEST].copy()
    for seed in range(a.seeds):
        if not table.lacks("pancreas", "test", seed, "cluster_cells"):
            continue
        some = cells[np.sort(np.random.default_rng(seed).permutation(cells.n_obs)[:6000])].copy()
        sf.tl.cluster_cells(some, random_state=seed)
        score = adjusted_rand_score(some.obs["cluster"].astype(str), some.obs["cell_cluster"])
        params = some.uns["cell_cluster"]["params"]
        found = {"cluster ARI": score, "resolution": params["resolution"], "clusters": params["n_clusters"]}
        table.add("pancreas", "test", seed, "cluster_cells", found)


def others(a, table: results.Table) -> None:
    mice = sf.datasets.starmap_mpfc()
    mice.obsm["spatial"] = mice.obsm["spatial"] * MPP
    names = list(mice.obs["mouse"].cat.categories)
    for peer in peers.NICHES:
        if a.only not in (None, peer.name) or not peers.installed(peer.package, peer.name):
            continue
        for seed in range(a.seeds):
            if not table.lacks("starmap", names[-1], seed, f"{peer.name}, number chosen"):
                continue
            start = time.perf_counter()
            found = peers.quiet(lambda peer=peer, seed=seed: dict(peer.run(mice.copy(), seed, peer.values)))
            add_peer(table, peer, seed, mice.obs.assign(seconds=time.perf_counter() - start), found)


def add_peer(table: results.Table, peer: peers.NichePeer, seed: int, obs: pd.DataFrame, found: dict) -> None:
    """Write agreement with layers; the tuned value of a mouse is the best of the two other mice."""
    score = pd.DataFrame({
        name: {value: adjusted_rand_score(one["layer"], labels[obs["mouse"] == name]) for value, labels in found.items()}
        for name, one in obs.groupby("mouse", observed=True)
    })  # fmt: skip
    niches = {value: len(np.unique(labels)) for value, labels in found.items()}
    for name in score:
        best = score.loc[[*peer.values]].drop(columns=name).mean(axis=1).idxmax()
        tried = {f"layer ARI, {value} {peer.setting}": score.loc[value, name] for value in peer.values}
        tuned = {", tuned": best} if len(peer.values) > 1 else {}
        which = {"": peer.values[0], **tuned, ", number chosen": peers.OWN_NUMBER}
        for note, value in which.items():
            row = {"layer ARI": score.loc[value, name], "niches": niches[value], **({} if note else tried)}
            row |= {peer.setting: best} if note == ", tuned" else {"seconds": obs["seconds"].iloc[0]}
            table.add("starmap", name, seed, peer.name + note, row)


COMMANDS = {"starmap": starmap, "simulated": simulated, "pancreas": pancreas, "others": others}


def parser():
    out = results.parser(__doc__)
    out.add_argument("data", nargs="+", choices=list(COMMANDS))
    out.add_argument("--store", help="the pancreas slide (benchmarks/pancreas.py)")
    out.add_argument("--only", choices=[peer.name for peer in peers.NICHES], help="one published method")
    out.add_argument("--seeds", type=int, default=3)
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # a close second number of niches
    for name in a.data:
        COMMANDS[name](a, results.Table("niches", again=a.again))

"""pl.regions: each row of the table is one dot with its interval, and what is not trusted is hollow."""

import pandas as pd
import pytest

import spatiaflow as sf


def table_of(regions=("tumour", "stroma"), genes=("A", "B", "C"), contrast=None, **columns):
    rows = [(region, gene) for region in regions for gene in genes]
    mean = [float(i) for i in range(len(rows))]
    data = pd.DataFrame(rows, columns=["region", "gene"]).assign(
        mean=mean, lower=[m - 1 for m in mean], upper=[m + 2 for m in mean], trusted=[gene != "B" for _, gene in rows], **columns
    )  # fmt: skip
    data.attrs = {"level": 0.9, "contrast": contrast}
    return data


def drawn(ax):
    """(row, mean, lower, upper, filled) of each dot from top to bottom."""
    ticks = [tick.get_text() for tick in ax.figure.axes[0].get_yticklabels()]  # panels share them
    spans = {tuple(segment[0]): segment for c in ax.collections for segment in c.get_segments()}
    out = []
    for line in ax.lines:
        if line.get_marker() == "o":
            for x, y in line.get_xydata():
                low, high = next((s[0][0], s[1][0]) for s in spans.values() if s[0][1] == y)
                out.append((y, ticks[round(y)], x, low, high, line.get_markerfacecolor() != "white"))
    return [row[1:] for row in sorted(out)]


def test_several_regions_are_rows_and_genes_panels():
    figure = sf.pl.regions(table_of(), return_fig=True)
    panels = {ax.get_title(): drawn(ax) for ax in figure.axes if ax.get_visible()}
    assert panels == {
        "A": [("tumour", 0, -1, 2, True), ("stroma", 3, 2, 5, True)],
        "B": [("tumour", 1, 0, 3, False), ("stroma", 4, 3, 6, False)],
        "C": [("tumour", 2, 1, 4, True), ("stroma", 5, 4, 7, True)],
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not trusted"]
    assert figure.get_supxlabel() == "mean log1p expression, 90% interval"
    assert figure.get_figwidth() < 3.6  # 9 cm


def test_one_difference_is_a_panel_with_all_genes_and_a_line_at_zero():
    table = table_of(("tumour - stroma",), contrast=["tumour", "stroma"])
    (ax,) = sf.pl.regions(table, return_fig=True).axes
    assert [row[:2] for row in drawn(ax)] == [("C", 2), ("B", 1), ("A", 0)]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "None"] == [[0, 0]]
    (ax,) = sf.pl.regions(table, genes=["A", "C"], return_fig=True).axes
    assert [row[0] for row in drawn(ax)] == ["A", "C"]


def test_samples_have_colours_and_are_beside_each_other():
    table = pd.concat([table_of(sample="one"), table_of(sample="two")])
    figure = sf.pl.regions(table, genes="A", return_fig=True)
    assert [row[0] for row in drawn(figure.axes[0])] == ["tumour", "tumour", "stroma", "stroma"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_sets_are_drawn_as_genes_are():
    table = table_of().rename(columns={"gene": "gene_set"})
    assert [ax.get_title() for ax in sf.pl.regions(table, return_fig=True).axes[:3]] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [(lambda t: [t], TypeError, "DataFrame"), (lambda t: t.drop(columns="lower"), KeyError, "no column 'lower'"),
     (lambda t: t[:0], ValueError, "no rows"), (lambda t: pd.concat([t, t]), ValueError, "several rows of 'tumour', 'A'"),
     (lambda t: table_of(genes=[f"G{i}" for i in range(13)]), ValueError, "Name some with genes=")],
)  # fmt: skip
def test_what_is_no_table_is_refused(bad, error, match):
    with pytest.raises(error, match=match):
        sf.pl.regions(bad(table_of()))


def test_a_gene_that_is_not_there():
    with pytest.raises(KeyError, match="no gene 'Z'"):
        sf.pl.regions(table_of(), genes=["Z"])

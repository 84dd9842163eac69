"""What figures of tissue share."""

import matplotlib.pyplot as plt
import numpy as np

from spatiaflow.pl._tissue import scale_bar


def test_a_scale_bar_has_its_length_and_leaves_the_panel_as_it_is():
    figure, ax = plt.subplots()
    ax.imshow(np.zeros((40, 60)), extent=(0, 60, 40, 0))
    before = ax.get_xlim(), ax.get_ylim()
    assert scale_bar(ax) == 10
    assert (ax.get_xlim(), ax.get_ylim()) == before
    (bar,) = [line for line in ax.lines if line.get_gid() == "scale bar"]
    assert np.ptp(bar.get_xdata()) == 10 and (np.array(bar.get_ydata()) > 40).all()
    plt.close(figure)

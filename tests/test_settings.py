import io
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import progress


def test_override_restores_even_after_an_error():
    before = sf.settings.seed
    with pytest.raises(RuntimeError), sf.settings.override(seed=7, progress=False):
        assert sf.settings.seed == 7
        raise RuntimeError
    assert sf.settings.seed == before


def test_unknown_or_bad_values_are_refused():
    with pytest.raises(AttributeError, match="sede.*seed"):
        sf.settings.sede = 1
    with pytest.raises(AttributeError, match="sede"):
        with sf.settings.override(sede=1):
            pass
    with pytest.raises(ValueError, match="verbosity"):
        sf.settings.verbosity = "loud"


def test_environment_is_read():
    code = "import spatiaflow as sf; s = sf.settings; print(s.seed, s.progress, s.mirror, s.cache_dir, s.verbosity)"
    environment = {
        "SPATIAFLOW_SEED": "5",
        "SPATIAFLOW_PROGRESS": "0",
        "SPATIAFLOW_MIRROR": "/m",
        "SPATIAFLOW_CACHE_DIR": "/c",
    }

    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["5", "False", "/m", "/c", "info"]
    assert "seed = " in repr(sf.settings)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", "0"])
def test_a_number_of_threads_that_cannot_be_is_refused(value):
    with (
        pytest.raises(ValueError, match="n_threads must be None or a whole number"),
        sf.settings.override(n_threads=value),
    ):
        pass


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(capsys):
    """What stderr, which is no terminal here, has got; lines without their seconds and rate."""
    time = re.compile(r", \d+ s(, [\d,.]+ \w+/s, \d+ s left)?")
    with sf.settings.override(progress=True):
        yield lambda: [time.sub("", line) for line in capsys.readouterr().err.splitlines()]


def test_in_a_log_progress_is_a_line_at_each_tenth(log):
    assert list(progress(range(250), "reading", unit="file")) == list(range(250))
    assert log() == [f"reading: {10 * k} %, file {25 * k} of 250" for k in range(1, 11)]


def test_steps_larger_than_a_tenth_and_an_early_end_are_told(log):
    with progress(None, "reading", total=1000, unit="cell") as bar:
        bar.update(50)
        bar.set_postfix({"loss": "0.5"})
        bar.update(400)
        bar.update(10)
    assert log() == ["reading: 45 %, cell 450 of 1,000, loss 0.5", "reading: ended, cell 460 of 1,000, loss 0.5"]


def test_lines_say_the_rate_and_the_time_left_of_what_was_not_done_before(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 40.0])
    monkeypatch.setattr("spatiaflow._settings.time.monotonic", lambda: next(clock))
    with sf.settings.override(progress=True), progress(None, "reading", 1000, "cell", initial=500) as bar:
        bar.update(200)
        monkeypatch.undo()
    expected = "reading: 70 %, cell 700 of 1,000, 10 s, 20 cell/s, 15 s left"
    assert capsys.readouterr().err.splitlines()[0] == expected


def test_a_bar_says_the_rate_of_what_was_not_done_before(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with sf.settings.override(progress=True), progress(None, "reading", 1000, "cell", initial=500) as bar:
        bar.update(1)
        found = bar.format_dict | {"elapsed": 10.0, "rate": None, "n": 700}
    assert "700/1000" in (text := bar.format_meter(**found)) and "20.00cell/s" in text and "<00:15" in text


def test_no_progress_and_nothing_to_do_write_nothing(log):
    list(progress([], "reading"))
    with sf.settings.override(progress=False):
        list(progress(range(20), "reading"))
    assert log() == []


def test_in_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with sf.settings.override(progress=True):
        list(progress(range(20), "reading"))
    assert "\r" in stream.getvalue() and "reading" in stream.getvalue()


def test_a_warning_points_at_the_line_of_the_user():
    """Through any number of functions of the package; and it is shown for each line, once."""
    table = sf.datasets.simulated_tissue(20)["table"]
    table.X = sparse.csr_matrix(table.X.toarray() * (np.arange(20) == 0)[:, None])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        each = _io.each_object(verb(lambda data: _io.library_sizes(data)))
        for _ in range(2):
            each([table])
    assert [(one.filename, str(one.message)) for one in shown] == [(__file__, "19 rows have no counts at all.")]

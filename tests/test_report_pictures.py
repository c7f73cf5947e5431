"""Where the points of a report's pictures lie."""

import pytest
from llamapro.report_pictures import _draw_changes, _draw_lost, draw_frontier

pyplot = pytest.importorskip("matplotlib.pyplot")
RUNS = [
    {"model": "a", "learnt": 0.3, "lost": 0.1, "mean change": {"value": -0.02, "stderr": 0.01}},
    {"model": "b", "learnt": 0.4, "lost": 0.2, "mean change": None},
]


@pytest.fixture
def axis():
    figure, axis = pyplot.subplots()
    yield axis
    pyplot.close(figure)


def test_each_run_has_a_point_for_what_it_learnt_and_lost(axis):
    _draw_lost(axis, RUNS, 0.05)
    *points, line = axis.lines
    assert [(*p.get_xdata(), *p.get_ydata(), p.get_label()) for p in points] == [
        (0.3, 0.1, "a"),
        (0.4, 0.2, "b"),
    ]
    assert {*line.get_ydata()} == {0.05} and axis.yaxis_inverted()


def test_ticks_say_where_they_are(axis):
    _draw_lost(axis, [{"model": "a", "learnt": 0.1, "lost": 0.012}], 0.05)
    axis.set_yticks([0.0, 0.025, 0.05])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.0%", "2.5%", "5.0%"]


def test_changes_of_benchmarks_have_bars_of_two_standard_errors(axis):
    _draw_changes(axis, RUNS)
    (bars,) = axis.containers
    point, _, (bar,) = bars.lines
    assert (*point.get_xdata(), *point.get_ydata()) == (0.3, -2.0)
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([-4.0, 0.0])


@pytest.mark.parametrize("lost", [0.1, None])
@pytest.mark.parametrize("change", [{"value": 0.1, "stderr": None}, None])
def test_what_is_not_known_is_not_drawn(tmp_path, lost, change):
    runs = [{"model": "a", "learnt": 0.3, "lost": lost, "mean change": change}]
    drawn = draw_frontier([{"model": "base"}, *runs], tmp_path / "f.png", 0.05)
    assert drawn == (tmp_path / "f.png").exists() == (lost is not None or change is not None)
    if drawn:
        width = 1 + (lost is not None and change is not None)
        assert pyplot.imread(tmp_path / "f.png").shape[1] == pytest.approx(715 * width, abs=2)

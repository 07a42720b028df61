import subprocess
import sys
import time
from itertools import combinations, pairwise

import pytest

from slidetune.traces import plots, style
from slidetune.traces.labels import in_words, task_label
from slidetune.traces.memory_plot import owners_in_use
from slidetune.traces.shares import parts
from slidetune.traces.timeline import shares, wrap
from slidetune.units import GIB

POINTS = [(1, 300.0), (2, 590.0), (4, 1100.0), (8, 1900.0), (16, 2000.0)]
BOUNDS = {
    "GPU compute": [(b, 2100.0) for b, _ in POINTS],
    "CPU Adam": [(b, 350.0 * b) for b, _ in POINTS],
    "uploads": [(b, 900.0 * b) for b, _ in POINTS],
    "h2d link": [(b, 901.0 * b) for b, _ in POINTS],
    "far away": [(b, 1e6 * b) for b, _ in POINTS],
}


def texts(figure):
    """Everything written in a figure."""
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]


def legend(figure):
    return [t.get_text() for part in figure.legends for t in part.get_texts()]


def placed(figure):
    """What is written inside and beside the axes, with its place in pixels after layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    found = []
    for ax in figure.axes:
        legend = ax.get_legend()
        written = [*ax.texts, *(legend.get_texts() if legend else [])]
        found += [(text.get_text(), text.get_window_extent()) for text in written]
    return found


def overlapping(figure):
    def common(a, b):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        return wide > 1 and high > 1

    return [(one, other) for (one, a), (other, b) in combinations(placed(figure), 2) if common(a, b)]


def ink(figure):
    """The share of pixels that aren't white."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return float((np.asarray(canvas.buffer_rgba())[..., :3].min(axis=2) < 250).mean())


def test_wrapped_tasks_cover_what_they_took(spilled):
    for lane in spilled.lanes:
        rows = [row for row in spilled.trace if row.lane == lane]
        spans = wrap(rows, spilled.step_s)
        inside = [span for parts in spans.values() for span in parts]
        assert all(0 <= start < end <= spilled.step_s for start, end in inside)
        assert sum(e - s for s, e in inside) == pytest.approx(sum(r.end_s - r.start_s for r in rows))
        ordered = sorted(inside)
        # The lane is still one that runs a task at a time, on the circle too.
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(ordered))
    assert any(neighbour for _, neighbour in wrap(list(spilled.trace), spilled.step_s))


def test_wrapping_shifts_by_whole_steps(plain):
    row = plain.trace[0]._replace(start_s=-0.5, end_s=0.25)
    (spans,) = (dict(wrap([row], 2.0)),)
    kind = style.kind_of(row.op)
    assert spans[kind, True] == [(1.5, 2.0)]
    assert spans[kind, False] == [(0.0, 0.25)]


def test_shares_of_slices():
    found = shares({("Adam", False): [(0.0, 0.5), (1.0, 2.0)], ("weights", False): [(3.25, 3.75)]}, 4.0, 4)
    assert found["Adam", False] == pytest.approx([0.5, 1.0, 0.0, 0.0])
    assert found["weights", False] == pytest.approx([0.0, 0.0, 0.0, 0.5])


def test_timeline_has_a_row_a_lane_and_a_colour_a_kind(spilled):
    figure = plots.timeline(spilled)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        *("NVMe writes", "NVMe reads", "CPU", "downloads", "uploads", "GPU")
    ]
    assert ax.get_xlim() == (0, spilled.step_s)
    assert set(legend(figure)) == {style.kind_of(row.op) for row in spilled.trace}
    assert f"{spilled.gpu_busy:.0%} busy" in texts(figure)
    assert not overlapping(figure)
    assert 0.1 < ink(figure) < 0.9


def test_timeline_of_thousands_of_tasks_is_quick_and_made_of_few_artists(deep):
    began = time.perf_counter()
    figure = plots.timeline(deep)
    assert ink(figure) > 0.1
    assert time.perf_counter() - began < 1.5
    assert len(deep.trace) > 4000
    assert len(figure.axes[0].collections) < 60


def test_every_operation_of_a_schedule_has_a_kind(spilled, deep):
    assert "other" not in {style.kind_of(task.work.op) for p in (spilled, deep) for task in p.schedule.tasks}


def test_lane_shares_add_up_to_the_step(spilled):
    for share in spilled.lanes.values():
        bar = parts(share, spilled.step_s)
        assert sum(width for _, _, width in bar) == pytest.approx(1.0, abs=1e-6)
    figure = plots.lane_shares(spilled)
    assert {"busy", "busy, slowed by sharing", "idle", "waiting for NVMe reads"} <= set(legend(figure))
    assert f"{spilled.lanes['gpu'].busy_s / spilled.step_s:.0%}" in texts(figure)
    assert not overlapping(figure)


def test_memory_has_a_panel_a_used_tier_with_its_peak(plain, spilled):
    assert len(plots.memory(plain).axes) == 2
    figure = plots.memory(spilled)
    assert len(figure.axes) == 3
    for ax, tier in zip(figure.axes, spilled.memory.values(), strict=True):
        title = ax.get_title(loc="left")
        assert f"{tier.peak_bytes / GIB:,.1f} of {tier.capacity_bytes / GIB:,.1f} GiB" in title
        assert ax.get_ylim()[1] > tier.peak_bytes / GIB
        labels = [t.get_text() for t in ax.get_legend().get_texts()]
        assert any(label.startswith("allocated") for label in labels)
    assert any("peak: " in text and "unit" not in text for text in texts(figure))
    assert not overlapping(figure)
    assert ink(figure) > 0.1


def test_owners_stack_to_what_is_in_use(spilled):
    for tier in spilled.memory.values():
        stacked = owners_in_use(tier)
        total = [sum(column) for column in zip(*tier.in_use.values(), strict=True)]
        assert [sum(column) for column in zip(*stacked.values(), strict=True)] == total
    assert len(owners_in_use(spilled.memory["ram"])) < len(spilled.memory["ram"].in_use)
    assert "other" in owners_in_use(spilled.memory["ram"])


def test_throughput_draws_the_bounds_in_sight_and_names_them():
    figure = plots.throughput_by_batch(POINTS, (8, 1900.0), BOUNDS)
    (ax,) = figure.axes
    written = texts(figure)
    assert "GPU compute" in written
    # Two that coincide share a name, one that leaves through the top has an arrow, one out of sight is gone.
    assert "uploads, h2d link ↑" in written
    assert not any("far away" in text for text in written)
    assert "chosen: batch 8, 1,900 tokens/s" in written
    assert ax.get_xscale() == "log"
    assert not overlapping(figure)


def test_bounds_between_batches_follow_seconds_a_step():
    """350 tokens/s a sequence is a straight line in the batch, whatever the axis."""
    figure = plots.throughput_by_batch(POINTS, (8, 1900.0), BOUNDS)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "CPU Adam")
    assert line.get_ydata() == pytest.approx([350.0 * x for x in line.get_xdata()])


def test_a_single_batch_without_bounds_is_drawn_too():
    assert ink(plots.throughput_by_batch([(4, 1000.0)], (4, 1000.0), {})) > 0.005


def trials():
    made = [{"number": i, "value": 1000.0 + 10 * i, "feasible": True, "origin": "sampler"} for i in range(20)]
    for trial in made[:3]:
        trial["origin"] = "heuristic"
    made[5] |= {"value": None, "feasible": False}
    made[6] |= {"feasible": False}
    return made


def test_history_shows_the_best_so_far_and_what_does_not_fit():
    figure = plots.study_history(trials())
    assert set(legend(figure)) == {"heuristic (3)", "sampler (15)", "does not fit (2)", "best so far"}
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "best so far")
    best = list(line.get_ydata())
    assert best == sorted(best)
    assert best[-1] == 1190.0
    crosses = next(c for c in figure.axes[0].collections if c.get_label().startswith("does not fit"))
    assert all(y < 0 for _, y in crosses.get_offsets())


def test_history_of_nothing_that_fits():
    bad = [{"number": 0, "value": None, "feasible": False, "origin": "heuristic"}]
    assert "does not fit (1)" in legend(plots.study_history(bad))
    assert plots.study_history([])


def test_importances_are_ranked():
    figure = plots.knob_importance({"window": 0.1, "micro_batch": 0.6, "prefetch": 0.001})
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["prefetch", "window", "micro_batch"]
    assert {"60%", "10%", "<1%"} <= set(texts(figure))


def test_spread_keeps_a_gap_and_the_order():
    placed = style.spread([0.5, 0.5, 1.0, 0.51], 0.1, 0.0, 1.0)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    assert placed[2] == 1.0
    assert placed[3] > placed[0]


def test_labels():
    assert task_label("backward", 12, 3, -1, 33) == "backward layer 12 mb 3"
    assert task_label("adam", 0, -1, 2, 33) == "adam embedding chunk 2"
    assert task_label("head", 33, 0, -1, 33) == "head mb 0"
    assert in_words("backward of unit 32", 33) == "backward of layer 32"
    assert in_words("head of unit 33", 33) == "head"


def test_importing_pictures_loads_no_matplotlib():
    code = (
        "import sys, slidetune.traces.plots, slidetune.traces.report, slidetune.traces.perfetto,"
        "slidetune.traces.compare, slidetune.traces.store;"
        "found = {'matplotlib', 'pandas', 'slidetune.simulator', 'slidetune.tuner'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys; from slidetune.traces.plots import knob_importance;"
        "knob_importance({'a': 1.0}).savefig('/dev/null', format='png');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

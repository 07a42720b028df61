"""Every picture of a report, each a matplotlib Figure that belongs to nobody else: save it, show it, drop it.

    timeline(prediction).savefig("timeline.png")

Nothing here touches pyplot, so notebooks, servers and threads can all draw.
"""

from slidetune.traces.memory_plot import memory
from slidetune.traces.search_plots import knob_importance, study_history, throughput_by_batch
from slidetune.traces.shares import lane_shares
from slidetune.traces.timeline import timeline
from slidetune.traces.validation_plot import side_by_side

__all__ = [
    "knob_importance",
    "lane_shares",
    "memory",
    "side_by_side",
    "study_history",
    "throughput_by_batch",
    "timeline",
]

"""Channels: which live and die together, which are dead, and networks without them.

small, kept, notes = compact(model, example_input)     # dead channels go, outputs stay
small = shrink(model, example_input, density=0.7)      # the least important go
again = replay(kept, build_model())                    # then load the state dict
graph = ChannelGraph(model, example_input)             # trace once, then ask often:
graph.unreachable(), graph.constant_reads(), graph.groups
"""

from __future__ import annotations

from secateur.channels.compaction import Compacted, compact, importance, shrink, shrink_to
from secateur.channels.fold import fold_constants
from secateur.channels.graph import ChannelGraph, Group, Member
from secateur.channels.surgery import Kept, replay
from secateur.channels.widths import longest, narrow, widths

__all__ = [
    "ChannelGraph",
    "Compacted",
    "Group",
    "Kept",
    "Member",
    "compact",
    "fold_constants",
    "importance",
    "longest",
    "narrow",
    "replay",
    "shrink",
    "shrink_to",
    "widths",
]

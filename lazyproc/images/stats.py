"""stats-dump, the figures of a dump: `u32 0x55105940, u32 magic`, one record (CRIU 4.2: images/stats.proto)."""

from __future__ import annotations

import struct

from lazyproc.images.pb import process_pb2 as pb

NAME = "stats-dump"
_SERVICE_MAGIC, _STATS_MAGIC = 0x55105940, 0x57093306


def dump_stats(*, stopping_us: int, frozen_us: int, describing_us: int, writing_us: int, pages: int) -> bytes:
    """The whole file. CRIU counts pages of shared memory apart; here they are among the others."""
    entry = pb.stats_entry()
    entry.dump.freezing_time, entry.dump.frozen_time = stopping_us, frozen_us
    entry.dump.memdump_time, entry.dump.memwrite_time = describing_us, writing_us
    entry.dump.pages_scanned = entry.dump.pages_written = pages
    entry.dump.pages_skipped_parent = entry.dump.pages_lazy = entry.dump.shpages_written = 0
    data = entry.SerializeToString()
    return struct.pack("<III", _SERVICE_MAGIC, _STATS_MAGIC, len(data)) + data

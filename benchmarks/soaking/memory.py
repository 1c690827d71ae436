"""Resident memory of the server's processes, from /proc."""

import asyncio
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def processes(session: int) -> dict[int, str]:
    """Pid and name of every process of a session."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            # "pid (name) state parent group session …", where a name may hold anything.
            name, _, rest = (directory / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        fields = rest.split()
        if int(fields[3]) == session and fields[0] != "Z":
            found[int(directory.name)] = name
    return found


def resident_mib(session: int) -> dict[str, float]:
    """By ``name-pid``."""
    resident = {}
    for pid, name in processes(session).items():
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
        resident[f"{name}-{pid}"] = pages * PAGE_BYTES / MIB
    return resident


@dataclass
class MemorySeries:
    """Samples of all processes. seconds: of each sample, from the first on."""

    session: int
    every_s: float = 3.0
    seconds: list[float] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    async def watch(self, stop: asyncio.Event) -> None:
        started = time.monotonic()
        while not stop.is_set():
            self.seconds.append(time.monotonic() - started)
            self.samples.append(resident_mib(self.session))
            await asyncio.sleep(self.every_s)

    def between(self, first_s: float, last_s: float) -> float:
        """The median of the sum over processes within a part of the series, in MiB."""
        sums = [
            sum(sample.values())
            for second, sample in zip(self.seconds, self.samples, strict=True)
            if first_s <= second <= last_s
        ]
        return statistics.median(sums)

    def ends(self, warm_up_s: float, window_s: float) -> tuple[float, float]:
        """In the first window after the warm-up, and in the last window; MiB."""
        return self.between(warm_up_s, warm_up_s + window_s), self.between(self.seconds[-1] - window_s, math.inf)

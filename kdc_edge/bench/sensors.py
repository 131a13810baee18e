"""Sensors beside the stopwatch: memory, energy, frequency, heat, other processes.

    watch = Watch()
    for ...: make_an_image(); watch.look()
    watch.energy_joules, watch.disturbance(samples_sec)

Whatever the system does not tell is None. A machine counts as disturbed by what can be seen: other processes' share of
the processors, a frequency that falls, or times of the same image that lie far apart, within or between processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from kdc_edge.bench.record import Disturbance, Timing

POWERCAP = Path("/sys/class/powercap")
OTHERS_SHARE = 0.10  # of the processors, from which on the machine is disturbed
FREQUENCY_LOSS = 0.10
SPREAD = 0.10  # between the quartiles, of the median
MIN_WATCH_SEC = 0.3  # the kernel counts in hundredths of a second


class Watch:
    """Looks at the machine from its making on, and whenever told to.

    `earlier` began before; its beginning counts where the own time is too short to tell what others did.
    """

    def __init__(self, earlier: Watch | None = None) -> None:
        self._energy = Energy()
        self._frequency: list[float] = []
        self._temperature: list[float] = []
        self._begin = self._last = _clocks()
        self._earlier = earlier._begin if earlier else self._begin

    def look(self) -> None:
        """After each counted image: outside of what is timed, for sensors can be slow."""
        self._last = _clocks()
        self._energy.read()
        if (frequency := _frequency_mhz()) is not None:
            self._frequency.append(frequency)
        if (temperature := _temperature_celsius()) is not None:
            self._temperature.append(temperature)

    @property
    def energy_joules(self) -> float | None:
        """Until the last look."""
        return self._energy.joules

    def disturbance(self, samples_sec: Sequence[float]) -> Disturbance:
        """What was seen, judged together with the times that the same image took."""
        begin = self._begin if self._last[0] - self._begin[0] >= MIN_WATCH_SEC else self._earlier
        elapsed, busy, own = (now - before for now, before in zip(self._last, begin, strict=True))
        others = None
        if elapsed >= MIN_WATCH_SEC:
            others = round(min(max(busy - own, 0.0) / (elapsed * len(_processors())), 1.0), 4)
        return Disturbance(
            others_share=others,
            frequency_mhz=tuple(self._frequency) or None,
            temperature_celsius=tuple(self._temperature) or None,
            verdict=verdict(others, self._frequency, samples_sec),
        )


def verdict(
    others_share: float | None,
    frequency_mhz: Sequence[float],
    samples_sec: Sequence[float],
    processes: Sequence[Sequence[float]] = (),
) -> str | None:
    """Why the machine counts as disturbed; None where nothing shows it. `processes`: the samples of each."""
    reasons = []
    if others_share is not None and others_share > OTHERS_SHARE:
        reasons.append(f"other processes used {_percent(others_share)} of the processor")
    if frequency_mhz and min(frequency_mhz) < (1 - FREQUENCY_LOSS) * max(frequency_mhz):
        reasons.append(f"its frequency went between {max(frequency_mhz):.0f} and {min(frequency_mhz):.0f} MHz")
    low, median, high = np.percentile(samples_sec, [25, 50, 75])
    if median > 0 and (high - low) / median > SPREAD:
        reasons.append(f"times of the same image lie {_percent((high - low) / median)} apart (between quartiles)")
    medians = [float(np.median(samples)) for samples in processes]
    if median > 0 and medians and (apart := (max(medians) - min(medians)) / median) > SPREAD:
        reasons.append(f"medians of {len(medians)} processes lie {_percent(apart)} apart")
    return f"the machine was disturbed: {'; '.join(reasons)}" if reasons else None


def disturbances(each: Sequence[Disturbance], times: Sequence[Timing]) -> Disturbance:
    """What several processes of the same measurement saw, as one; `times` are their images'."""
    others = max((d.others_share for d in each if d.others_share is not None), default=None)
    frequency = [f for d in each for f in d.frequency_mhz or ()]
    temperature = [t for d in each for t in d.temperature_celsius or ()]
    samples = [s for t in times for s in t.samples_sec]
    return Disturbance(
        others_share=others,
        frequency_mhz=tuple(frequency) or None,
        temperature_celsius=tuple(temperature) or None,
        verdict=verdict(others, frequency, samples, [t.samples_sec for t in times]),
    )


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


class Energy:
    """Joules of all processor packages, from the kernel's RAPL counters, which start over now and then."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [zone for zone in sorted(root.glob("*-rapl:*")) if _text(zone / "name").startswith("package")]
        self._last = [self._count(zone) for zone in self._zones]
        self._microjoules = 0

    def read(self) -> None:
        """Add what was used since the last reading."""
        now = [self._count(zone) for zone in self._zones]
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            if before is not None and after is not None:
                top = int(_text(zone / "max_energy_range_uj") or 0)
                self._microjoules += after - before if after >= before else after - before + top
        self._last = now

    @property
    def joules(self) -> float | None:
        """None where there are no counters, or only the administrator may read them."""
        if not self._last or None in self._last:
            return None
        return self._microjoules / 1e6

    @staticmethod
    def _count(zone: Path) -> int | None:
        text = _text(zone / "energy_uj")
        return int(text) if text else None


def peak_rss_bytes() -> int | None:
    """The most resident memory that this process has had; None where the system does not tell.

    The kernel's own high-water mark: VmHWM on Linux, where ru_maxrss would begin at the parent's size, ru_maxrss on
    macOS, the peak working set on Windows. A sampling thread would miss short peaks.
    """
    if (peak := peak_rss_of("self")) is not None:
        return peak
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    peak_working_set = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak_working_set is None else int(peak_working_set)


def peak_rss_of(process: int | str) -> int | None:
    """The high-water mark of another process, on Linux."""
    return _kibibytes(Path(f"/proc/{process}/status"), "VmHWM:")


def pss_of(process: int | str) -> int | None:
    """The proportional set size now, on Linux: pages that n processes share count as an n-th."""
    return _kibibytes(Path(f"/proc/{process}/smaps_rollup"), "Pss:")


def _kibibytes(path: Path, key: str) -> int | None:
    for line in _text(path).splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def _text(path: Path) -> str:
    """A file of the kernel's; nothing where it is not there, or not for us."""
    try:
        return path.read_text().strip()
    except OSError:  # a process that has just ended, too
        return ""


def _processors() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _clocks() -> tuple[float, float, float]:
    """Seconds: of the clock, of work on our processors whoever's it is, of work of this process."""
    every = psutil.cpu_times(percpu=True)
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(every[i], kind, 0.0) for i in _processors() if i < len(every) for kind in kinds)
    return time.perf_counter(), busy, time.process_time()


def _frequency_mhz() -> float | None:
    """Of the fastest processor: the idle ones rest at a low frequency."""
    if not hasattr(psutil, "cpu_freq"):
        return None
    try:
        found = [f.current for f in psutil.cpu_freq(percpu=True) if f.current]
    except (OSError, NotImplementedError, RuntimeError):  # where the system tells it otherwise than psutil knows
        return None
    return max(found, default=None)


def _temperature_celsius() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    try:
        return max((s.current for sensors in psutil.sensors_temperatures().values() for s in sensors), default=None)
    except (OSError, RuntimeError):
        return None

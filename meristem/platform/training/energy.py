"""The energy that a machine says it used: counters of its processors and of a GPU. What no counter tells is not guessed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]
"""Joules so far, from an unknown start."""


class Meter:
    """Joules since it was made, of everything that ran meanwhile on what it reads; None where there is no counter at all.

    To be read at least once an hour: a processor's counter starts again after some 10^5 joules, which `read` allows for once.
    index: of the GPU that is used, None for none. processors: whether the processor packages count too (once per machine).
    of: what has a counter: `processors`, `GPU`, `GPU and processors`, or nothing.
    """

    def __init__(self, index: int | None, processors: bool = True, powercap: Path = POWERCAP) -> None:
        gpu = None if index is None else _gpu(index)
        packages = _packages(powercap) if processors else []
        self._counters = [*([] if gpu is None else [(gpu, 0.0)]), *packages]
        self.of = " and ".join(["GPU"] * (gpu is not None) + ["processors"] * bool(packages))
        self.joules: float | None = 0.0 if self._counters else None
        self._last = [count() for count, _ in self._counters]

    @classmethod
    def here(cls) -> Meter:
        """Of this process's device."""
        return cls(torch.cuda.current_device() if torch.cuda.is_available() else None)

    def read(self) -> float | None:
        """Joules until now."""
        if self.joules is not None:
            now = [count() for count, _ in self._counters]
            for new, old, (_, turn) in zip(now, self._last, self._counters, strict=True):
                self.joules += new - old if new >= old else new - old + turn
            self._last = now
        return self.joules


def _packages(powercap: Path) -> list[tuple[Counter, float]]:
    """Linux's RAPL counters of whole processor packages, where they may be read, and the joules at which each starts again.

    Their parts (cores, memory) are zones below them, `intel-rapl:0:0`, and would count twice.
    """
    found: list[tuple[Counter, float]] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # of other makers' processors too
        if zone.name.count(":") != 1:
            continue
        try:
            turn = int((zone / "max_energy_range_uj").read_text()) / 1e6
            (zone / "energy_uj").read_text()
        except (OSError, ValueError):
            continue
        found.append((lambda file=zone / "energy_uj": int(file.read_text()) / 1e6, turn))  # type: ignore[misc]
    return found


def _gpu(index: int) -> Counter | None:
    """NVML's counter of a GPU, where the driver brings the library and the GPU has one (Volta and newer)."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    name = str(torch.cuda.get_device_properties(index).uuid)  # CUDA may number fewer GPUs than NVML knows
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

    def count() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    found = nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(f"GPU-{name}".encode(), ctypes.byref(handle)) == 0
    works = found and nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0
    return count if works else None

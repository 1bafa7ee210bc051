"""Memory: what a process held at most, what is left, and what the tensors of a step take."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux: the peak of a process can be reset
_CGROUP = Path("/sys/fs/cgroup")


def reset_peak() -> None:
    """Forget what was held at most, on the GPU and, where the system lets one, in the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _RESET.write_text("5")


def peak() -> int:
    """Bytes that this process held at most since `reset_peak`, or, where that cannot be told, since it began."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows, where psutil knows a peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_peak() -> int | None:
    """Bytes of tensors on the GPU at most since `reset_peak`; None where there is no GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def left() -> int:
    """Bytes that may still be taken: on the GPU where there is one, else of the machine or of the container's share of it."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = psutil.virtual_memory().available
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        return free if most == "max" else min(free, int(most) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


class Tensors(TorchDispatchMode):
    """Bytes of all tensors that were made, and still live, since it was entered. most: at any one time.

    The same on every device; what an operator takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if storage._cdata not in self._live | given:  # a view of what was there is nothing new
                self._live.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]

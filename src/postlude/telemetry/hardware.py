"""Readings of the machine: memory, cores, and the peak rate that model FLOPs utilisation is measured against."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# --- memory ---------------------------------------------------------------------------------------------------


def machine_bytes() -> int:
    """The memory of this machine."""
    return psutil.virtual_memory().total


def resident_bytes() -> int:
    """How much memory of the machine this process holds at this moment."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most that :func:`resident_bytes` has been since :func:`reset_peak`, or since the start of the process."""
    try:
        with open("/proc/self/status") as file:  # psutil does not tell it
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (FileNotFoundError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bytes() -> int:
    """The most memory that was in use since :func:`reset_peak`: a GPU's where this process uses one, else resident."""
    cuda = cuda_in_use()
    return cuda.max_memory_allocated() if cuda else peak_resident_bytes()


def reset_peak() -> bool:
    """Begin to look for the peak anew. False where the system does not allow it for resident memory."""
    cuda = cuda_in_use()
    if cuda:
        cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def cuda_in_use():
    """torch.cuda if this process has begun to use it; asking must not begin it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


# --- processors -----------------------------------------------------------------------------------------------


def cores() -> int:
    """How many cores this process may use, by its affinity and the quotas of its control groups."""
    process = psutil.Process()
    # macOS has no affinity.
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
    return max(1, min([allowed, *(round(quota) for quota in _quotas(Path("/proc/self/cgroup"), _CONTROL_GROUPS))]))


_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def _quotas(own: Path, root: Path) -> Iterator[float]:
    """The cores that each control group of a process grants, its own first; those without a limit are left out.

    ``own`` is the kernel's table of the groups of a process (cgroups(7)), ``root`` where they are mounted. A container
    may see its group as the root or by a path of the host that is not there; what is not there grants everything.
    """
    try:
        table = own.read_text().splitlines()
    except OSError:
        return
    for _, controllers, place in (line.split(":", 2) for line in table):
        if controllers and "cpu" not in controllers.split(","):
            continue
        for group in (PurePosixPath(place), *PurePosixPath(place).parents):
            folder = root / ("cpu" if controllers else "") / str(group).lstrip("/")
            names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            with suppress(OSError):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)


def gpus() -> int:
    """How many GPUs this process may use."""
    import torch

    return torch.cuda.device_count()


def device_name(device: torch.device | str) -> str:
    """The name of a GPU or of this machine's processor."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, "CPU")
    except FileNotFoundError:
        return "CPU"


# --- peak rate ------------------------------------------------------------------------------------------------

_MEASURE_SECONDS = 0.3


def peak_flops(device: torch.device | str, dtype: torch.dtype, threads: int) -> float | None:
    """The most floating-point operations per second in matrix products; None for a GPU that is not in the table.

    On a CPU it is measured by products of growing size on ``threads`` threads, once per process. On a GPU it is the
    datasheet's figure without sparsity; for fp32 that of TF32 where torch is allowed to use it
    (``torch.set_float32_matmul_precision``), and of the ordinary cores otherwise.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return _measure_flops(dtype, threads)
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return datasheet_flops(device_name(device), "tf32" if tf32 else str(dtype).split(".")[-1])


@cache
def _measure_flops(dtype: torch.dtype, threads: int) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best, begin = 0.0, time.perf_counter()
        size = 256
        while (spent := time.perf_counter() - begin) < _MEASURE_SECONDS:
            # Transposed as in a linear layer: other layouts of bf16 can be fifteen times slower.
            left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype).t()
            out = left @ right
            fastest = float("inf")
            for _ in range(8):
                start = time.perf_counter()
                torch.mm(left, right, out=out)
                fastest = min(fastest, time.perf_counter() - start)
                if time.perf_counter() - begin > _MEASURE_SECONDS:
                    break
            best = max(best, 2 * size**3 / fastest)
            if size < 2048 and 16 * fastest < _MEASURE_SECONDS - spent:
                size *= 2
        return best
    finally:
        torch.set_num_threads(before)


def datasheet_flops(name: str, number_format: str) -> float | None:
    """NVIDIA's figure for a GPU by its name, in dense operations per second; None if it is not known.

    ``number_format`` is ``bfloat16``, ``float16``, ``tf32`` or ``float32``. A MIG slice has no figure of its own.
    """
    words = set(name.lower().replace("-", " ").split())
    column = {"bfloat16": 0, "float16": 0, "tf32": 1, "float32": 2}.get(number_format)
    if column is None or "mig" in words:
        return None
    matches = [key for key in _DATASHEET_TFLOPS if set(key.split()) <= words]
    if not matches:
        return None
    tflops = _DATASHEET_TFLOPS[max(matches, key=lambda key: len(key.split()))][column]
    return tflops * 1e12 if tflops else None


_DATASHEET_TFLOPS: dict[str, tuple[float, float, float]] = {
    "gb200": (2500, 1250, 80),
    "b200": (2250, 1125, 75),
    "gh200": (989.4, 494.7, 66.9),
    "h200": (989.4, 494.7, 66.9),
    "h200 nvl": (835.5, 417.5, 60),
    "h100": (989.4, 494.7, 66.9),
    "h100 pcie": (756, 378, 51),
    "h100 nvl": (835.5, 417.5, 60),
    "h800": (989.4, 494.7, 66.9),
    "h20": (148, 74, 44),
    "a100": (312, 156, 19.5),
    "a800": (312, 156, 19.5),
    "a40": (149.7, 74.8, 37.4),
    "a30": (165, 82, 10.3),
    "a10": (125, 62.5, 31.2),
    "a10g": (70, 35, 31.2),
    "l40s": (362, 183, 91.6),
    "l40": (181, 90.5, 90.5),
    "l4": (121, 60, 30.3),
    "rtx a6000": (154.8, 77.4, 38.7),
    "rtx 6000 ada": (364.2, 182.1, 91.1),
    "rtx 5090": (209.5, 104.8, 104.8),
    "rtx 4090": (165.2, 82.6, 82.6),
    "rtx 3090": (71, 35.6, 35.6),
    "v100": (125, 0, 15.7),
    "t4": (65, 0, 8.1),
}
"""fp16 and bf16 on tensor cores with fp32 accumulation, TF32, fp32: TFLOP/s without sparsity, from NVIDIA's
datasheets and architecture papers (where only the figure with sparsity is printed, half of it). 0: not there."""

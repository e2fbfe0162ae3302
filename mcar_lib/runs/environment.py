"""What a run ran on: for its record."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from mcar_lib.files import checkout
from mcar_lib.training import processes

# Settings that make a processor act like another: they change sums in their last bits, as another machine does.
LIKE_ANOTHER_MACHINE = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "OMP_DYNAMIC"),
    *("OMP_THREAD_LIMIT", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_DYNAMIC"),
    *("OPENBLAS_CORETYPE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_USE_HEURISTIC_MODE_B"),
    *("TORCH_CUDNN_V8_API_DISABLED", "NCCL_ALGO", "NCCL_PROTO"),
)


class PeakMemory:
    """The most memory that is taken from here on: of the GPU where there is one, else of this process."""

    def __init__(self) -> None:
        self.known = torch.cuda.is_available()
        if self.known:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):  # Linux with glibc
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier run has freed, and malloc kept (see keep_freed_memory)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
            self.known = True

    @property
    def bytes(self) -> int | None:
        """None where the system cannot tell it from that of an earlier run in this process."""
        if not self.known:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # in KiB there


def taken_memory() -> int:
    """Bytes of the memory that PeakMemory counts which this process has now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def describe_environment(threads: int = 0) -> dict[str, Any]:
    """The machine, the versions and the commit of a run, for its record; threads: of each process, 0 for torch's own.

    Records that lack "processes" were made by one.
    """
    packages = ("torch", "torchvision", "accelerate", "numpy", "pillow", "mcar-lib")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "processes": processes.num_processes(),
        "settings": {name: os.environ[name] for name in LIKE_ANOTHER_MACHINE if name in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout, with -dirty behind it when files differ from it."""
    if (root := checkout()) is None:  # what git would describe is somebody else's project
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()

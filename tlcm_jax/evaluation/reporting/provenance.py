"""Where and with what a run was made: versions, hardware, duration."""

import importlib.metadata
import os
import platform

import jax

_PACKAGES = ("tlcm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def duration(seconds: float) -> str:
    """Writes a time for people: "41 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _processor() -> str:
    """The processor's name as Linux knows it, else as the platform module does."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    """The installed version. A run from a source tree does not fail at its end for want of one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def provenance(seconds: float) -> dict[str, str]:
    """Describes this process for a report.

    Args:
        seconds: how long the run took.

    Returns:
        label -> text, in the order in which it is to be shown.
    """
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{name} {_version(name)}" for name in _PACKAGES]
    return {
        "duration": duration(seconds),
        "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
        "host": f"{_processor()}, {cores} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
    }

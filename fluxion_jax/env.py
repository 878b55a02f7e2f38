"""The report behind `fluxion info`: what is installed, what it runs on, what is in use.

Knows nothing of caches or models. It must work on a broken installation, where it is needed most:
only the standard library is imported here, and every probe is guarded by itself, so that one which
fails is reported in its place instead of hiding the others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "orbax-checkpoint",
    "safetensors",
    "gguf",
    "tokenizers",
    "matplotlib",
)
VARIABLES = (
    "FLUXION_CPU_VARIANT",
    "FLUXION_NUM_THREADS",
    "FLUXION_COMMIT",
    "FLUXION_CPUS",
    "FLUXION_SPIN_US",
    "FLUXION_TIMEOUT_S",
    "FLUXION_HOST_LIBRARY",
    "FLUXION_CUDA_SYNC",
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
    "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "CUDA_VISIBLE_DEVICES",
)
_CONTROL_GROUP = Path("/sys/fs/cgroup")
# XLA's own default, which its documentation does not state.
_PINNED_LIMIT_GIB = 64
CPU_FEATURES = (
    "sse4_2",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
)

Section = dict[str, object]
Report = dict[str, Section]


def report() -> Report:
    """Returns everything known about this installation and machine.

    Returns:
      Sections by name (`versions`, `devices`, `host_library`, `cpu`, `memory`, `environment`), each
      a dictionary of plain values that `json.dumps` accepts. Bytes are bytes. A probe that fails
      leaves `{"error": "TYPE: text"}` in its section. Calling it initialises the JAX backend and
      loads the host library.
    """
    probes: Mapping[str, Callable[[], Section]] = {
        "versions": _versions,
        "devices": _devices,
        "host_library": _host_library,
        "cpu": _cpu,
        "memory": _memory,
        "environment": _environment,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def render(sections: Report) -> str:
    """Returns the report as aligned text, one line a value, for people and for bug reports.

    Args:
      sections: what `report` returned.
    """
    lines: list[str] = []
    for title, section in sections.items():
        lines.append(title.replace("_", " "))
        width = max((len(_label(key)) for key in section), default=0)
        for key, value in section.items():
            lines.append(f"  {_label(key):<{width}}  {_text(key, value)}")
    return "\n".join(lines)


def _guarded(probe: Callable[[], Section]) -> Section:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ") if not key.isupper() else key


def _text(key: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        unit, name = (2**30, "GiB") if value >= 2**29 else (2**10, "KiB")
        return f"{value / unit:.1f} {name}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "-"
    return str(value)


def _numbers(text: str) -> str:
    """The version that a text begins with; what builders append says nothing about the machine."""
    found = re.match(r"[0-9.]*[0-9]", text)
    return found[0] if found else text


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Section:
    return {
        "fluxion-jax": _version("fluxion-jax"),
        "python": platform.python_version(),
        "platform": "-".join(
            (
                platform.system(),
                _numbers(platform.release()),
                platform.machine(),
                *platform.libc_ver(),
            )
        ),
        **{package: _version(package) for package in PACKAGES},
    }


def _devices() -> Section:
    import jax

    devices = jax.devices()
    found: Section = {
        "backend": jax.default_backend(),
        "devices": [f"{device.device_kind} ({device})" for device in devices],
        "memory_kinds": sorted({m.kind for d in devices for m in d.addressable_memories()}),
    }
    for device in devices:
        used = device.memory_stats()
        if used and "bytes_limit" in used:
            name = str(device).replace(":", "_")
            found[f"{name}_limit_bytes"] = int(used["bytes_limit"])
            found[f"{name}_in_use_bytes"] = int(used["bytes_in_use"])
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        # The line goes on with who built it, and when.
        found["nvidia_driver"] = _numbers(driver.read_text().partition("x86_64")[2].strip())
    return found


def _host_library() -> Section:
    from host_ops import native

    return dict(native.info())


def _cpu() -> Section:
    fields: dict[str, str] = {}
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if not line.strip():
                break
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "present": os.cpu_count(),
        "allowed": len(os.sched_getaffinity(0)),
        "quota": _cpu_quota(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
    }


def _cpu_quota() -> float | None:
    """CPUs' worth of time that the control group grants, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def free_bytes() -> int | None:
    """Memory that this process may still take, by the system and by its control group, or None."""
    free = [_meminfo().get("MemAvailable")]
    limit, used = _group_bytes("memory.max"), _group_bytes("memory.current")
    if limit is not None and used is not None:
        # What the group has read from files counts as used, but goes when memory is wanted.
        cached = _group_statistics().get("inactive_file", 0)
        free.append(limit - used + cached)
    return min((x for x in free if x is not None), default=None)


def pinned_limit_bytes() -> int:
    """How much pinned host memory JAX allocates on a GPU at most."""
    text = os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "")
    return (int(text) if text.isdecimal() else _PINNED_LIMIT_GIB) * 2**30


def _meminfo() -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sizes
    for line in lines:
        key, _, value = line.partition(":")
        sizes[key] = int(value.split()[0]) * 1024
    return sizes


def _group_bytes(name: str) -> int | None:
    """A size of this process's control group, or None if there is none."""
    try:
        text = (_CONTROL_GROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _group_statistics() -> dict[str, int]:
    try:
        lines = (_CONTROL_GROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}


def _memory() -> Section:
    sizes = _meminfo()
    lockable, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "total_bytes": sizes.get("MemTotal"),
        "available_bytes": sizes.get("MemAvailable"),
        "limit_bytes": _group_bytes("memory.max"),
        "free_bytes": free_bytes(),
        "pinned_limit_bytes": pinned_limit_bytes(),
        "lockable_bytes": None if lockable == resource.RLIM_INFINITY else lockable,
        "page_bytes": resource.getpagesize(),
        "transparent_huge_pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
    }


def _chosen(path: Path) -> str | None:
    """The bracketed word of a file like `always [madvise] never`."""
    try:
        text = path.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def _environment() -> Section:
    return {
        "executable": sys.executable,
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }

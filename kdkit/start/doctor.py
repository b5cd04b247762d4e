"""What this machine has for kdkit, what is known to be wrong with it, and what would go wrong."""

from __future__ import annotations

import importlib
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from kdkit import __version__
from kdkit.errors import cause
from kdkit.units import gigabytes

IMPORTED = ("torch", "torchvision", "timm")
"""Libraries that are imported: one that is installed may still not fit the others."""
LEAST_DISK = 2 * 10**9
"""Free bytes below which a run may not end: checkpoints, best epochs, a teacher's weights."""
LEAST_SHARED = 512 * 2**20
"""Bytes of /dev/shm below which workers that load images may be killed; Docker gives 64 MiB."""
LEAST_FILES = 1024
"""Open files below which several workers may fail."""
SHARED = Path("/dev/shm")
NVIDIA = Path("/proc/driver/nvidia/version")
"""Exists where a driver of NVIDIA's is loaded, whatever torch can do."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str


@dataclass
class Findings:
    """The table, what is known to be slow or unsafe here, and problems, each with a way out."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def row(self, what: str, found: str) -> None:
        self.rows.append(Row(what, found))


def examine(folder: Path) -> Findings:
    """Examine the machine; runs would be in `folder`."""
    findings = Findings()
    findings.row("kdkit", __version__)
    findings.row("Python", platform.python_version())
    _examine_libraries(findings)
    places = {"runs": folder / "runs", "temporary files": Path(tempfile.gettempdir())}
    if all(_imports(name, findings) for name in IMPORTED):
        _examine_devices(findings)
        _examine_processor(findings)
        places |= _caches()
    _examine_folders(places, findings)
    _examine_limits(findings)
    return findings


def _examine_libraries(findings: Findings) -> None:
    """Compare what is installed with what kdkit requires, and tell its extras."""
    extras: dict[str, list[str]] = {}
    try:
        required = metadata.requires("kdkit") or ()
    except metadata.PackageNotFoundError:
        findings.problems.append("kdkit is not installed: pip install -e . in its checkout")
        return
    for requirement in map(Requirement, required):
        version = _version(requirement.name)
        if requirement.marker is not None:
            for extra in _extras(requirement):
                extras.setdefault(extra, []).extend([] if version else [requirement.name])
            continue
        findings.row(requirement.name, version or "is missing")
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            findings.problems.append(
                f"{requirement.name}: {version or 'is missing'}; kdkit needs"
                f" {requirement.specifier or 'it'}: pip install '{requirement}'"
            )
    for extra, missing in sorted(extras.items()):
        lacks = f"without {', '.join(missing)}: pip install 'kdkit[{extra}]'"
        findings.row(f"extra {extra}", lacks if missing else "is here")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extras(requirement: Requirement) -> Iterator[str]:
    """List the extras that ask for a requirement, but for developers' own."""
    for extra in metadata.metadata("kdkit").get_all("Provides-Extra") or ():
        marker = requirement.marker
        if extra != "dev" and marker is not None and marker.evaluate({"extra": extra}):
            yield extra


def _imports(name: str, findings: Findings) -> bool:
    """Import a library; a build that does not fit torch's fails here."""
    try:
        importlib.import_module(name)
    # a library may raise anything: torchvision of another torch a RuntimeError, a missing file of
    # CUDA an OSError
    except Exception as error:
        findings.problems.append(
            f"{name}: cannot be imported ({cause(error, 200)}); torch and torchvision have to be"
            " installed together: pip install --force-reinstall torch torchvision"
        )
        return False
    return True


def _examine_devices(findings: Findings) -> None:
    import psutil
    import torch

    from kdkit.models import devices

    findings.row("torch's build", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    memory = gigabytes(psutil.virtual_memory().available)
    threads = torch.get_num_threads()
    findings.row("device cpu", f"{threads} threads of torch, {memory} of memory available")
    accelerators = devices.present()[1:]
    for name in accelerators:
        findings.row(f"device {name}", _accelerator(name))
    if not accelerators and NVIDIA.exists():
        findings.problems.append(
            f"an NVIDIA GPU is here, and torch {torch.__version__} does not reach it: install a"
            " torch for its driver (pytorch.org), or update the driver"
        )


def _accelerator(name: str) -> str:
    import torch

    device = torch.device(name)
    if device.type != "cuda":
        return "is here"
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{about.name}, {gigabytes(free)} of {gigabytes(total)} free"


def _examine_processor(findings: Findings) -> None:
    """Tell what is known to be unsafe or slow on this processor, and what kdkit does about it."""
    import torch

    from kdkit.engine.accelerator import multiplies_bf16
    from kdkit.models import devices

    capability = torch.backends.cpu.get_cpu_capability()
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    findings.row("processor", f"{platform.machine()}, {capability}")
    if has_onednn and capability.startswith("AVX"):
        findings.notes.append(
            f"oneDNN corrupts memory on {capability} in the backward pass of strided 1x1"
            f" convolutions with fewer than {devices.LEAST_CHANNELS} input channels, channels-last:"
            " `train.channels_last: auto` avoids it on the CPU, and `true` is refused where it"
            " would occur; a loop of your own has to avoid it itself"
        )
    if not multiplies_bf16():
        findings.notes.append(
            "this processor has no instructions for bf16 matrices (AMX): `train.precision: bf16`"
            " is slower than fp32 on it"
        )


def _caches() -> dict[str, Path]:
    """Return the folders that fetched weights go to."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE  # installed with timm

    return {
        "torch's weights": Path(torch.hub.get_dir()),
        "Hugging Face's files": Path(HF_HUB_CACHE),
    }


def _examine_folders(places: Mapping[str, Path], findings: Findings) -> None:
    """Tell the free space of the disk that each folder is on."""
    for what, path in places.items():
        # the folder may not exist yet
        there = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        findings.row(f"disk of {what}", f"{gigabytes(free)} free ({path})")
        if free < LEAST_DISK:
            findings.problems.append(
                f"{path}: {gigabytes(free)} free for {what}; a run may need more than"
                f" {gigabytes(LEAST_DISK)}"
            )


def _examine_limits(findings: Findings) -> None:
    """Tell the shared memory and the number of open files that loading workers need."""
    if SHARED.is_dir():
        size = shutil.disk_usage(SHARED).free
        findings.row("shared memory", f"{gigabytes(size)} free ({SHARED})")
        if size < LEAST_SHARED:
            findings.problems.append(
                f"{SHARED}: {gigabytes(size)} free; workers that load images may be killed: give a"
                " container `--shm-size 2g`, or set data.workers: 0"
            )
    files = _open_files()
    if files is None:
        return
    findings.row("open files", f"{files:,}")
    if files < LEAST_FILES:
        findings.problems.append(
            f"only {files:,} files may be open; several workers may fail: ulimit -n 4096"
        )


def _open_files() -> int | None:
    """Return how many files this process may open; None where the system has no such number."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft

"""The GPUs of this machine, as nvidia-smi tells of them.

Owns the questions asked of nvidia-smi and the reading of its answers. It is asked before any CUDA context is there, so every process
that it lists is somebody else's. What must hold of the GPUs is train/node_verdict.py's. Called by train/node_facts.py.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

GPU_FIELDS = (
    "index,uuid,memory.total,memory.free,ecc.mode.current,ecc.errors.uncorrected.volatile.total,mig.mode.current,name"
)
PROCESS_FIELDS = "gpu_uuid,pid,used_memory,process_name"
FORMAT = "--format=csv,noheader,nounits"
LIMIT_S = 30.0  # a GPU that has fallen off the bus lets nvidia-smi hang
GB_PER_MIB = 2**20 / 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one instance of a GPU that is cut up (MIG), of which nvidia-smi tells neither memory nor errors.

    index: nvidia-smi's, of the whole GPU. Memory in GB (1e9 bytes). ecc: whether errors are corrected. uncorrected: errors since the driver
    was loaded. processes: pid, name and GB of each program on it. None: the GPU does not tell.
    """

    index: int
    uuid: str
    name: str
    total_gb: float | None
    free_gb: float | None
    ecc: bool | None
    uncorrected: int | None
    processes: tuple[str, ...] = ()


def read_gpus(visible: Sequence[str] | None = None) -> tuple[Gpu, ...]:
    """GPUs of this machine; none where there is no nvidia-smi. visible: indices or UUIDs of those that count (None: all).
    Where none counts it is not asked: what fails there is nothing to the run.

    Raises:
        RuntimeError: nvidia-smi fails or hangs.
    """
    if (visible is not None and not visible) or shutil.which("nvidia-smi") is None:
        return ()
    gpus = parse_gpus(
        _ask(f"--query-gpu={GPU_FIELDS}", FORMAT), _ask(f"--query-compute-apps={PROCESS_FIELDS}", FORMAT), _ask("-L")
    )
    return gpus if visible is None else tuple(gpu for gpu in gpus if _is_among(gpu, visible))


def parse_gpus(gpus: str, processes: str, listed: str) -> tuple[Gpu, ...]:
    """Reads the answers to the query of GPUs, to that of processes, and to -L, which alone lists the instances of a cut GPU.

    Raises:
        RuntimeError: the first is no table of GPU_FIELDS.
    """
    found: list[Gpu] = []
    for line in filter(None, map(str.strip, gpus.splitlines())):
        cells = [cell.strip() for cell in line.split(",", GPU_FIELDS.count(","))]
        if len(cells) <= GPU_FIELDS.count(",") or not cells[0].isdecimal():
            raise RuntimeError(
                f"nvidia-smi must answer with {GPU_FIELDS}, but it says {line!r}: look at nvidia-smi there"
            )
        index, uuid, total, free, ecc, uncorrected, mig, name = cells
        gpu = Gpu(
            index=int(index),
            uuid=uuid,
            name=name,
            total_gb=_gb(total),
            free_gb=_gb(free),
            ecc={"Enabled": True, "Disabled": False}.get(ecc),
            uncorrected=int(uncorrected) if uncorrected.isdecimal() else None,
            processes=_processes_on(uuid, processes),
        )
        found += _instances(gpu, listed) if mig == "Enabled" else [gpu]
    return tuple(found)


def _ask(*arguments: str) -> str:
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"nvidia-smi {arguments[0]} has not ended within {LIMIT_S:g} s: reset the GPUs") from error
    if answer.returncode:
        said = " ".join((answer.stdout + answer.stderr).split())
        raise RuntimeError(f"nvidia-smi ends with status {answer.returncode} ({said}): repair the driver")
    return answer.stdout


def _gb(mib: str) -> float | None:
    """GB of a number of MiB; None for [N/A], [Insufficient Permissions] and the like."""
    return round(int(mib) * GB_PER_MIB, 3) if mib.isdecimal() else None


def _processes_on(uuid: str, processes: str) -> tuple[str, ...]:
    found: list[str] = []
    for line in processes.splitlines():
        cells = [cell.strip() for cell in line.split(",", PROCESS_FIELDS.count(","))]
        if cells[0] == uuid and len(cells) > PROCESS_FIELDS.count(","):
            used = _gb(cells[2])
            found.append(f"process {cells[1]} ({cells[3]}{'' if used is None else f', {used:.1f} GB'})")
    return tuple(found)


def _instances(gpu: Gpu, listed: str) -> list[Gpu]:
    """The instances of a cut GPU: the indented lines of -L below its own."""
    found: list[Gpu] = []
    inside = False
    for line in listed.splitlines():
        if line.startswith("GPU "):
            inside = f"UUID: {gpu.uuid})" in line
        elif inside and (instance := re.search(r"(MIG \S+)\s.*\(UUID: (\S+)\)", line)):
            name, uuid = f"{gpu.name} {instance[1]}", instance[2]
            found.append(replace(gpu, uuid=uuid, name=name, total_gb=None, free_gb=None))
    return found


def _is_among(gpu: Gpu, visible: Sequence[str]) -> bool:
    """CUDA takes a UUID by its first characters too."""
    return any(str(gpu.index) == name or (not name.isdecimal() and gpu.uuid.startswith(name)) for name in visible)

"""What started this process: the only reader of RANK, SLURM_*, OMPI_* and the like.

Owns the mapping of each starter's variables to a ProcessInfo, and the choice of the device before DeepSpeed is imported. Joins no
group and starts nothing. Called by launcher/main.py and launcher/preflight.py.
"""

import re
import socket
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from launcher.parent import LAUNCHED
from parallel.config import ProcessInfo

# Starter -> its names of rank, world size, local rank and local world size, and what else it always sets and is read here.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": (
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_ID",
        "SLURM_JOB_ID",
    ),
}
_REMEDIES = {
    "srun": "srun, which sets",
    "openmpi": "Open MPI's mpirun, which sets",
    "mpich": "MPICH's mpirun, which sets",
}
_DEFAULT_PORT = 29500
# SLURM numbers its own steps (the batch script, an interactive shell) from here: nothing was started by srun in them.
_FIRST_RESERVED_STEP = 0xFFFFFFF0


def read_environment(environ: Mapping[str, str]) -> ProcessInfo:
    """Place of this process in its job. Without any starter's variables: the only process.

    Raises:
        ValueError: names the variables that are missing, no numbers, or contradict each other.
    """
    explicit = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environ]
    launched = LAUNCHED & environ.keys()
    below = None if launched else _starter_below(environ)
    if "RANK" in explicit or launched or (explicit and below is None):
        # Explicit variables win: torchrun and deepspeed are themselves started by srun or mpirun, with other ranks.
        starter = _explicit_starter(environ)
        info = _process(environ, starter)
        if below is not None:
            # A RANK exported by hand must not turn every process of an mpirun or srun into the same rank.
            _refuse_contradiction(environ, starter, below)
        return info
    if below is None:
        return ProcessInfo(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr="127.0.0.1",
            master_port=0,
            launcher="python",
            **_job(environ),
        )
    for ours, theirs in zip(_VARIABLES["torchrun"][1:3], _VARIABLES[below][1:3], strict=True):
        if ours in explicit and environ[ours] != environ.get(theirs):
            raise ValueError(
                f"{ours} is {environ[ours]}, but {theirs}, set by {below}, is {environ.get(theirs)}: unset {ours}"
            )
    return _process(environ, below)


def choose_device(setting: Literal["auto", "cpu", "cuda"], environ: Mapping[str, str]) -> Literal["cpu", "cuda"]:
    """The device type of the run, for `run.device` and DS_ACCELERATOR. ValueError where these two or the machine
    disagree.
    """
    from torch import cuda  # takes seconds: not for --help

    accelerator = environ.get("DS_ACCELERATOR")
    if setting == "auto":
        setting = "cuda" if accelerator != "cpu" and cuda.is_available() else "cpu"
    if accelerator not in (None, setting):
        raise ValueError(
            f"run.device and DS_ACCELERATOR must agree, but the device is {setting} and DS_ACCELERATOR is {accelerator}: "
            "unset DS_ACCELERATOR or change run.device"
        )
    if setting == "cuda" and not cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no GPU: set run.device to auto or cpu")
    return setting


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Indices or UUIDs of the GPUs that this process may use; None: all that the machine has."""
    if "CUDA_VISIBLE_DEVICES" not in environ:
        return None
    given = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
    # CUDA takes the list as ended at the first entry that names no device: -1, NoDevFiles (SLURM's word for none), nothing.
    ended = [name.isdecimal() or name.startswith(("GPU-", "MIG-")) for name in given]
    return tuple(given[: ended.index(False)] if False in ended else given)


def _explicit_starter(environ: Mapping[str, str]) -> str:
    """Whose RANK, WORLD_SIZE and LOCAL_RANK these are. ValueError where both launchers have left their mark and differ."""
    ours, theirs = environ.get("LOCAL_WORLD_SIZE"), environ.get("LOCAL_SIZE")
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"LOCAL_WORLD_SIZE, set by torchrun, is {ours}, but LOCAL_SIZE, set by deepspeed, is {theirs}: start with one of the two, or "
            "unset the other's"
        )
    return "deepspeed" if ours is None and {"LOCAL_SIZE", "CROSS_SIZE"} & environ.keys() else "torchrun"


def _starter_below(environ: Mapping[str, str]) -> str | None:
    """Which of mpirun and srun started this process, directly or further up.

    mpirun first: inside a SLURM job it starts its own helpers by srun, whose variables then reach the ranks too. One variable of a starter
    is enough to ask for all of them: four processes that each miss one must not become four runs. ValueError where two contradict.
    """
    in_step = _is_in_step(environ)
    # Of MPICH's four the first two are of its process manager PMI, which srun --mpi=pmi2 speaks too.
    names = {"openmpi": _VARIABLES["openmpi"], "mpich": _VARIABLES["mpich"][2 if in_step else 0 :]}
    found = [starter for starter, ours in names.items() if environ.keys() & set(ours)]
    if len(found) == 2:
        _refuse_contradiction(environ, *found)
    if found and in_step and not set(_VARIABLES["srun"]) - environ.keys() and _tasks(environ)[0] > 1:
        # Of mpirun's helpers there is one on a node. Where srun has started more, who is inside whom cannot be told.
        _refuse_contradiction(environ, found[0], "srun")
    return found[0] if found else "srun" if in_step else None


def _is_in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has run. SLURM_PROCID does not say so: it is 0 in the batch script itself, whose step has a reserved number or none."""
    if "SLURM_STEP_ID" in environ:
        return _number(environ, "SLURM_STEP_ID") < _FIRST_RESERVED_STEP
    return any(name.startswith("SLURM_STEP") for name in environ)


def _process(environ: Mapping[str, str], starter: str) -> ProcessInfo:
    """The ProcessInfo in this starter's variables. ValueError, naming them, where they are missing or make no sense."""
    names = _VARIABLES[starter]
    missing = [name for name in names if name not in environ]
    if missing:
        present = [f"{name}={environ[name]}" for name in names if name in environ]
        raise ValueError(
            f"the environment is half set: {', '.join(present) or starter} without {', '.join(missing)}: start with "
            f"{_REMEDIES.get(starter, 'deepspeed or torchrun, which set')} them all, or unset what is there to train with one process"
        )
    local_world_size = _tasks(environ)[0] if starter == "srun" else _number(environ, names[3])
    world_size = _number(environ, names[1])
    address, port = _meeting_point(environ, starter, on_one_machine=local_world_size == world_size)
    try:
        return ProcessInfo(
            rank=_number(environ, names[0]),
            world_size=world_size,
            local_rank=_number(environ, names[2]),
            local_world_size=local_world_size,
            master_addr=address,
            master_port=port,
            launcher=starter,
            **_job(environ),
            **(_step(environ) if starter == "srun" else {}),
        )
    except ValidationError as error:
        given = ", ".join(f"{name}={environ[name]}" for name in names)
        reason = "; ".join(found["msg"].removeprefix("Value error, ") for found in error.errors())
        raise ValueError(f"the environment contradicts itself ({given}): {reason}") from None


def _job(environ: Mapping[str, str]) -> dict[str, Any]:
    """The machine's name, and what SLURM says of the job wherever in it this process was started."""
    found: dict[str, Any] = {
        "node": environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "job": environ.get("SLURM_JOB_ID", ""),
    }
    # SLURM sets it from the second run on only.
    for field, name in (("restarts", "SLURM_RESTART_COUNT"), ("gpus", "SLURM_GPUS_ON_NODE")):
        if name in environ:
            found[field] = _number(environ, name)
    return found


def _step(environ: Mapping[str, str]) -> dict[str, Any]:
    """ValueError where the ranks of a node are not consecutive: expert groups, which are, would span nodes."""
    _, first, counts = _tasks(environ)
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    if rank != first + local_rank:
        raise ValueError(
            f"the ranks of a node must be consecutive, but SLURM_PROCID is {rank} for SLURM_LOCALID {local_rank} of node "
            f"{environ['SLURM_NODEID']}, whose first rank is then {first}: start with srun --distribution=block"
        )
    return {"step": environ["SLURM_STEP_ID"], "nodes": _hosts(environ["SLURM_STEP_NODELIST"]), "tasks_of_nodes": counts}


def _refuse_contradiction(environ: Mapping[str, str], starter: str, below: str) -> None:
    """ValueError unless the two give this process the same place."""
    for ours, theirs in zip(_VARIABLES[starter][:3], _VARIABLES[below][:3], strict=True):
        if environ.get(ours) != environ.get(theirs):
            raise ValueError(
                f"{ours} is {environ.get(ours, 'missing')}, but {theirs}, set by {below}, is {environ.get(theirs, 'missing')}: unset "
                f"{', '.join(_VARIABLES[starter])} to use {below}'s, or {', '.join(_VARIABLES[below])} not to"
            )


def _meeting_point(environ: Mapping[str, str], starter: str, *, on_one_machine: bool) -> tuple[str, int]:
    """Address and port of rank 0: MASTER_ADDR and MASTER_PORT where set, else what the starter implies."""
    address = environ.get("MASTER_ADDR")
    port = _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else None
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if starter == "srun":
        address = address or next(iter(_hosts(environ["SLURM_STEP_NODELIST"])), None)
        # From the job, so that two jobs on one node do not meet; below 32768, where Linux gives ports to others.
        port = port if port is not None else 20000 + _number(environ, "SLURM_JOB_ID") % 10000
    elif starter in ("torchrun", "deepspeed") and len(absent) == 1:
        raise ValueError(
            f"the environment is half set: MASTER_ADDR and MASTER_PORT belong together, but {absent[0]} is missing: start with "
            f"{starter}, which sets both, or unset the other"
        )
    elif on_one_machine:
        address = address or "127.0.0.1"
        port = port if port is not None else _DEFAULT_PORT
    if not address or port is None:
        raise ValueError(
            f"processes on several machines need a meeting point, but there is none without {' and '.join(absent)}: set MASTER_ADDR to the "
            "address of rank 0's machine and MASTER_PORT to a free port there"
        )
    if not on_one_machine and _is_here(address) and _is_a_machine(environ):
        raise ValueError(
            f"MASTER_ADDR must be an address of rank 0's machine that the others reach, but it is {address}, where each finds itself: "
            "unset MASTER_ADDR, or set it to that machine's name"
        )
    return address, port


def _is_here(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def _is_a_machine(environ: Mapping[str, str]) -> bool:
    """False where several nodes of SLURM are one machine, as in tests: they reach each other at 127.0.0.1."""
    host = socket.gethostname().partition(".")[0]
    return environ.get("SLURMD_NODENAME", host).partition(".")[0] == host


def _tasks(environ: Mapping[str, str]) -> tuple[int, int, tuple[int, ...]]:
    """Tasks on this node, on those before it, and on each: what SLURM_STEP_TASKS_PER_NODE spells as 2(x3),1."""
    counts: list[int] = []
    for entry in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        counts += [int(match[1])] * int(match[2] or 1) if match else [0]
    node = _number(environ, "SLURM_NODEID")
    if node >= len(counts) or 0 in counts:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE must hold the tasks of each node, but it is {environ['SLURM_STEP_TASKS_PER_NODE']} and "
            f"SLURM_NODEID is {node}: start with srun, which sets both"
        )
    return counts[node], sum(counts[:node]), tuple(counts)


def _hosts(nodelist: str) -> tuple[str, ...]:
    """The names in SLURM's list: gpu-[03-04,07],big1 -> gpu-03, gpu-04, gpu-07, big1. Several brackets of a name multiply."""
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        heads = [""]
        for text, numbers in re.findall(r"([^\[]+)|\[([^\]]*)\]", entry):
            heads = [head + tail for head in heads for tail in ([text] if text else _numbers(numbers))]
        names += heads
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    """03-05,9 -> 03, 04, 05, 9."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].strip().isdecimal():
        raise ValueError(f"{name} must be a whole number, but it is {environ[name]!r}: unset or correct it")
    return int(environ[name])

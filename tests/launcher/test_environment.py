"""Which variables say where a process stands, and which combinations are refused."""

import itertools
import re

import pytest

from launcher.environment import read_environment, visible_gpus

MASTER = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
    **MASTER,
}
# what deepspeed's launch.py sets (read in 0.19.8): no LOCAL_WORLD_SIZE
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
# an sbatch script: SLURM has set a PROCID, but nothing was started by srun
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "5"}
SRUN = {
    **SBATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu-[03-04,07],big1",
}
# what srun --mpi=pmi2 adds
PMI2 = {"PMI_RANK": "4", "PMI_SIZE": "5", "PMI_FD": "9", "PMI_JOBID": "77.0"}
STARTERS = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "openmpi": OPENMPI, "mpich": MPICH, "srun": SRUN}
# of these two the presence is no news: they tell only that the launcher itself has been here
MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "CROSS_RANK")


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def refused(environ: dict[str, str]) -> str:
    with pytest.raises(ValueError) as caught:
        read_environment(environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environ", "place", "meeting", "launcher"),
    [
        ({}, (0, 1, 0, 1), ("127.0.0.1", 0), "python"),
        (MASTER, (0, 1, 0, 1), ("127.0.0.1", 0), "python"),
        (SBATCH, (0, 1, 0, 1), ("127.0.0.1", 0), "python"),
        ({**SBATCH, "SLURM_STEP_ID": "4294967291"}, (0, 1, 0, 1), ("127.0.0.1", 0), "python"),
        (TORCHRUN, (3, 4, 1, 2), ("node7", 1234), "torchrun"),
        (DEEPSPEED, (1, 2, 1, 2), ("127.0.0.1", 29500), "deepspeed"),
        (OPENMPI, (2, 4, 2, 4), ("127.0.0.1", 29500), "openmpi"),
        ({**MPICH, **MASTER}, (2, 4, 2, 4), ("node7", 1234), "mpich"),
        (SRUN, (4, 5, 0, 1), ("gpu-03", 20077), "srun"),
        ({**SRUN, **MASTER, "SLURM_NODEID": "1", "SLURM_PROCID": "2"}, (2, 5, 0, 2), ("node7", 1234), "srun"),
        ({**SRUN, "SLURM_JOB_ID": "4312345"}, (4, 5, 0, 1), ("gpu-03", 22345), "srun"),
        # a starter inside another: the inner one counts, that is the explicit one, then mpirun, then srun
        ({**SRUN, **TORCHRUN}, (3, 4, 1, 2), ("node7", 1234), "torchrun"),
        ({**OPENMPI, **DEEPSPEED}, (1, 2, 1, 2), ("127.0.0.1", 29500), "deepspeed"),
        ({**SRUN, **OPENMPI}, (2, 4, 2, 4), ("127.0.0.1", 29500), "openmpi"),
        ({**SRUN, **MPICH}, (2, 4, 2, 4), ("127.0.0.1", 29500), "mpich"),
        ({**SRUN, **MPICH, **DEEPSPEED}, (1, 2, 1, 2), ("127.0.0.1", 29500), "deepspeed"),
        ({**SRUN, **PMI2}, (4, 5, 0, 1), ("gpu-03", 20077), "srun"),
        # variables exported by hand that say the same are no contradiction
        ({**OPENMPI, "WORLD_SIZE": "4"}, (2, 4, 2, 4), ("127.0.0.1", 29500), "openmpi"),
        (
            {**OPENMPI, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"},
            (2, 4, 2, 4),
            ("127.0.0.1", 29500),
            "torchrun",
        ),
    ],
)
def test_each_starter_is_understood(
    environ: dict[str, str], place: tuple[int, ...], meeting: tuple[str, int], launcher: str
) -> None:
    info = read_environment(environ)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == place
    assert (info.master_addr, info.master_port) == meeting
    assert info.launcher == launcher


def test_a_job_of_slurm_has_its_ids_and_the_names_of_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    info = read_environment({**SRUN, "SLURMD_NODENAME": "gpu-07", "SLURM_GPUS_ON_NODE": "8"})
    assert (info.job, info.step, info.restarts, info.node, info.gpus) == ("77", "0", 0, "gpu-07", 8)
    assert info.nodes == ("gpu-03", "gpu-04", "gpu-07", "big1")
    assert info.tasks_of_nodes == (2, 2, 1)
    assert read_environment({**SRUN, "SLURM_RESTART_COUNT": "2"}).restarts == 2
    # in the batch script itself, which is no step
    info = read_environment({**SBATCH, "SLURM_RESTART_COUNT": "1"})
    assert (info.job, info.step, info.restarts, info.nodes) == ("77", "", 1, ())
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    info = read_environment({})
    assert (info.job, info.step, info.restarts, info.node, info.nodes, info.gpus) == ("", "", 0, "laptop", (), None)


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a[1,3-4]x,b-c,d[07]", ["a1x", "a3x", "a4x", "b-c", "d07"]),
        ("r[1-2]n[8-9]", ["r1n8", "r1n9", "r2n8", "r2n9"]),
        ("", []),
    ],
)
def test_the_list_of_nodes_is_spelled_out(nodelist: str, names: list[str]) -> None:
    assert read_environment({**SRUN, "SLURM_STEP_NODELIST": nodelist, **MASTER}).nodes == tuple(names)


@pytest.mark.parametrize(
    ("setting", "gpus"),
    [
        (None, None),
        ("0,2", ("0", "2")),
        ("GPU-ab, MIG-cd", ("GPU-ab", "MIG-cd")),
        ("", ()),
        ("NoDevFiles", ()),
        ("1,-1,2", ("1",)),
    ],
)
def test_visible_gpus_end_where_cuda_ends_them(setting: str | None, gpus: tuple[str, ...] | None) -> None:
    assert visible_gpus({} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}) == gpus


@pytest.mark.parametrize(
    ("starter", "name"),
    [
        (starter, name)
        for starter, environ in STARTERS.items()
        for name in environ
        if name not in (*MARKS, "SLURM_NTASKS")
    ],
)
def test_a_variable_that_is_missing_is_named(starter: str, name: str) -> None:
    """And never makes a run of its own of each process."""
    told = refused(without(STARTERS[starter], name))
    assert re.search(rf"the environment is half set: .*(without|but) {name}\b.*: start with", told), told


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        # several machines by mpirun, which does not say where rank 0 is
        ({**OPENMPI, "OMPI_COMM_WORLD_SIZE": "8"}, ["several machines", "without MASTER_ADDR and MASTER_PORT"]),
        ({**MPICH, "PMI_SIZE": "8", "MASTER_ADDR": "node7"}, ["several machines", "without MASTER_PORT"]),
        # another MPI's process manager, or what is left of one
        (
            without(MPICH, "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
            ["PMI_RANK=2", "without MPI_LOCALRANKID, MPI_LOCALNRANKS"],
        ),
        (without(MPICH, "PMI_RANK", "PMI_SIZE"), ["MPI_LOCALRANKID=2", "without PMI_RANK, PMI_SIZE"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE=4", "without OMPI_COMM_WORLD_RANK"]),
        ({"TORCHELASTIC_RUN_ID": "x", **SRUN}, ["torchrun without RANK, WORLD_SIZE, LOCAL_RANK"]),
        ({"RANK": "0"}, ["half set", "RANK=0", "without WORLD_SIZE, LOCAL_RANK"]),
        ({"WORLD_SIZE": "2"}, ["half set", "WORLD_SIZE=2", "without RANK"]),
        ({"LOCAL_RANK": "0"}, ["half set", "LOCAL_RANK=0", "unset"]),
        (without(TORCHRUN, "LOCAL_RANK"), ["half set", "RANK=3", "without LOCAL_RANK"]),
        (without(TORCHRUN, *MASTER), ["several machines", "without MASTER_ADDR and MASTER_PORT"]),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), ["half set", "without OMPI_COMM_WORLD_SIZE"]),
        (without(SRUN, "SLURM_LOCALID"), ["half set", "without SLURM_LOCALID"]),
        ({**TORCHRUN, "RANK": "4"}, ["contradicts itself", "RANK=4", "WORLD_SIZE=4", "rank must be below"]),
        ({**TORCHRUN, "RANK": "one"}, ["RANK must be a whole number", "'one'"]),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ["MASTER_PORT must be a whole number", "'http'"]),
        (
            {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ["MASTER_ADDR and MASTER_PORT"],
        ),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2),?,1"}, ["SLURM_STEP_TASKS_PER_NODE", "2(x2),?,1"]),
        ({**SRUN, "SLURM_NODEID": "3"}, ["SLURM_STEP_TASKS_PER_NODE", "2(x2),1", "SLURM_NODEID is 3"]),
        # srun --distribution=cyclic
        (
            {**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
            [
                "must be consecutive",
                "SLURM_PROCID is 3 for SLURM_LOCALID 1 of node 0",
                "is then 0",
                "--distribution=block",
            ],
        ),
        # left over in the user's shell
        ({**TORCHRUN, "MASTER_ADDR": "localhost"}, ["MASTER_ADDR must be", "is localhost", "unset MASTER_ADDR"]),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.1.1"}, ["MASTER_ADDR must be", "is 127.0.1.1"]),
        # every process of an mpirun or srun would take itself for the exported rank
        (
            {**OPENMPI, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            ["RANK is 0", "OMPI_COMM_WORLD_RANK", "is 2", "unset RANK"],
        ),
        ({**SRUN, "WORLD_SIZE": "8"}, ["WORLD_SIZE is 8", "SLURM_STEP_NUM_TASKS", "is 5", "unset WORLD_SIZE"]),
    ],
)
def test_half_set_and_contradictory_environments_name_the_variables(environ: dict[str, str], parts: list[str]) -> None:
    message = refused(environ)
    assert all(part in message for part in parts), message


# inner and outer starter -> what cannot both be true of one process
CONTRADICTIONS = {
    # both write RANK, of which only the last is left; their own marks are not
    ("torchrun", "deepspeed"): ("LOCAL_WORLD_SIZE", "2", "LOCAL_SIZE", "1"),
    # RANK by hand: of a launcher's own, whose mark is there, the one further up may differ
    ("torchrun", "openmpi"): ("RANK", "3", "OMPI_COMM_WORLD_RANK", "2"),
    ("torchrun", "mpich"): ("RANK", "3", "PMI_RANK", "2"),
    ("torchrun", "srun"): ("RANK", "3", "SLURM_PROCID", "2"),
    ("deepspeed", "openmpi"): ("RANK", "1", "OMPI_COMM_WORLD_RANK", "2"),
    ("deepspeed", "mpich"): ("RANK", "1", "PMI_RANK", "2"),
    ("deepspeed", "srun"): ("RANK", "1", "SLURM_PROCID", "2"),
    ("openmpi", "mpich"): ("OMPI_COMM_WORLD_RANK", "2", "PMI_RANK", "3"),
    # more than one task of srun on the node: these are no helpers of mpirun
    ("openmpi", "srun"): ("OMPI_COMM_WORLD_SIZE", "4", "SLURM_STEP_NUM_TASKS", "5"),
    ("mpich", "srun"): ("PMI_SIZE", "4", "SLURM_STEP_NUM_TASKS", "5"),
}


def test_every_pair_of_starters_has_its_contradiction() -> None:
    assert set(CONTRADICTIONS) == set(itertools.combinations(STARTERS, 2))


@pytest.mark.parametrize("pair", CONTRADICTIONS, ids="-".join)
def test_two_starters_that_contradict_each_other_are_named(pair: tuple[str, str]) -> None:
    inner, outer = pair
    ours, our_value, theirs, their_value = CONTRADICTIONS[pair]
    environ = {**STARTERS[outer], **without(STARTERS[inner], *MARKS), ours: our_value, theirs: their_value}
    if outer == "srun":
        environ |= {"SLURM_NODEID": "1", "SLURM_PROCID": "2"}
    told = refused(environ)
    assert f"{ours}, set by {inner}, is {our_value}" in told or told.startswith(f"{ours} is {our_value}, but ")
    assert f"{theirs}, set by {outer}, is {their_value}" in told
    assert "unset" in told


def test_nodes_that_are_one_machine_meet_at_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-07.cluster")
    here = {**SRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}
    assert read_environment(here | {"SLURMD_NODENAME": "n3"}).master_addr == "127.0.0.1"
    assert "is 127.0.0.1" in refused(here | {"SLURMD_NODENAME": "gpu-07"})


def test_starters_that_give_the_same_place_are_no_contradiction() -> None:
    same = {"PMI_RANK": "2", "PMI_SIZE": "5", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert read_environment({**SRUN, **same, **MASTER, "SLURM_NODEID": "1", "SLURM_PROCID": "2"}).rank == 2
    assert read_environment({**OPENMPI, **MPICH}).launcher == "openmpi"

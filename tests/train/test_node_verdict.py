"""Which nodes are called bad for which facts, and when leaving out nodes would not help."""

from dataclasses import replace

import pytest

from train.node_facts import NodeFacts
from train.node_gpus import Gpu
from train.node_verdict import Limits, Verdict, conclude, judge

GPU = Gpu(index=0, uuid="GPU-1", name="H100", total_gb=80.0, free_gb=79.0, ecc=True, uncorrected=0)
GOOD = NodeFacts(
    rank=0,
    node="",
    promised=1,
    commit="abc",
    versions={"torch": "2.13.0", "numpy": "2.4.6"},
    gpus=(GPU,),
    host_gb=100.0,
    clock_s=0.0,
    shards={"data.shards": "f1", "data.heldout": "f2"},
)


def verdict(
    *changes: dict | None, limits: Limits | None = None, seen: dict | None = None, strangers: tuple[int, ...] = ()
) -> Verdict:
    """Of nodes n0, n1, ... that differ from a good one by `changes`; None: it told nothing, or no facts (`strangers`)."""
    facts = {rank: replace(GOOD, rank=rank, **change) for rank, change in enumerate(changes) if change is not None}
    names = [f"n{rank}" for rank in range(len(changes))]
    everyone = {rank: list(facts) for rank in facts}
    limits = limits or Limits(min_host_gb=2.0, patience_s=7.0)
    problems = judge(facts, seen or everyone, names=names, limits=limits, place="/shared", strangers=strangers)
    return conclude(problems, size=len(changes))


def gpu(**changes) -> dict:
    return {"gpus": (replace(GPU, **changes),)}


def test_equal_nodes_in_order_are_good():
    assert verdict({}, {}, {}) == Verdict(0, (), ())
    assert verdict({}).exit_code == 0


@pytest.mark.parametrize(
    ("change", "check", "parts"),
    [
        ({"commit": "def"}, "commit", ["n2 has def", "2 of 3 nodes have abc", "check out"]),
        ({"commit": "abc+changes-1"}, "commit", ["n2 has abc+changes-1", "have abc:"]),
        ({"commit": None}, "commit", ["n2 has None", "have abc"]),
        (
            {"versions": {"torch": "2.12.0", "numpy": "2.4.6"}},
            "packages",
            ["n2 has torch 2.12.0 and", "have torch 2.13.0:", "requirements.lock"],
        ),
        (
            {"shards": {"data.shards": "f9", "data.heldout": "f2"}},
            "shards",
            ["n2 has data.shards f9", "data.shards f1"],
        ),
        ({"gpus": ()}, "GPUs", ["n2 has 0 and SLURM promised 1"]),
        ({"gpus": (), "promised": None}, "GPUs", ["n2 has 0 and most nodes have 1"]),
        (
            gpu(free_gb=60.0, processes=("process 7 (python, 19.0 GB)",)),
            "GPU memory",
            ["90% of its 80.0 GB", "GPU 0 of n2 has 60.0 GB", "72.0 GB", "process 7 (python, 19.0 GB)"],
        ),
        (gpu(uncorrected=3), "ECC", ["0 uncorrected", "GPU 0 of n2 has 3", "replace"]),
        (gpu(ecc=False), "ECC", ["n2 has Disabled and 2 of 3 nodes have Enabled"]),
        ({"host_gb": 1.5}, "host memory", ["n2 has 1.5 GB", "--min-host-gb is 2"]),
        ({"clock_s": -6.0}, "clock", ["within 5 s", "n2 is 6.0 s ahead of"]),
        ({"clock_s": 60.0}, "clock", ["n2 is 60.0 s behind"]),
        # what was not found differs from the others' too, which is no second problem
        (
            {"problems": {"shards": "the index is torn: restore it"}, "shards": {}},
            "shards",
            ["on n2 the index is torn: restore it"],
        ),
        ({"problems": {"commit": "git hangs"}, "commit": None, "versions": {}}, "commit", ["on n2 git hangs"]),
        ({"problems": {"GPUs": "nvidia-smi hangs"}, "gpus": ()}, "GPUs", ["on n2 nvidia-smi hangs"]),
        (None, "folder", ["n2 has written nothing within 7 s", "/shared", "starts no program"]),
    ],
)
def test_the_node_that_differs_is_named_with_both_values(change: dict | None, check: str, parts: list[str]):
    found = verdict({}, {}, change)
    assert (found.exit_code, found.bad) == (1, (2,))
    (problem,) = found.problems
    assert problem.check == check
    assert all(part in problem.sentence for part in parts), problem.sentence


def test_most_nodes_are_right_even_against_the_first():
    for change in ({"commit": "def"}, {"versions": {}}, {"clock_s": 60.0}):
        assert verdict(change, {}, {}).bad == (0,)


def test_the_first_node_is_right_on_a_tie():
    for change in ({"commit": "def"}, {"clock_s": 60.0}, gpu(ecc=False)):
        assert verdict({}, change).bad == (1,)
        assert verdict({}, change, change, {}).bad == (1, 2)


def test_a_commit_of_each_node_its_own_is_no_nodes_fault():
    found = verdict({"commit": "a"}, {"commit": "b"}, {"commit": "c"})
    assert (found.exit_code, found.bad) == (3, ())
    assert len(found.problems) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"problems": {"shards": "there is no folder of shards"}},
        gpu(free_gb=1.0),
        gpu(uncorrected=1),
        {"host_gb": 0.1},
        {"gpus": ()},
    ],
)
def test_what_is_wrong_on_all_nodes_is_3(change: dict):
    assert verdict(change, change).exit_code == 3
    assert verdict(change, {}).exit_code == 1


def test_of_a_node_alone_its_devices_are_its_fault_and_its_files_are_not():
    assert verdict(gpu(uncorrected=1)).exit_code == 1
    assert verdict({"problems": {"shards": "no folder"}}).exit_code == 3


def test_limits_of_the_command_replace_what_is_usual():
    low = gpu(free_gb=60.0)
    assert verdict({}, low, limits=Limits(min_gpu_gb=50.0)).exit_code == 0
    assert verdict({}, low, limits=Limits(min_gpu_gb=60.5)).bad == (1,)
    assert verdict({}, low, {"gpus": ()}, limits=Limits(gpus=0)).exit_code == 0
    assert verdict({"gpus": (GPU, GPU)}, {}, limits=Limits(gpus=2)).bad == (1,)


def test_a_gpu_that_tells_nothing_is_not_bad():
    silent = gpu(total_gb=None, free_gb=None, ecc=None, uncorrected=None)
    assert verdict(silent, silent).exit_code == 0
    assert verdict({}, {}, silent).exit_code == 0


def test_a_clock_that_was_read_slowly_is_not_blamed_for_it():
    assert verdict({}, {"clock_s": 6.0, "clock_error_s": 1.5}).exit_code == 0
    assert verdict({}, {"clock_s": 6.0, "clock_error_s": 0.5}).exit_code == 1
    # nor is it the other's fault that the right one was
    assert verdict({"clock_error_s": 1.5}, {"clock_s": 6.0}).exit_code == 0
    assert verdict({"clock_error_s": 0.5}, {"clock_s": 6.0}).exit_code == 1


def test_the_smaller_group_of_those_that_see_each_other_has_the_wrong_folder():
    found = verdict({}, {}, {}, seen={0: [0], 1: [1, 2], 2: [1, 2]})
    assert found.bad == (0,)
    assert "n0 and the others see each other's files in 0 of 2 cases" in found.problems[0].sentence
    # one way is not enough: n1's files reach nobody
    assert verdict({}, {}, {}, seen={0: [0, 2], 1: [0, 1, 2], 2: [0, 2]}).bad == (1,)


def test_of_two_halves_that_do_not_see_each_other_neither_is_blamed():
    """The first node may be the one without the file system."""
    for found in (
        verdict({}, None),
        verdict({}, None, {}, None),
        verdict({}, {}, seen={0: [0], 1: [1]}),
        verdict({}, {}, {}, {}, seen={0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}),
    ):
        assert (found.exit_code, found.bad) == (3, ())
        assert "mount the shared" in found.problems[0].sentence
    assert verdict({}, None, {}).bad == (1,)


def test_a_node_whose_words_are_no_facts_has_another_commit():
    found = verdict({}, {}, None, strangers=(2,))
    assert (found.exit_code, found.bad) == (1, (2,))
    (problem,) = found.problems
    assert problem.check == "commit"
    assert "n2 tells its facts as another version" in problem.sentence

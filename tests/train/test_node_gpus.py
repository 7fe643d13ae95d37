"""What is read out of nvidia-smi's answers. The answers are written by hand after its manual: no GPU was there to record them."""

import os
import stat
from pathlib import Path

import pytest

from train.node_gpus import parse_gpus, read_gpus

H100 = "0, GPU-aaaa1111, 81559, 81008, Enabled, 0, Disabled, NVIDIA H100 80GB HBM3\n"
NO_ECC = "1, GPU-bbbb2222, 24564, 20000, [N/A], [N/A], [N/A], NVIDIA GeForce RTX 4090\n"
OFF = "2, GPU-cccc3333, 81559, 100, Disabled, [N/A], Disabled, NVIDIA H100 80GB HBM3\n"
CUT = "3, GPU-dddd4444, 40960, 40000, Enabled, 2, Enabled, NVIDIA A100-SXM4-40GB\n"
REFUSED = "4, GPU-eeee5555, [Insufficient Permissions], [Insufficient Permissions], Enabled, [Unknown Error], Disabled, H100\n"
LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111)
GPU 3: NVIDIA A100-SXM4-40GB (UUID: GPU-dddd4444)
  MIG 3g.20gb     Device  0: (UUID: MIG-0001)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-0002)
GPU 5: other (UUID: GPU-f)
  MIG 1g.5gb      Device  0: (UUID: MIG-0003)
"""
PROCESSES = "GPU-aaaa1111, 4242, 1024, /usr/bin/python3, with a comma\nGPU-cccc3333, 7, [N/A], [Not Found]\n"


def test_a_gpu_with_ecc_tells_memory_errors_and_processes():
    (gpu,) = parse_gpus(H100, PROCESSES, LISTED)
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-aaaa1111", "NVIDIA H100 80GB HBM3")
    assert (gpu.ecc, gpu.uncorrected) == (True, 0)
    assert gpu.total_gb == pytest.approx(81559 * 1048576 / 1e9, abs=1e-3)
    assert gpu.free_gb == pytest.approx(81008 * 1048576 / 1e9, abs=1e-3)
    assert gpu.processes == ("process 4242 (/usr/bin/python3, with a comma, 1.1 GB)",)


def test_what_a_gpu_does_not_tell_is_none_and_no_number():
    without, off, refused = parse_gpus(NO_ECC + OFF + REFUSED, PROCESSES, "")
    assert (without.ecc, without.uncorrected, without.processes) == (None, None, ())
    assert (off.ecc, off.uncorrected) == (False, None)
    assert off.processes == ("process 7 ([Not Found])",)
    assert (refused.total_gb, refused.free_gb, refused.ecc, refused.uncorrected) == (None, None, True, None)


def test_a_cut_gpu_counts_as_its_own_instances():
    whole, first, second = parse_gpus(H100 + CUT, "", LISTED)
    assert whole.free_gb is not None
    assert [gpu.uuid for gpu in (first, second)] == ["MIG-0001", "MIG-0002"]
    assert first.name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert (first.free_gb, first.total_gb, first.uncorrected) == (None, None, 2)


@pytest.mark.parametrize("answer", ["No devices were found\n", "0, GPU-a, 1, 2\n"])
def test_another_answer_is_an_error_that_quotes_it(answer: str):
    with pytest.raises(RuntimeError, match="nvidia-smi must answer with index,uuid") as caught:
        parse_gpus(answer, "", "")
    assert repr(answer.strip()) in str(caught.value)


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_only_visible_gpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gpus").write_text(H100 + NO_ECC + CUT)
    (tmp_path / "list").write_text(LISTED)
    script = f"case $1 in --query-gpu=*) cat {tmp_path}/gpus;; -L) cat {tmp_path}/list;; esac\n"
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert [gpu.uuid[:8] for gpu in read_gpus()] == ["GPU-aaaa", "GPU-bbbb", "MIG-0001", "MIG-0002"]
    assert [gpu.uuid[:8] for gpu in read_gpus(("1",))] == ["GPU-bbbb"]
    assert [gpu.uuid[:8] for gpu in read_gpus(("GPU-aa", "MIG-0002"))] == ["GPU-aaaa", "MIG-0002"]
    assert read_gpus(()) == ()


def test_an_nvidia_smi_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'Driver/library version mismatch'; exit 18\n")
    with pytest.raises(RuntimeError, match=r"status 18 \(Driver/library version mismatch\)"):
        read_gpus()


def test_one_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "exec sleep 60\n")
    monkeypatch.setattr("train.node_gpus.LIMIT_S", 0.2)
    with pytest.raises(RuntimeError, match=r"has not ended within 0.2 s"):
        read_gpus()


def test_no_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus() == ()

"""python -m train.checkpoint list, verify, prune: what is said of a folder, and that pruning never costs a resume."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.disk_states import plant, recorded
from tests.train.thread_mesh import STATE, draw, save_split
from train.checkpoint import latest
from train.checkpoint_tool import main
from train.engine import LocalMesh
from train.run_lock import hold, hold_together

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 100 to 500; `latest` means 500."""
    for step in (100, 200, 300, 400, 500):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def save(run: Path, step: int, *, keep: int = 9) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = {"parallel": {"zero_stage": 2}}
    extra = {"layout": {"processes": 3, "ep_size": 1}}
    state = dataclasses.replace(STATE, step=step, position=16 * step, config=config, extra=extra)
    return save_split(run / "checkpoints", draw(step), 3, state=state, keep=keep)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def flip(file: Path) -> None:
    data = file.read_bytes()
    half = len(data) // 2
    file.write_bytes(data[:half] + bytes([data[half] ^ 0x40]) + data[half + 1 :])


def row(text: str, step: int) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [str(step)]]
    return line.split()


def test_list_shows_what_each_checkpoint_is(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "checkpoints" / "step_000600.partial").mkdir()
    assert main(["list", str(run)]) == 0
    text = capsys.readouterr().out
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step_000400").iterdir())
    assert row(text, 400) == f"400 6,400 {size:,} 4 processes 3, ep_size 1, zero 2 whole".split()
    assert row(text, 500) == f"500 8,000 {size:,} 4 processes 3, ep_size 1, zero 2 <- whole".split()
    assert "step_000600.partial is being written, or a killed save left it" in text


def test_list_says_what_is_wrong_as_far_as_it_looks(run: Path, capsys: pytest.CaptureFixture[str]):
    folder = run / "checkpoints"
    flip(folder / "step_000100" / "manifest.json")
    (folder / "step_000200" / "rank_00001.safetensors").unlink()
    with (folder / "step_000300" / "rank_00000.safetensors").open("ab") as file:
        file.write(b"\0")
    flip(folder / "step_000400" / "rank_00000.safetensors")
    main(["list", str(run)])
    text = capsys.readouterr().out
    assert "manifest.json does not match its checksum" in text
    assert "rank_00001.safetensors is missing" in text
    assert "rank_00000.safetensors must have" in text
    assert row(text, 400)[-1] == "whole"  # lengths and manifests alone do not tell
    assert (row(text, 100)[1], row(text, 100)[-1]) == ("?", "damaged")
    main(["list", "--verify", str(folder)])
    text = capsys.readouterr().out
    assert "step_000400/rank_00000.safetensors does not match its checksum" in text
    assert row(text, 500)[-1] == "whole"


def test_verify_names_every_damaged_file_and_what_a_resume_would_use(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(run)]) == 0
    assert f"a resume would use {run}/checkpoints/step_000500" in capsys.readouterr().out
    folder = run / "checkpoints"
    for name in ("rank_00000.safetensors", "rank_00001.safetensors"):
        flip(folder / "step_000500" / name)
    flip(folder / "step_000400" / "manifest.sha256")
    (folder / "step_000200" / "rank_00001.safetensors").unlink()
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    damaged = [line for line in lines if line.startswith("damaged: ")]
    for line, name in zip(
        damaged,
        [
            "step_000200/rank_00001.safetensors",
            "step_000400/manifest.json",
            "step_000500/rank_00000.safetensors",
            "step_000500/rank_00001.safetensors",
        ],
        strict=True,
    ):
        assert name in line
    assert [line.split()[1].rstrip(",")[-3:] for line in lines if line.startswith("whole: ")] == ["100", "300"]
    assert lines[-1] == f"a resume would use {folder}/step_000300"
    assert latest(folder) == folder / "step_000300"
    assert main(["verify", "--step", "300", str(run)]) == 0
    assert main(["verify", "--step", "500", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"a resume would use {folder}/step_000300"
    for step in (100, 300):
        flip(folder / f"step_000{step}" / "rank_00000.safetensors")
    assert main(["verify", str(run)]) == 1
    assert "would find no whole checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep", "2"], [400, 500]),
        (["--keep", "1"], [500]),
        (["--keep", "9"], [100, 200, 300, 400, 500]),
        (["--keep", "1", "--every", "200"], [200, 400, 500]),
        (["--keep", "2", "--dry-run"], [100, 200, 300, 400, 500]),
    ],
)
def test_prune_keeps_the_newest_and_the_multiples(run: Path, capsys, options: list[str], left: list[int]):
    (run / "checkpoints" / "notes.txt").write_text("the user's own")
    folder = run / "checkpoints"
    sizes = {step: sum(f.stat().st_size for f in (folder / f"step_000{step}").iterdir()) for step in steps(run)}
    assert main(["prune", str(run), *options]) == 0
    assert steps(run) == left
    gone = [step for step in sizes if step not in ([400, 500] if "--dry-run" in options else left)]
    said = capsys.readouterr().out.splitlines()
    verb = "would go" if "--dry-run" in options else "removed"
    assert said[:-1] == [f"{verb}: {folder}/step_000{step}, {sizes[step]:,} bytes" for step in gone]
    assert said[-1] == f"{verb}: {len(gone)} checkpoints, {sum(sizes[step] for step in gone):,} bytes"
    assert (folder / "notes.txt").exists()
    assert latest(folder) == folder / "step_000500"


def test_prune_never_removes_what_latest_means(run: Path):
    """Someone went back by hand: `latest` means an old one."""
    folder = run / "checkpoints"
    line = subprocess.run(
        ["sha256sum", "step_000200/manifest.json"], cwd=folder, check=True, capture_output=True
    ).stdout
    (folder / "latest").write_bytes(line)
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert steps(run) == [200, 500]
    assert latest(folder) == folder / "step_000200"


def test_prune_never_removes_the_last_whole_one(run: Path):
    folder = run / "checkpoints"
    flip(folder / "step_000500" / "rank_00000.safetensors")
    (folder / "step_000400" / "rank_00001.safetensors").unlink()
    flip(folder / "step_000300" / "rank_00001.safetensors")
    assert main(["prune", str(run), "--keep", "2"]) == 0
    assert steps(run) == [200, 400, 500]
    assert latest(folder) == folder / "step_000200"
    flip(folder / "step_000200" / "rank_00000.safetensors")
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert steps(run) == [500]  # nothing whole is left to be kept


def test_prune_keeps_the_newest_whole_one_whatever_older_ones_stay(run: Path):
    """200 is whole and stays as a multiple; it is no reason to let 300 go, from which a resume would go on."""
    folder = run / "checkpoints"
    for step in (400, 500):
        flip(folder / f"step_000{step}" / "rank_00000.safetensors")
    assert main(["prune", str(run), "--keep", "1", "--every", "200"]) == 0
    assert steps(run) == [200, 300, 400, 500]
    assert latest(folder) == folder / "step_000300"


@pytest.mark.parametrize("refused", ["rename", "rmtree"])
def test_prune_says_what_it_could_not_remove(run: Path, capsys, monkeypatch: pytest.MonkeyPatch, refused: str):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr({"rename": Path, "rmtree": shutil}[refused], refused, refuse)
        assert main(["prune", str(run), "--keep", "4"]) == 1
    said = capsys.readouterr()
    assert f"error: 1 of {run}/checkpoints must be removed, but could not be, the first of them step_000100" in said.err
    assert said.out == "removed: 0 checkpoints, 0 bytes\n"
    assert main(["prune", str(run), "--keep", "4"]) == 0
    assert sorted(path.name for path in (run / "checkpoints").glob("step_000100*")) == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "latest").unlink(), "latest must name a checkpoint, but is missing"),
        (lambda folder: (folder / "latest").write_bytes(b"\0" * 80), "latest must be a line as sha256sum writes it, but is damaged"),
        (lambda folder: shutil.rmtree(folder / "step_000500"), "latest must have the checksum of a checkpoint's manifest.json, but"),
    ],
    ids=["missing", "damaged", "its checkpoint is gone"],
)  # fmt: skip
@pytest.mark.parametrize("command", [["verify"], ["list", "--verify"]])
def test_a_latest_that_is_of_no_use_is_named(run: Path, capsys, command: list[str], damage, sentence: str):
    assert main([*command, str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out
    damage(run / "checkpoints")
    assert main([*command, str(run)]) == 1
    assert f"damaged: {run}/checkpoints/{sentence}" in capsys.readouterr().out


def test_a_file_with_a_checkpoints_name_is_a_damaged_checkpoint(run: Path, capsys):
    (run / "checkpoints" / "step_000600").write_text("no folder")
    assert main(["list", str(run)]) == 0
    assert row(capsys.readouterr().out, 600)[-1] == "damaged"
    assert main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "step_000600/manifest.json cannot be read (Not a directory)" in said
    assert said.splitlines()[-1] == f"a resume would use {run}/checkpoints/step_000500"


def test_a_kill_of_prune_at_any_instant_leaves_what_a_resume_needs(run: Path, tmp_path: Path, monkeypatch):
    folder = run / "checkpoints"
    with recorded(folder, monkeypatch) as recorder:
        main(["prune", str(run), "--keep", "2"])
    assert len(recorder.states) >= 6
    for i, tree in enumerate(recorder.states):
        again = tmp_path / f"killed{i}" / "checkpoints"
        again.parent.mkdir()
        plant(tree, again)
        assert latest(again) == again / "step_000500"
        assert main(["verify", str(again)]) == 0, "a folder with a plain name is never half there"
        assert main(["prune", str(again.parent), "--keep", "2"]) == 0
        assert sorted(path.name for path in again.iterdir()) == ["latest", "step_000400", "step_000500"]


def test_prune_is_refused_while_a_run_holds_the_folder(run: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.checkpoint_tool.hold", lambda path, **how: hold(path, patience_s=0.0, **how))
    (run.parent / "link").symlink_to(run / "checkpoints")
    with hold_together(LocalMesh(torch.device("cpu")), run):
        for folder in (run, run / "checkpoints", run.parent / "link"):
            assert main(["prune", str(folder), "--keep", "1"]) == 1
            assert f"process {os.getpid()} on" in capsys.readouterr().err
        assert not (run.parent / "lock").exists()
        assert steps(run) == [100, 200, 300, 400, 500]
        for command in (["list"], ["verify"], ["prune", "--keep", "1", "--dry-run"]):
            assert main([*command, str(run)]) == 0


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["list", "DIR"], "DIR must be a run folder or its folder of checkpoints"),
        (["verify", "RUN", "--step", "7"], "--step must be the step of a checkpoint, but it is 7 and"),
    ],
)
def test_a_wrong_argument_is_one_sentence(run: Path, tmp_path: Path, capsys, command: list[str], sentence: str):
    (tmp_path / "empty").mkdir()
    places = {"DIR": str(tmp_path / "empty"), "RUN": str(run)}
    assert main([places.get(word, word) for word in command]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_runs_as_a_program(run: Path):
    shutil.rmtree(run / "checkpoints" / "step_000100")
    done = subprocess.run(
        [sys.executable, "-m", "train.checkpoint", "list", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, 500)[-1] == "whole"

"""Bad input, through the real program: one sentence that says what must hold, both values and the remedy; nothing is lost.

Each part has tests of its own beside its module; here the sentence must reach the user, and the run folder must stay as it was.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from data.prepare import main as prepare
from tests.end_to_end.conftest import ConfigFile, records

ALONE = "parallel.zero_stage=0"


@pytest.fixture
def copied(config: ConfigFile, shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage; data.shards must be set to its train folder."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def tar_in(folder: Path) -> Path:
    return sorted(folder.glob("*.tar"))[0]


def test_a_missing_tar(config: ConfigFile, copied: Path, fails):
    tar_in(copied / "train").unlink()
    sentence = fails(config.arguments(f"data.shards={copied}/train", ALONE), code=1)
    assert "train-000000.tar" in sentence
    assert "prepare the shards" in sentence
    assert not config.folder.exists()


def test_a_truncated_tar(config: ConfigFile, copied: Path, fails):
    tar = tar_in(copied / "train")
    size = tar.stat().st_size
    os.truncate(tar, size // 2)
    sentence = fails(config.arguments(f"data.shards={copied}/train", ALONE), code=1)
    assert str(size) in sentence.replace(",", "")
    assert str(size // 2) in sentence.replace(",", "")


def test_an_index_that_does_not_match_its_shards(config: ConfigFile, copied: Path, fails):
    index = copied / "train" / "index.json"
    index.write_text(index.read_text().replace('"documents": ', '"documents": 1'))
    assert "index.json" in fails(config.arguments(f"data.shards={copied}/train", ALONE), code=1)


def test_another_tokenizer_than_the_shards(config: ConfigFile, tmp_path: Path, fails):
    source = tmp_path / "text"
    source.mkdir()
    for number in range(60):
        (source / f"{number}.txt").write_text(f"document {number} " * 50)
    arguments = ["--source", str(source), "--out", str(tmp_path / "other"), "--tokenizer", "bpe", "--vocab-size", "300"]
    prepare([*arguments, "--workers", "1"])
    sentence = fails(config.arguments(f"data.heldout={tmp_path}/other/heldout", ALONE))
    assert "same tokenizer" in sentence


def test_a_vocabulary_that_differs_from_the_shards(config: ConfigFile, fails):
    sentence = fails(config.arguments("model.vocab_size=300", ALONE))
    assert "model.vocab_size is 300" in sentence
    assert "257" in sentence
    assert "null" in sentence


def test_an_ep_size_that_does_not_divide_the_processes(config: ConfigFile, fails):
    sentence = fails(config.arguments("parallel.ep_size=3"), world_size=4)
    assert "ep_size is 3" in sentence
    assert "4 processes" in sentence


@pytest.mark.parametrize(
    ("setting", "named"), [("data.streams=6", "streams is 6"), ("data.global_batch_size=12", "12 / 2 = 6 rows")]
)
def test_streams_or_rows_that_the_processes_do_not_divide(config: ConfigFile, fails, setting, named):
    sentence = fails(config.arguments(setting), world_size=4)
    assert named in sentence
    assert "4 processes" in sentence


def test_too_few_tokens(config: ConfigFile, fails):
    sentence = fails(config.arguments("data.sequence_length=1000000", ALONE))
    assert "8000001" in sentence.replace(",", "")
    assert not (config.folder / "checkpoints").exists()


def test_zero_stage_3(config: ConfigFile, fails):
    assert "averages different experts together" in fails(config.arguments("parallel.zero_stage=3"))


def test_a_run_folder_with_another_config_keeps_its_run(config: ConfigFile, fails):
    from launcher.main import main

    assert main(config.arguments(ALONE, "run.steps=4")) == 0
    before = records(config.folder)
    sentence = fails(config.arguments(ALONE, "run.steps=4", "model.d_model=64", "optim.lr=1.0e-3"))
    assert "model.d_model was 32 and is 64" in sentence
    assert "optim.lr was 0.003 and is 0.001" in sentence
    assert records(config.folder) == before


def test_a_checkpoint_of_another_config_is_refused_also_without_config_yaml(config: ConfigFile, fails):
    from launcher.main import main

    assert main(config.arguments(ALONE, "run.steps=4")) == 0
    (config.folder / "config.yaml").unlink()
    assert "run.seed was 5 and is 9" in fails(config.arguments(ALONE, "run.steps=6", "run.seed=9"))
    assert not (config.folder / "config.yaml").exists()


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(config: ConfigFile, fails, monkeypatch):
    from launcher.main import main
    from train import storage

    assert main(config.arguments(ALONE, "run.steps=4")) == 0
    before = (config.folder / "checkpoints" / "latest").read_text()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "sync_folder", full)
    sentence = fails(config.arguments(ALONE, "run.steps=8"), code=1)
    assert "step_000008" in sentence
    monkeypatch.undo()
    assert (config.folder / "checkpoints" / "latest").read_text() == before
    assert main(config.arguments(ALONE, "run.steps=8")) == 0
    assert sorted(records(config.folder)) == list(range(1, 9))


def test_a_loss_that_is_not_finite(config: ConfigFile, fails):
    sentence = fails(config.arguments(ALONE, "optim.lr=1.0e+30", "optim.clip_grad_norm=0.0"), code=1)
    assert "must be finite" in sentence
    assert "lower optim.lr" in sentence


def test_a_run_that_left_no_checkpoint_may_begin_again_with_another_config(config: ConfigFile, fails):
    from launcher.main import main

    fails(config.arguments(ALONE, "optim.lr=1.0e+30", "optim.clip_grad_norm=0.0"), code=1)
    before = (config.folder / "metrics.jsonl").read_text()
    assert main(config.arguments(ALONE, "run.steps=4")) == 0
    assert sorted(records(config.folder)) == [1, 2, 3, 4]
    assert (config.folder / "metrics.jsonl.1").read_text() == before


@pytest.mark.parametrize(
    ("place", "code", "named"),
    [
        ("file", 2, "run.dir must be a folder, but "),
        ("file/run", 1, "file/run cannot be written (Not a directory)"),
        ("/proc/run", 1, "/proc/run cannot be written (No such file or directory)"),
        ("full", 1, "full/metrics.jsonl cannot be written (No space left on device)"),
    ],
)
def test_a_run_folder_that_cannot_be_written(config: ConfigFile, tmp_path: Path, capsys, place, code, named):
    from launcher.main import main

    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    assert main(config.arguments(ALONE, f"run.dir={tmp_path / place}")) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert "choose another run.dir" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_row_that_is_damaged_behind_the_index(config: ConfigFile, copied: Path, capsys, split: str):
    from launcher.main import main

    tar = tar_in(copied / split)
    tar.write_bytes(b"\xa5" * tar.stat().st_size)
    settings = [f"data.{name}={copied}/{folder}" for name, folder in (("shards", "train"), ("heldout", "heldout"))]
    assert main(config.arguments(ALONE, *settings)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tar) in line


def test_a_source_folder_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "picture.png").write_bytes(bytes(range(256)))
    assert prepare(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) != 0
    assert str(tmp_path / "source") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)

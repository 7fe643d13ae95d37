"""The loader's benchmark in a small form: it measures what it says, and its bar is the GPU's appetite."""

from pathlib import Path

import pytest

from benchmarks.data import bench_loader
from benchmarks.data.bench_loader import Case, Speed, main, tokens_of_a_gpu
from data.index import open_index


def test_an_h100_eats_what_the_macs_of_the_1b_model_leave():
    """150.0 million MACs a token by `--dry-run` of configs/switchall_1b.yaml."""
    assert tokens_of_a_gpu() == pytest.approx(989e12 * 0.4 / (6 * 150.0e6), rel=1e-3)


def test_documents_have_the_mean_length_that_the_table_names(tmp_path: Path):
    index = open_index(bench_loader.write_shards(tmp_path / "shards", mean=500, tokens=1_000_000, seed=1))
    assert index.num_tokens >= 1_000_000
    assert 400 < index.num_tokens / index.num_documents < 600


@pytest.mark.parametrize(("maker", "code", "word"), [(8.9e6, 0, "met"), (8.7e6, 1, "missed")])
def test_the_status_says_whether_the_bar_is_met(capsys, monkeypatch, maker, code, word):
    monkeypatch.setattr(bench_loader, "CASES", (Case(500, 1, 0),))
    monkeypatch.setattr(bench_loader, "measure", lambda *_, **__: Speed(wall=1e6, maker=maker, taker=2e6))
    assert main(["--tokens", "1000"]) == code
    assert f"| 500 | 1 | 0 | 1.0 | {maker / 1e6:.1f} | 2.0 | 20 | {word} |" in capsys.readouterr().out


def test_a_tiny_case_is_really_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench_loader, "CASES", (Case(500, 2, 0),))
    monkeypatch.setattr(bench_loader, "STREAMS", 8)
    main(["--tokens", "100000", "--seconds", "0.05", "--length", "64"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert float(cells[4]) > 0.05

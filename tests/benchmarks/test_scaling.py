"""The scaling prediction: what its numbers must obey, and what it writes."""

from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import efficiency, main, points
from parallel.predict import Hardware
from train.config import load_config

ONE_B = Path(__file__).resolve().parents[2] / "configs" / "switchall_1b.yaml"


def test_compute_and_the_exchange_inside_a_node_stay_and_what_crosses_nodes_grows():
    found = points(load_config(ONE_B), Hardware(), gpus=(8, 16, 1024))
    assert len({point.seconds.compute for point in found}) == 1
    inside = [point.seconds.exchange - point.seconds.by_verb["statistics"] for point in found]
    assert inside == pytest.approx([inside[0]] * 3)
    assert found[0].seconds.reduction < found[1].seconds.reduction < found[2].seconds.reduction
    for overlap in (False, True):
        shares = efficiency(found, overlap=overlap)
        assert shares[0] == 1.0 > shares[1] > shares[2] > 0.0


def test_with_links_without_limit_the_efficiency_is_one():
    found = points(load_config(ONE_B), Hardware(nvlink_gb=1e12, network_gb=1e12), gpus=(8, 64))
    assert efficiency(found, overlap=False) == pytest.approx([1.0, 1.0])


def test_one_micro_step_has_a_quarter_of_the_compute_and_the_same_gradients():
    config = load_config(ONE_B)
    (whole,), (single,) = points(config, Hardware(), gpus=(64,)), points(config, Hardware(), gpus=(64,), micro_steps=1)
    assert (whole.tokens, single.tokens) == (32_768, 8_192)
    assert whole.seconds.compute == pytest.approx(4 * (single.seconds.compute or 0.0))
    assert whole.seconds.reduction == pytest.approx(single.seconds.reduction)


def test_the_table_and_the_picture_say_that_they_are_predictions(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "GPUS", (8, 16))
    assert main(["--out", str(tmp_path), "--network-gb", "25"]) == 0
    printed = capsys.readouterr().out
    table, picture = sorted(tmp_path.iterdir())
    assert (table.suffix, picture.suffix) == (".md", ".png")
    assert table.read_text() == printed
    assert printed.startswith("# Predicted")
    assert "Predictions, not measurements" in printed
    assert "25 GB/s to others" in printed
    assert printed.count("\n| 16 |") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")

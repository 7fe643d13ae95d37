"""What --dry-run says of experts that may move. The rest of its text: test_dry_run.py."""

from pathlib import Path

import pytest

from tests.train.tiny_job import ALONE
from train.config import load_config
from train.dry_run import Plan, dry_run

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml"
# of four layers: values and outputs of 2 heads of 4 experts, 128 x 32; 16 experts of 64 channels, in and out
EXPERTS = 4 * (2 * 2 * 4 * 128 * 32 + 16 * 2 * 64 * 128)


def told(capsys: pytest.CaptureFixture[str], *settings: str) -> list[str]:
    """On 8 processes."""
    config = load_config(TINY, ["model.vocab_size=256", *settings])
    dry_run(config, ALONE, Plan(nodes=4, gpus_per_node=2))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("# placement: ")]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (["parallel.zero_stage=1"], 12 * EXPERTS / 8),
        (["parallel.zero_stage=0"], 12 * EXPERTS / 4),
        (["parallel.zero_stage=1", "optim.optimizer=sgd"], 4 * EXPERTS / 8),
    ],
)
def test_a_move_of_all_experts_is_told_with_its_bytes(capsys, settings: list[str], size: float):
    (line,) = told(
        capsys, "parallel.placement_every_steps=50", "parallel.ep_size=4", "parallel.exchange=tokens", *settings
    )
    assert (
        f"every 50 steps the experts of 12 bank(s) may change places, at most {size:,.0f} bytes that a rank sends"
        in line
    )


@pytest.mark.parametrize("settings", [["parallel.exchange=weights", "parallel.ep_size=4"], ["parallel.ep_size=1"]])
def test_where_no_expert_moves_that_is_told(capsys, settings: list[str]):
    (line,) = told(capsys, "parallel.placement_every_steps=50", *settings)
    assert line == "# placement: no expert moves, because no bank's tokens travel to experts that could live elsewhere"


def test_tables_stay_where_they_are(capsys):
    pkm = [f"model.pkm.{key}" for key in ("num_heads=2", "num_keys=8", "top_k=2", "key_dim=8")]
    tables = ["model.feedforwards=[pkm]", "model.sigma_moe=null", *pkm]
    (line,) = told(
        capsys, "parallel.placement_every_steps=50", "parallel.ep_size=4", "parallel.exchange=tokens", *tables
    )
    assert "the experts of 8 bank(s) may change places" in line  # those of the mixers


def test_without_the_setting_nothing_is_told(capsys):
    assert told(capsys, "parallel.ep_size=4") == []

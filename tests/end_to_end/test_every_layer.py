"""Every mixer and every feed-forward trains on two expert-parallel processes, and resumes bit for bit.

A kind that is added gets its line in MIXERS or FEEDFORWARDS. What a layer computes is tested in tests/model/; here it goes through a
whole run: config, engine, exchange, checkpoint, evaluation. The runs are those of train/run.py, on a warm pool. PAIRS are all mixers
with the two plain feed-forwards, one mixer of each family with the tables, and the forms of sigma-MoE with one mixer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import records
from train.checkpoint import read_tensors
from train.config import Config, to_yaml

STEPS, SAVED = 20, 10
ATTENTION = {"num_heads": 2, "head_dim": 8}
SWITCHHEAD = ATTENTION | {"num_experts": 3, "top_k": 2}

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"attention": ATTENTION},
    "attention_xl": {"attention": ATTENTION | {"positions": "xl", "memory_blocks": 1}},
    "grouped_top_k": {"attention": ATTENTION | {"num_kv_heads": 1, "attend_top_k": 4, "attend_chunk": 8}},
    "switchhead": {"switchhead": SWITCHHEAD},
    "switchhead_xl": {"switchhead": SWITCHHEAD | {"positions": "xl", "memory_blocks": 1}},
    "switchhead_top_k": {"switchhead": SWITCHHEAD | {"attend_top_k": 4, "attention_dropout": 0.1}},
    "switchhead_qkvo": {"switchhead": SWITCHHEAD | {"experts": ["q", "k", "v", "o"], "routers": "separate"}},
    "hsm": {"hsm": {"variant": "constant"}},
    "hsm_gate": {"hsm": {"variant": "double_gate"}},
    "hsm_fusion": {"hsm": {"variant": "fusion", "hidden_dim": 32}},
    "hsm_switchhead": {"hsm": {"variant": "matrix"}, "switchhead": SWITCHHEAD},
}
FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "sigma_moe": {"sigma_moe": {"num_experts": 5, "expert_dim": 16, "top_k": 2}},
    "dense_mlp": {"dense_mlp": {"hidden_dim": 48}},
    "pkm": {"pkm": {"num_keys": 5, "num_heads": 2, "top_k": 4, "scores": "relu", "initialisation": "dense_equivalent"}},
    "peer": {"peer": {"num_experts": 25, "num_heads": 2, "top_k": 4, "key_dim": 8}},
    "balanced": {
        "sigma_moe": {"num_experts": 5, "expert_dim": 16, "top_k": 2, "balance": "bias", "bias_update_speed": 0.1}
    },
    "recurrent": {
        "sigma_moe": {"num_experts": 5, "expert_dim": 16, "top_k": 2, "router": "recurrent", "router_dim": 8}
    },
    "swiglu": {"dense_mlp": {"hidden_dim": 32, "activation": "swiglu"}},
}
PAIRS = [(mixer, feedforward) for feedforward in ("sigma_moe", "dense_mlp") for mixer in MIXERS]
PAIRS += [(mixer, table) for table in ("pkm", "peer") for mixer in ("attention", "switchhead", "grouped_top_k", "hsm")]
PAIRS += [("switchhead", form) for form in ("balanced", "recurrent", "swiglu")]


def write_config(path: Path, *, shards: Path, mixer: str, feedforward: str) -> Path:
    """A model of two layers and width 32; `path` gets its config, the run folder lies beside it."""
    layers = MIXERS[mixer] | FEEDFORWARDS[feedforward]
    values = {
        "run": {"dir": str(path.parent / "run"), "steps": STEPS, "seed": 5, "log_every_steps": 1, "device": "cpu"},
        "data": {
            "shards": str(shards / "train"),
            "heldout": str(shards / "heldout"),
            "sequence_length": 24,
            "global_batch_size": 4,
            "streams": 8,
        },
        "model": {
            "d_model": 32,
            "num_layers": 2,
            "mixers": list(MIXERS[mixer]),
            "feedforwards": list(FEEDFORWARDS[feedforward]),
            "dropout": 0.1,
            **layers,
        },
        "optim": {"lr": 1.0e-2, "warmup_steps": 2},
        "checkpoint": {"every_steps": SAVED},
        "eval": {"every_steps": SAVED, "max_tokens": 400},
    }
    path.write_text(to_yaml(Config.model_validate(values)))
    return path


def run_on_this_rank(path: str) -> None:
    """The whole of a run, as launcher/main.py starts it, on one rank of a pool."""
    from parallel.config import ProcessInfo
    from train.config import load_config
    from train.run import run

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place: dict[str, Any] = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    run(load_config(path), ProcessInfo(**place, master_addr="", master_port=0, launcher="pool"))


@pytest.mark.parametrize(("mixer", "feedforward"), PAIRS)
def test_a_pair_learns_and_resumes_bit_for_bit_on_two_processes(
    mixer: str, feedforward: str, shards: Path, tmp_path: Path, pool: Callable[[int], Any]
):
    path, folder = tmp_path / "config.yaml", tmp_path / "run"
    write_config(path, shards=shards, mixer=mixer, feedforward=feedforward)
    pool(2).run(run_on_this_rank, str(path), timeout=60)
    whole = records(folder)
    first, last = (sum(whole[step]["loss"] for step in steps) / 3 for steps in ((1, 2, 3), (18, 19, 20)))
    assert last < first - 0.5
    weights = read_tensors(folder / "checkpoints" / "step_000020", kind="master")

    shutil.rmtree(folder / "checkpoints" / "step_000020")
    pool(2).run(run_on_this_rank, str(path), timeout=60)
    again = records(folder)
    assert again.keys() == whole.keys()
    for step in range(1, STEPS + 1):
        for key in ("loss", "grad_norm", "heldout_loss", "routers", "bias_ranges"):
            assert again[step].get(key) == whole[step].get(key), f"{key} of step {step}"
    resumed = read_tensors(folder / "checkpoints" / "step_000020", kind="master")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)

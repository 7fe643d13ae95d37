"""The SwitchAlls of configs/ that are too large for one GPU: the figures in their comments."""

import re
from pathlib import Path

import pytest

from model.cost_table import model_table
from tests.train.test_config import parameters, world
from train.build import build_model
from train.config import Config, load_config
from train.dry_run import Forecast, forecast

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ["switchall_1b", "switchall_7b", "switchall_30b"]
VOCABULARY = 32000


def figures(name: str, pattern: str) -> list[float]:
    """The numbers in the file's comments, read as one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    comments = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    found = re.search(pattern, comments)
    assert found is not None, pattern
    return [float(number.replace(",", "")) for number in found.groups()]


def config_and_forecast(name: str, *, nodes: int) -> tuple[Config, Forecast]:
    config = load_config(CONFIGS / f"{name}.yaml")
    model = build_model(config, vocab_size=VOCABULARY)
    return config, forecast(config, world(8 * nodes, per_node=8), model)


def expert_weights(config: Config) -> int:
    attention, mlp = config.model.switchhead, config.model.sigma_moe
    assert attention is not None
    assert mlp is not None
    of_attention = 2 * attention.num_heads * attention.num_experts * attention.head_dim
    return config.model.num_layers * config.model.d_model * (of_attention + 2 * mlp.num_experts * mlp.expert_dim)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_and_the_active_ones_are_those_of_the_formulas(name: str):
    config = load_config(CONFIGS / f"{name}.yaml")
    count = parameters(config, vocab_size=VOCABULARY)
    attention, mlp, D = config.model.switchhead, config.model.sigma_moe, config.model.d_model
    assert attention is not None
    assert mlp is not None
    idle_attention = 2 * attention.num_heads * (attention.num_experts - attention.top_k) * attention.head_dim
    idle = config.model.num_layers * D * (idle_attention + 2 * (mlp.num_experts - mlp.top_k) * mlp.expert_dim)
    active = count - idle - (VOCABULARY - 1) * D  # one row of the embedding
    assert figures(name, r"([\d,]+) parameters, ([\d,]+) of which work on one token") == [count, active]


@pytest.mark.parametrize("name", NAMES)
def test_memory_and_bytes_on_two_nodes_are_what_the_dry_run_predicts(name: str):
    _, found = config_and_forecast(name, nodes=2)
    sent = found.prediction.sent.values()
    sizes = (found.prediction.memory.total, sum(one.near for one in sent), sum(one.far for one in sent))
    pattern = (
        r"memory per GPU ([\d.]+) GB .* sent per GPU and step ([\d.]+) GB inside the node, ([\d.]+) GB to the other"
    )
    assert figures(name, pattern) == [round(size / 1e9, 3) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_a_node_of_8_splits_the_experts_evenly_and_two_nodes_their_state(name: str):
    config, found = config_and_forecast(name, nodes=2)
    experts = expert_weights(config)
    dense = parameters(config, vocab_size=VOCABULARY) - experts
    memory = found.prediction.memory
    assert memory.weights == 4 * (dense + experts / 8)
    assert memory.moments == pytest.approx(8 * (dense / 16 + experts / 16), rel=1e-6)


def test_one_node_leaves_the_30b_no_room_for_activations():
    text = (CONFIGS / "switchall_30b.yaml").read_text()
    _, found = config_and_forecast("switchall_30b", nodes=1)
    assert f"on 1 node the experts' state is not split: {found.prediction.memory.total / 1e9:.1f} GB" in text


@pytest.mark.parametrize(
    ("name", "floats", "size"), [("switchall_1b", "288,000", "4.7"), ("switchall_7b", "1,290,000", "42")]
)
def test_the_floats_of_a_token_and_of_a_micro_step_are_those_of_the_table(name: str, floats: str, size: str):
    config, found = config_and_forecast(name, nodes=2)
    model = build_model(config, vocab_size=VOCABULARY)
    length = config.data.sequence_length
    lines = model_table(model, length=length)
    of_token = sum(line.cost.work.floats for line in lines if line.cost is not None) / length
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert f"{floats} floats a token" in text
    assert of_token == pytest.approx(float(floats.replace(",", "")), rel=0.005)
    assert f"{size} GB " in text
    assert of_token * found.work.tokens * 2 / 1e9 == pytest.approx(float(size), rel=0.01)


def test_the_share_of_experts_and_the_tokens_of_the_1b_are_as_its_comments_say():
    config, found = config_and_forecast("switchall_1b", nodes=2)
    (share,) = figures("switchall_1b", r"(\d+) % are experts")
    assert share == round(100 * expert_weights(config) / parameters(config, vocab_size=VOCABULARY))
    assert (found.work.tokens, found.work.accumulation_steps) == (8 * 1024, 4)
    assert found.topology.ep_size == 8


@pytest.mark.parametrize(("tokens", "mode"), [(4_500, "tokens"), (5_300, "weights")])
def test_the_1b_sends_tokens_below_4900_of_them_and_weights_above(tokens: int, mode: str):
    from parallel.volume import ExpertGroup, choose_exchange

    (bank,) = {
        bank.shape for bank in load_config(CONFIGS / "switchall_1b.yaml").model.banks() if bank.shape.label == "mlp"
    }
    assert choose_exchange(bank, ExpertGroup(8, 8), tokens=tokens, wire_bytes=2).mode == mode

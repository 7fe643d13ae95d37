"""The run's config as a whole: files in configs/, checks across sections, the world, the YAML copy."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from parallel.config import ProcessInfo
from train.config import Config, check_world, load_config, to_yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny_cpu.yaml"
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def world(size: int, *, per_node: int | None = None) -> ProcessInfo:
    return ProcessInfo(
        rank=0,
        world_size=size,
        local_rank=0,
        local_world_size=per_node or size,
        master_addr="127.0.0.1",
        master_port=1,
        launcher="test",
    )


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(TINY, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_survives_its_own_yaml(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config
    # runs/<the file's own name>: two configs never share a run folder
    assert config.run.dir == f"runs/{path.relative_to(ROOT / 'configs').with_suffix('')}"


def test_the_yaml_copy_is_written_as_people_write_it() -> None:
    lines = to_yaml(load_config(TINY)).splitlines()
    assert lines[:2] == ["run:", "  dir: runs/tiny_cpu"]
    assert "  betas: [0.9, 0.95]" in lines
    assert "  eps: 1.0e-08" in lines  # not 1e-08, which YAML would read as text


def test_tiny_cpu_is_the_config_that_the_design_shows() -> None:
    config = load_config(TINY)
    assert config.run.model_dump() == {
        "dir": "runs/tiny_cpu",
        "steps": 400,
        "seed": 1,
        "dtype": "float32",
        "device": "auto",
        "log_every_steps": 10,
        "init_from": None,
        "upcycle": False,
        "upcycle_router_std": None,
    }
    assert config.model.mixers == ("switchhead",)
    assert config.optim.betas == (0.9, 0.95)
    assert (config.parallel.ep_size, config.parallel.zero_stage) == ("auto", 1)
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (100, 3)
    assert (config.eval.every_steps, config.eval.max_tokens) == (100, 65536)


def parameters(config: Config, *, vocab_size: int) -> int:
    """Parameters by the formulas of the papers' counts, not by building the model."""
    model = config.model
    D = model.d_model
    if (s := model.switchhead) is not None:
        HC = s.num_heads * s.head_dim
        mixer = 2 * D * HC + 2 * s.num_experts * D * HC + 2 * s.num_heads * s.num_experts * D
    else:
        assert model.attention is not None
        mixer = 4 * D * model.attention.num_heads * model.attention.head_dim
    if (m := model.sigma_moe) is not None:
        feedforward = 2 * D * m.num_experts * m.expert_dim + m.num_experts * D
    else:
        assert model.dense_mlp is not None
        feedforward = 2 * D * model.dense_mlp.hidden_dim + model.dense_mlp.hidden_dim + D
    return model.num_layers * (mixer + feedforward + 4 * D) + 2 * vocab_size * D + vocab_size + 2 * D


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("paper/switchhead_rope_45m", 44_505_336),
        ("paper/switchhead_rope_243m", 243_347_984),
        ("paper/dense_rope_45m_10heads", 44_544_264),
        ("paper/dense_rope_45m_2heads", 44_544_264),
        ("paper/dense_rope_243m_16heads", 243_568_700),
        ("paper/dense_rope_243m_2heads", 243_568_700),
    ],
)
def test_published_models_have_the_published_number_of_parameters(name: str, count: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.model.vocab_size == 8000
    assert parameters(config, vocab_size=8000) == count


def test_the_dense_twin_has_as_many_parameters_as_the_switchall() -> None:
    ours, twin = (load_config(ROOT / "configs" / f"{name}_47m.yaml") for name in ("switchall", "dense"))
    count = parameters(ours, vocab_size=8000)
    assert abs(parameters(twin, vocab_size=8000) - count) < 1e-4 * count
    assert twin.data == ours.data


def test_an_override_wins_over_the_file_and_the_last_of_two_wins() -> None:
    config = load_config(TINY, ["optim.lr=2.0e-3", "run.dir=elsewhere", "optim.lr=3.0e-3", "optim.betas=[0.8, 0.9]"])
    assert (config.optim.lr, config.run.dir, config.optim.betas) == (3.0e-3, "elsewhere", (0.8, 0.9))
    assert config.run.steps == 400


def test_overrides_change_the_layers_of_a_model() -> None:
    dense = ["model.attention.num_heads=4", "model.attention.head_dim=32", "model.dense_mlp.hidden_dim=512"]
    patterns = ["model.mixers=[attention]", "model.feedforwards=[dense_mlp]"]
    config = load_config(TINY, [*patterns, "model.switchhead=null", "model.sigma_moe=null", *dense])
    assert config.model.switchhead is None
    assert config.model.attention is not None
    assert config.model.attention.head_dim == 32


def test_a_config_never_changes() -> None:
    config = load_config(TINY)
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.warmup_steps=400"], ["optim.warmup_steps", "below run.steps", "is 400 and steps is 400", "lower"]),
        (["run.steps=50"], ["warmup_steps is 50 and steps is 50", "raise run.steps"]),
        (["optim.accumulation_steps=3"], ["optim.accumulation_steps", "data.global_batch_size", "is 3", "is 16"]),
        (["optim.schedule=constant", "optim.min_lr_ratio=0.1"], ["constant", "0.1", "set min_lr_ratio to 0.0"]),
        (
            ["parallel.zero_stage=3"],
            ["parallel.zero_stage", "0, 1 or 2", "is 3", "averages different experts", "use 2"],
        ),
        (["parallel.zero_stage=4"], ["parallel.zero_stage", "0, 1 or 2", "is 4"]),
        (["parallel.tensor_parallel_size=2"], ["tensor_parallel_size is 2", "not offered", "remove", "ep_size"]),
        (["parallel.pp_size=2"], ["pp_size is 2", "not offered", "remove"]),
        (["model.switchhead.top_k=5"], ["model.switchhead", "top_k is 5", "num_experts is 4", "lower top_k"]),
        (["model.sigma_moe=null"], ["feedforwards names sigma_moe", "model.sigma_moe is missing"]),
        (
            ["optim.optimizer=sgd", "optim.betas=[0.8, 0.9]"],
            ["betas belongs to adamw", "optimizer is sgd", "remove betas"],
        ),
        (["optim.optimizer=sgd", "optim.eps=1.0e-6"], ["eps belongs to adamw", "1e-06", "set optimizer to adamw"]),
        (
            ["model.switchhead.attend_top_k=300"],
            ["attend_top_k is 300", "a row of 256 tokens", "lower attend_top_k"],
        ),
        (
            ["model.mixers=[hsm]", "model.switchhead=null", "model.hsm.variant=constant", "data.sequence_length=8"],
            ["layer 3", "shifts by 8", "data.sequence_length is 8", "num_shifts to 3"],
        ),
        (
            ["model.switchhead.memory_blocks=1", "data.document_mask=true"],
            ["data.document_mask is true", "memory_blocks of the mixers is 1", "auto or false"],
        ),
        (
            ["model.switchhead.memory_blocks=1", "data.streams=8"],
            ["is 16 and streams is 8", "a multiple of 16"],
        ),
        (
            ["model.switchhead.expert_dropout=0.1", "model.switchhead.top_k=4"],
            ["expert_dropout", "it is 0.1", "top_k is num_experts (4)", "lower top_k"],
        ),
        (
            ["model.mixers=[hsm]", "model.switchhead=null", "model.hsm.hybrid_shift=skip"],
            ["hybrid_shift is skip", "hsm alone", "remove hybrid_shift"],
        ),
        (
            ["model.mixers=[hsm]", "model.switchhead=null", "model.hsm.num_shifts=4", "model.hsm.wrap=hold"],
            ["wrap is hold", "num_shifts is 4", "4 layers of hsm", "lower num_shifts"],
        ),
        (
            [
                *("model.feedforwards=[sigma_moe, sigma_moe, sigma_moe, peer]", "model.peer.num_experts=25"),
                *(
                    "model.peer.num_heads=1",
                    "model.peer.top_k=2",
                    "model.peer.key_dim=4",
                    "model.peer.shared_experts=true",
                ),
            ],
            ["model.peer.shared_experts is true", "1 layer of peer", "to false"],
        ),
        (["eval.memory_blocks=4"], ["eval.memory_blocks", "it is 4", "no mixer of ['switchhead']", "null"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_clash_names_both_values_and_the_remedy(overrides: list[str], parts: list[str]) -> None:
    message = error_of(*overrides)
    assert all(part in message for part in parts), message
    assert all(f"--set {override}" in message for override in overrides)  # where the clash came from
    assert "\n" not in message


@pytest.mark.parametrize(
    ("setting", "memory_blocks", "masked"),
    [("auto", 0, True), ("auto", 1, False), ("true", 0, True), ("false", 0, False), ("false", 1, False)],
)
def test_attention_stays_inside_documents_unless_a_mixer_has_memory(
    setting: str, memory_blocks: int, masked: bool
) -> None:
    overrides = [f"data.document_mask={setting}", f"model.switchhead.memory_blocks={memory_blocks}"]
    assert load_config(TINY, overrides).mask_documents == masked


@pytest.mark.parametrize(
    ("processes", "per_node", "ep_size"),
    [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 8), (8, 4, 4), (16, 8, 8)],
)
def test_ep_size_auto_is_the_largest_that_fits_the_node_and_the_banks(
    processes: int, per_node: int, ep_size: int
) -> None:
    # tiny_cpu's smallest bank: 2 heads x 4 experts = 8 groups
    layout = check_world(load_config(TINY), world(processes, per_node=per_node))
    assert (layout.ep_size, layout.node_size) == (ep_size, per_node)


@pytest.mark.parametrize(
    ("overrides", "processes", "parts"),
    [
        (["parallel.ep_size=3"], 4, ["parallel.ep_size", "ep_size is 3", "4 processes", "1, 2, 4"]),
        (["parallel.node_size=3"], 4, ["parallel.node_size", "node_size is 3", "4 processes", "1, 2, 4"]),
        (["data.streams=2"], 4, ["data.streams", "4 processes", "streams is 2"]),
        ([], 3, ["3 processes", "streams is 16"]),
        (["optim.accumulation_steps=8"], 4, ["4 processes", "16 / 8 = 2 rows"]),
    ],
)
def test_a_world_that_does_not_fit_is_an_error(overrides: list[str], processes: int, parts: list[str]) -> None:
    config = load_config(TINY, overrides)
    with pytest.raises(ValueError) as caught:
        check_world(config, world(processes))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_nodes_with_different_numbers_of_processes_need_a_node_size() -> None:
    """Each rank would work out an ep_size of its own."""
    uneven = world(4, per_node=2).model_copy(update={"tasks_of_nodes": (2, 1, 1)})
    with pytest.raises(ValueError, match=r"parallel\.node_size must be a number .* they have 2, 1, 1: start"):
        check_world(load_config(TINY), uneven)
    assert check_world(load_config(TINY, ["parallel.node_size=1"]), uneven).node_size == 1
    even = uneven.model_copy(update={"tasks_of_nodes": (2, 2)})
    assert check_world(load_config(TINY), even).node_size == 2


@given(
    directory=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    lr=st.floats(min_value=0.0, max_value=1e300),
    seed=st.integers(0, 2**63 - 1),
    betas=st.tuples(*[st.floats(0.0, 1.0, exclude_max=True)] * 2),
)
def test_yaml_of_any_config_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, directory: str, lr: float, seed: int, betas: tuple[float, float]
) -> None:
    base = load_config(TINY)
    run = base.run.model_copy(update={"dir": directory, "seed": seed})
    config = base.model_copy(update={"run": run, "optim": base.optim.model_copy(update={"lr": lr, "betas": betas})})
    path = tmp_path_factory.mktemp("round_trip") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config

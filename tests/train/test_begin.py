"""run.init_from: what a run takes from another model, what it does not, and what must fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.parameters import materialize, states_of
from model.transformer import Transformer
from tests.model.build import context, tokens
from tests.train.tiny_job import ALONE, another_tokenizer, tiny_config, write_shards
from train import checkpoint_tool
from train.checkpoint import latest, read_state, read_tensors
from train.config import Config
from train.engine import PlainEngine
from train.evaluate import score
from train.run import run
from train.trained import load_run

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
CPU = torch.device("cpu")
QUICK = {"expert_backend": "reference"}  # nothing is measured before the first step
EXPERTS = {"num_experts": 5, "expert_dim": 4, "top_k": 2, "balance": "bias"}
WITH_BIAS = QUICK | {"sigma_moe": EXPERTS}
STILL = {"lr": 0.0}
DENSE = {
    "mixers": ["attention"],
    "feedforwards": ["dense_mlp"],
    "switchhead": None,
    "sigma_moe": None,
    "attention": {"num_heads": 2, "head_dim": 4},
    "dense_mlp": {"hidden_dim": 12, "bias": False},
    "dropout": 0.0,
}
TWIN = QUICK | {"sigma_moe": {"num_experts": 5, "expert_dim": 12, "top_k": 2}, "dropout": 0.0}


def run_of(folder: Path, name: str, *, run: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """The config of a run in folder/name, of one step with a rate of 0: its checkpoint holds the weights it began with."""
    fields = {"dir": str(folder / name), "steps": 1} | (run or {})
    return tiny_config(folder, run=fields, **({"optim": STILL} | sections))


def newest(folder: Path) -> Path:
    path = latest(folder / "checkpoints")
    assert path is not None
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and states of the newest checkpoint."""
    return read_tensors(newest(folder), kind="master") | read_tensors(newest(folder))


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, pool: Any) -> Path:
    """Shards, a run of three steps in `first`, and one of a dense model in `dense`."""
    folder = tmp_path_factory.mktemp("begin")
    write_shards(folder / "shards", seed=1)
    values = [
        tiny_config(folder, run={"dir": str(folder / name)}, model=model, checkpoint={"every_steps": 2}).model_dump()
        for name, model in (("first", WITH_BIAS), ("dense", DENSE))
    ]
    for value in values:  # in a pool's process, because a run changes torch's switches
        pool(1).run(alone, value)
    return folder


def alone(values: dict[str, Any]) -> None:
    run(Config.model_validate_json(json.dumps(values)), ALONE)


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path, dirs_exist_ok=True))


def given(folder: Path, form: str) -> Path:
    """The first run in one of the forms that run.init_from may name."""
    if form == "export":
        assert checkpoint_tool.main(["export", str(folder / "first"), str(folder / "out")]) == 0
        return folder / "out"
    return folder / {"run": "first", "checkpoints": "first/checkpoints", "step": "first/checkpoints/step_000003"}[form]


@pytest.mark.parametrize("form", ["run", "checkpoints", "step", "export"])
def test_weights_and_states_are_taken_and_nothing_else(folder: Path, form: str, capsys):
    still = QUICK | {"sigma_moe": EXPERTS | {"bias_update_speed": 1e-30}}
    source = given(folder, form)
    run(run_of(folder, "second", run={"init_from": str(source), "seed": 6}, model=still), ALONE)
    taken = newest(folder / "second")
    assert equal(weights(folder / "second"), weights(folder / "first"))
    assert any(value.any() for value in read_tensors(taken).values()), "the bias of the first run has moved"
    fresh = read_tensors(newest(folder / "first"), kind="exp_avg_sq")
    moments = read_tensors(taken, kind="exp_avg_sq")
    assert not any(torch.equal(value, fresh[name]) for name, value in moments.items() if value.any())
    state = read_state(taken)
    assert (state.step, state.position) == (1, 4)
    assert f"init_from: {source}" in (folder / "second" / "config.yaml").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert "(its step 3); step 0, data position 0" in said
    assert "model.sigma_moe.bias_update_speed was None and is 1e-30" in said


def test_an_earlier_checkpoint_is_taken_when_it_is_named(folder: Path):
    earlier = folder / "first" / "checkpoints" / "step_000002"
    run(run_of(folder, "second", run={"init_from": str(earlier)}, model=WITH_BIAS), ALONE)
    assert torch.equal(
        weights(folder / "second")["output.weight"], read_tensors(earlier, kind="master")["output.weight"]
    )


def test_on_resume_the_runs_own_checkpoints_win_and_the_folder_is_not_needed(folder: Path):
    def steps(number: int) -> Config:
        fields = {"init_from": str(folder / "first"), "steps": number}
        how = {"lr": 1e-2, "schedule": "constant"}
        return run_of(folder, "second", run=fields, model=WITH_BIAS, optim=how)

    run(steps(2), ALONE)
    shutil.rmtree(folder / "first")
    own = weights(folder / "second")
    run(steps(4), ALONE)
    assert [record["step"] for record in records_of(folder / "second")] == [2, 4]
    assert not equal(weights(folder / "second"), own)
    shutil.rmtree(folder / "second" / "checkpoints")
    with pytest.raises(ValueError, match=r"run.init_from must name .*first/checkpoints holds no checkpoint"):
        run(steps(4), ALONE)


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("model", "sentences"),
    [
        (WITH_BIAS | {"d_model": 16}, ["embedding.weight has shape [", ", 8] in", ", 16] here", "model.d_model was 8 and is 16"]),
        (
            {"sigma_moe": EXPERTS | {"num_experts": 6}},
            ["has shape [5, 4, 8] in", "[6, 4, 8] here", "model.sigma_moe.num_experts was 5 and is 6"],
        ),
        (WITH_BIAS | {"num_layers": 2}, ["layers.1.", "has shape none in", "model.num_layers was 1 and is 2"]),
        (
            {"sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2}},
            ["selection.bias has shape [5] in", "none here", "model.sigma_moe.balance was bias and is none"],
        ),
    ],
    ids=["a width", "number of experts", "depth", "a state"],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_with_both_values(folder: Path, model: dict[str, Any], sentences: list[str]):
    with pytest.raises(ValueError) as caught:
        run(run_of(folder, "second", run={"init_from": str(folder / "first")}, model=model), ALONE)
    for sentence in ["run.init_from must be a model of these sizes", *sentences]:
        assert sentence in str(caught.value)
    assert not (folder / "second").exists()


def test_another_tokenizer_is_an_error_with_both(folder: Path):
    write_shards(folder / "shards", seed=1, tokenizer=another_tokenizer())
    with pytest.raises(ValueError) as caught:
        run(run_of(folder, "second", run={"init_from": str(folder / "first")}, model=WITH_BIAS), ALONE)
    for tokenizer in (another_tokenizer().tokenizer_id, read_state(newest(folder / "first")).extra["tokenizer_id"]):
        assert tokenizer in str(caught.value)
    assert not (folder / "second").exists()


def test_a_damaged_source_is_an_error_that_names_the_file(folder: Path):
    source = given(folder, "step")
    (file,) = source.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match=r"rank_00000.safetensors does not match its checksum"):
        run(run_of(folder, "second", run={"init_from": str(source)}, model=WITH_BIAS), ALONE)


@pytest.mark.parametrize(
    "fields", [{"upcycle": True}, {"upcycle_router_std": 0.1}, {"init_from": "somewhere", "upcycle_router_std": 0.1}]
)
def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, fields: dict[str, Any]):
    with pytest.raises(ValueError, match="upcycle needs init_from, and upcycle_router_std needs upcycle"):
        tiny_config(tmp_path, run={"dir": "x", "steps": 1, **fields})


def on_a_rank(values: dict[str, Any]) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    run(Config.model_validate(values), ALONE.model_copy(update=place))


@pytest.mark.parametrize(("ep_size", "zero_stage"), [(2, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("upcycle", [False, True])
def test_each_layout_begins_with_the_same_weights(folder: Path, pool, ep_size: int, zero_stage: int, upcycle: bool):
    fields = {"init_from": str(folder / ("dense" if upcycle else "first")), "upcycle": upcycle, "seed": 6}
    model = TWIN if upcycle else WITH_BIAS
    run(run_of(folder, "alone", run=fields, model=model), ALONE)
    values = run_of(folder, "many", run=fields, model=model).model_dump(mode="json")
    values["parallel"] |= {"ep_size": ep_size, "zero_stage": zero_stage}
    pool(2).run(on_a_rank, values)
    many, alone = (records_of(folder / name)[0]["loss"] for name in ("many", "alone"))
    assert many == pytest.approx(alone, rel=1e-5), "the weights that compute are those that are saved"
    assert equal(
        read_tensors(newest(folder / "many"), kind="master"), read_tensors(newest(folder / "alone"), kind="master")
    )


def loss(folder: Path) -> float:
    trained = load_run(folder, device=CPU)
    return score(trained, device=CPU, heldout=trained.config.data.heldout, max_tokens=400, memory_blocks=None).loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_upcycled_run_begins_where_the_dense_one_ended(folder: Path, dtype: str):
    fields = {"dtype": dtype, "init_from": str(folder / "dense"), "upcycle": True}
    run(run_of(folder, "twin", run=fields, model=TWIN), ALONE)
    run(run_of(folder, "exact", run=fields | {"upcycle_router_std": 0.0}, model=TWIN), ALONE)
    expected = loss(folder / "dense")
    if dtype == "float32":
        assert loss(folder / "exact") == pytest.approx(expected, rel=1e-7)
        assert loss(folder / "twin") == pytest.approx(expected, rel=1e-4)
        assert loss(folder / "twin") != pytest.approx(expected, rel=1e-7)
    else:
        assert loss(folder / "twin") == pytest.approx(expected, rel=3e-3)


def test_an_upcycled_run_takes_the_states_of_layers_that_stay_and_only_new_ones_are_fresh(folder: Path, monkeypatch):
    """The router bias of a sigma-MoE beside which attention becomes SwitchHead; and of one that was dense."""
    bias, begins = "layers.0.feedforward.selection.bias", []
    monkeypatch.setattr(
        PlainEngine, "restored", lambda self, *, step: begins.append(states_of(self.model)[bias].clone())
    )
    stays = WITH_BIAS | {"dropout": 0.0}
    dense = {"mixers": ["attention"], "switchhead": None, "attention": {"num_heads": 2, "head_dim": 4}}
    run(run_of(folder, "mixed", run={"steps": 3}, model=WITH_BIAS | dense | {"dropout": 0.0}), ALONE)
    run(run_of(folder, "twin", run={"init_from": str(folder / "mixed"), "upcycle": True}, model=stays), ALONE)
    taken = weights(folder / "mixed")[bias]
    assert taken.any()
    new = TWIN | {"sigma_moe": EXPERTS | {"expert_dim": 12}}
    run(run_of(folder, "new", run={"init_from": str(folder / "dense"), "upcycle": True}, model=new), ALONE)
    assert [found.tolist() for found in begins] == [taken.tolist(), [0.0] * 5]


def test_the_new_routers_are_those_of_the_seed_made_small(folder: Path):
    fields = {"init_from": str(folder / "dense"), "upcycle": True, "seed": 9, "upcycle_router_std": 0.02}
    config = run_of(folder, "twin", run=fields, model=TWIN)
    run(config, ALONE)
    found = weights(folder / "twin")
    drawn = Transformer(config.model, vocab_size=found["embedding.weight"].shape[0], backend="reference")
    materialize(drawn, seed=9)
    routers = {name: value for name, value in drawn.named_parameters() if "router" in name}
    assert len(routers) == 3
    for name, value in routers.items():
        assert found[name].norm(dim=1).mean() == pytest.approx(0.02, rel=1e-5)
        direction = torch.nn.functional.cosine_similarity(found[name].flatten(), value.detach().flatten(), dim=0)
        assert direction == pytest.approx(1.0, abs=1e-6)


def test_the_default_keeps_the_gates_within_a_thousandth_of_a_half(folder: Path):
    fields = {"init_from": str(folder / "dense"), "upcycle": True}
    run(run_of(folder, "twin", run=fields, model=TWIN), ALONE)
    model, gates = load_run(folder / "twin", device=CPU).model, []
    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda _m, _i, logits: gates.append(logits.detach().sigmoid()))
    model(tokens(4, 8), context(4))
    assert len(gates) == 3
    assert max(float((gate - 0.5).abs().max()) for gate in gates) < 1e-3


def test_a_dense_model_that_does_not_fit_is_an_error_that_says_what_would(folder: Path):
    fields = {"init_from": str(folder / "dense"), "upcycle": True}
    narrow = TWIN | {"sigma_moe": {"num_experts": 5, "expert_dim": 7, "top_k": 2}}
    with pytest.raises(ValueError, match=r"hidden_dim is 12 and .* expert_dim 7: .*choose expert_dim 12 \(copies"):
        run(run_of(folder, "twin", run=fields, model=narrow), ALONE)
    xl = {"switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2, "positions": "xl"}}
    with pytest.raises(ValueError, match=r"positions must be equal, but the dense model has rope and this model xl"):
        run(run_of(folder, "twin", run=fields, model=TWIN | xl), ALONE)
    assert not (folder / "twin").exists()

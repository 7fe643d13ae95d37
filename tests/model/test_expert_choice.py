"""The candidates for a bank's experts and the work by which they are compared."""

import time
from dataclasses import replace

import pytest
import torch

from kernels import tuning
from model import expert_choice
from model.attention_config import SwitchHeadConfig
from model.expert_choice import BankWork
from model.experts import gated_mlp
from model.feedforward_config import SigmaMoEConfig
from model.section import Place
from model.work import PASSES, WARM_UP

CPU = torch.device("cpu")
PLACE = Place(24, 2, 0, ("switchhead",) * 2, "reference", 0.0)
SWITCHHEAD = SwitchHeadConfig.model_validate({"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2})
MLP = SigmaMoEConfig.model_validate({"num_experts": 4, "expert_dim": 16, "top_k": 2})
BANKS = {bank.label: bank for bank in [*SWITCHHEAD.banks(PLACE), *MLP.banks(PLACE)]}


def work_of(label: str, dtype: torch.dtype = torch.float32, **changes: object) -> BankWork:
    bank = BANKS[label]
    return replace(BankWork(bank, tokens=11, num_groups=bank.num_groups, exchange=None, dtype=dtype), **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", BANKS)
def test_on_a_cpu_every_candidate_gives_the_same_bits(label: str, dtype: torch.dtype):
    """So a clock may choose there, and the same command still gives the same losses."""
    work = work_of(label, dtype)
    first, *others = (work.work(backend, device=CPU)() for backend in work.candidates("cpu"))
    assert others
    assert all(value.any() for value in first)
    for other in others:
        assert all(torch.equal(found, value) for found, value in zip(other, first, strict=True))


@pytest.mark.parametrize("label", BANKS)
def test_the_work_is_of_the_sizes_that_a_layer_of_the_run_has(label: str):
    bank = BANKS[label]
    output, rows, *weights, gates = work_of(label).work("reference", device=CPU)()
    assert rows.shape == (11 * bank.rows_per_token, bank.row_dim)
    assert output.shape == (11 * bank.outputs_per_token, bank.output_dim)
    assert gates.shape == (11 * bank.num_heads, bank.top_k)
    assert sum(weight.numel() for weight in weights) == bank.num_groups * bank.group_numel
    assert all(weight.any() for weight in weights)


@pytest.mark.parametrize("label", BANKS)
def test_a_rank_with_a_part_of_the_groups_is_measured_with_that_part(label: str):
    for num_groups in (1, 3):
        _, _, *weights, gates = work_of(label, num_groups=num_groups, exchange="tokens").work("reference", device=CPU)()
        assert {len(weight) for weight in weights} == {num_groups}
        assert gates.numel() == 11 * BANKS[label].num_heads * BANKS[label].top_k  # the copies of a rank with its share


def test_triton_is_a_candidate_where_it_runs_and_all_experts_of_a_head_where_they_are_here(monkeypatch):
    monkeypatch.setattr(expert_choice, "why_not_triton", lambda device_type: None)
    assert work_of("value", torch.bfloat16).candidates("cuda") == ["triton", "triton_dense", "torch"]
    assert work_of("value", torch.bfloat16, exchange="tokens").candidates("cuda") == ["triton", "torch"]
    assert work_of("mlp", torch.bfloat16).candidates("cuda") == ["triton", "torch"]
    assert work_of("mlp", torch.float32).candidates("cuda") == ["triton"]
    monkeypatch.setattr(expert_choice, "why_not_triton", lambda device_type: "no Triton here")
    assert work_of("mlp", torch.bfloat16).candidates("cuda") == ["torch"]
    assert work_of("mlp", torch.float32).candidates("cuda") == ["loop"]


def test_torch_is_no_candidate_for_widths_that_it_refuses():
    odd = replace(BANKS["mlp"], row_dim=12, output_dim=12, group_numel=2 * 12 * 16)
    assert replace(work_of("mlp", torch.bfloat16), bank=odd).candidates("cpu") == ["loop"]


def test_the_time_is_the_median_of_passes_after_warm_up(monkeypatch):
    spent = iter([9.0, 9.0, 3.0, 1.0, 2.0, 50.0, 2.5])
    now = [0.0]

    def work(self, backend, *, device):
        def one_pass():
            now[0] += next(spent)

        return one_pass

    monkeypatch.setattr(BankWork, "work", work)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert work_of("mlp").seconds("loop", device=CPU) == 2.5


def test_tiles_are_measured_in_the_warm_up_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(BankWork, "work", lambda self, backend, *, device: lambda: seen.append(tuning._measuring))
    work_of("mlp").seconds("loop", device=CPU)
    assert seen == [True] * WARM_UP + [False] * PASSES


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_the_work_keeps_the_hidden_activations_where_the_run_does(monkeypatch, keep_hidden: bool):
    seen = []

    def recorded(*tensors, keep_hidden, **options):
        seen.append(keep_hidden)
        return gated_mlp(*tensors, keep_hidden=keep_hidden, **options)

    monkeypatch.setattr(expert_choice, "gated_mlp", recorded)
    work_of("mlp", keep_hidden=keep_hidden).work("loop", device=CPU)()
    assert seen == [keep_hidden]


def test_what_tells_two_works_apart_is_in_their_names():
    base = work_of("mlp")
    others = [
        work_of("value"),
        work_of("mlp", torch.bfloat16),
        replace(base, tokens=12),
        replace(base, num_groups=2),
        replace(base, exchange="tokens"),
        replace(base, exchange="weights"),
        replace(base, keep_hidden=True),
        replace(base, open_gates=True),
        replace(base, bank=replace(base.bank, top_k=1)),
        replace(base, bank=replace(base.bank, hashed=True)),
        replace(base, bank=replace(base.bank, group_numel=2 * 24 * 8)),
    ]
    assert len({str(work) for work in [base, *others]}) == 12

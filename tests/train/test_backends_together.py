"""What ranks that do not have the same backends compute with: one has no Triton."""

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.expert_choice import BankWork
from model.part_choice import PartWork
from tests.train.test_part_backends import OPS, RELATIVES
from tests.train.tiny_job import ALONE, tiny_config
from train.build import build_model, choose_kernels
from train.config import Config, Layout


def chosen_here(
    values: dict[str, Any], lacking: int, failing: int
) -> tuple[dict[str, str], list[str], list[str]] | tuple[str, str]:
    """On a rank of a pool of two: what it computes with, what it measured and what the log says, or what it raised.

    Rank `lacking` has no Triton; rank `failing` cannot even say what it has.
    """
    from parallel.mesh import open_mesh

    config, measured = Config.model_validate(values), []
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    reason = "there is no Triton" if rank == lacking else None

    def seconds(self: Any, backend: str, *, device: torch.device) -> float:
        measured.append(backend)
        return 0.5 if backend == "triton" else 1.0

    def candidates(self: BankWork, device_type: str) -> list[str]:
        return ["loop"] if reason else ["triton"]

    def broken(self: PartWork, device_type: str) -> list[str]:
        raise OSError("the driver is gone")

    places = ["train.backends", *(f"kernels.{op}" for op in OPS)]
    patches = [patch(f"{place}.why_not_triton", lambda device_type: reason) for place in places]
    patches += [patch.object(PartWork, "candidates", broken)] * (rank == failing)
    patches += [patch.object(kind, "seconds", seconds) for kind in (PartWork, BankWork)]
    patches += [patch.object(BankWork, "candidates", candidates)]
    info, device = ALONE.model_copy(update=place), torch.device("cpu")
    with contextlib.ExitStack() as patched, open_mesh(info, ep_size=1, device=device) as mesh:
        for each in patches:
            patched.enter_context(each)
        try:
            model = build_model(config, vocab_size=256)
            chosen, _ = choose_kernels(config, Layout(ep_size=1, node_size=size), mesh, model)
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, str(error)
    return chosen.of_module, measured, chosen.notes()


def chosen(pool: Any, folder: Path, *, lacking: int = -1, failing: int = -1, model: dict[str, Any]) -> list[Any]:
    return pool(2).run(chosen_here, tiny_config(folder, model=model).model_dump(mode="json"), lacking, failing)


@pytest.mark.parametrize("lacking", [0, 1])
def test_what_one_rank_lacks_no_rank_takes(pool, tmp_path: Path, lacking: int):
    """On a CPU the one candidate that is left is not even measured."""
    first, second = chosen(pool, tmp_path, lacking=lacking, model=RELATIVES)
    assert first == second
    assert set(first[0].values()) == {"torch"}
    assert first[1] == []
    assert first[2] == [f"rank {lacking} of 2 has no triton backend: there is no Triton"]


def test_what_all_ranks_have_is_measured_by_rank_zero(pool, tmp_path: Path):
    (of_zero, measured, notes), (of_one, nothing, _) = chosen(pool, tmp_path, model=RELATIVES)
    assert of_zero == of_one
    assert set(of_zero.values()) == {"triton"}
    assert set(measured) == {"triton", "torch"}
    assert nothing == []
    assert not [note for note in notes if "no triton" in note]


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_bank_for_which_the_ranks_have_nothing_in_common_is_computed_by_the_loop(pool, tmp_path: Path, lacking: int):
    banks = "layers.0.mixer.value_experts, layers.0.mixer.output_experts, layers.0.feedforward.experts"
    for of_module, _, notes in chosen(pool, tmp_path, lacking=lacking, model={}):
        assert set(of_module.values()) == {"loop"}
        assert notes[0] == (
            f"rank {lacking} of 2 has no triton backend: there is no Triton; so only the loop is left for {banks}: install triton there, "
            "or name model.expert_backend"
        )
        assert all(note.endswith("the only candidate") for note in notes[1:])


def test_what_goes_wrong_on_one_rank_is_the_sentence_of_all(pool, tmp_path: Path):
    assert (
        chosen(pool, tmp_path, failing=1, model=RELATIVES) == [("RuntimeError", "the driver is gone (rank 1 of 2)")] * 2
    )


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_named_backend_that_one_rank_lacks_is_refused_by_all_with_its_rank(pool, tmp_path: Path, lacking: int):
    first, second = chosen(pool, tmp_path, lacking=lacking, model={**RELATIVES, "kernel_backend": "triton"})
    assert first == second
    assert first[0] == "ValueError"
    assert f"but it is triton: set it to auto (rank {lacking} of 2)" in first[1]

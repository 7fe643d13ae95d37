"""DeepSpeed's mixture of experts on a gloo group, with the weights of a sigma-MoE layer, and what it should give.

Owns: how deepspeed.moe.layer.MoE is put on the ranks of a mesh, the expert module that it wants, and its result written as a loop. Counts
its bytes too, since no ledger knows of them. Does not own what is measured (workers.py, the caller).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.sigma_moe import SigmaMoE
from parallel.mesh import Mesh
from parallel.zero import _import_deepspeed


class Expert(nn.Module):
    """relu(x W1) W2 without biases, one of sigma-MoE's experts as a module. up (D, F), down (F, D)."""

    def __init__(self, up_DF: Tensor, down_FD: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(up_DF.clone())
        self.down = nn.Parameter(down_FD.clone())

    def forward(self, rows_XD: Tensor) -> Tensor:
        return (rows_XD @ self.up).relu() @ self.down


def deepspeed_moe(ours: SigmaMoE, mesh: Mesh) -> nn.Module:
    """deepspeed.moe.layer.MoE with its own top-k gate and every token kept, over the expert group.

    Experts and router are copies of those of `ours`, a layer whose bank is sharded over the same group in equal parts. DeepSpeed's gate
    softmaxes the logits, so it chooses the experts that sigma-MoE's router chooses, with other gates.
    """
    deepspeed = _import_deepspeed()
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    name = f"ep_size_{mesh.ep_size}"
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert_group  # found there, none is made
    up_LDF, down_LFD = (weight.detach() for weight in ours.experts.weights().values())
    layer = MoE(
        hidden_size=ours.place.d_model,
        expert=Expert(up_LDF[0], down_LFD[0]),
        num_experts=ours.config.num_experts,
        ep_size=mesh.ep_size,
        k=ours.config.top_k,
        drop_tokens=False,
        use_rts=False,  # the order of tokens inside an expert, of no effect where none is dropped
        min_capacity=0,
    )
    layer.set_deepspeed_parallelism()
    inner: Any = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(ours.router.weight)
        for expert, up_DF, down_FD in zip(inner.experts.deepspeed_experts, up_LDF, down_LFD, strict=True):
            expert.up.copy_(up_DF)
            expert.down.copy_(down_FD)
    return layer


def forget_groups() -> None:
    """Empties DeepSpeed's table, so that another mesh can be made in this process."""
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP.clear()


def as_a_loop(whole: SigmaMoE, x_BSD: Tensor) -> Tensor:
    """What DeepSpeed's layer computes, expert after expert on one process: gates are the softmax of the chosen, with one choice of all."""
    x_TD = x_BSD.flatten(0, 1)
    logits_TE = x_TD @ whole.router.weight.T
    chosen_TK = logits_TE.topk(whole.config.top_k, dim=1).indices
    gates_TE = logits_TE.softmax(1)
    if whole.config.top_k > 1:
        gates_TE = gates_TE / gates_TE.gather(1, chosen_TK).sum(1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for expert, (up_DF, down_FD) in enumerate(zip(*whole.experts.weights().values(), strict=True)):
        (tokens_X,) = (chosen_TK == expert).any(1).nonzero(as_tuple=True)
        rows_XD = (x_TD[tokens_X] @ up_DF).relu() @ down_FD
        y_TD = y_TD.index_add(0, tokens_X, gates_TE[tokens_X, expert, None] * rows_XD)
    return y_TD.view_as(x_BSD)


@dataclass
class Counted:
    """Bytes that left this rank for others."""

    bytes: int = 0


class CountedAllToAll:
    """While it is entered, every torch.distributed.all_to_all_single of this process is counted.

    Left out are DeepSpeed's all-reduce of 8 bytes for the largest count, and what stays on the rank.
    """

    def __enter__(self) -> Counted:
        self.counted, self.real = Counted(), dist.all_to_all_single
        counted, real = self.counted, self.real

        def counting(output, input, output_split_sizes=None, input_split_sizes=None, group=None, **others):
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            rows = input_split_sizes if input_split_sizes else [len(input) // size] * size
            width = input[:1].numel() if len(input) else 0
            counted.bytes += (sum(rows) - rows[rank]) * width * input.element_size()
            return real(output, input, output_split_sizes, input_split_sizes, group=group, **others)

        dist.all_to_all_single = counting
        return counted

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single = self.real

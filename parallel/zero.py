"""DeepSpeed's ZeRO engine behind the interface of train/engine.py. Every private name of DeepSpeed that we touch is in this file.

What DeepSpeed does silently wrong for us, and what is done about it (tests in tests/parallel/test_zero.py and test_same_as_one_process.py):
- experts are found only through a module of its own MoE class: `mark_experts` adds one empty child of it;
- `gradient_clipping` left out means 1.0: it is always written;
- at stage 0 the norm that it clips by is wrong under expert parallelism: there we clip ourselves, and its clipping is 0.0;
- at stages 1 and 2 it tells the norm only after the update: `step` asks for it before, and hands it the same one;
- `round_robin_gradients` corrupts the map from weights to partitions: refused by being written as false, and the map is checked.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.context import BatchContext
from model.fragments import Fragment, Held, create_state, fragments_of, held_in, set_step_count, share
from model.parameters import ExpertBank, LogicalParameter, logical_parameters
from model.transformer import ModelOutput, Transformer
from parallel.ledger import Where
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.zero_ledger import counted


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 renamed; nothing to be done about it here
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # its first init would compile a C++ op that only inference uses: 32 to 50 s on a CPU. Found in sys.modules, because the
    # attribute deepspeed.comm.torch is torch itself
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None
    return deepspeed


def mark_experts(model: Transformer, mesh: Mesh) -> None:
    """Tags the banks' parameters as expert-parallel and tells DeepSpeed the groups of the mesh."""
    _import_deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    group_name = f"ep_size_{mesh.ep_size}"
    for module in model.modules():
        if isinstance(module, ExpertBank):
            parameter: Any
            for parameter in module.parameters(recurse=False):
                parameter.allreduce = False
                parameter.group_name = group_name

    class ExpertMarker(MoE):
        """No parameters and no forward: its class alone makes the engine look for tagged parameters."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.ep_size = mesh.ep_size
            self.num_experts = mesh.ep_size
            self.num_local_experts = 1
            self.expert_group_name = group_name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            groups._EXPERT_PARALLEL_GROUP[group_name] = mesh.expert_group
            groups._EXPERT_PARALLEL_GROUP_RANKS[group_name] = dist.get_process_group_ranks(mesh.expert_group)
            groups._EXPERT_DATA_PARALLEL_GROUP[group_name] = mesh.expert_data_group
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[group_name] = dist.get_process_group_ranks(mesh.expert_data_group)

    model.add_module("expert_marker", ExpertMarker())


class ZeroEngine:
    """train.engine.Engine on DeepSpeed: gradients averaged over all ranks, optimizer sharded by ZeRO stage 0, 1 or 2.

    `optimizer` must come from named groups (train/optimizer.py); groups with experts are split off here. After construction the
    optimizer state exists on every rank.
    """

    def __init__(
        self,
        model: Transformer,
        groups: list[dict[str, Any]],
        build_optimizer: Any,
        *,
        mesh: Mesh,
        stage: int,
        clip_grad_norm: float,
        accumulation_steps: int,
        dtype: torch.dtype,
    ) -> None:
        deepspeed = _import_deepspeed()
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
        from deepspeed.utils import groups as deepspeed_groups

        self.model = model
        self.mesh = mesh
        self.stage = stage
        self.clip_grad_norm = clip_grad_norm
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self._counting = contextlib.ExitStack()
        self._counting.enter_context(counted(deepspeed.comm.comm.cdb, mesh))
        deepspeed_groups._WORLD_GROUP = mesh.world_group  # the mesh's communicator instead of a clone of the world
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(split_params_into_different_moe_groups_for_optimizer(groups)),
            config=_deepspeed_config(
                stage=stage, clip_grad_norm=clip_grad_norm, accumulation_steps=accumulation_steps, dtype=dtype
            ),
        )
        wrapper = self._deepspeed.optimizer
        self.optimizer: torch.optim.Optimizer = wrapper.optimizer if stage > 0 else wrapper
        create_state(self.optimizer)
        try:
            self._check_partition_map()
        except RuntimeError:
            self.close()  # nobody else can, and DeepSpeed's tables would hold the mesh's groups
            raise
        self.placement = Placement(self)

    def forward(self, tokens_BS: Tensor, context: BatchContext) -> ModelOutput:
        return self._deepspeed(tokens_BS, context)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.backward(loss)
        if not last:
            self._deepspeed.step()  # between boundaries this only counts the micro-step

    def step(self, lr: float, *, accept: Callable[[float], bool]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            scaled, norm = None, self._clip()
        else:
            with self.mesh.ledger.waiting(Where("optimizer", "", "step")):  # its collectives are counted as norm in it
                scaled = self._deepspeed.optimizer.scaled_global_norm()  # the loss scale is 1
                norm = float(scaled)
        update = accept(norm)
        prepared = self._with_norm(scaled if update else None) if self.stage > 0 else self._stage_0(update=update)
        with prepared, self.mesh.ledger.waiting(Where("optimizer", "", "step")):
            self._deepspeed.step()
        return norm

    @contextlib.contextmanager
    def _with_norm(self, scaled: Tensor | None) -> Iterator[None]:
        """Stages 1 and 2: DeepSpeed's step clips by this norm instead of taking it again; None: it drops the gradients, as for an inf.

        Without this its wrapper would count a collective more each step, and log a skipped step as an overflow.
        """
        wrapper = self._deepspeed.optimizer
        given = torch.tensor(torch.inf, device=self.mesh.device) if scaled is None else scaled
        wrapper.scaled_global_norm = lambda norm_type=2: given
        wrapper._update_scale = lambda has_overflow=False: None
        try:
            yield
        finally:
            del wrapper.scaled_global_norm, wrapper._update_scale

    @contextlib.contextmanager
    def _stage_0(self, *, update: bool) -> Iterator[None]:
        """Stage 0: DeepSpeed's step goes through its own counts and forgets the gradients, also where the optimizer must not act."""
        optimizer: Any = self.optimizer
        if not update:
            optimizer.step = lambda *_, **__: None
        try:
            yield
        finally:
            if not update:
                del optimizer.step

    def _clip(self) -> float:
        """Stage 0: the true global norm (experts summed over the expert group: 4 bytes of all-reduce), and clipping by it."""
        dense, experts = torch.zeros((), device=self.mesh.device), torch.zeros((), device=self.mesh.device)
        gradients = []
        for parameter in logical_parameters(self.model):
            gradient = parameter.tensor.grad
            if gradient is not None:
                gradients.append(gradient)
                (experts if self._is_split(parameter) else dense).add_(gradient.float().square().sum())
        if self.mesh.ep_size > 1:
            with self.mesh.ledger.collective(Where("optimizer", "", "norm"), self.mesh.experts.all_reduce(4)):
                dist.all_reduce(experts, group=self.mesh.expert_group)
        with self.mesh.ledger.waiting(Where("optimizer", "", "norm")):  # on a GPU the host waits only here
            norm = float((dense + experts).sqrt())
        if self.clip_grad_norm > 0 and norm > self.clip_grad_norm:
            for gradient in gradients:
                gradient.mul_(self.clip_grad_norm / (norm + 1e-6))
        return norm

    def fragments(self) -> list[Fragment]:
        return [part for parameter in logical_parameters(self.model) for part in self._fragments(parameter)]

    def owned_fragments(self) -> list[Fragment]:
        if self.stage > 0:
            return self.fragments()  # ZeRO's partitions are disjoint over the ranks that hold a parameter
        parts = []
        for parameter in logical_parameters(self.model):
            group = self.mesh.expert_data_group if self._is_split(parameter) else self.mesh.world_group
            place = {"rank": dist.get_rank(group), "size": dist.get_world_size(group)}
            parts += [share(whole, **place) for whole in self._fragments(parameter)]
        return [part for part in parts if part is not None]

    def held(self, parameter: LogicalParameter) -> Held | None:
        """What of the local tensor, padding included, this rank's optimizer stores; None for nothing. Always the same elements."""
        tensor = parameter.tensor
        if self.stage == 0:
            return held_in(tensor, self.optimizer, offset=0, local_start=0, numel=tensor.numel())
        mapping = tensor._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:  # no element of it lies in this rank's partition
            return None
        return held_in(
            self._deepspeed.optimizer.single_partition_of_fp32_groups[mapping.param_group_index],
            self.optimizer,
            offset=mapping.hp_fragment_address.start,
            local_start=mapping.lp_fragment_address.start,
            numel=mapping.hp_fragment_address.numel,
        )

    def restored(self, *, step: int) -> None:
        set_step_count(self.optimizer, step)
        self.gather_weights()

    def gather_weights(self) -> None:
        """Stages 1 and 2: the weights to compute with become those of the partitions, by DeepSpeed's all-gathers."""
        if self.stage > 0:
            self._deepspeed.optimizer.update_lp_params()

    def gradient(self, parameter: LogicalParameter) -> Tensor:
        """The averaged gradient of the local tensor, between the last `backward` and `step`. Collective: every rank, same order."""
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter.tensor)
        assert gradient is not None
        return gradient

    def close(self) -> None:
        """Forgets DeepSpeed's tables, so that another engine with other groups can be made in this process."""
        from deepspeed.utils import groups

        self._counting.close()
        self._deepspeed.destroy()
        for table in (
            groups._EXPERT_PARALLEL_GROUP,
            groups._EXPERT_PARALLEL_GROUP_RANKS,
            groups._EXPERT_DATA_PARALLEL_GROUP,
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ):
            table.clear()
        groups._WORLD_GROUP = None

    def _is_split(self, parameter: LogicalParameter) -> bool:
        return self.mesh.ep_size > 1 and isinstance(parameter.module, ExpertBank)

    def _fragments(self, parameter: LogicalParameter) -> list[Fragment]:
        held = self.held(parameter)
        return [] if held is None else fragments_of(parameter, held)

    def _check_partition_map(self) -> None:
        for parameter in logical_parameters(self.model):
            held = self.held(parameter)
            if held is None:
                continue
            weights = parameter.tensor.detach().view(-1)[held.start : held.start + held.numel]
            if not torch.equal(weights, held.tensors["master"]):
                raise RuntimeError(
                    f"DeepSpeed's partition must hold the weights of {parameter.name} from element {held.start}, but it holds others: "
                    "this version of DeepSpeed lays partitions out differently; use the version in requirements.lock"
                )


def _deepspeed_config(
    *, stage: int, clip_grad_norm: float, accumulation_steps: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the engine never sees how many rows a micro-step has
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_grad_norm if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,  # overlap would reorder sums
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": True,  # plain SGD; AdamW is on its list
        "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }

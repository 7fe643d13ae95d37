"""One function that turns the single-process network into this rank's part of it, in a fixed order. The network knows nothing of it.

Layers are found by what they hold (an ExpertBank, a dispatcher, statistics), not by their class, so a new layer is split without a
line here.
"""

from model.parameters import ExpertBank, materialize
from model.transformer import Transformer
from parallel.expert import AllToAllDispatcher
from parallel.mesh import Mesh
from parallel.statistics import AllRankStatistics
from parallel.zero import mark_experts


def parallelize(model: Transformer, mesh: Mesh, *, seed: int) -> None:
    """Rewires a model that is still on the meta device, then draws the weights that this rank owns.

    With ep_size 1 every rank keeps whole banks and rows stay at home; only the statistics reach other ranks.
    """
    if mesh.ep_size > 1:
        # 1. banks first: materialize must see the local shapes
        for module in model.modules():
            if isinstance(module, ExpertBank):
                module.shard(rank=mesh.ep_rank, size=mesh.ep_size)
        # 2. rows now travel to the owners of their experts; one dispatcher serves all layers, it keeps no state between calls
        dispatcher = AllToAllDispatcher(mesh.expert_group)
        for module in model.modules():
            if hasattr(module, "dispatcher"):
                module.dispatcher = dispatcher  # pyright: ignore[reportArgumentType]
    # 3. statistics over the micro-step's rows on all ranks
    statistics = AllRankStatistics(mesh.world_group)
    for module in model.modules():
        if hasattr(module, "statistics"):
            module.statistics = statistics  # pyright: ignore[reportArgumentType]
    # 4. weights: each block by its own generator, so equal at every layout
    materialize(model, seed=seed, device=mesh.device)
    # 5. last, because it marks parameters: who shares which gradient
    if mesh.ep_size > 1:
        mark_experts(model, mesh)

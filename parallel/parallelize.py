"""One function that turns the single-process network into this rank's part of it, in a fixed order. The network knows nothing of it.

Layers are found by what they hold (an ExpertBank, a dispatcher, statistics), not by their class, so a new layer is split without a
line here.
"""

from collections.abc import Mapping

from model.parameters import ExpertBank, Table, materialize
from model.transformer import Transformer
from parallel.expert import AllToAllDispatcher
from parallel.mesh import Mesh
from parallel.statistics import AllRankStatistics
from parallel.volume import BankExchange
from parallel.zero import mark_experts


def parallelize(
    model: Transformer, mesh: Mesh, *, seed: int, exchanges: Mapping[str, BankExchange], chunks: int = 1
) -> None:
    """Rewires a model that is still on the meta device, then draws the weights that this rank owns.

    exchanges: what travels, for each bank by its path in the model. chunks: parts into which the tokens of an exchange are cut. With
    ep_size 1 every rank keeps whole banks and rows stay at home; only the statistics reach other ranks.

    Raises:
        RuntimeError: a bank is not among `exchanges`: its section does not name it.
    """
    if mesh.ep_size > 1:
        # 1. banks first: materialize must see the local shapes
        gathered = set()
        for path, module in model.named_modules():
            if not isinstance(module, ExpertBank):
                continue
            if path not in exchanges:
                raise RuntimeError(
                    f"every expert bank must be among its section's banks(), but {path} is not: add a BankShape of that name"
                )
            if isinstance(module, Table):
                module.shard(rank=mesh.ep_rank, size=mesh.ep_size, columns=exchanges[path].columns)
            else:
                module.shard(rank=mesh.ep_rank, size=mesh.ep_size)
            if exchanges[path].mode == "weights":
                gathered.add(module)
        # 2. rows now travel to the owners of their experts, or weights to the rows; a dispatcher keeps no state between calls
        levels = () if mesh.rail is None or mesh.node is None else (mesh.rail, mesh.node)
        for path, module in model.named_modules():
            if hasattr(module, "dispatcher"):
                dispatcher = AllToAllDispatcher(
                    mesh.experts, layer=path, levels=levels, gathered=gathered, chunks=chunks
                )
                module.dispatcher = dispatcher  # pyright: ignore[reportArgumentType]
    # 3. statistics over the micro-step's rows on all ranks
    for path, module in model.named_modules():
        if hasattr(module, "statistics"):
            module.statistics = AllRankStatistics(mesh.world, layer=path)  # pyright: ignore[reportArgumentType]
    # 4. weights: each block by its own generator, so equal at every layout
    materialize(model, seed=seed, device=mesh.device)
    # 5. last, because it marks parameters: who shares which gradient
    if mesh.ep_size > 1:
        mark_experts(model, mesh)

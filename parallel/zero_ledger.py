"""DeepSpeed's own collectives in the ledger: gradient reductions, weight gathers and norms are made inside a span like ours.

The bytes are those of the tensors that DeepSpeed really hands to torch, by the formulas of parallel/peers.py. Called by
parallel/zero.py, which knows where DeepSpeed keeps its backend.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.ledger import Ledger, Sent, Where
from parallel.mesh import Mesh
from parallel.peers import Peers, peers_of


@contextlib.contextmanager
def counted(backend: Any, mesh: Mesh) -> Iterator[None]:
    """Inside, every collective of `backend` (a deepspeed.comm.torch.TorchBackend) is counted in the mesh's ledger.

    A collective of a kind that ZeRO 0, 1 and 2 do not make is refused with RuntimeError rather than left out of the count.
    """
    known = {"all_reduce": _all_reduce, "reduce": _reduce, "broadcast": _broadcast}
    known |= {"all_gather": _all_gather, "all_gather_into_tensor": _all_gather, "barrier": _barrier}
    spans = _Spans(mesh)
    # from the class, so that what an engine that never came to its end has left here is replaced
    wrapped = {name: spans.around(getattr(type(backend), name).__get__(backend), sent) for name, sent in known.items()}
    wrapped |= {name: _refused(name) for name in _NOT_USED if hasattr(backend, name)}
    vars(backend).update(wrapped)  # attributes of the object hide the methods of its class
    try:
        yield
    finally:
        for name in wrapped:
            del vars(backend)[name]


_NOT_USED = (
    "all_reduce_coalesced",
    "all_gather_coalesced",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
)


class _Spans:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ledger: Ledger = mesh.ledger
        self.peers: dict[dist.ProcessGroup, Peers] = {
            each.group: each for each in (mesh.world, mesh.experts, mesh.expert_data)
        }

    def around(self, collective: Callable[..., Any], sent: Callable[..., tuple[str, Sent]]) -> Callable[..., Any]:
        def spanned(*args: Any, **kwargs: Any) -> Any:
            verb, bytes_sent = sent(self._of(kwargs.get("group") or _group_in(args)), *args, **kwargs)
            with self.ledger.collective(Where("optimizer", "", verb), bytes_sent):
                return collective(*args, **kwargs)

        return spanned

    def _of(self, group: Any) -> Peers:
        group = group or dist.group.WORLD
        if group not in self.peers:
            self.peers[group] = peers_of(group, node_size=self.mesh.node_size, ledger=self.ledger)
        return self.peers[group]


def _group_in(args: tuple[Any, ...]) -> dist.ProcessGroup | None:
    return next((value for value in args if isinstance(value, dist.ProcessGroup)), None)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_reduce(peers: Peers, tensor: Tensor, *_: Any, **__: Any) -> tuple[str, Sent]:
    # a norm or an overflow flag is one number; a bucket of gradients never is
    return "norm" if tensor.numel() == 1 else "reduce", peers.all_reduce(_size(tensor))


def _reduce(peers: Peers, tensor: Tensor, dst: int, *_: Any, **__: Any) -> tuple[str, Sent]:
    return "reduce", peers.reduce(_size(tensor), target=dist.get_group_rank(peers.group, dst))


def _broadcast(peers: Peers, tensor: Tensor, src: int, *_: Any, **__: Any) -> tuple[str, Sent]:
    return "broadcast", peers.broadcast(_size(tensor), source=dist.get_group_rank(peers.group, src))


def _all_gather(peers: Peers, *_: Any, **kwargs: Any) -> tuple[str, Sent]:
    mine = kwargs["input_tensor"] if "input_tensor" in kwargs else kwargs["tensor"]
    return "gather", peers.all_gather(_size(mine) * peers.size)


def _barrier(peers: Peers, *_: Any, **__: Any) -> tuple[str, Sent]:
    return "barrier", Sent()


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"every collective must be counted, but DeepSpeed called {name}, which parallel/zero_ledger.py does not know: use the "
            "version in requirements.lock"
        )

    return refuse

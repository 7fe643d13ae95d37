"""The calls of the operations that have backends, as values that can be compared: those of a model, and those of what is measured for it.

Owns: what of a call is told: shapes and dtypes of all tensors, which of them get gradients, every setting, and the dtype of autocast.
Called by: tests/train/test_works.py.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import product_key_topk as key_op
from kernels import shift_mix as shift_op
from kernels import top_k_attention as attention_op
from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.product_key_topk import product_key_topk
from kernels.shift_mix import shift_mix
from kernels.top_k_attention import top_k_attention
from model import expert_choice, lookup, part_choice, product_keys, sigma_moe, switchhead
from model import top_k_attention as model_attention
from model.context import BatchContext
from model.experts import gate_then_project, gated_mlp, project_then_gate
from model.hsm import layer

OPERATIONS = (
    embedding_bag,
    gate_then_project,
    gated_mlp,
    peer_experts,
    peer_products,
    product_key_topk,
    project_then_gate,
    shift_mix,
    top_k_attention,
)
# Named and so imported before anything is patched: what is imported later would keep a patch.
CALLERS = (expert_choice, lookup, part_choice, product_keys, sigma_moe, switchhead, layer, model_attention)
CALLERS += (key_op, shift_op, attention_op)  # part_choice finds the functions there
Call = tuple[Any, ...]  # of the name, then what it was given


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Inside, every call that autograd follows adds itself to the list."""
    calls: list[Call] = []
    with ExitStack() as patched:
        for operation in OPERATIONS:
            recording = _recording(operation, calls)
            for module in CALLERS:
                for name in [name for name, value in vars(module).items() if value is operation]:
                    patched.enter_context(patch.object(module, name, recording))
        yield calls


def _recording(operation: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    signature = inspect.signature(operation)

    def recording(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            told = tuple((name, _told(value)) for name, value in given.arguments.items() if name != "backend")
            calls.append((operation.__name__, ("autocast", autocast), *told))
        return operation(*args, **kwargs)

    return recording


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad
    if isinstance(value, BatchContext):
        return "context"  # chooses which are dropped, not how
    if is_dataclass(value):
        return tuple((field.name, _told(getattr(value, field.name))) for field in fields(value))
    if isinstance(value, tuple):
        return tuple(map(_told, value))
    return None if callable(value) else value

"""switchhead_project: SwitchHead's values and outputs, every expert multiplied and the chosen ones kept.

Owns: the two public functions, all checks, autocast, and the choice of a backend. Does not own: the router's choice (model/router.py),
and where it is better to multiply the chosen experts only, which is kernels/grouped_matmul's work.
Called by: model/switchhead.py, where all experts of a bank are on this process.

The multiplications are E / K times those of the chosen experts, but nothing is written per copy: traffic.py has both figures.
"""

import torch
from torch import Tensor

from kernels.autocast import as_autocast
from kernels.availability import check_backend
from kernels.switchhead_project import dense, reference

BACKENDS = ("triton", "torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def project_values(
    x_TD: Tensor, weights_GDC: Tensor, gates_THK: Tensor, *, experts_THK: Tensor, backend: str
) -> Tensor:
    """values[t,h] = sum_k gate[t,h,k] * (x[t] @ W[h*E + expert[t,h,k]]): V of SwitchHead (arXiv 2312.07987).

    Args:
        x_TD: T tokens of width D, fp32, fp16 or bf16 ("torch" and "reference": any). Other strides are copied first.
        weights_GDC: G = H * E matrices, expert e of head h at h * E + e, dtype and device of x.
        gates_THK: float32.
        experts_THK: int32 or int64, in [0, E), distinct for one token and head.
        backend: "triton"; "torch", one matmul over all experts; or "reference".

    Returns:
        (T, H, C) in the dtype of x, differentiable in x, weights and gates; under torch.autocast in the autocast dtype, and fp32
        leaves get fp32 gradients. "triton" applies the gate to the fp32 product and rounds the sum over the choices once, is
        deterministic, bit for bit, and saves its inputs only. fp32 products round to TF32 only where
        torch.backends.cuda.matmul.allow_tf32 is set. An expert that nobody chose gets exactly zero gradients.
        Weights that are not finite reach only the values, and the gates' gradients, of those who chose them. The gradient of x is another
        matter: "triton" and "torch" multiply every expert's matrix there, by 0 where it was not chosen, and give every token NaN.

    Raises:
        ValueError: shapes, dtypes, devices or experts that do not fit together; "triton" without a GPU. What experts hold is not
            looked at on a GPU: reading them would stall the stream.
    """
    x_TD, weights_GDC = map(as_autocast, (x_TD, weights_GDC))
    _check_layout("x [T, D]", x_TD, 2, "weights [G, D, C]", weights_GDC)
    _check_choices(gates_THK, experts_THK, x_TD, weights_GDC)
    _check_backend("project_values", backend, x_TD)
    if backend != "triton":
        plain = dense if backend == "torch" else reference
        return plain.project_values(x_TD, weights_GDC, gates_THK, experts_THK)
    from kernels.switchhead_project.op import values_op

    return values_op(*(each.contiguous() for each in (x_TD, weights_GDC, gates_THK, experts_THK)))


def project_outputs(
    y_THC: Tensor, weights_GCD: Tensor, gates_THK: Tensor, *, experts_THK: Tensor, backend: str
) -> Tensor:
    """outputs[t] = sum_h,k (gate[t,h,k] * y[t,h]) @ W[h*E + expert[t,h,k]]: O of SwitchHead (arXiv 2312.07987).

    Args and errors are those of `project_values`, but for:
        y_THC: what each head has read, width C.
        weights_GCD: G = H * E matrices.

    Returns:
        (T, D). "triton" rounds gate * y to the dtype of y before the product, and the sum over heads and choices once. "triton" and
        "torch" multiply every expert's matrix, by 0 where it was not chosen: a weight that is not finite gives every token NaN, and a y
        that is not finite its own token. In the gradient of y that holds for "torch"; in the others' a weight reaches only those who
        chose it, as in the gates' gradients of all.
    """
    y_THC, weights_GCD = map(as_autocast, (y_THC, weights_GCD))
    _check_layout("y [T, H, C]", y_THC, 3, "weights [G, C, D]", weights_GCD)
    _check_choices(gates_THK, experts_THK, y_THC, weights_GCD)
    _check_backend("project_outputs", backend, y_THC)
    if backend != "triton":
        plain = dense if backend == "torch" else reference
        return plain.project_outputs(y_THC, weights_GCD, gates_THK, experts_THK)
    from kernels.switchhead_project.op import outputs_op

    return outputs_op(*(each.contiguous() for each in (y_THC, weights_GCD, gates_THK, experts_THK)))


def _check_layout(name: str, rows: Tensor, ndim: int, weights_name: str, weights: Tensor) -> None:
    fits = rows.ndim == ndim and weights.ndim == 3 and rows.shape[-1] == weights.shape[1]
    if not fits or 0 in weights.shape:
        raise ValueError(
            f"{name} and {weights_name} must agree, with no size 0 but T, got {list(rows.shape)} and weights {list(weights.shape)}: "
            "transpose or reshape one of them"
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"{name} and weights must have one dtype outside autocast, got {rows.dtype} and {weights.dtype}: cast one of them, or run "
            "under torch.autocast"
        )
    if rows.device != weights.device:
        raise ValueError(
            f"{name} and weights must be on one device, got {rows.device} and {weights.device}: move one of them"
        )


def _check_choices(gates_THK: Tensor, experts_THK: Tensor, rows: Tensor, weights: Tensor) -> None:
    """rows: x (T, D) or y (T, H, C)."""
    shape = gates_THK.shape
    if len(shape) != 3 or shape[: rows.ndim - 1] != rows.shape[:-1] or 0 in shape[1:] or len(weights) % shape[1]:
        raise ValueError(
            f"gates must be [T, H, K] with the T and the H of the rows, and H must divide the number of matrices, got gates {list(shape)} "
            f"for rows {list(rows.shape)} and weights {list(weights.shape)}: pass one gate for each choice of each head"
        )
    num_experts = len(weights) // shape[1]
    if shape[2] > num_experts:
        raise ValueError(
            f"a head must have at least as many experts as choices, got {num_experts} experts and gates {list(shape)}: choose fewer"
        )
    expected = (
        ("gates", gates_THK, (torch.float32,)),
        ("experts", experts_THK, (torch.int32, torch.int64)),
    )
    for name, tensor, dtypes in expected:
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != rows.device:
            raise ValueError(
                f"{name} must be {list(shape)} of {' or '.join(map(str, dtypes))} on {rows.device}, got {list(tensor.shape)} of "
                f"{tensor.dtype} on {tensor.device}"
            )
    if rows.is_cpu and not torch.compiler.is_compiling():
        _check_experts(experts_THK, num_experts=num_experts)


def _check_experts(experts_THK: Tensor, *, num_experts: int) -> None:
    if experts_THK.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(experts_THK))
    if low < 0 or high >= num_experts:
        raise ValueError(
            f"experts must be in [0, {num_experts}), got {low} to {high}: pass the expert within its head, not the group of the bank"
        )
    sorted_THK = experts_THK.sort(dim=2).values
    if (sorted_THK[..., 1:] == sorted_THK[..., :-1]).any():
        raise ValueError(
            "experts must be distinct for one token and head, got one twice: add its gates and choose it once"
        )


def _check_backend(function: str, backend: str, rows: Tensor) -> None:
    check_backend(function, backend, BACKENDS, device_type=rows.device.type)
    if backend == "triton" and rows.dtype not in DTYPES:
        raise ValueError(
            f"the triton backend of {function} computes in {', '.join(map(str, DTYPES))}, got {rows.dtype}: cast rows and weights, or "
            "choose another backend"
        )

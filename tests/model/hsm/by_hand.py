"""Hierarchical shift mixing written out position by position and channel by channel, without any code of model/.

Owns: what the right answer is (sections 3 to 5 of the specification). Called by the tests of this folder. Letters: S positions,
D model width.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def mix(variant: str, u: list[float], v: list[float], weights: Weights) -> list[float]:
    """m = M(u, v) for one position, with the weights under the layer's own names."""
    width = len(u)
    w = {name: weight.tolist() for name, weight in weights.items()}
    if variant in ("constant", "vector", "multihead"):
        a, b = w["of_token.weight"], w["of_shifted.weight"]
        part = width // len(a)
        return [a[i // part] * u[i] + b[i // part] * v[i] for i in range(width)]
    if variant in ("matrix_scalar", "matrix"):
        bias = w.get("of_token.bias", [0.0] * width)
        m = [dot(row, u) + extra for row, extra in zip(w["of_token.weight"], bias, strict=True)]
        if variant == "matrix_scalar":
            return [m[i] + w["of_shifted.weight"][0] * v[i] for i in range(width)]
        return [m[i] + dot(w["of_shifted.weight"][i], v) for i in range(width)]
    if variant == "multihead_matrix":
        bias = w.get("of_token.bias", [0.0] * width)
        part = width // len(w["of_token.weight"])
        m = []
        for i in range(width):
            head, row = divmod(i, part)
            inside = slice(head * part, (head + 1) * part)
            mixed = dot(w["of_token.weight"][head][row], u[inside]) + dot(w["of_shifted.weight"][head][row], v[inside])
            m.append(mixed + bias[i])
        return m
    both = u + v
    if variant == "fusion":
        up_bias = w.get("up.bias", [0.0] * len(w["up.weight"]))
        hidden = [gelu(dot(row, both) + extra) for row, extra in zip(w["up.weight"], up_bias, strict=True)]
        bias = w.get("down.bias", [0.0] * width)
        return [dot(row, hidden) + extra for row, extra in zip(w["down.weight"], bias, strict=True)]
    bias = w.get("gate.bias", [0.0] * len(w["gate.weight"]))
    gates = [1 / (1 + math.exp(-dot(row, both) - extra)) for row, extra in zip(w["gate.weight"], bias, strict=True)]
    second = gates[width:] if variant == "double_gate" else [1 - gate for gate in gates]
    return [gates[i] * u[i] + second[i] * v[i] for i in range(width)]


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def shifted(u_SD: Tensor, amount: int, *, boundary: str, documents: list[int] | None = None) -> Tensor:
    """v (S, D), one position after the other."""
    documents = [0] * len(u_SD) if documents is None else documents
    v_SD = torch.zeros_like(u_SD)
    for t, document in enumerate(documents):
        source = t - amount
        if source >= 0 and documents[source] == document:
            v_SD[t] = u_SD[source]
        elif boundary == "self":
            v_SD[t] = u_SD[t]
        elif boundary == "clamp":
            v_SD[t] = u_SD[documents.index(document)]
    return v_SD


def hsm(
    u_SD: Tensor,
    shifts: list[int],
    *,
    variant: str,
    weights: Weights,
    boundary: str,
    documents: list[int] | None = None,
) -> Tensor:
    """One layer over one row; several shifts belong to equal slices of the channels."""
    part = u_SD.shape[1] // len(shifts)
    slices = [
        shifted(u_SD[:, h * part : (h + 1) * part], amount, boundary=boundary, documents=documents)
        for h, amount in enumerate(shifts)
    ]
    v_SD = torch.cat(slices, dim=1)
    rows = [mix(variant, u.tolist(), v.tolist(), weights) for u, v in zip(u_SD, v_SD, strict=True)]
    return torch.tensor(rows, dtype=u_SD.dtype)

"""The papers' formulas in float64, one row of tokens at a time, token by token and head by head, without any code of model/.

Owns: what the right answer is (specs of arXiv 2312.07987 and 2310.10837). Does not own: how weights are taken out of a layer
(tests/model/build.py). Called by the tests of this folder. Letters as in model/: S positions, D model width, H heads, C head width,
E experts, F expert width.
"""

import math

import torch
from torch import Tensor


def causal(length: int) -> Tensor:
    """bool (S, S): query i may look at key j."""
    return torch.tensor([[j <= i for j in range(length)] for i in range(length)])


def rope(x_SC: Tensor) -> Tensor:
    """Turns complex numbers: of the first int(C / 2) channels, rounded down to even, the first half is real, the second imaginary."""
    width = int(0.5 * x_SC.shape[1])
    width -= width % 2
    turned = torch.complex(x_SC[:, : width // 2], x_SC[:, width // 2 : width])
    angles = [[p * 10_000 ** (-2 * i / width) for i in range(width // 2)] for p in range(x_SC.shape[0])]
    turned = turned * torch.exp(1j * torch.tensor(angles, dtype=x_SC.dtype))
    return torch.cat([turned.real, turned.imag, x_SC[:, width:]], dim=1)


def attend(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the visible keys, one query after the other."""
    rows = []
    for i, query in enumerate(q_SC):
        keys = [j for j in range(len(k_SC)) if visible_SS[i, j]]
        powers = torch.stack([torch.exp(query @ k_SC[j] / math.sqrt(q_SC.shape[1])) for j in keys])
        rows.append(sum(power / powers.sum() * v_SC[j] for power, j in zip(powers, keys, strict=True)))
    return torch.stack(rows)


def attention(
    x_SD: Tensor, *, query_HCD: Tensor, key_HCD: Tensor, value_HDC: Tensor, output_HCD: Tensor, visible_SS: Tensor
) -> Tensor:
    """Dense multi-head attention with rotary positions and no biases."""
    y_SD = torch.zeros_like(x_SD)
    for query, key, value, output in zip(query_HCD, key_HCD, value_HDC, output_HCD, strict=True):
        mixed = attend(rope(x_SD @ query.T), rope(x_SD @ key.T), x_SD @ value, visible_SS)
        y_SD = y_SD + mixed @ output
    return y_SD


def best(logits_E: Tensor, top_k: int) -> list[int]:
    """The ids of the k largest logits; among equal ones the lowest ids."""
    return sorted(range(len(logits_E)), key=lambda e: (-logits_E[e].item(), e))[:top_k]


def gate(logit: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logit))


def switchhead(
    x_SD: Tensor,
    *,
    query_HCD: Tensor,
    key_HCD: Tensor,
    value_HEDC: Tensor,
    output_HECD: Tensor,
    value_router_HED: Tensor,
    output_router_HED: Tensor,
    top_k: int,
    visible_SS: Tensor,
) -> Tensor:
    """Section 1 of the SwitchHead specification, steps 1 to 7."""
    y_SD = torch.zeros_like(x_SD)
    for h in range(len(query_HCD)):
        values = []
        for x_D in x_SD:
            logits_E = value_router_HED[h] @ x_D
            values.append(sum(gate(logits_E[e]) * (x_D @ value_HEDC[h, e]) for e in best(logits_E, top_k)))
        mixed_SC = attend(rope(x_SD @ query_HCD[h].T), rope(x_SD @ key_HCD[h].T), torch.stack(values), visible_SS)
        for i, x_D in enumerate(x_SD):
            logits_E = output_router_HED[h] @ x_D
            for e in best(logits_E, top_k):
                y_SD[i] += gate(logits_E[e]) * (mixed_SC[i] @ output_HECD[h, e])
    return y_SD


def sigma_moe(x_SD: Tensor, *, up_EDF: Tensor, down_EFD: Tensor, router_ED: Tensor, top_k: int) -> Tensor:
    """Section 4 of the sigma-MoE specification, with the gate on the expert's output."""
    y_SD = torch.zeros_like(x_SD)
    for i, x_D in enumerate(x_SD):
        logits_E = router_ED @ x_D
        for e in best(logits_E, top_k):
            y_SD[i] += gate(logits_E[e]) * ((x_D @ up_EDF[e]).clamp(min=0) @ down_EFD[e])
    return y_SD


def dense_mlp(x_SD: Tensor, *, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    return (x_SD @ up_DF).clamp(min=0) @ down_FD


def negative_entropy(logits_TE: Tensor) -> float:
    """sum_e p_e log p_e of the mean over tokens of softmax(logits), with 0 log 0 = 0."""
    mean = [0.0] * logits_TE.shape[1]
    for row in logits_TE.tolist():
        powers = [math.exp(logit - max(row)) for logit in row]
        mean = [m + power / sum(powers) / len(logits_TE) for m, power in zip(mean, powers, strict=True)]
    return sum(p * math.log(p) for p in mean if p > 0)


def layer_norm(x_SD: Tensor, *, gain_D: Tensor, bias_D: Tensor) -> Tensor:
    centred = x_SD - x_SD.mean(dim=1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5) * gain_D + bias_D

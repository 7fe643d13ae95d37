"""The papers' formulas in float64, one row of tokens at a time, token by token and head by head, without any code of model/.

Owns: what the right answer is (specs of arXiv 2312.07987 and 2310.10837). Does not own: how weights are taken out of a layer
(tests/model/build.py). Called by the tests of this folder. Letters as in model/: S positions, D model width, H heads, C head width,
E experts, F expert width, M positions of memory and row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def causal(length: int, earlier: int = 0) -> Tensor:
    """bool (S, M): query i may look at key j; `earlier` keys come before the row."""
    return torch.tensor([[j <= i + earlier for j in range(earlier + length)] for i in range(length)])


@dataclass(frozen=True)
class Positions:
    """How scores know of positions: "rope" (of `width` channels; None: half, rounded down to even), "xl" or "none".

    xl: W_pos of each head, and the learned biases u and v and scale, where there are any.
    """

    kind: str = "rope"
    width: int | None = None
    position_HCD: Tensor | None = None
    content_bias_HC: Tensor | None = None
    position_bias_HC: Tensor | None = None
    scale: float | None = None


ROPE = Positions()


def rope(x_SC: Tensor, *, width: int | None = None, first: int = 0) -> Tensor:
    """Turns complex numbers: of the first `width` channels, the first half is real, the second imaginary. Positions first, first + 1, .."""
    if width is None:
        width = int(0.5 * x_SC.shape[1])
        width -= width % 2
    turned = torch.complex(x_SC[:, : width // 2], x_SC[:, width // 2 : width])
    angles = [[(first + p) * 10_000 ** (-2 * i / width) for i in range(width // 2)] for p in range(x_SC.shape[0])]
    turned = turned * torch.exp(1j * torch.tensor(angles, dtype=x_SC.dtype).view(turned.shape))
    return torch.cat([turned.real, turned.imag, x_SC[:, width:]], dim=1)


def sinusoid(distance: int, dim: int) -> Tensor:
    """Sine and cosine in turns, wavelengths from 2 pi to 10000 * 2 pi."""
    angles = [distance / 10_000 ** (2 * (c // 2) / dim) for c in range(dim)]
    return torch.tensor([(math.cos if c % 2 else math.sin)(a) for c, a in enumerate(angles)], dtype=torch.float64)


def attend(
    q_SC: Tensor, k_MC: Tensor, v_MC: Tensor, visible_SS: Tensor, *, head: int = 0, positions: Positions = ROPE,
    top_k: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scores) v over the visible keys, or the top_k best of them, one query after the other; q are the last S of M positions."""
    earlier, scale = len(k_MC) - len(q_SC), 1 / math.sqrt(q_SC.shape[1])
    if positions.kind == "rope":
        q_SC = rope(q_SC, width=positions.width, first=earlier)
        k_MC = rope(k_MC, width=positions.width)
    rows = []
    for i, query in enumerate(q_SC):
        scores = {}
        for j in range(len(k_MC)):
            if not visible_SS[i, j]:
                continue
            if positions.position_HCD is None:
                scores[j] = scale * (query @ k_MC[j])
                continue
            weight_CD = positions.position_HCD[head]
            u_C = 0 if positions.content_bias_HC is None else positions.content_bias_HC[head]
            v_C = 0 if positions.position_bias_HC is None else positions.position_bias_HC[head]
            distance_C = weight_CD @ sinusoid(i + earlier - j, weight_CD.shape[1])
            factor = scale if positions.scale is None else positions.scale
            scores[j] = factor * ((query + u_C) @ k_MC[j] + (query + v_C) @ distance_C)
        kept = sorted(scores, key=lambda j: (-scores[j].item(), j))[:top_k]
        powers = torch.stack([torch.exp(scores[j]) for j in kept])
        rows.append(sum(power / powers.sum() * v_MC[j] for power, j in zip(powers, kept, strict=True)))
    return torch.stack(rows)


def attention(
    x_MD: Tensor,
    *,
    query_HCD: Tensor,
    key_HCD: Tensor,
    value_HDC: Tensor,
    output_HCD: Tensor,
    visible_SS: Tensor,
    positions: Positions = ROPE,
    top_k: int | None = None,
) -> Tensor:
    """Dense multi-head attention without biases; the last S of the M positions are the row, the others memory."""
    x_SD = x_MD[len(x_MD) - len(visible_SS) :]
    y_SD = torch.zeros_like(x_SD)
    for h, (query, key, value, output) in enumerate(zip(query_HCD, key_HCD, value_HDC, output_HCD, strict=True)):
        q, k, v = x_SD @ query.T, x_MD @ key.T, x_MD @ value
        y_SD = y_SD + attend(q, k, v, visible_SS, head=h, positions=positions, top_k=top_k) @ output
    return y_SD


def best(logits_E: Tensor, top_k: int) -> list[int]:
    """The ids of the k largest logits; among equal ones the lowest ids."""
    return sorted(range(len(logits_E)), key=lambda e: (-logits_E[e].item(), e))[:top_k]


def gate(logit: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logit))


def project(row_X: Tensor, weight: Tensor, logits_E: Tensor | None, *, top_k: int, gates: str) -> Tensor:
    """row W for a dense W (X, Y); the gated sum over the best experts for W (E, X, Y)."""
    if weight.ndim == 2:
        return row_X @ weight
    assert logits_E is not None
    chosen = best(logits_E, top_k)
    powers = torch.exp(logits_E[chosen])
    shares = [gate(logits_E[e]) for e in chosen] if gates == "sigmoid" else [power / powers.sum() for power in powers]
    return sum((share * (row_X @ weight[e]) for share, e in zip(shares, chosen, strict=True)), torch.tensor(0.0))


def switchhead(
    x_MD: Tensor,
    *,
    weights: Mapping[str, Tensor],
    routers: Mapping[str, Tensor],
    top_k: int,
    visible_SS: Tensor,
    gates: str = "sigmoid",
    positions: Positions = ROPE,
    attend_top_k: int | None = None,
) -> Tensor:
    """Section 1 of the SwitchHead specification, steps 1 to 7, with any of the projections as experts.

    weights: by projection (query, key, value, output) and head, dense (H, X, Y) or experts (H, E, X, Y). routers: (H, E, D) for each
    projection with experts.
    """
    x_SD = x_MD[len(x_MD) - len(visible_SS) :]
    y_SD = torch.zeros_like(x_SD)

    def projected(name: str, h: int, x_D: Tensor, row_X: Tensor) -> Tensor:
        logits_E = routers[name][h] @ x_D if name in routers else None
        return project(row_X, weights[name][h], logits_E, top_k=top_k, gates=gates)

    for h in range(len(weights["query"])):
        q, k, v = (
            torch.stack([projected(name, h, x_D, x_D) for x_D in rows])
            for name, rows in (("query", x_SD), ("key", x_MD), ("value", x_MD))
        )
        mixed_SC = attend(q, k, v, visible_SS, head=h, positions=positions, top_k=attend_top_k)
        for i, x_D in enumerate(x_SD):
            y_SD[i] += projected("output", h, x_D, mixed_SC[i])
    return y_SD


def sigma_moe(x_SD: Tensor, *, up_EDF: Tensor, down_EFD: Tensor, router_ED: Tensor, top_k: int) -> Tensor:
    """Section 4 of the sigma-MoE specification, with the gate on the expert's output."""
    y_SD = torch.zeros_like(x_SD)
    for i, x_D in enumerate(x_SD):
        logits_E = router_ED @ x_D
        for e in best(logits_E, top_k):
            y_SD[i] += gate(logits_E[e]) * ((x_D @ up_EDF[e]).clamp(min=0) @ down_EFD[e])
    return y_SD


def routed_mlp(x_SD: Tensor, *, up_EDF: Tensor, down_EFD: Tensor, logits_SE: Tensor, top_k: int, gates: str) -> Tensor:
    """The layer with the gates of another router, on the experts' outputs; gates: softmax before or after the top-k, or open."""
    y_SD = torch.zeros_like(x_SD)
    for i, (x_D, logits_E) in enumerate(zip(x_SD, logits_SE, strict=True)):
        chosen = best(logits_E, top_k)
        powers = torch.exp(logits_E)
        total = {"before": powers.sum(), "after": powers[chosen].sum()}.get(gates)
        for e in chosen:
            share = torch.ones(()) if total is None else powers[e] / total
            y_SD[i] += share * ((x_D @ up_EDF[e]).clamp(min=0) @ down_EFD[e])
    return y_SD


def sinkhorn(logits_TE: Tensor, *, iterations: int) -> Tensor:
    """The matrix exp(logits) whose rows are scaled to sum 1, then its columns to sum T / E, again and again, number by number."""
    matrix = logits_TE.exp()
    num_rows, num_columns = matrix.shape
    for _ in range(iterations):
        for t in range(num_rows):
            matrix[t] /= matrix[t].sum()
        for e in range(num_columns):
            matrix[:, e] *= num_rows / num_columns / matrix[:, e].sum()
    return matrix


def dense_mlp(x_SD: Tensor, *, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    return (x_SD @ up_DF).clamp(min=0) @ down_FD


def negative_entropy(logits_TE: Tensor) -> float:
    """sum_e p_e log p_e of the mean over tokens of softmax(logits), with 0 log 0 = 0."""
    mean = [0.0] * logits_TE.shape[1]
    for row in logits_TE.tolist():
        powers = [math.exp(logit - max(row)) for logit in row]
        mean = [m + power / sum(powers) / len(logits_TE) for m, power in zip(mean, powers, strict=True)]
    return sum(p * math.log(p) for p in mean if p > 0)


def sequence_negative_entropy(logits_BSHE: Tensor) -> float:
    """The mean over rows of sum_e p_e log p_e, p the mean over a row's tokens and heads of softmax(logits)."""
    return sum(negative_entropy(row.flatten(0, 1)) for row in logits_BSHE) / len(logits_BSHE)


def layer_norm(x_SD: Tensor, *, gain_D: Tensor, bias_D: Tensor) -> Tensor:
    centred = x_SD - x_SD.mean(dim=1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5) * gain_D + bias_D

"""The routers that arXiv 2310.10837 compares sigma-MoE's with: from scores to a choice of experts, and Switch's load loss.

Owns what is added to the scores before the ranking (noise, Sinkhorn's potentials, the balancing bias) and which gate a router has. Does
not own the scores themselves nor the ranking (router.py, recurrent_router.py). Called by sigma_moe.py, whose one router has one head.
Shape letters: T tokens of this rank, D model width, E experts, K choices; 1 or H for the head.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.context import BatchContext, gaussian_noise
from model.feedforward_config import SigmaMoEConfig
from model.parameters import DeclaringModule, zeros
from model.router import Choice, Gates, Router, RouterReport, choose, kept_experts
from model.section import Place
from model.statistics import BatchStatistics

SINKHORN_ITERATIONS = 3  # as in the S-BASE baseline of arXiv 2310.10837
BIAS_UPDATE_SPEED = 1.0e-3  # arXiv 2408.15664, where it is added to sigmoids
GATES: dict[str, Gates] = {
    "sigmoid": "sigmoid",
    "softmax": "softmax_of_all",
    "softmax_after": "softmax",
    "switch": "softmax_of_all",
    "sinkhorn": "sigmoid",
    "noisy": "softmax",
    "average_keys": "open",
    "recurrent": "softmax",
}


class Selection(DeclaringModule):
    """Chooses each token's experts and gates them, as `config.router` says.

    noisy (Shazeer et al., arXiv 1701.06538, equations 3 to 5): in training logits + normal noise * softplus(x W_noise), in the ranking and
    in the gates. sinkhorn: in training the ranking is balanced over all tokens of all ranks, the gates are not. With `balance: bias`
    (Wang et al., arXiv 2408.15664) the ranking alone adds a bias of each expert; ours is in units of the logits, so that it serves every
    router.
    """

    bias: Tensor

    def __init__(self, config: SigmaMoEConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        if config.router == "noisy":
            self.noise = Router(d_model=place.d_model, num_heads=1, num_experts=config.num_experts, draw=zeros)
        if config.balance == "bias":
            self.declare_state("bias", (config.num_experts,))

    def forward(self, logits_T1E: Tensor, x_TD: Tensor, context: BatchContext, statistics: BatchStatistics) -> Choice:
        """x: what the router has read."""
        offsets_HE = self.bias[None] if self.config.balance == "bias" else None
        if self.training and self.config.router == "noisy":
            logits_T1E = logits_T1E + self._noise(x_TD, context)
        if self.training and self.config.router == "sinkhorn":
            offsets_HE = sinkhorn_potentials(logits_T1E, statistics)
        probability = self.config.expert_dropout if self.training else 0.0
        return choose(
            logits_T1E,
            top_k=self.config.top_k,
            kept_THE=kept_experts(logits_T1E, context, probability=probability, site="mlp_expert"),
            offsets_HE=offsets_HE,
            gates=GATES[self.config.router],
        )

    def _noise(self, x_TD: Tensor, context: BatchContext) -> Tensor:
        scale_T1E = F.softplus(self.noise(x_TD))
        rows = len(context.positions_B)
        length = len(x_TD) // rows if rows else 0
        noise_BSE = gaussian_noise(context, length, scale_T1E.shape[-1], site="mlp_noise")
        return noise_BSE.view(scale_T1E.shape) * scale_T1E

    @torch.no_grad()
    def move_bias(self, report: RouterReport) -> None:
        """One step's copies of all ranks: those below the mean get a higher bias, those above a lower one, all by the same amount."""
        speed = self.config.bias_update_speed or BIAS_UPDATE_SPEED
        self.bias.add_((report.count_G.mean() - report.count_G).sign(), alpha=speed)


@torch.no_grad()
def sinkhorn_potentials(
    logits_THE: Tensor, statistics: BatchStatistics, *, iterations: int = SINKHORN_ITERATIONS
) -> Tensor:
    """(H, E): what to add to the logits of all tokens so that the experts' shares come near to equal (S-BASE, arXiv 2202.01169).

    One iteration of Sinkhorn scales every row of exp(logits) to sum 1, then every column of the rows of all ranks to an equal sum. A row's
    scale does not change its ranking, so the columns' potentials are all that is kept, up to a constant: minus the log of the mean of
    the softmax. One all-reduce of H*E numbers for each iteration.
    """
    potentials_HE = logits_THE.new_zeros(logits_THE.shape[1:])
    for _ in range(iterations):
        load_HE = statistics.mean((logits_THE + potentials_HE).softmax(-1))
        potentials_HE = potentials_HE - load_HE.clamp_min(torch.finfo(load_HE.dtype).tiny).log()
    return potentials_HE


def load_loss(
    logits_THE: Tensor,
    choice: Choice,
    statistics: BatchStatistics,
    *,
    weight: float,
    reading: Literal["paper", "code"],
) -> Tensor:
    """weight * E * sum_e f_e P_e (Switch, arXiv 2101.03961, equation 4), the mean over heads; `weight` itself at perfect balance.

    f: the share of the routed copies that go to e, without gradient; P: the mean of softmax(logits); both over the rows of all ranks.
    code: the mean over e in place of E times the sum, E^2 less, as the code of arXiv 2310.10837 has it.
    """
    num_experts, num_choices = logits_THE.shape[-1], choice.experts_THK.shape[-1]
    share_THE = torch.zeros_like(logits_THE).scatter(-1, choice.experts_THK, 1 / num_choices)
    share_HE, probability_HE = statistics.mean(torch.stack([share_THE, logits_THE.softmax(-1)], dim=1))
    factor = num_experts if reading == "paper" else 1 / num_experts
    return weight * factor * (share_HE * probability_HE).sum(-1).mean()


def bias_ranges(model: nn.Module) -> dict[str, float]:
    """By path of each selection with a balancing bias: its largest minus its smallest, in units of the logits."""
    return {
        path: float(module.bias.max() - module.bias.min())
        for path, module in model.named_modules()
        if isinstance(module, Selection) and module.config.balance == "bias"
    }

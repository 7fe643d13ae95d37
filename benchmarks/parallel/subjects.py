"""The layers that the exchange is measured on, with their sizes: which config each comes from, and how many tokens a rank has.

All in float32 and without entropy losses, whose all-reduces are no part of the exchange. Used by the workers and by bench_exchange.py.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from benchmarks.parallel.messages import Bank
from kernels.grouped_matmul import choose_backend
from model.attention_config import SwitchHeadConfig
from model.config import ModelConfig
from model.feedforward_config import SigmaMoEConfig
from model.section import Place
from model.transformer import Block

NUM_LAYERS = 16  # of the model around the layer, which the initial scale depends on


class Subject(Protocol):
    """A layer with `forward(x_BSD, context).y_BSD`, and its rows on each rank."""

    @property
    def name(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def length(self) -> int: ...
    def build(self) -> nn.Module:
        """On the meta device."""
        ...


@dataclass(frozen=True)
class FeedForward:
    """A sigma-MoE layer of `num_experts` experts of width `expert_dim`."""

    name: str
    d_model: int
    num_experts: int
    expert_dim: int
    top_k: int
    length: int
    sequences: int = 1

    def config(self) -> SigmaMoEConfig:
        return SigmaMoEConfig(
            num_experts=self.num_experts,
            expert_dim=self.expert_dim,
            top_k=self.top_k,
            entropy_weight=0.0,
            expert_dropout=0.0,
        )

    def build(self) -> nn.Module:
        return self.config().build(place(self.d_model, "sigma_moe", backend=_backend(self.d_model, self.expert_dim)))


@dataclass(frozen=True)
class Heads:
    """A SwitchHead layer whose value and output projections are experts."""

    num_heads: int
    top_k: int
    num_experts: int = 8
    d_model: int = 512
    head_dim: int = 64
    sequences: int = 4
    length: int = 256

    @property
    def name(self) -> str:
        return f"SwitchHead, H {self.num_heads}, k {self.top_k}, E {self.num_experts}"

    def config(self) -> SwitchHeadConfig:
        return SwitchHeadConfig(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_dropout=0.0,
        )

    def build(self) -> nn.Module:
        return self.config().build(place(self.d_model, "switchhead", backend=_backend(self.d_model, self.head_dim)))

    def bank(self, label: str) -> Bank:
        """What the formulas must know of the value or the output experts."""
        row_dim, output_dim = self.d_model, self.head_dim
        if label == "output":
            row_dim, output_dim = output_dim, row_dim
        return Bank(self.num_heads * self.num_experts, row_dim, output_dim)


@dataclass(frozen=True)
class SwitchAll:
    """A block of configs/switchall_47m.yaml with one shared expert more, so that there is something to compute under the exchange."""

    name: str = "SwitchAll block, 47M"
    d_model: int = 412
    sequences: int = 8
    length: int = 256

    def build(self) -> nn.Module:
        heads = {"num_heads": 2, "head_dim": 76, "num_experts": 5, "top_k": 2}
        experts = {"num_experts": 16, "expert_dim": 128, "top_k": 4, "num_shared_experts": 1, "entropy_weight": 0.0}
        config = ModelConfig.model_validate(
            {"d_model": self.d_model, "num_layers": NUM_LAYERS, "mixers": ["switchhead"], "feedforwards": ["sigma_moe"]}
            | {"switchhead": heads, "sigma_moe": experts}
        )
        return Block(config, config.places(backend=_backend(self.d_model, 76, 128))[0])


def place(d_model: int, mixer: str, *, backend: str = "auto") -> Place:
    return Place(d_model, NUM_LAYERS, 0, (mixer,) * NUM_LAYERS, backend, 0.0)


def _backend(*widths: int) -> str:
    return choose_backend("auto", device="cpu", dtype=torch.float32, widths=widths)


FEED_FORWARDS = (
    FeedForward("sigma-MoE 47M, k 4", 412, 16, 128, 4, 2048),  # configs/switchall_47m.yaml
    FeedForward("sigma-MoE 47M, k 1", 412, 16, 128, 1, 2048),
    # configs/paper/moeut_1b.yaml with 564 experts instead of 565, because DeepSpeed wants as many on every rank
    FeedForward("sigma-MoE 1B, k 24", 1536, 564, 128, 24, 512),
    FeedForward("sigma-MoE 1B, k 1", 1536, 564, 128, 1, 512),
)
HEADS = (Heads(4, 2), Heads(2, 4))
# around the number at which the bytes of configs/switchall_47m.yaml's feed-forward are equal, about 1,000 tokens on 2 ranks
LENGTHS = (128, 512, 1024, 2048, 4096)

"""Batch normalisation over the rows of all ranks, for the queries of product keys (arXiv 1907.05242, 2407.04153).

In training each feature is normalised by its mean and variance over the micro-step's rows on all ranks, so that the result does not
depend on the layout; later tokens and other rows take part in them. In evaluation the running statistics are used, and a row depends
on nothing but itself. Called by model/product_keys.py.

Shape letters: T rows, X features.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.parameters import DeclaringModule, ones, zeros
from model.statistics import BatchStatistics, LocalStatistics

MOMENTUM, EPSILON = 0.1, 1e-5  # torch.nn.BatchNorm1d's; the papers give none


class Normalised(NamedTuple):
    """y (T, X), and what is to be added to the states "mean" and "variance" after a training micro-step."""

    y_TX: Tensor
    updates: Mapping[str, Tensor]


class BatchNorm(DeclaringModule):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, per feature.

    The running statistics move by MOMENTUM towards those of each micro-step. The variance divides by the number of rows in both
    places (torch's running one divides by one less, which at thousands of rows is nothing).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.statistics: BatchStatistics = LocalStatistics()
        self.declare("weight", (dim,), ones)
        self.declare("bias", (dim,), zeros)
        self.declare_state("mean", (dim,))
        self.declare_state("variance", (dim,), value=1.0)

    def forward(self, x_TX: Tensor) -> Normalised:
        mean_X, variance_X, updates = self.mean, self.variance, {}
        if self.training:
            mean_X = self.statistics.mean(x_TX)
            variance_X = self.statistics.mean(
                (x_TX - mean_X).square()
            )  # mean of squares less square of mean would cancel
            updates = {
                "mean": MOMENTUM * (mean_X.detach() - self.mean),
                "variance": MOMENTUM * (variance_X.detach() - self.variance),
            }
        scale_X = self.weight * torch.rsqrt(variance_X + EPSILON)
        return Normalised((x_TX - mean_X) * scale_X + self.bias, updates)

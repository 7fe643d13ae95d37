"""How long a collective waits for a rank that does not come: the time that open_mesh is given, in every group.

In this process and not on a pool, whose world is open already.
"""

import os
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist

from parallel.mesh import open_mesh
from tests.train.tiny_job import ALONE

CPU = torch.device("cpu")


def patience(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(CPU).options._timeout


def test_every_group_waits_as_long_as_it_is_told():
    with mock.patch.dict(os.environ), open_mesh(ALONE, ep_size=1, device=CPU, timeout_s=90.0) as mesh:
        assert dist.group.WORLD is not None
        assert patience(dist.group.WORLD) == timedelta(seconds=90)
        for group in (mesh.world_group, mesh.expert_group, mesh.expert_data_group):
            assert patience(group) == timedelta(minutes=2), "whole minutes, rounded up"
    assert not dist.is_initialized()

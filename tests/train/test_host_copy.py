"""train/host_copy.py: what is copied is equal, and its memory is taken again."""

import torch

from tests.train.thread_mesh import draw, split
from train.host_copy import HostCopy


def test_a_copy_is_equal_keeps_shapes_and_dtypes_and_takes_the_same_memory_again():
    holder = HostCopy()
    fragments = split(draw(3), 1, seed=0)[0]
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "number": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "columns": torch.randn(6, 4).t(),
        "flags": torch.tensor([True, False, True]),
    }
    places = []
    for _ in range(2):
        copied = holder.take(fragments, tensors)
        for found, expected in zip(copied.fragments, fragments, strict=True):
            assert (found.name, found.shape, found.start, found.box) == (
                expected.name,
                expected.shape,
                expected.start,
                None,
            )
            for kind, view in expected.tensors.items():
                assert torch.equal(found.tensors[kind].view(torch.int32), view.view(torch.int32))
                assert view.numel() == 0 or found.tensors[kind].data_ptr() != view.data_ptr()
        for name, tensor in tensors.items():
            assert torch.equal(copied.tensors[name], tensor)
            assert (copied.tensors[name].dtype, copied.tensors[name].shape) == (tensor.dtype, tensor.shape)
        places.append(copied.fragments[0].tensors["master"].data_ptr())
    assert places[0] == places[1]
    less = holder.take(fragments[:1], {})
    assert less.fragments[0].tensors["master"].data_ptr() == places[0], "a smaller copy fits, and nothing is taken anew"

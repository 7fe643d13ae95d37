"""How the work of a grouped kernel is laid out on a GPU, from shapes and the device alone: never from what a tensor holds.

Owns: how many programs a launch has, in which order they walk through the tiles, into how many parts the sum of a weight gradient is
cut. Does not own: the kernels that follow it (tiles.py, weight_gradient.py).
Called by: the launching functions of kernels/grouped_matmul and kernels/expert_mlp, and their traffic.py.
"""

import torch

WARPS = 16  # of a multiprocessor: at 128 registers per thread they fill its 65,536; half as many at 255
SHARED = 227 << 10  # bytes of an H100's multiprocessor for all its programs
WITHOUT_DEVICE = 4  # programs in the interpreter, and where code is only compiled
L2_BYTES = 50 << 20  # an H100's, where there is no device to ask
PROGRAMS_OF_A_GPU = (
    264  # two for each of an H100's 132 multiprocessors; fixed, so that no device changes the order of a sum
)
SHORTEST_PART = (
    512  # copies: 8 steps of a sum; a shorter part would not repay its 4 bytes per number, written and read again
)


def num_programs(max_tiles: int, *, warps: int, shared: int, wide: bool, device: torch.device) -> int:
    """Programs of a launch of at most so many tiles: what is resident at once, since more would wait, and then run nearly alone.

    Each walks over every num_programs-th tile. warps, shared (bytes): of a program; wide: it needs more than 128 registers per thread.
    """
    if device.type != "cuda":
        return min(max_tiles, WITHOUT_DEVICE)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(max_tiles, count * resident(warps=warps, shared=shared, wide=wide))


def resident(*, warps: int, shared: int, wide: bool) -> int:
    """Programs that a multiprocessor holds at once."""
    return max(1, min((WARPS // 2 if wide else WARPS) // warps, SHARED // shared))


def order_bits(*, copies: int, groups: int, block: int, weight_bytes: int, device: torch.device) -> int:
    """b: all groups advance together in 2**b steps, of about one tile of a group of mean size; 0: one group after the other.

    Together where all the weights that a launch reads fit in half of the L2, the other half being for rows and results: a row that
    several groups read is then read from memory once. Else one after the other, so that each group's weights are.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_BYTES
    if weight_bytes > l2 // 2 or copies == 0:
        return 0
    return (-(-copies // (block * groups)) - 1).bit_length()


def part_length(*, copies: int, groups: int, tiles: int, block: int) -> int | None:
    """The copies of one part of a group's sum; None for a group with one part, however many it has.

    tiles: of one group's gradient; block: the copies of a step. A group of mean size has as many parts as fill a GPU. Equal lengths,
    not equal numbers: a group that has nearly all copies is cut into nearly all parts.
    """
    parts = min(PROGRAMS_OF_A_GPU // (groups * tiles), copies // (groups * SHORTEST_PART))
    if parts < 2:
        return None
    steps = -(-copies * 5 // (4 * groups * parts * block))  # a group a quarter above the mean has no part more
    return steps * block

"""Transformer-XL state memory of a run: which rows each stream remembers, and when it forgets them."""

import torch

from model.memory import StreamMemory

LENGTH, WIDTH = 3, 2
BLOCKS = {0: 1, 2: 2}  # layers 0 and 2 remember one row and two


def memory(*, rank: int = 0, num_ranks: int = 1, num_streams: int = 4) -> StreamMemory:
    return StreamMemory(
        BLOCKS,
        row_length=LENGTH,
        d_model=WIDTH,
        num_streams=num_streams,
        rank=rank,
        num_ranks=num_ranks,
        device=torch.device("cpu"),
    )


def inputs(positions: list[int]) -> dict[int, torch.Tensor]:
    """What layers were given: position p, layer d, offset s give 100 p + 10 d + s, so every number says where it is from."""
    offset_SD = torch.arange(LENGTH)[:, None].expand(LENGTH, WIDTH)
    return {
        depth: torch.stack([100.0 * position + 10 * depth + offset_SD for position in positions]) for depth in BLOCKS
    }


def train_on(streams: StreamMemory, positions: list[int], *, continues: bool = True) -> list[list[list[float]]]:
    """One micro-step; gives what each row was shown: by layer the filled memory, first channel."""
    positions_B = torch.tensor(positions)
    shown = streams.read(positions_B, torch.full((len(positions),), continues))
    streams.write(shown, positions_B, inputs(positions))
    return [
        [
            state[row, -min(int(filled), state.shape[1]) or state.shape[1] :, 0].tolist()
            for state in shown.states.values()
        ]
        for row, filled in enumerate(shown.filled_B)
    ]


def test_a_row_is_shown_the_rows_before_it_in_its_stream():
    streams = memory()
    assert streams.read(torch.tensor([0, 1]), torch.tensor([False, False])).filled_B.tolist() == [0, 0]
    train_on(streams, [0, 1], continues=False)
    train_on(streams, [2, 3], continues=False)
    first = train_on(streams, [4, 5])
    assert first == [[[0, 1, 2], [20, 21, 22]], [[100, 101, 102], [120, 121, 122]]]
    train_on(streams, [6, 7])
    second = train_on(streams, [8, 9])
    assert second[0] == [[400, 401, 402], [20, 21, 22, 420, 421, 422]]
    train_on(streams, [10, 11])
    third = train_on(streams, [12, 13])
    assert third[1] == [[900, 901, 902], [520, 521, 522, 920, 921, 922]]


def test_memory_is_emptied_where_a_row_does_not_continue_or_the_position_jumped():
    streams = memory()
    train_on(streams, [0, 1], continues=False)
    afresh = streams.read(torch.tensor([4, 5]), torch.tensor([True, False]))
    assert afresh.filled_B.tolist() == [LENGTH, 0]
    assert not afresh.states[0][1].any()
    jumped = streams.read(torch.tensor([8, 5]), torch.tensor([True, True]))  # stream 0 expects row 4
    assert jumped.filled_B.tolist() == [0, 0]


def test_a_checkpoint_gives_every_stream_back_at_another_layout():
    alone = memory()
    train_on(alone, [0, 1, 2, 3], continues=False)
    train_on(alone, [4, 5])
    saved = alone.tensors()
    expected = alone.read(torch.tensor([6, 7, 8, 9]), torch.full((4,), True))
    for rank in range(2):
        half = memory(rank=rank, num_ranks=2)
        half.restore({name: saved[name] for name in half.names()})
        positions_B = torch.tensor([6, 7, 8, 9])[rank::2]
        found = half.read(positions_B, torch.full((2,), True))
        assert torch.equal(found.filled_B, expected.filled_B[rank::2])
        for depth in BLOCKS:
            assert torch.equal(found.states[depth], expected.states[depth][rank::2])
    names = [set(memory(rank=rank, num_ranks=2).names()) for rank in range(2)]
    assert names[0] | names[1] == set(saved)
    assert not names[0] & names[1]


def test_what_a_layer_was_shown_does_not_change_when_the_memory_moves_on():
    streams = memory()
    train_on(streams, [0, 1], continues=False)
    shown = streams.read(torch.tensor([4, 5]), torch.full((2,), True))
    before = {depth: state.clone() for depth, state in shown.states.items()}
    streams.write(shown, torch.tensor([4, 5]), inputs([4, 5]))
    assert all(torch.equal(shown.states[depth], state) for depth, state in before.items())

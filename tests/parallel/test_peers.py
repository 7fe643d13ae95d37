"""What a collective sends, against the steps of a ring counted one by one, and which ranks are near."""

import pytest

from parallel.ledger import Ledger, Sent
from parallel.peers import Peers
from tests.parallel.two_steps import open_world


def ring(rank: int, size: int, *, node: int) -> Peers:
    near = tuple(other // node == rank // node for other in range(size))
    return Peers(group=None, rank=rank, size=size, is_near=near, ledger=Ledger())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ring_collectives_send_a_part_to_the_next_rank_in_each_of_their_rounds(size: int):
    part, total = 12, 12 * size
    for rank in range(size):
        peers = ring(rank, size, node=2)
        scattered = gathered = 0
        for _ in range(size - 1):  # each round, every rank sends one part on
            scattered, gathered = scattered + part, gathered + part
        near = (rank + 1) % size // 2 == rank // 2
        for sent, expected in (
            (peers.all_gather(total), gathered),
            (peers.all_reduce(total), scattered + gathered),
        ):
            assert sent == (Sent(near=expected) if near else Sent(far=expected))


@pytest.mark.parametrize("root", [0, 2])
def test_a_chain_has_one_link_less_than_ranks(root: int):
    outgoing = [(ring(rank, 4, node=4).broadcast(100, source=root).near) for rank in range(4)]
    incoming = [(ring(rank, 4, node=4).reduce(100, target=root).near) for rank in range(4)]
    assert outgoing == [0 if (rank + 1) % 4 == root else 100 for rank in range(4)]
    assert incoming == [0 if rank == root else 100 for rank in range(4)]


def test_what_goes_straight_to_a_rank_is_near_or_far_and_what_stays_is_nothing():
    assert ring(2, 4, node=2).to_each([1, 10, 1000, 100]) == Sent(near=100, far=11)


def places(ep_size: int, node_size: int) -> list[tuple[int, int, tuple[bool, ...]] | None]:
    with open_world(ep_size, node_size=node_size) as mesh:
        groups = (mesh.world, mesh.experts, mesh.expert_data, mesh.node, mesh.rail)
        return [None if peers is None else (peers.rank, peers.size, peers.is_near) for peers in groups]


def test_an_expert_group_over_two_nodes_has_a_rail_and_a_node_group(pool):
    found = pool(4).run(places, 4, 2)
    left, right = (True, True, False, False), (False, False, True, True)
    both = [left, left, right, right]
    for rank in range(4):
        world, experts, expert_data, node, rail = found[rank]
        assert world == experts == (rank, 4, both[rank])
        assert expert_data == (0, 1, (True,))
        assert node == (rank % 2, 2, (True, True))
        assert rail == (rank // 2, 2, ((True, False), (False, True))[rank // 2])


def test_an_expert_group_inside_a_node_needs_neither(pool):
    found = pool(4).run(places, 2, 2)
    assert [rank[3:] for rank in found] == [[None, None]] * 4
    assert [rank[2] for rank in found] == [(r // 2, 2, ((True, False), (False, True))[r // 2]) for r in range(4)]


def refuse() -> str:
    try:
        with open_world(4, node_size=3):
            return "opened"
    except ValueError as error:
        return str(error)


def test_an_expert_group_that_does_not_fill_its_nodes_is_refused(pool):
    for sentence in pool(4).run(refuse):
        assert "node_size is 3 and ep_size is 4" in sentence

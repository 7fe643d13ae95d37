"""Any shape, routing and layout against one process in float64. `make fuzz` tries 200 new ones; a failing one prints its seed."""

from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.parallel.routed import ROUTINGS, Layout, Shape
from tests.parallel.test_expert import check

shapes = st.builds(
    Shape,
    groups=st.integers(1, 13),
    choices=st.just(1),
    heads=st.integers(1, 4),
    d_model=st.integers(1, 9),
    head_dim=st.integers(1, 9),
)
worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, Layout, list[int]]:
    processes, ep_size = draw(worlds)
    shape = draw(shapes)
    choices = draw(st.integers(1, shape.groups))
    node_size = draw(st.sampled_from([None, *(size for size in (1, 2) if size < ep_size)]))
    layout = Layout(
        ep_size,
        node_size,
        exchange=draw(st.sampled_from(["tokens", "tokens", "mixed", "mixed, V's weights", "weights"])),
        chunks=draw(st.integers(1, 5)),
        overlap=draw(st.booleans()),
    )
    tokens = draw(st.lists(st.integers(0, 9), min_size=processes, max_size=processes))
    sizes = {"heads": shape.heads, "d_model": shape.d_model, "head_dim": shape.head_dim}
    return Shape(groups=shape.groups, choices=choices, **sizes), layout, tokens


@settings(max_examples=max(30, settings().max_examples))
@given(case=cases(), routing=st.sampled_from(ROUTINGS), seed=st.integers(0, 2**32))
def test_any_shape_routing_and_layout_gives_what_one_process_gives(pool, case, routing, seed):
    shape, layout, tokens = case
    note(f"{shape}, {layout}, tokens {tokens}, routing {routing}, seed {seed}")
    check(pool, layout, routing=routing, tokens=tokens, shape=shape, seed=seed, bound=1e-12)

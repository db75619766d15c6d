"""What property tests draw from."""

from hypothesis import strategies as st


@st.composite
def layer_types(draw, max_layers: int = 12) -> str:
    """Any valid `layer_types` string of up to `max_layers` layers."""
    num_layers = draw(st.integers(1, max_layers))
    entry = st.tuples(st.integers(0, num_layers - 1), st.sampled_from(["", "s"])).map(
        lambda pair: f"{pair[0]}{pair[1]}"
    )
    return "_".join(draw(st.lists(entry, min_size=num_layers, max_size=num_layers)))

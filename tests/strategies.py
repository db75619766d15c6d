"""What property tests draw from."""

from hypothesis import strategies as st


@st.composite
def layer_types(draw, max_layers: int = 12) -> str:
    """Any valid `layer_types` string of up to `max_layers` layers."""
    num_layers = draw(st.integers(1, max_layers))
    source = st.integers(0, num_layers - 1)
    entry = st.tuples(source, st.none() | source, st.sampled_from(["", "s"])).map(
        lambda parts: f"{parts[0]}{'' if parts[1] in (None, parts[0]) else f':{parts[1]}'}{parts[2]}"
    )
    return "_".join(draw(st.lists(entry, min_size=num_layers, max_size=num_layers)))

"""Hypothesis strategies for what calls cost: small random graphs with shared weights and kept tensors."""

from hypothesis import strategies as st

from pipeline.cutting.costs import CallCost, Costs, TensorCost, Weight

seconds = st.integers(0, 40).map(lambda number: number / 8)  # sums of these are exact


@st.composite
def graphs_of_calls(draw, largest=7):
    """Costs of 1 to `largest` calls, each reading some earlier tensors (or the input) and making one or two."""
    weights = [Weight(key, draw(st.integers(0, 30)), draw(st.integers(0, 99)), draw(st.booleans())) for key in range(4)]
    sizes = [draw(st.integers(0, 60)) for _ in range(5)]
    there, calls = [0], []
    for position in range(draw(st.integers(1, largest))):
        reads = tuple(draw(st.lists(st.sampled_from(there), min_size=1, max_size=3)))
        makes = tuple(range(len(there), len(there) + draw(st.integers(1, 2))))
        there += makes
        backward = draw(seconds)
        calls.append(
            CallCost(
                name=f"layer{position}",
                reads=reads,
                makes=makes,
                forward=draw(seconds),
                backward=backward,
                weight_half=backward * draw(st.sampled_from([0, 0.5, 1])),
                weights=tuple(draw(st.lists(st.sampled_from(weights), max_size=2, unique=True))),
                kept=tuple((f"kept{i}", sizes[i]) for i in draw(st.lists(st.integers(0, 4), max_size=3, unique=True))),
            )
        )
    tensors = {t: TensorCost(f"t{t}", draw(st.integers(0, 32)), draw(st.booleans())) for t in there}
    outputs = tuple(draw(st.lists(st.sampled_from(there[1:]), min_size=1, max_size=2, unique=True)))
    return Costs(tuple(calls), tensors, (0,), outputs, samples=draw(st.sampled_from([1, 2, 4])))

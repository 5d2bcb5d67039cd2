"""Balanced cuts against trying all of them, for every balance, on random graphs."""

import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cutting.costs import CallCost, Costs, TensorCost, Transfer, Weight
from pipeline.cutting.optimise import BALANCES, balanced_cuts
from pipeline.errors import SplitError
from tests.sources import ROOT
from tests.strategies_costs import graphs_of_calls

TRANSFER = Transfer(per_message=0.25, per_byte=0.125)


def load(costs, by, begin, end, in_flight, slots):
    """What a stage of the calls begin..end-1 weighs, from the words of the module and nothing else."""
    inside = costs.calls[begin:end]
    weights = {weight.key: weight for call in inside for weight in call.weights}.values()
    if by == "parameters":
        return sum(weight.count for weight in weights)
    if by == "memory":
        kept = dict(pair for call in inside for pair in call.kept)
        return sum(w.bytes * (1 + w.trainable * (1 + slots)) for w in weights) + in_flight * sum(kept.values())
    made = {tensor for call in inside for tensor in call.makes}
    earlier = {tensor for call in costs.calls[:begin] for tensor in call.makes}
    incoming = {tensor for call in inside for tensor in call.reads} & earlier
    outgoing = {tensor for call in costs.calls[end:] for tensor in call.reads} & made
    messages = [
        costs.tensors[tensor].bytes * costs.samples
        for tensor in [*incoming, *outgoing]
        for _ in range(1 + costs.tensors[tensor].differentiable)
    ]
    return sum(call.forward + call.backward for call in inside) + TRANSFER.seconds(messages)


def heaviest(costs, cuts, by, microbatches, slots):
    bounds = [0, *cuts, len(costs.calls)]
    stages = len(bounds) - 1
    return max(
        load(costs, by, begin, end, min(stages - stage, microbatches), slots)
        for stage, (begin, end) in enumerate(pairwise(bounds))
    )


@pytest.mark.parametrize("by", BALANCES)
@given(data=st.data())
def test_no_other_cuts_have_a_lighter_heaviest_stage(by, data):
    costs = data.draw(graphs_of_calls())
    calls = len(costs.calls)
    stages, microbatches = data.draw(st.integers(1, calls)), data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(0, 2))
    allowed = data.draw(st.none() | st.lists(st.booleans(), min_size=calls + 1, max_size=calls + 1))
    possible = [
        cuts
        for cuts in combinations(range(1, calls), stages - 1)
        if allowed is None or all(allowed[position] for position in cuts)
    ]

    def cut():
        return balanced_cuts(
            costs, stages, by, microbatches=microbatches, transfer=TRANSFER, slots=slots, allowed=allowed
        )

    if not possible:
        with pytest.raises(SplitError, match="ask for fewer stages"):
            cut()
        return
    found = cut()
    assert found in possible
    best = min(heaviest(costs, cuts, by, microbatches, slots) for cuts in possible)
    assert heaviest(costs, found, by, microbatches, slots) == pytest.approx(best)


@given(data=st.data())
def test_a_function_can_forbid_stages(data):
    costs = data.draw(graphs_of_calls())
    calls = len(costs.calls)
    stages = data.draw(st.integers(1, calls))
    pairs = [(begin, end) for begin in range(calls) for end in range(begin + 1, calls + 1)]
    forbidden = set(data.draw(st.lists(st.sampled_from(pairs))))
    possible = [
        cuts for cuts in combinations(range(1, calls), stages - 1) if not forbidden & set(pairwise([0, *cuts, calls]))
    ]
    try:
        found = balanced_cuts(costs, stages, transfer=TRANSFER, allowed=lambda a, b: (a, b) not in forbidden)
    except SplitError:
        assert not possible
        return
    assert found in possible
    best = min(heaviest(costs, cuts, "time", 8, 2) for cuts in possible)
    assert heaviest(costs, found, "time", 8, 2) == pytest.approx(best)


def chain(*calls, size=0.0):
    """Calls in a row: (forward, backward, weights, kept) each."""
    made = tuple(
        CallCost(f"layer{i}", (i,), (i + 1,), forward, backward, weights, kept)
        for i, (forward, backward, weights, kept) in enumerate(calls)
    )
    tensors = {i: TensorCost(f"t{i}", size) for i in range(len(calls) + 1)}
    return Costs(made, tensors, (0,), (len(calls),))


def test_what_takes_longest_gets_a_stage_of_its_own():
    costs = chain(*[(0.1, 0.2, (), ())] * 3, (10.0, 20.0, (), ()), *[(0.1, 0.2, (), ())] * 3)
    assert balanced_cuts(costs, 3) == (3, 4)


def test_a_cheap_border_is_preferred():
    costs = chain(*[(1.0, 1.0, (), ())] * 4, size=4e9)
    narrow = {**costs.tensors, 3: TensorCost("t3", 0.0)}
    costs = Costs(costs.calls, narrow, costs.inputs, costs.outputs)
    assert balanced_cuts(costs, 2) == (3,)
    assert balanced_cuts(costs, 2, transfer=Transfer(0.0, 0.0)) == (2,)


def test_no_gradient_comes_back_for_integers():
    """15 bytes of integers cross once, 10 bytes of floats twice."""
    costs = chain(*[(1.0, 1.0, (), ())] * 3)
    tensors = {**costs.tensors, 1: TensorCost("words", 15.0, differentiable=False), 2: TensorCost("floats", 10.0)}
    costs = Costs(costs.calls, tensors, costs.inputs, costs.outputs)
    assert balanced_cuts(costs, 2, transfer=Transfer(0.0, 1.0)) == (1,)


def test_a_kept_tensor_that_two_calls_read_counts_once_in_a_stage():
    costs = chain((0, 0, (), (("k", 100),)), (0, 0, (), (("k", 100),)), (0, 0, (), (("j", 100),)))
    assert balanced_cuts(costs, 2, "memory", microbatches=1) == (2,)


def test_what_passes_over_a_stage_weighs_nothing_there():
    """The skip connection t1 goes from call 0 straight to call 3, whatever lies between."""
    calls = (
        CallCost("a", (0,), (1, 2)),
        CallCost("b", (2,), (3,), forward=1.0),
        CallCost("c", (3,), (4,), forward=1.0),
        CallCost("d", (4, 1), (5,)),
    )
    tensors = {i: TensorCost(f"t{i}", 1000.0 if i == 1 else 0.0) for i in range(6)}
    costs = Costs(calls, tensors, (0,), (5,))
    # The ends weigh 2 each for the skip connection; were it counted in the middle too, b and c would stay apart.
    assert balanced_cuts(costs, 3, transfer=Transfer(0.0, 1e-3)) == (1, 3)


def test_the_first_stage_holds_the_most_microbatches():
    """Equal calls: under 1F1B stage 0 of 2 keeps two microbatches and stage 1 one, so stage 0 gets fewer calls."""
    costs = chain(*[(1.0, 1.0, (), ((f"k{i}", 100),)) for i in range(6)])
    assert balanced_cuts(costs, 2, "memory", microbatches=8) == (2,)
    assert balanced_cuts(costs, 2, "memory", microbatches=1) == (3,)


def test_a_layer_called_twice_counts_once_in_a_stage():
    shared, other = Weight(1, 100, 400), Weight(2, 100, 400)
    costs = chain((0, 0, (shared,), ()), (0, 0, (shared,), ()), (0, 0, (other,), ()))
    assert balanced_cuts(costs, 2, "parameters") == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "number of stages must be a whole number of at least 1, received 0"),
        ({"stages": True}, "received True"),
        ({"stages": 4}, r"has 3 layer\(s\) to give to stages, 4 stages were asked for; ask for at most 3"),
        ({"stages": 2, "by": "speed"}, "'time', 'parameters', 'memory', received 'speed'"),
        ({"stages": 2, "microbatches": 0}, "number of microbatches"),
        ({"stages": 2, "allowed": [True, True]}, "one value for each position, 4 of them, received 2"),
        ({"stages": 2, "allowed": [True, False, False, True]}, "ask for fewer stages"),
    ],
    ids=["none", "bool", "too many", "unknown balance", "no microbatch", "length of allowed", "nothing allowed"],
)
def test_what_cannot_be_balanced_is_refused(arguments, message):
    with pytest.raises(SplitError, match=message):
        balanced_cuts(chain(*[(1.0, 1.0, (), ())] * 3), **arguments)


def test_balancing_does_not_load_tensorflow():
    modules = ("optimise", "prediction", "cut_table", "transfer")
    code = f"import sys, {', '.join(f'pipeline.cutting.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"tensorflow", "keras"} & set(loaded.split())

"""The rule for sums in another order covers such sums, and is not so wide that it covers faults."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.compare.tolerance import Tolerance, eps


@pytest.mark.parametrize("terms", [3, 100, 10_000])
def test_sums_in_many_orders_stay_within_the_bound_and_are_not_far_below_it(terms: int) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.uniform(size=terms).astype(np.float32)
    exact = float(np.sum(numbers.astype(np.float64)))
    apart = [abs(float(np.cumsum(rng.permutation(numbers))[-1]) - exact) / exact for _ in range(300)]
    allowed = Tolerance.reordered("float32", terms, 300).relative
    assert allowed / 1000 < max(apart) <= allowed


def test_the_bound_grows_with_the_root_of_the_terms_and_hardly_with_the_places() -> None:
    one = Tolerance.reordered("float32", 100, 10).relative
    assert Tolerance.reordered("float32", 10_000, 10).relative == pytest.approx(10 * one)
    assert one < Tolerance.reordered("float32", 100, 10_000_000).relative < 2 * one
    assert Tolerance.reordered("bfloat16", 100, 10).relative == pytest.approx(one * eps("bfloat16") / eps("float32"))


def test_beside_a_witness_all_reasons_add_up_and_are_named() -> None:
    compiled = Tolerance.default(False)
    all_of_them = Tolerance.beside("float32", 100, 10, compiled, model=1e-5, error=1e-4)
    order = Tolerance.reordered("float32", 100, 10)
    assert all_of_them.relative == pytest.approx(order.relative + compiled.relative + 2e-5 + 1e-4)
    assert all(word in all_of_them.why for word in ("another order", "float64", "compiled", "differences"))
    assert Tolerance.beside("float32", 100, 10, Tolerance.bits()) == order

"""Faults in what looks for faults: a verification that says yes, or that names the wrong place."""

from __future__ import annotations

from tests.planted.planting import Planted

_COMPARE, _VERIFY = "pipeline/compare/compare.py", "pipeline/verify/verification.py"
_TESTS = ("test_verify", "test_verify_steps")
_MATRIX = ("test_matrix_1f1b",)

VERIFICATION = (
    Planted(
        "what was handed over may differ in the sign of zero",
        _COMPARE,
        "        ok &= apart.same_bits or check not in ALWAYS\n",
        "",
        _TESTS,
    ),
    Planted(
        "what is not finite on one side only is not compared",
        _COMPARE,
        "if not np.array_equal(np.isfinite(a), np.isfinite(b)):",
        "if a.shape != b.shape:",
        _TESTS,
    ),
    Planted(
        "compiled stages may differ by a thousand times more",
        "pipeline/compare/tolerance.py",
        "FUSED_EPS = 8\n",
        "FUSED_EPS = 8000\n",
        (*_TESTS, "test_witness_tolerance", "test_matrix_compiled"),
    ),
    Planted(
        "a verification leaves its traces, and says it did not",
        "pipeline/runtime/driver.py",
        "return {int(i): paths for reply in self.ask(PutBack()) for i, paths in reply.value.items()}",
        "return {}",
        _TESTS,
    ),
    Planted(
        "the last deviation is named, not the first",
        _VERIFY,
        "        first = min(\n            ((judged.order, k)",
        "        first = max(\n            ((judged.order, k)",
        _TESTS,
    ),
    Planted(
        "what was sent is compared with itself",
        "pipeline/verify/tape.py",
        "seen.get(sight._replace(sent=False)),",
        "seen.get(sight._replace(sent=True)),",
        (*_TESTS, *_MATRIX),
    ),
    Planted(
        "gradients at the cuts are compared with themselves",
        "pipeline/verify/tape.py",
        "Pair(ours.get(sight), theirs.get(sight), flow_order(sight), where(sight)) for sight in sights",
        "Pair(ours.get(sight), ours.get(sight), flow_order(sight), where(sight)) for sight in sights",
        (*_TESTS, *_MATRIX),
    ),
    Planted(
        "variables' gradients are compared with themselves",
        "pipeline/verify/tape.py",
        "Pair(ours.gradients[i][k], theirs.gradients[i][k], order_of_sum(names, i, k))",
        "Pair(ours.gradients[i][k], ours.gradients[i][k], order_of_sum(names, i, k))",
        (*_TESTS, *_MATRIX),
    ),
    Planted(
        "the reference updates by the rate of the step before",
        "pipeline/verify/steps.py",
        "reference.apply(rates, None, loss_scale)",
        "reference.apply({}, None, loss_scale)",
        _TESTS,
    ),
    Planted(
        "updates are compared without the moving statistics",
        "pipeline/verify/steps.py",
        "                self._add(kind, i,",
        '                if kind != "statistics":\n                    self._add(kind, i,',
        (*_TESTS, *_MATRIX),
    ),
)

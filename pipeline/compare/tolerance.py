"""Tolerances: the difference allowed between two computations of the same numbers, by dtype, mode and size.

    eager against the same operations        0: equal bits
    compiled against compiled                8 eps of the dtype (fused operations skip roundings, at most three bits of
                                             the last place), or, where that is more, 4 times what one tape itself
                                             differs by between eager and compiled on this very batch, the largest of
                                             4 samples: there, and where every variable is changed by one rounding
    the same sum in another order            lambda * sqrt(n) * u, the probabilistic bound of Higham and Mary (2019) for
                                             n terms; lambda = sqrt(2 ln(2 * elements / chance)), chance = 1e-6 of one
                                             false alarm in a row of so many elements
    another process, the model uncut         64 eps of what the model computes in, or, where that is more, 32 times what
                                             changes there when every variable is changed by at most one rounding, the
                                             largest of 3 tries (the model's own magnification of rounding, measured)
    a witness                                sums in another order, and twice what the model's own gradients are from
                                             those of its float64 twin on this very batch (measured: normalisation of
                                             few samples amplifies rounding), and what compiling adds

eps is the distance from 1 to the next number of the dtype, u = eps / 2. All are parts of the largest |value| of what is
compared (for gradients: of all variables of the model), so that a zero gradient is judged by the others' size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transport.dtypes import DTYPES

FUSED_EPS = 8
"""What fused operations may differ by, in eps."""
SAMPLED = 4
"""How much more the pipeline may differ than the largest of some samples of what compiling changes in one tape."""
PLAIN_EPS = 64
"""What another process may round differently where the model does not magnify rounding, in eps."""
MARGIN = 32
"""Where it does: so many times what one rounding of every variable changes, the largest of `TRIES`."""
TRIES = 3
FALSE_ALARM = 1e-6
"""The chance of one false alarm per row that the bound for reordered sums accepts."""


def eps(dtype: str) -> float:
    """The distance from 1 to the next number; of integers and booleans 0."""
    import ml_dtypes

    kind = DTYPES[dtype]
    return float(ml_dtypes.finfo(kind).eps) if kind.kind in "fV" else 0.0  # type: ignore[no-untyped-call]


def magnifies(roundings: Mapping[str, float]) -> bool:
    """Whether compiling alone changes so much that more samples of what rounding changes are wanted."""
    return SAMPLED * max(roundings.values(), default=0.0) > FUSED_EPS * eps("float32")


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference between two runs, with its reason.

    Attributes:
        relative: As a part of the largest |value|; 0 demands equal bits.
        why: Why this much.
    """

    relative: float
    why: str

    @classmethod
    def bits(cls) -> Tolerance:
        """None at all."""
        return cls(0.0, "the same operations in the same order, bit for bit")

    @classmethod
    def default(cls, run_eagerly: bool, rounding: float = 0.0, dtype: str = "float32") -> Tolerance:
        """Against one tape over the same microbatches.

        Args:
            run_eagerly: Whether stages run eager tapes.
            rounding: How far one compiled tape is from the same tape run eagerly, the largest of some samples; as a
                part of the largest |gradient|.
            dtype: What the model computes in.
        """
        if run_eagerly:
            return cls(0.0, "eager: the same operations in the same order, bit for bit")
        fused = FUSED_EPS * eps(dtype)
        if SAMPLED * rounding <= fused:
            return cls(fused, f"compiled: fused operations round differently, at most {FUSED_EPS} eps of {dtype}")
        return cls(
            SAMPLED * rounding,
            f"compiled: {SAMPLED} x {rounding:.1e}, what one tape over it differs by between eager and compiled",
        )

    @classmethod
    def elsewhere(cls, precision: float, changes: Sequence[float] = (), plain: int = PLAIN_EPS) -> Tolerance:
        """Against the same numbers in another process, where the model is not cut and rounds otherwise.

        Args:
            precision: eps of what the model computes in.
            changes: What one rounding of every variable changes, as a part of the largest |value|, in some tries.
            plain: What is allowed in any case, in eps.
        """
        least, magnified = plain * precision, MARGIN * max(changes, default=0.0)
        if not magnified > least:
            return cls(least, f"another process, the model uncut: at most {plain} eps ({precision:.1e})")
        return cls(
            magnified,
            f"another process, the model uncut: {MARGIN} x {magnified / MARGIN:.1e}, what one rounding of every "
            "variable changes here",
        )

    @classmethod
    def reordered(cls, dtype: str, terms: int, elements: int = 1) -> Tolerance:
        """Sums of `terms` numbers made in another order, compared in `elements` places."""
        spread = math.sqrt(2 * math.log(2 * max(elements, 1) / FALSE_ALARM))
        allowed = spread * math.sqrt(max(terms, 1)) * eps(dtype) / 2
        return cls(allowed, f"sums of {terms} terms of {dtype} in another order")

    @classmethod
    def beside(
        cls, dtype: str, terms: int, elements: int, compiled: Tolerance, model: float = 0.0, error: float = 0.0
    ) -> Tolerance:
        """Against a witness, which computes the same numbers another way.

        Args:
            dtype: What the model computes in.
            terms: Numbers that are added up on the longest way from the inputs to the loss and back.
            elements: In how many places is compared.
            compiled: What the pipeline may differ by from one tape.
            model: How far the model's own gradients are from those in float64. Pipeline and witness round
                independently, each by so much.
            error: What the witness may be wrong by besides.
        """
        order = cls.reordered(dtype, terms, elements)
        why = [order.why]
        if model:
            why.append(f"2 x {model:.1g}, what the model itself is from float64")
        if compiled.relative:
            why.append(compiled.why)
        if error:
            why.append(f"{error:.1g}, the error of the differences themselves")
        return cls(order.relative + 2 * model + compiled.relative + error, "; ".join(why))

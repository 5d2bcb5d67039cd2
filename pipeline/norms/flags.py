"""Rules that flag a norm at a cut as vanishing, exploding or not finite, derived from dtype and place in the model.

    stage 0 ──a0──► stage 1 ──a1──► stage 2 ──a2──► stage 3 ─► L       a: activations, beside those nearest to the input
            ◄──g0──         ◄──g1──         ◄──g2──                    g: gradients, beside those nearest to the loss

Beside means: as a ratio r. Gradients by their L2 norms, since what hands a gradient down is the transposed Jacobian,
whose gain is what vanishes or explodes with depth (Pascanu et al. 2013); activations by their size per element, which
is what initialisations keep (Glorot and Bengio 2010). With t = sqrt(eps) of the weights' dtype, 3.5e-4 in float32:

    not finite   a NaN or an infinity; but of a gradient in a step that loss scaling skips: so it finds its scale
    vanishing    r < t: squares are what optimizers and global norms add up, and a square below eps of another changes
                 no digit of their sum. Whatever rate suits the stage at the loss, this cut does not exist for it
                 or: the gradient at the cut nearest to the input, if one stage more at the same rate makes it so; what
                 vanishes between that cut and the input leaves no other trace
                 or: a gradient of nothing but zeros
                 or: norm < the smallest normal number of the dtype that crosses: every element has lost digits
    exploding    r > 1 / t: the same, seen from the other end
                 or: over time, more than 1 / t of the first one that was measured at this cut

`ratios` and `found` are pure functions of one step's norms. What else is in use: absolute limits for a gradient's size
(1e-7 and 100 are common), which depend on the unit of the loss and on the batch, and ratios such as 1e-3, near t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.compare.tolerance import eps
from stages.worker.observers import ACTIVATION, GRADIENT
from transport.dtypes import DTYPES

VANISHING, EXPLODING, NOT_FINITE = "vanishing", "exploding", "not finite"
FLAG_KINDS = (VANISHING, EXPLODING, NOT_FINITE)
"""What a norm may be flagged as."""


class Boundary(NamedTuple):
    """One tensor at one cut.

    Attributes:
        what: ``"activation"``, or ``"gradient"``: dL/dOut, which goes the other way.
        producer: The stage whose output it is.
        consumer: The stage that takes it.
        tensor: Its name.
    """

    what: str
    producer: int
    consumer: int
    tensor: str


@dataclass(frozen=True)
class FlagLimits:
    """The smallest and largest ratios of norms that are not flagged.

    Attributes:
        vanishing: A ratio below it is vanishing.
        exploding: One above it is exploding.
        why: Where they come from.
    """

    vanishing: float
    exploding: float
    why: str

    @classmethod
    def of(cls, dtype: str, vanishing: float | None = None, exploding: float | None = None) -> FlagLimits:
        """By the rules of the module for weights of a dtype, where the user gave none."""
        root = math.sqrt(eps(dtype) or eps("float32"))
        given = [name for name, one in (("vanishing", vanishing), ("exploding", exploding)) if one is not None]
        why = f"sqrt(eps) of {dtype}" if not given else f"{' and '.join(given)} as given"
        return cls(root if vanishing is None else vanishing, 1 / root if exploding is None else exploding, why)


@dataclass(frozen=True)
class Crossing:
    """The dtype and size of a tensor at a cut, the same in every step.

    Attributes:
        dtype: As it crosses.
        elements: Per sample, free dimensions counted as 1 (time: the same at all cuts); for sizes beside each other.
    """

    dtype: str = "float32"
    elements: int = 1


def boundaries_in_order(boundaries: Iterable[Boundary]) -> list[Boundary]:
    """Activations as they flow, then gradients as they flow."""
    given = list(boundaries)
    forward = sorted(boundary for boundary in given if boundary.what == ACTIVATION)
    return [*forward, *sorted((boundary for boundary in given if boundary.what == GRADIENT), reverse=True)]


def ratios(norms: Mapping[Boundary, float], crossings: Mapping[Boundary, Crossing]) -> dict[Boundary, float]:
    """Each norm beside that of its source, the stage nearest to the input (activations) or to the loss (gradients).

    Args:
        norms: Of one step.
        crossings: Of the same boundaries.

    Returns:
        {boundary: ratio}; NaN where the source has nothing to compare with (zero, or not finite).
    """
    found: dict[Boundary, float] = {}
    for what in (ACTIVATION, GRADIENT):
        some = {boundary: norm for boundary, norm in norms.items() if boundary.what == what}
        if not some:
            continue
        if what == GRADIENT:
            nearest = max(boundary.consumer for boundary in some)
            source = [boundary for boundary in some if boundary.consumer == nearest]
        else:
            nearest = min(boundary.producer for boundary in some)
            source = [boundary for boundary in some if boundary.producer == nearest]
        beside = math.hypot(*(some[b] for b in source)) / _per_element(source, crossings)
        for boundary, norm in some.items():
            size = norm / _per_element([boundary], crossings)
            found[boundary] = size / beside if 0.0 < beside < math.inf else math.nan
    return found


def _per_element(boundaries: Sequence[Boundary], crossings: Mapping[Boundary, Crossing]) -> float:
    """What a norm is divided by: of activations sqrt(elements), of gradients nothing."""
    elements = sum(crossings[boundary].elements for boundary in boundaries if boundary.what == ACTIVATION)
    return math.sqrt(elements or 1)


def found(
    norms: Mapping[Boundary, float],
    first: Mapping[Boundary, float],
    crossings: Mapping[Boundary, Crossing],
    limits: FlagLimits,
    loss_scale: float = 1.0,
) -> dict[tuple[Boundary, str], str]:
    """What the rules of the module flag in one step.

    Args:
        norms: Of the step, gradients without the loss scale.
        first: The first norm of each that was finite and not zero.
        crossings: What is known of each.
        limits: Of ratios.
        loss_scale: What crossed was a gradient times this.

    Returns:
        {(boundary, kind): why, in words}, in the order in which data flows.
    """
    flags: dict[tuple[Boundary, str], str] = {}
    beside = ratios(norms, crossings)
    passed = _passed(norms)
    for boundary in boundaries_in_order(norms):
        norm, backward, ratio = norms[boundary], boundary.what == GRADIENT, beside[boundary]
        source = "next to the loss" if backward else "next to the input"
        tiny = smallest(crossings[boundary].dtype) / (loss_scale if backward else 1.0)
        earlier = first.get(boundary, norm)
        if not math.isfinite(norm):
            flags[boundary, NOT_FINITE] = f"its norm is {norm}"
        elif backward and norm == 0.0:
            flags[boundary, VANISHING] = "it is zero"
        elif ratio < limits.vanishing:
            flags[boundary, VANISHING] = f"{ratio:.1e} of what is {source}, below {limits.vanishing:.1e} ({limits.why})"
        elif (one_more := _one_more(ratio, passed.get(boundary, 0))) < limits.vanishing:
            flags[boundary, VANISHING] = (
                f"{ratio:.1e} of what is {source}; one stage more at that rate is {one_more:.1e}, "
                f"below {limits.vanishing:.1e} ({limits.why})"
            )
        elif backward and norm < tiny:
            flags[boundary, VANISHING] = f"its norm {norm:.1e} is below {tiny:.1e}, where its dtype loses digits"
        elif ratio > limits.exploding:
            flags[boundary, EXPLODING] = f"{ratio:.1e} of what is {source}, above {limits.exploding:.1e} ({limits.why})"
        elif norm > earlier * limits.exploding:
            flags[boundary, EXPLODING] = (
                f"{norm / earlier:.1e} of what it was at first, above {limits.exploding:.1e} ({limits.why})"
            )
    return flags


def _passed(boundaries: Iterable[Boundary]) -> dict[Boundary, int]:
    """Of the gradients at the cut nearest to the input: how many stages they passed since the one next to the loss."""
    back = [boundary for boundary in boundaries if boundary.what == GRADIENT]
    first, last = min((b.producer for b in back), default=0), max((b.producer for b in back), default=0)
    return {boundary: last - first for boundary in back if boundary.producer == first and last > first}


def _one_more(ratio: float, passed: int) -> float:
    """What a ratio becomes in one stage more than those that it took; NaN where that is not asked."""
    return ratio ** ((passed + 1) / passed) if passed else math.nan


def smallest(dtype: str) -> float:
    """The smallest normal number of a floating dtype: below it every number has fewer digits."""
    import ml_dtypes

    return float(ml_dtypes.finfo(DTYPES[dtype]).smallest_normal)  # type: ignore[no-untyped-call]

"""The vanilla recurrent network differentiated by hand: every gradient in closed form, no tape, NumPy only.

Why: tapes are checked against tapes everywhere else. Here the numbers come from formulas that a person can derive on
paper, with every intermediate, so that the tape and the hand-off through time have an outside witness.

    x(1)       x(2)       x(3)               h(t) = tanh(x(t) U + h(t-1) W + b)       row vectors
     │ U        │ U        │ U               ŷ(t) = softmax(h(t) V + c)
     ▼    W     ▼    W     ▼                 L    = - Σ y(t) log ŷ(t)                 over samples and steps
    h(1) ────► h(2) ────► h(3)
     │ V        │ V        │ V               δ(t) = dL/dh(t), all that h(t) does to later steps included
     ▼          ▼          ▼
    ŷ(1)       ŷ(2)       ŷ(3)

    δ(T) = (ŷ(T) - y(T)) Vᵀ               δ(t) = (ŷ(t) - y(t)) Vᵀ + [δ(t+1) ∘ (1 - h(t+1)²)] Wᵀ
    dV = Σ h(t)ᵀ (ŷ(t) - y(t))            dc = Σ (ŷ(t) - y(t))
    dW = Σ h(t-1)ᵀ [δ(t) ∘ (1 - h(t)²)]   db = Σ δ(t) ∘ (1 - h(t)²)   dU = Σ x(t)ᵀ [δ(t) ∘ (1 - h(t)²)]
    dL/dh(0) = [δ(1) ∘ (1 - h(1)²)] Wᵀ    dL/dx(t) = [δ(t) ∘ (1 - h(t)²)] Uᵀ

Run alone it compares the formulas with published figures; exit status 0 if all agree within 1e-6. `vanilla_rnn.py`
lays them beside the tape and beside processes.

    python examples/rnn_by_hand.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The network's weights, all of one float dtype.

    Attributes:
        U: (features, units), from the inputs.
        W: (units, units), from the state before.
        b: (units,).
        V: (units, classes), to the logits.
        c: (classes,).
    """

    U: Array
    W: Array
    b: Array
    V: Array
    c: Array

    def astype(self, dtype: Any) -> Weights:
        """The same weights in another dtype."""
        return Weights(*(np.asarray(value, dtype) for value in (self.U, self.W, self.b, self.V, self.c)))


@dataclass(frozen=True, slots=True, eq=False)
class ClosedForm:
    """Everything that the formulas give, in the dtype of the inputs; time comes first.

    Attributes:
        loss: L, summed over samples and steps.
        h: (T, n, units), the states h(1) to h(T).
        probabilities: (T, n, classes), ŷ(1) to ŷ(T).
        delta: (T, n, units), δ(1) to δ(T).
        dV, dc, dW, db, dU: gradients of the weights, each of its weight's shape.
        dh0: (n, units), the gradient of the initial state.
        dx: (T, n, features), the gradient of the inputs: what a stage below would be handed.
    """

    loss: float
    h: Array
    probabilities: Array
    delta: Array
    dV: Array
    dc: Array
    dW: Array
    db: Array
    dU: Array
    dh0: Array
    dx: Array


def closed_form(x: Any, targets: Any, h0: Any, weights: Weights) -> ClosedForm:
    """Run the network and differentiate it by the formulas above.

    Args:
        x: (T, n, features) inputs, T >= 1.
        targets: (T, n, classes), each row a distribution: the formulas hold where its sum is 1.
        h0: (n, units), the state before the first step.
        weights: U, W, b, V, c.

    Returns:
        States, outputs and all gradients. Everything is computed in the common dtype of x and the weights.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or a target's row does not sum to 1.
    """
    x, targets, h0 = np.asarray(x), np.asarray(targets), np.asarray(h0)
    _check(x, targets, h0, weights)
    steps = len(x)
    states = [h0]
    for t in range(steps):
        states.append(np.tanh(x[t] @ weights.U + states[t] @ weights.W + weights.b))
    h = np.stack(states[1:])
    shifted = h @ weights.V + weights.c
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    probabilities = np.exp(log_probabilities)

    error = probabilities - targets  # ŷ(t) - y(t)
    delta, inner = np.empty_like(h), np.empty_like(h)  # inner: δ(t) ∘ (1 - h(t)²)
    handed = np.zeros_like(h0)  # what h(t) is told by the step after it
    for t in reversed(range(steps)):
        delta[t] = error[t] @ weights.V.T + handed
        inner[t] = delta[t] * (1 - h[t] ** 2)
        handed = inner[t] @ weights.W.T
    before = np.stack(states[:-1])
    return ClosedForm(
        loss=float(-(targets * log_probabilities).sum()),
        h=h,
        probabilities=probabilities,
        delta=delta,
        dV=np.einsum("tnu,tnc->uc", h, error),
        dc=error.sum(axis=(0, 1)),
        dW=np.einsum("tnu,tnv->uv", before, inner),
        db=inner.sum(axis=(0, 1)),
        dU=np.einsum("tnf,tnu->fu", x, inner),
        dh0=handed,
        dx=inner @ weights.U.T,
    )


def inputs_for_states(h: Any, h0: Any, weights: Weights) -> Array:
    """The inputs of least norm that lead the network through given states.

    They solve x(t) U = atanh(h(t)) - h(t-1) W - b, step by step.

    Args:
        h: (T, n, units), each entry inside (-1, 1).
        h0: (n, units).
        weights: U with at least as many rows as columns, of full rank, or there are no such inputs.

    Returns:
        (T, n, features), in the dtype of h.

    Raises:
        ValueError: A state is out of reach: outside (-1, 1), or no input leads to it.
    """
    h, h0 = np.asarray(h), np.asarray(h0)
    if not (np.abs(h) < 1).all():
        raise ValueError(f"h: expected entries inside (-1, 1), received one of {float(np.abs(h).max())}")
    if np.linalg.matrix_rank(weights.U) < weights.U.shape[1]:
        raise ValueError(
            f"U: expected full column rank, so that every state can be reached, received {weights.U.shape}"
        )
    before = np.concatenate([h0[None], h[:-1]]).astype(np.float64)
    wanted = np.arctanh(h.astype(np.float64)) - before @ weights.W - weights.b
    return np.asarray(wanted @ np.linalg.pinv(weights.U.astype(np.float64)), h.dtype)


def _check(x: Array, targets: Array, h0: Array, weights: Weights) -> None:
    features, units = weights.U.shape
    classes = weights.V.shape[1]
    steps, samples = x.shape[:2] if x.ndim == 3 else (0, 0)
    wanted = {
        "x": (x, ("T", "n", features) if not steps else (steps, samples, features)),
        "targets": (targets, (steps, samples, classes)),
        "h0": (h0, (samples, units)),
        "W": (weights.W, (units, units)),
        "b": (weights.b, (units,)),
        "V": (weights.V, (units, classes)),
        "c": (weights.c, (classes,)),
    }
    faults = [
        f"{name}: expected shape {shape}, received {value.shape}"
        for name, (value, shape) in wanted.items()
        if value.shape != shape
    ]
    dtypes = {name: value.dtype.name for name, (value, _) in {**wanted, "U": (weights.U, ())}.items()}
    if len(set(dtypes.values())) > 1 or not np.issubdtype(x.dtype, np.floating):
        faults.append(f"expected one float dtype for all, received {dtypes}")
    if not faults and not np.allclose(targets.sum(axis=-1), 1, rtol=0, atol=1e-5):
        faults.append("targets: expected every row to sum to 1, or dL/dlogits is not ŷ - y")
    if faults:
        raise ValueError("; ".join(faults))


def published() -> tuple[Weights, dict[str, Array]]:
    """The outside check: published weights and figures of T = 3 steps, batch 1, 4 features, 2 units, 3 classes.

    Returns:
        The weights, and by name: y (targets) and h (3, 1, 2) from which `inputs_for_states` makes the inputs, with
        h(0) = 0; and the results probabilities, dV, dc, delta1 and db. All float32.
    """
    figures = {
        "y": [[[0.3, 0.5, 0.2]], [[0.2, 0.3, 0.5]], [[0.5, 0.2, 0.3]]],
        "h": [[[0.85244656, 0.01066787]], [[0.3758163, 0.21824013]], [[0.8450084, -0.6304215]]],
        "probabilities": [
            [[0.43937117, 0.37462497, 0.18600382]],
            [[0.32436833, 0.3793582, 0.29627347]],
            [[0.6205071, 0.2681237, 0.11136916]],
        ],
        "dV": [[0.26737562, -0.01948635, -0.2478894], [-0.04734133, -0.02696498, 0.07430632]],
        "dc": [0.3842466, 0.02210681, -0.40635356],
        "delta1": [[-0.13369548, -0.13435042]],
        "db": [0.07789478, -0.40646493],
    }
    rows = [[0.8315637, -0.6328325], [-0.6249914, -0.02345729], [0.3253579, -0.66497874], [0.5830157, -0.03220487]]
    weights = Weights(
        U=np.array(rows),
        W=np.array([[-0.26513684, 0.96421075], [0.96421075, 0.2651369]]),
        b=np.zeros(2),
        V=np.array([[0.16630626, -0.03400385, -0.8589585], [-1.0909375, -0.02843404, 0.2594756]]),
        c=np.zeros(3),
    )
    return weights.astype("float32"), {name: np.array(value, "float32") for name, value in figures.items()}


def main() -> int:
    """Compare the formulas with the published figures; 0 if each agrees within `TOLERANCE`, else 1."""
    weights, figures = published()
    h0 = np.zeros_like(figures["h"][0])
    found = closed_form(inputs_for_states(figures["h"], h0, weights), figures["y"], h0, weights)
    results = {name: getattr(found, name) for name in ("probabilities", "dV", "dc", "db")} | {"delta1": found.delta[0]}
    off = {name: float(np.abs(value - figures[name]).max()) for name, value in results.items()}
    for name, difference in off.items():
        print(f"{name:>13}  {difference:.1e} away from the published figures")
    print("OK" if max(off.values()) <= TOLERANCE else "FAILED")
    return int(max(off.values()) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())

"""Dynamic loss scaling decided over all stages: one value that is not finite, anywhere, skips the update everywhere.

Float16 gradients underflow, so the loss is multiplied by a scale before it is differentiated, and the gradients are
divided by it afterwards. Keras's `LossScaleOptimizer` looks at the gradients that it is given; a stage has only its
own. Here stages report whether theirs are finite, and the driver does what Keras's optimizer would do with all of them.
"""

from __future__ import annotations

from typing import Any

import keras


def unscaled(optimizer: Any) -> Any:
    """The optimizer that updates, without loss scaling around it."""
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


class LossScaling:
    """The scale and its rule; the state is in the user's own `LossScaleOptimizer`.

    Args:
        optimizer: A Keras LossScaleOptimizer. Built here, without variables to update.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        if not optimizer.built:
            optimizer.build([])

    @staticmethod
    def of(optimizer: Any) -> LossScaling | None:
        """The loss scaling that an optimizer asks for, if it does."""
        return LossScaling(optimizer) if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else None

    @property
    def scale(self) -> float:
        """The factor on the loss in the next step."""
        return float(self.optimizer.dynamic_scale)

    def decide(self, finite: bool) -> None:
        """Adjust the scale after a step: halve it after one that overflowed, double it after a run of good ones."""
        counter, scale = self.optimizer.step_counter, self.optimizer.dynamic_scale
        if not finite:
            counter.assign(0)
            scale.assign(scale * 0.5)
        elif int(counter) == self.optimizer.dynamic_growth_steps - 1:
            counter.assign(0)
            scale.assign(scale * 2.0)
        else:
            counter.assign_add(1)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": int(self.optimizer.step_counter)}

    def go_on_from(self, state: dict[str, float]) -> None:
        """Take over a checkpoint's scale."""
        self.optimizer.dynamic_scale.assign(state["scale"])
        self.optimizer.step_counter.assign(int(state["good_steps"]))

"""The fixed parts of a pipeline, known before any worker runs: segments, wires, options, the model that was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.cutting.splitter import Split
from pipeline.errors import WiringError
from pipeline.model.batch_sizes import only_size
from pipeline.model.shared_variables import state_in_two_stages
from pipeline.model.stateful import warn_of_stateful_layers
from pipeline.model.wiring import Wires
from pipeline.runtime.options import Options
from stages.recipe.segment import Segment
from stages.tape.model_call import metrics_of_layers


@dataclass(frozen=True, eq=False)
class Setup:
    """The fixed parts of one pipeline.

    Attributes:
        segments: What each stage is built from, in order.
        wires: Which tensors go from which stage to which.
        options: How the pipeline runs.
        split: The model that was cut, and where; None for a pipeline that was put together from segments.
    """

    segments: tuple[Segment, ...]
    wires: Wires
    options: Options
    split: Split | None = None

    @property
    def original(self) -> Any | None:
        """The model that was split, if one was."""
        return None if self.split is None else self.split.model

    @cached_property
    def models(self) -> dict[int, Any]:
        """{stage: its Keras model in this process} of those that are not built in their workers."""
        return {i: segment.model for i, segment in enumerate(self.segments) if segment.model is not None}

    @cached_property
    def one_size(self) -> bool:
        """Whether batches of one size only are taken, as far as models in this process say."""
        models = self.models.values() if self.original is None else [self.original]
        return any(only_size(model) is not None for model in models)

    @cached_property
    def layers_count(self) -> bool:
        """Whether layers may keep metrics of their own: some do, or a worker builds its part."""
        found = any(metrics_of_layers(model) for model in self.models.values())
        return found or len(self.models) < len(self.segments)

    def check(self) -> None:
        """Look for layers that cannot mean the same in several processes; warn of stateful ones.

        Raises:
            WiringError: A layer that changes its own variables when it is called is in two stages.
        """
        warn_of_stateful_layers(self.models.values())
        if found := state_in_two_stages(self.models):
            layer, one, other = found
            names: Sequence[str] = self.wires.names
            raise WiringError(
                f"the layer {layer!r} is in the stages {names[one]!r} and {names[other]!r}, and every use "
                "changes its state (statistics or random numbers), which cannot be in two processes at once; give each "
                "stage a layer of its own"
            )


__all__ = ["Setup"]

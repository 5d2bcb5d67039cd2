"""Variables that several segments have, because their models share layers: which they are, and which cannot be shared.

A trainable variable used in two stages is trained as one (`stages.worker.tied_gradients`). A variable that a forward
pass changes by itself, a moving statistic or the state of a random generator, cannot be: in one process each use sees
what the use before it left, and two processes run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages.keras_internals import layers_of, own_other_variables, own_seed_generators, replace_in
from stages.recipe.segment import Segment
from stages.worker.stage_spec import Tie


def groups(segments: Sequence[Segment]) -> list[list[tuple[int, int]]]:
    """The places (stage, index among its trainable variables) of each variable that several segments have."""
    places: dict[int, list[tuple[int, int]]] = {}
    for i, segment in enumerate(segments):
        if segment.model is not None:
            for k, variable in enumerate(segment.model.trainable_variables):
                places.setdefault(id(variable), []).append((i, k))
    return [uses for uses in places.values() if len(uses) > 1]


def ties(segments: Sequence[Segment]) -> dict[int, list[Tie]]:
    """For each stage its trainable variables that other stages have too."""
    found: dict[int, list[Tie]] = {i: [] for i in range(len(segments))}
    for number, uses in enumerate(groups(segments)):
        stages = tuple(i for i, _ in uses)
        for i, k in uses:
            found[i].append(Tie(f"tie{number}", k, stages))
    return found


def share(models: Sequence[Any], places: Sequence[Sequence[Sequence[int]]]) -> None:
    """Let models that were made one by one have variables in common again.

    Args:
        models: One per stage.
        places: What `groups` said of the models they are copies of.
    """
    concerned = {i for uses in places for i, _ in uses}
    before = {i: list(models[i].trainable_variables) for i in concerned}
    for (owner, place), *others in places:
        for i, k in others:
            _replace(models[i], before[i][k], before[owner][place])


def _replace(model: Any, old: Any, new: Any) -> None:
    """Let every layer of a model that has one variable have another in its place."""
    for layer in layers_of(model):
        replace_in(layer, old, new)


def changes_by_itself(layer: Any) -> bool:
    """Whether calling a layer changes a variable: statistics, seed generators, a power iteration's vector."""
    return any(True for _ in _states(layer))


def state_in_two_stages(models: Mapping[int, Any]) -> tuple[str, int, int] | None:
    """A layer that changes its own variables in two of these models: (name, stage, stage); None if there is none."""
    home: dict[int, int] = {}
    for i, model in models.items():
        for layer in layers_of(model, include_self=False):
            for variable in _own_states(layer):
                if home.setdefault(id(variable), i) != i:
                    return layer.name, home[id(variable)], i
    return None


def _states(layer: Any) -> Iterator[Any]:
    for inner in layers_of(layer):
        yield from _own_states(inner)


def _own_states(layer: Any) -> Iterator[Any]:
    """Variables that were made to be changed by calls, not by an optimizer; a frozen weight is none."""
    yield from own_other_variables(layer)
    draws = getattr(layer, "dropout", None) != 0 or getattr(layer, "recurrent_dropout", 0)
    for generator in own_seed_generators(layer) if draws else ():  # recurrent cells always have one
        yield generator.state

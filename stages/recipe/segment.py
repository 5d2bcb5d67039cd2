"""The recipe of a part of a model: how to build it, and the names of the tensors it takes and gives.

A `Segment` is frozen data. Made from a builder function, the part is built only in its worker, so a model larger than
any one memory never exists in one place. Made from a built Keras model, a copy of the model travels and its weights
follow as arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from stages.errors import RecipeError, SegmentError
from stages.recipe.describe import Recipe, describe, function_name, import_function
from stages.recipe.overrides import why_training_would_differ
from stages.recipe.stage_objects import Built
from stages.versions import received

_NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Segment:
    """The recipe of one part of a model.

    Args:
        build: A function (or its ``"module:name"``) that returns a built Keras model; called in the worker as
            ``build(**kwargs)``. A lambda, a function of the main script or of another function can be run by workers
            of this process, and cannot be saved.
        inputs: Names of the tensors it takes, in the order of the model's inputs. Left out in a chain.
        outputs: Names of the tensors it gives, in the order of the model's outputs. Left out in a chain.
        name: The stage's name in messages, reports and gradient keys; default ``"stage<i>"``.
        kwargs: Keyword arguments for `build`; to be saved, plain ones (JSON: numbers, strings, lists, dicts).
        model: The built Keras model, where there is one (see `of`); then `build` is None.
        states: Names of the states that the part hands to its own next window: the model takes them behind its inputs
            and gives them behind its outputs (see `stages.tape.window_states`).

    Raises:
        SegmentError: Neither or both of `build` and `model` were given, or a name is no valid name.

    Example:
        >>> Segment("my_parts:bottom", kwargs={"units": 64}, name="bottom")
    """

    build: Callable[..., Any] | str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    name: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=lambda: _NO_KEYWORDS)
    model: Any = field(default=None, compare=False, repr=False)
    states: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.build is None) == (self.model is None):
            raise SegmentError("a Segment needs either a builder function or a built model: Segment(build=my_function)")
        if self.build is not None and not isinstance(self.build, str):
            if not callable(self.build):
                raise SegmentError(f"Segment(build=...) expects a function, received {type(self.build).__name__}")
            with contextlib.suppress(RecipeError):  # else it travels as code
                object.__setattr__(self, "build", function_name(self.build, "a Segment's builder"))
        if isinstance(self.build, str) and ":" not in self.build:
            raise SegmentError(f"a builder's name has the form 'module:function', received {self.build!r}")
        for label in ("inputs", "outputs", "states"):
            names = getattr(self, label)
            if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
                raise SegmentError(f"Segment({label}=...) expects a tuple of names, received {names!r}")
            object.__setattr__(self, label, tuple(names))
        if self.name is not None and ("/" in self.name or not self.name.isprintable() or not self.name):
            raise SegmentError(
                f"a stage's name must not be empty or contain '/' or what cannot be printed, received {self.name!r}"
            )

    @classmethod
    def of(cls, part: Any, name: str | None = None) -> Segment:
        """The segment of a built Keras model, of a single layer's model, or of a Segment (returned as it is).

        Raises:
            SegmentError: The model is not built, so the shapes and weights of its variables are unknown.
        """
        if isinstance(part, Segment):
            return part
        import keras

        if not isinstance(part, keras.Model):
            raise SegmentError(
                "a segment is a built Keras model or a Segment; a layer becomes one as "
                f"keras.Sequential([keras.Input(shape), layer]): {received(part)}"
            )
        if not part.built or not getattr(part, "inputs", None):
            raise SegmentError(
                f"the model {part.name!r} has no defined input, so it cannot become a stage; begin it with "
                "keras.Input(shape), or pass Segment(build=my_function) for a subclassed model"
            )
        if (why := why_training_would_differ(part)) is not None:
            raise SegmentError(why)
        from stages.recipe.unbuilt import build_rest

        build_rest(part)
        return cls(model=part, name=name)

    @property
    def part(self) -> Any:
        """The model, or how to build it, for `stages.recipe.stage_objects`."""
        return Built(self.build, dict(self.kwargs)) if self.build is not None else self.model

    def recipe(self) -> Recipe:
        """The segment as plain data, for a checkpoint.

        Raises:
            RecipeError: A custom class of the model, or the builder, cannot be imported by another process.
        """
        if self.build is None:
            return {"model": describe(self.model, f"the model {self.model.name!r}")}
        build = self.build if isinstance(self.build, str) else function_name(self.build, "a Segment's builder")
        return {"build": build, "kwargs": dict(self.kwargs)}

    def create(self) -> Any:
        """The model: the given one, or a new one from the builder."""
        return build_part(self.part, self.name or "segment")


def build_part(part: Any, name: str) -> Any:
    """The model of a segment's `part`.

    Args:
        part: A Keras model, or how to build one.
        name: The stage's name, for messages.

    Returns:
        A built Keras model.

    Raises:
        SegmentError: The builder returned something that is not a built Keras model.
        Exception: Whatever the builder itself raises.
    """
    import keras

    if not isinstance(part, Built):
        return part
    build = import_function(part.build) if isinstance(part.build, str) else part.build
    model = build(**part.kwargs)
    if not isinstance(model, keras.Layer) or not model.built:
        called = part.build if isinstance(part.build, str) else getattr(build, "__qualname__", repr(build))
        raise SegmentError(
            f"the builder {called} of stage {name!r} must return a built Keras model, it returned "
            f"{type(model).__name__}{'' if not isinstance(model, keras.Layer) else ', which is not built'}; "
            "begin the model with keras.Input(shape), or call it once on an example before returning it"
        )
    return model


def names_of(segments: Sequence[Segment]) -> tuple[str, ...]:
    """The stage names of a list of segments: given ones, else ``stage<i>``.

    Raises:
        SegmentError: Two stages have one name.
    """
    names = tuple(segment.name or f"stage{i}" for i, segment in enumerate(segments))
    for name in names:
        if names.count(name) > 1:
            raise SegmentError(f"two stages are called {name!r}; give each Segment a name of its own")
    return names

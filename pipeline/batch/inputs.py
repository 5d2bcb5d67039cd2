"""The assignment of what a user passes as x to the pipeline's inputs, read as the model that was split reads it.

model of a list, or of one input    x: a list in that order, or a dict by the inputs' names
model of a dict                     x: a dict with the same keys (not the inputs' names), or a list in the keys' order

Keys that a model does not take are left out, as by Keras. Of a model of a dict Keras warns then, and gives it the
arrays in the order of *all* keys: so there only keys that are behind the model's own in the alphabet may be too much.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError, SplitError
from pipeline.model.batch_sizes import only_size
from stages.plain_text import printable
from stages.tape.tensors import flatten


@dataclass(frozen=True)
class InputNames:
    """The names and the nesting under which a user may give the inputs of a pipeline.

    Attributes:
        keys: One per input, in the pipeline's order: the model's own keys where it takes a dict, else names.
        exact: Whether a dict may have no other keys; so where no Keras model says how they are nested.
        ordered: Whether other keys must be behind these, and are told of.
        sequence: Whether x may be a list. Keras refuses one for a dict whose keys are not in alphabetical order.
    """

    keys: tuple[str, ...]
    exact: bool = True
    sequence: bool = True
    ordered: bool = False

    @classmethod
    def of(cls, names: Sequence[str], structure: Any = None) -> InputNames:
        """From the inputs' names and the nesting of inputs of the model that was split (`model.input`), if one was."""
        if isinstance(structure, Mapping) and len(structure) == len(names):
            keys = tuple(sorted(structure))
            return cls(keys, False, list(keys) == list(structure), True)
        return cls(tuple(names), structure is None)

    def arrays(self, x: Any) -> list[Any]:
        """What x has for each input, in the pipeline's order.

        Raises:
            DataError: Something is missing or too much.
        """
        takes = f"the pipeline takes {len(self.keys)} input(s) ({', '.join(map(printable, self.keys))})"
        if isinstance(x, Mapping) and not any(isinstance(value, Mapping | list | tuple) for value in x.values()):
            missing, more = [key for key in self.keys if key not in x], [key for key in x if key not in self.keys]
            mixed = self.ordered and not missing and min(more, default=self.keys[-1]) < self.keys[-1]
            if missing or (more and self.exact) or mixed:
                which = [
                    f"{what} {', '.join(map(repr, some))}" for what, some in (("lacks", missing), ("has", more)) if some
                ]
                raise DataError(f"{takes}, x is a dict that {' and '.join(which)}; pass a dict with these keys")
            if more and self.ordered:
                warnings.warn(
                    f"{takes}, x is a dict that has {', '.join(map(repr, more))} besides; left out, as by Keras",
                    stacklevel=2,
                )
            return [x[key] for key in self.keys]
        leaves = flatten(x) if isinstance(x, list | tuple | Mapping) and not self._is_rows(x) else [x]
        if len(leaves) != len(self.keys):
            raise DataError(
                f"{takes}, x has {len(leaves)}; pass them as a list in this order or as a dict by these names"
            )
        if not self.sequence and isinstance(x, list | tuple):
            raise DataError(f"{takes}, whose order in a list nobody can tell; pass x as a dict with these keys")
        return list(leaves)

    def _is_rows(self, x: Any) -> bool:
        """Whether a list is one array written as Python rows, not a list of input arrays."""
        return len(self.keys) == 1 and isinstance(x, list | tuple) and len(x) > 0 and not hasattr(x[0], "shape")


def check_cuttable(models: Iterable[Any], microbatches: int) -> None:
    """Refuse microbatches where a model says how many samples a batch has.

    Args:
        models: The one that was split, or the parts; None for one that its worker builds, which is not looked at.
        microbatches: Into how many parts a batch is cut.

    Raises:
        SplitError: A batch of the only size that an input takes would be cut.
    """
    for found in map(only_size, models if microbatches > 1 else ()):
        if found is not None:
            symbol, size = found
            raise SplitError(
                f"the input {symbol.name!r} takes batches of {size} samples (keras.Input has a batch_size, which a "
                f"layer counts on), and microbatches={microbatches} would cut them into smaller ones; make it "
                f"keras.Input({tuple(symbol.shape[1:])}), or microbatches=1"
            )

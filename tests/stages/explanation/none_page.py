"""Writes docs/why-is-my-gradient-none.md from the cases: python -m tests.stages.explanation.none_page."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from pipeline import Pipeline
from stages import Explanation, explain, explaining
from stages.explanation.reasons import ADVICE
from tests.pipeline.runtime.blocking_layers import Grades
from tests.sources import ROOT
from tests.stages.explanation.cases_of_none import CASES, Case

PAGE = ROOT / "docs" / "why-is-my-gradient-none.md"

INTRO = """\
# Why is my gradient None?

`tape.gradient` gives `None` where there is no way back from the target to the variable, and does not say why. This
project does: it records one run of your code, asks a real tape for the verdict, and follows the recorded operations to
the place where the gradient ends.

```python
import stages

with stages.explaining() as explanation:        # around your own tape
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x))
    gradients = tape.gradient(loss, model.trainable_variables)
print(explanation)

print(stages.explain(model, x, y, loss="mean_squared_error"))           # a Keras model
print(stages.explain(lambda: loss_fn(y, model(x))))                     # whatever computes a target
print(pipe.explain(x, y))                                               # a pipeline: over all stages and processes
```

`tapeline explain my_model:make` does the same from the command line; `make()` returns `(pipeline, x, y)`,
`(model, x, y)`, or a loss. `explain` puts back what your code wrote into variables; `explaining` does not, since it is
your own code that runs. Compiled functions run eagerly while they are looked at. A step of `model.fit` can be in
`explaining` too.

Four answers are possible: *connected*, *zero* (there is a gradient, and all of it is 0), *not finite*, and *not
connected*, which is TensorFlow's `None`. Below are the forms in which the question comes up most often, each as people
write it and with what is printed.

How it knows, and what it cannot know:

- Whether there is a gradient is never worked out, it is what a tape gives. Only the reason comes from the recording;
  where the two do not fit together the reason is *unknown*, with the operations that are in question.
- A way through NumPy or Python is invisible to any recording. `explain` runs the code again with the variable changed,
  up and down, and sees which constant changes with it. `explaining` cannot run your code again: it compares values, and
  where that proves nothing it says *a guess*.
- The second run is the judge of *no dependence*: if the target is another one with the variable changed, that is never
  said, but the way (NumPy, a data set, a queue, a table), that the code took another way (*branch*), or *hidden way*.
  Where there is no second run (`explaining`; a queue that was filled before; values that change by themselves), what
  could not be followed is named as *not followed*: where the value left TensorFlow, where arrays came in, iterators,
  and Python inside of `py_function`.
- `tape.jacobian`, `tape.batch_jacobian` and `tf.autodiff.ForwardAccumulator` are seen like `tape.gradient`.
- Where a `tf.function` is called, `explain` runs the code once more as it is, compiled, and that verdict counts: a loop
  over a data set passes a gradient eagerly and none in a graph, and a branch that was not taken gives zeros there.
  `explaining` has seen your code run eagerly, and notes such a loop.
- All tensors of the run stay in memory, as on a tape. Look at one step of a small batch.
- `explain` puts random states back, but not those of `tf.random` operations that are given a seed of their own.

This page is written by `python -m tests.stages.explanation.none_page`, and a test sees that it is what the code prints.
"""

STAGES = """\
## Over several stages and processes

In a pipeline the model is in several processes, and what is in the way may be in another one than the variable. Stages
are joined in one process and recorded there; the gradients beside it are those of the pipeline itself.
"""

USELESS = """\
## When there is a gradient, and it is useless

A gradient of zeros, or one with a NaN, is followed to where it becomes so.
"""


def explained(case: Case) -> Explanation:
    """What is said of a case."""
    with suppress(*([case.raises] if case.raises else [])), explaining() as explanation:
        case.run()
    return explanation


def page(explained: Callable[[Case], Explanation] = explained) -> str:
    """The whole page.

    Args:
        explained: Gives the explanation of a case.
    """
    parts = [INTRO, _contents()]
    parts += [_section(case, explained(case)) for case in CASES]
    parts += [STAGES, _value_section(_third_stage)]
    parts += [USELESS, *map(_value_section, (_dead, _root))]
    parts += ["## All reasons\n", _reasons()]
    return "\n".join(parts)


def _contents() -> str:
    lines = ["| what people write | the reason |", "|---|---|"]
    lines += [f"| [{_title(case.name)}](#{_title(case.name).replace(' ', '-')}) | {case.reason} |" for case in CASES]
    return "\n".join(lines) + "\n"


def _section(case: Case, found: Explanation) -> str:
    doc = inspect.getdoc(case.run) or ""
    only = Explanation(found.headline, tuple(row for row in found.rows if not row.ok), found.notes)
    return f"## {_title(case.name)}\n\n*{doc}*\n\n{_code(case.run)}\n{_output(only)}"


def _value_section(function: Callable[[], Explanation]) -> str:
    found = function()
    only = replace(found, rows=tuple(row for row in found.rows if not row.ok))
    return f"*{inspect.getdoc(function)}*\n\n{_code(function)}\n{_output(only)}"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _code(function: Callable[..., object]) -> str:
    """The body of a function, without what stands in front of it."""
    source = textwrap.dedent(inspect.getsource(function))
    body = re.split(r'^    """.*?"""\n', source, maxsplit=1, flags=re.MULTILINE | re.DOTALL)[1]
    return f"```python\n{textwrap.dedent(body).strip()}\n```\n"


def _output(found: Explanation) -> str:
    lines = str(found).splitlines()[1:]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _reasons() -> str:
    lines = ["| reason | what to do |", "|---|---|"]
    lines += [f"| {name} | {advice} |" for name, advice in ADVICE.items()]
    return "\n".join(lines) + "\n"


def _third_stage() -> Explanation:
    """A straight-through estimate was planned for the third of three stages, and only its first half was written."""
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="a"),
            keras.layers.Dense(4, name="b"),
            Grades(name="grades"),  # tf.round(x * 3.0)
            keras.layers.Dense(1, name="c"),
        ],
        name="net",
    )
    with Pipeline.split(model, at=["a", "b"], transport="inproc") as pipe:
        pipe.compile("sgd", "mean_squared_error")
        return pipe.explain(x, y)


def _dead() -> Explanation:
    """A ReLU whose inputs are all below 0 learns nothing any more, nor does what is before it."""
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    dead = keras.layers.Dense(4, activation="relu", bias_initializer=keras.initializers.Constant(-50.0), name="dead")
    model = keras.Sequential([keras.Input((3,)), dead, keras.layers.Dense(1, name="scores")], name="net")
    return explain(model, x, y, loss="mean_squared_error")


def _root() -> Explanation:
    """The root of 0 is 0; its derivative is not finite."""
    w = tf.Variable([0.0, 1.0], name="w")
    return explain(lambda: tf.reduce_sum(tf.sqrt(w * 2.0)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

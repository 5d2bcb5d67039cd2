"""Run in a process of its own: unpack what the tests packed, look at it, and tell what was seen.

python -m tests.stages.recipe.elsewhere < [(module, function, bytes, input)] > [what was seen]
"""

import importlib
import pickle
import sys

from stages.recipe.by_value import unpack

if __name__ == "__main__":
    answers = []
    for module, function, data, x in pickle.load(sys.stdin.buffer):
        look = getattr(importlib.import_module(module), function)
        answers.append(look(unpack(data).thing, x))
    pickle.dump(answers, sys.stdout.buffer)

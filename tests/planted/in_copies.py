"""Faults in the copies of a user's objects that workers get."""

from __future__ import annotations

from tests.planted.planting import Planted

_USERS = ("test_users_objects", "test_by_value")

COPIES = (
    Planted(
        "an attribute that was set later is lost",
        "stages/recipe/keras_state.py",
        "    return dict(vars(thing))\n",
        '    return {name: value for name, value in vars(thing).items() if name != "gain"}\n',
        _USERS,
    ),
    Planted(
        "an optimizer that has trained begins with slots of zeros",
        "pipeline/compiled/trained_optimizers.py",
        "np.asarray(variable.numpy())) for place",
        "0 * np.asarray(variable.numpy())) for place",
        ("test_trained_optimizer",),
    ),
    Planted(
        "a checkpoint is loaded from a configuration that leaves something out",
        "pipeline/saving/own_objects.py",
        '    return {**recipe, "lost": found} if found else recipe\n',
        "    return recipe\n",
        ("test_own_objects",),
    ),
)

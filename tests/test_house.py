"""The rules of the house that no other tool checks: who may import whom, what may never run, what a file may hold.

Each rule is a function from source to faults, tried on sources that break it, then on all sources of the repository in
one test, which lists every fault at once.
"""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.private_names import ADAPTERS, names_of_the_house, private_faults
from tests.sources import PACKAGES, ROOT, imported, modules, name_of, repository_files

# Who may import which of the three packages; everything else outside the package itself is free.
ALLOWED = {
    "pipeline": {"pipeline", "stages", "transport"},
    "stages": {"stages", "transport"},
    "transport": {"transport"},
}
# The project's own folders that the packages never reach into.
OUTSIDE = {"tests", "examples", "benchmarks"}
TENSORFLOW = {"tensorflow", "keras"}
LONGEST_FILE = 400

# What turns bytes into code or into objects of the sender's choice.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
UNSAFE_MODULES |= {f"multiprocessing.{name}" for name in ("connection", "reduction", "managers", "Queue", "Pipe")}
# The one file that may: it copies a user's objects into this process's own workers (docs/security.md) ...
BY_VALUE = "stages/recipe/by_value.py"
# ... and whoever writes or reads such bytes, which come from `StageObjects.packed` in the same process, or through the
# launch. None of them sends or receives anything.
OF_BY_VALUE = {
    "stages/recipe/stage_objects.py",
    "pipeline/compiled/compiled.py",
    "pipeline/compiled/trained_optimizers.py",
    "pipeline/model/merge.py",
    "pipeline/model/stateful.py",
    "pipeline/reference/witness/flow.py",
    "pipeline/reference/witness/float64_twin.py",
}
UNSAFE_BUILTINS = {"eval", "exec", "compile"}
UNSAFE_METHODS = {"recv_pyobj", "send_pyobj", "enable_unsafe_deserialization"}
UNSAFE_ARGUMENTS = {("allow_pickle", True), ("safe_mode", False)}

# Written with a gap, so that this file does not hold what it looks for.
FOLDERS = [word.replace(" ", "") for word in ("wo rk", "ro ot", r"ho me/\w+", r"Us ers/\w+")]
HOSTS = [
    re.escape(word.replace(" ", ""))
    for word in (
        *("py pi.org", "py pi.io", "pythonho sted.org", "npm js.org", "npm js.com", "deb.de bian.org"),
        *("security.de bian.org", "crates. io", "proxy.gol ang.org", "anacon da.org", "download.pyt orch.org"),
    )
]
# A folder counts at the start of a path only: not in "net/..", "{root}/..", "$HOME/..", "~/..".
FORBIDDEN = re.compile(rf"(?<![\w.~}})-])/(?:t(?:)mp/|(?:{'|'.join(FOLDERS)})(?![\w-]))|{'|'.join(HOSTS)}")

SOURCES = modules(*PACKAGES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direction_faults(source: str, package: str) -> Iterator[str]:
    """Imports in ``source``, a module of the dotted ``package``, that point the wrong way."""
    home = package.split(".")[0]
    forbidden = (set(PACKAGES) | OUTSIDE) - ALLOWED[home]
    if home == "transport":
        forbidden |= TENSORFLOW
    tree = ast.parse(source)
    for line, name in imported(tree, package):
        if name.split(".")[0] in forbidden:
            yield f"line {line}: {home} imports {name}"
    # Tables of lazy exports and "module:function" entries import by a string.
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = re.fullmatch(r"(\w+)(?:\.\w+)+(?::\w+)?|(\w+):\w+", node.value)
            if dotted and (dotted[1] or dotted[2]) in forbidden:
                yield f"line {node.lineno}: {home} names {node.value}"


def unsafe_faults(source: str, package: str) -> Iterator[str]:
    """Uses in ``source`` of anything that turns bytes into code or into arbitrary objects."""
    tree = ast.parse(source)
    for line, name in imported(tree, package):
        if any(name == unsafe or name.startswith(unsafe + ".") for unsafe in UNSAFE_MODULES):
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in UNSAFE_BUILTINS:
            yield f"line {node.lineno}: uses the built-in {node.id}"
        elif isinstance(node, ast.Attribute) and node.attr in UNSAFE_METHODS:
            yield f"line {node.lineno}: uses {node.attr}"
        elif isinstance(node, ast.keyword) and (node.arg, getattr(node.value, "value", None)) in UNSAFE_ARGUMENTS:
            yield f"line {node.value.lineno}: passes {node.arg}={ast.unparse(node.value)}"


def forbidden_words(text: str) -> Iterator[str]:
    """Paths of one machine and hosts of package registries in ``text``."""
    for number, line in enumerate(text.splitlines(), start=1):
        for found in FORBIDDEN.finditer(line):
            yield f"line {number}: {found[0]!r} in {line.strip()[:80]!r}"


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def assert_kept(rule: Callable[[str, str], Iterable[str]], paths: Iterable[Path]) -> None:
    """No file breaks ``rule``, which takes its text and its package; else the message has every fault of every file."""
    texts = {path: path.read_text(errors="replace") for path in paths}
    faults = [f"{name_of(path)}: {fault}" for path in texts for fault in rule(texts[path], package_of(path))]
    assert not faults, "\n".join(faults)


def without_one_fault(rule: Callable[..., Iterable[str]], examples: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those of ``examples``, arguments of ``rule``, in which it does not see exactly one fault."""
    return [example for example in examples if len(list(rule(*example))) != 1]


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after it has run ``code`` in the repository."""
    script = code + "\nimport sys\nprint('loaded:', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("loaded:")[2].split())


# -- imports point one way ---------------------------------------------------------------------------------------


def test_all_three_packages_have_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)


AGAINST = [
    ("import stages", "transport"),
    ("from stages.actions import Action", "transport"),
    ("def late():\n    import tensorflow as tf", "transport"),
    ("from keras import layers", "transport"),
    ("from pipeline import plan", "stages"),
    ("from ..pipeline import x\nfrom pipeline.plan.plan import Plan", "stages.deep"),
    ("import importlib\nimportlib.import_module('pipeline')", "stages"),
    ("HOME = {'Plan': 'pipeline.plan'}", "stages"),
    ("entry = 'pipeline.launch.local:run'", "stages"),
    ("__import__('pipeline')", "stages"),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipeline.plan.plan", "stages"),
    ("from tests.sources import ROOT", "pipeline"),
    ("import examples.digits", "pipeline.runtime.launch"),
]


def test_an_import_against_the_direction_is_seen() -> None:
    assert without_one_fault(direction_faults, AGAINST) == []


def test_an_import_along_the_direction_is_no_fault() -> None:
    source = "import numpy\nfrom . import plan\nfrom ..stages import x\nimport stages.actions\nimport transport"
    assert list(direction_faults(source, "pipeline.runtime.launch")) == []


def test_imports_point_from_pipeline_to_stages_to_transport() -> None:
    assert_kept(direction_faults, SOURCES)


# -- what does not need TensorFlow does not load it --------------------------------------------------------------

PLANNING = """
from pipeline.plan.schedules import SCHEDULES
for name in ("gpipe", "1f1b"):
    print(SCHEDULES[name](3, 4).text())
"""
HELP = """
import importlib, sys
sys.argv = ["tapeline", "--help"]
module, function = "{command}".split(":")
try:
    getattr(importlib.import_module(module), function)()
except SystemExit as end:
    assert not end.code, end.code
"""
AS_MODULE = """
import runpy, sys
sys.argv = ["pipeline", "--help"]
try:
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
TRANSPORT = "\n".join(
    f"import {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')}"
    for path in modules("transport")
)


def test_a_loaded_module_is_seen() -> None:
    assert loaded_after("import msgpack.exceptions") >= {"msgpack"} and "msgpack" not in loaded_after("")


@pytest.mark.parametrize(
    "code",
    [
        "import pipeline",
        "import stages",
        PLANNING,
        "import pipeline.plan.simulator, stages.actions",
        TRANSPORT,
        HELP.format(command=PROJECT["scripts"]["tapeline"]),
        AS_MODULE,
    ],
    ids=["pipeline", "stages", "planning", "simulating", "transport", "tapeline --help", "python -m pipeline --help"],
)
def test_tensorflow_is_not_loaded_by(code: str) -> None:
    assert not loaded_after(code) & TENSORFLOW


# -- nothing received can become code ----------------------------------------------------------------------------


UNSAFE = [
    "import pickle",
    "from marshal import loads",
    "def late():\n    import cloudpickle",
    "import multiprocessing.connection",
    "from multiprocessing import Pipe",
    "eval('1')",
    "run = exec",
    "socket.recv_pyobj()",
    "numpy.load(file, allow_pickle=True)",
    "keras.models.load_model(path, safe_mode=False)",
]


def test_an_unsafe_use_is_seen() -> None:
    assert without_one_fault(unsafe_faults, [(source, "transport") for source in UNSAFE]) == []


def test_what_only_looks_unsafe_is_no_fault() -> None:
    source = textwrap.dedent("""
        from multiprocessing import shared_memory
        model.compile(optimizer)
        re.compile("x")
        numpy.load(file, allow_pickle=False)
        evaluate = model.evaluate
    """)
    assert list(unsafe_faults(source, "transport")) == []


def test_no_source_turns_bytes_into_code_or_objects() -> None:
    assert_kept(unsafe_faults, [path for path in SOURCES if name_of(path) != BY_VALUE])
    there = unsafe_faults((ROOT / BY_VALUE).read_text(), "stages.recipe")
    assert [fault.partition(": ")[2] for fault in there] == ["imports pickle", "imports cloudpickle"]


def test_copies_by_value_are_read_where_no_message_arrives() -> None:
    def users(path: Path) -> set[str]:
        return {name for _, name in imported(ast.parse(path.read_text()), package_of(path))}

    by_value = "stages.recipe.by_value"
    found = {path for path in SOURCES if any(name.startswith(by_value) for name in users(path))}
    assert {name_of(path) for path in found} == OF_BY_VALUE
    message = {"transport.message", "transport.message.DRIVER"}  # a number
    assert [path for path in found if any(n.split(".")[0] == "transport" for n in users(path) - message)] == []
    readers = [name_of(path) for path in SOURCES if "StageObjects.of(" in path.read_text()]
    assert readers == ["stages/worker/hosted_stage.py"]


# -- what libraries do not promise is touched in few files -------------------------------------------------------

OURS, FOREIGN = {"_own", "_shared", "_variables"}, {"_variables", "_fn_kwargs"}
PRIVATE = [
    ("from keras.src import backend",),
    ("import tensorflow.python.eager.context",),
    ("def late():\n    from tensorflow.python import pywrap_tfe",),
    ("context = sys.modules.get('tensorflow.python.eager.context')",),
    ("module = keras.src.backend.random",),
    ("layers = model._flatten_layers()",),
    ("tensor._keras_mask = mask",),
    ("function, more = loss.fn, loss._fn_kwargs",),
    ("layer.submodule._variables.append(1)",),  # ours in another file, and of Keras
    ("class A(keras.Layer):\n    def f(self):\n        return self._losses",),
    ("class A(keras.Layer):\n    def f(self):\n        return super()._call()",),
    ("mask = getattr(tensor, '_keras_mask', None)",),
    ("if hasattr(model, '_nodes_by_depth'): pass",),
    ("object.__setattr__(layer, 'call', call)",),
    ("setattr(module, name, draw)",),
    ("names = vars(layer)",),
    ("layer.__dict__[name] = value",),
    ("model.compute_mask = lambda inputs, mask: None",),
    ("def call(x): ...\nlayer.call = call",),
    ("recorder.replace_while_open(keras.Model, 'predict', make)",),
]


def test_a_private_name_is_seen() -> None:
    assert without_one_fault(lambda source: private_faults(source, "pipeline", OURS, FOREIGN), PRIVATE) == []


def test_what_only_looks_private_is_no_fault() -> None:
    source = textwrap.dedent("""
        import keras, tensorflow
        from stages.keras_internals import layers_of
        class A:
            def __init__(self, other):
                self._here, self.play = other._own, None
                object.__setattr__(self, "_here", vars(self), self.__dict__, super()._shared)
        def f(a):
            a.play = lambda: a._here
            os._exit(sys._getframe(0)._replace(x=1)._fields)
            return a.__class__, a._shared
        with replaced(*layer_call(), make):
            axes.add_patch(Rectangle(1))
            print("see keras.src and tensorflow.python for that")
    """)
    assert list(private_faults(source, "pipeline", OURS, FOREIGN)) == []


def test_private_names_of_keras_and_tensorflow_are_touched_in_the_adapters_only() -> None:
    ours, foreign = names_of_the_house(ROOT)
    assert "_keras_mask" in foreign and "_push_tape" in foreign
    sources = [path for path in [*SOURCES, ROOT / "tapeline_pytest.py"] if name_of(path) not in ADAPTERS]
    assert_kept(lambda source, package: private_faults(source, package, ours, foreign), sources)


# -- files -------------------------------------------------------------------------------------------------------


def too_long(text: str, package: str = "") -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > LONGEST_FILE:
        yield f"{lines} lines, more than {LONGEST_FILE}: split it"


def test_a_long_file_is_seen() -> None:
    assert without_one_fault(too_long, [("\n" * (LONGEST_FILE + 1),)]) == []
    assert list(too_long("\n" * LONGEST_FILE)) == []


def test_a_file_holds_one_concept() -> None:
    assert_kept(too_long, [path for path in repository_files() if path.suffix == ".py"])


FORBIDDEN_WORDS = [
    "cd /wo" + "rk/main",
    'path = "/tm' + 'p/x"',
    "ipc:///tm" + "p/socket",
    "in /ro" + "ot.",
    "see /ro" + "ot/.cache",
    "/home/" + "someone/x",
    "https://py" + "pi.org/simple",
    "files.python" + "hosted.org",
]
INNOCENT_WORDS = ["stages/worker/worker.py", "net/work", "{root}/x", "$HOME/x", "tmp_path / 'x'"]


def test_a_forbidden_word_is_seen() -> None:
    assert without_one_fault(forbidden_words, [(f"first line\n{text}\n",) for text in FORBIDDEN_WORDS]) == []


def test_an_innocent_word_is_no_fault() -> None:
    assert list(forbidden_words("\n".join(INNOCENT_WORDS))) == []


def test_a_file_names_no_machine_and_no_registry() -> None:
    assert_kept(lambda text, package: forbidden_words(text), repository_files())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data[package]

"""Two processes with nothing in common but a port and each other's public key: trained, killed, frozen."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from tests.one_tape import assert_same_bits
from tests.pipeline.parties.meeting import VANILLA, plan_with_keys
from tests.sources import ROOT

SECONDS = 90
HOSPITAL = """
import os, keras, numpy as np
from pipeline import Party

class Ids(list):
    seen = 0
    def __getitem__(self, place):
        Ids.seen += 1
        if Ids.seen == 8 * {stop}:
            print("stopping", flush=True)
            os.kill(os.getpid(), {signal})
        return super().__getitem__(place)

def make():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh")])
    party = Party(model, x=np.random.default_rng(0).normal(size=(16, 3)), ids=range(16), optimizer="adam")
    party.ids = Ids(party.ids)
    return party
"""
LAB = """
import keras, numpy as np
from pipeline import Party

def make():
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    return Party(model, y=np.random.default_rng(5).normal(size=(16, 1)), ids=range(16), optimizer="sgd", loss="mse")
"""


def plan_text(plan):
    """The plan as a file, written by hand."""
    keys = "\n".join(f'[parties.{name}]\nkey = "{key}"' for name, key in plan.parties.items())
    return f"""hub = "lab"
{keys}
[stages]
bottom = {{ owner = "hospital", x = true }}
top = {{ owner = "lab", y = true }}
[[edges]]
tensor = "z"
from = "bottom"
to = "top"
shape = [4]
dtype = "float32"
[training]
batch = 8
microbatches = 3
epochs = 2
order_seed = 5
[limits]
patience = 60
silence = 1.5
"""


class Two:
    """Both processes, each in a folder of its own with its own keys."""

    def __init__(self, folder, stop=0, sent=signal.SIGKILL, inside=None, address=None):
        self.inside = inside or {"hospital": (), "lab": ()}
        table = {**VANILLA, "limits": {"patience": 60, "silence": 1.5}}
        plan, folders = plan_with_keys(table, folder / "keys")
        self.folders = {name: folder / name for name in ("hospital", "lab")}
        source = {"hospital": HOSPITAL.format(stop=stop, signal=int(sent)), "lab": LAB}
        for name, home in self.folders.items():
            home.mkdir()
            folders[name].path.rename(home / "keys")
            (home / "plan.toml").write_text(plan_text(plan))
            (home / "mine.py").write_text(source[name])
        self.address = address or free_address()
        self.start()

    def start(self, *options):
        """Both at once: who joins waits until the other serves."""
        self.lab = self._start("lab", "serve", "--listen", self.address, *options)
        self.hospital = self._start("hospital", "join", "--at", self.address, *options)

    def _start(self, name, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(self.folders[name])}
        program = [*self.inside[name], sys.executable, "-u", "-m", "pipeline", "party", arguments[0]]
        own = ["plan.toml", "mine:make", "--as", name, "--keys", "keys", "--save", "trained", "--checkpoints", "runs"]
        return subprocess.Popen(
            [*program, *own, *arguments[1:]],
            cwd=self.folders[name], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self):
        """{party: (status, output, errors)}; those that are stopped are killed after the others have ended."""
        try:
            found = {"lab": (*self.lab.communicate(timeout=SECONDS), self.lab.returncode)}
        finally:
            for process in (self.hospital, self.lab):
                if process is self.hospital and self.lab.returncode == 0:
                    process.wait(SECONDS)
                process.kill() if process.poll() is None else None
        found["hospital"] = (*self.hospital.communicate(timeout=SECONDS), self.hospital.returncode)
        return {name: (status, out, errors) for name, (out, errors, status) in found.items()}


def free_address():
    """A loopback address with a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.soak
def test_two_processes_train_what_one_tape_trains(tmp_path):
    """And write their weights, each its own."""
    two = Two(tmp_path)
    assert_trained(two)


@pytest.mark.soak
def test_two_processes_of_which_one_was_killed_end_as_if_it_had_not_been(tmp_path):
    two = Two(tmp_path, stop=4)  # the second step of the second epoch
    assert two.end()["hospital"][0] == -signal.SIGKILL
    (two.folders["hospital"] / "mine.py").write_text(HOSPITAL.format(stop=0, signal=0))
    two.start("--resume")
    assert_trained(two)


def run_ip(*words):
    """Whether the command `ip` did it."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces with one cable between them: the words that run a command in each, and an address."""
    names = {name: f"tapeline-{os.getpid()}-{name}" for name in ("hospital", "lab")}
    cable = [f"tl{os.getpid()}a", f"tl{os.getpid()}b"]
    try:
        made = shutil.which("ip") is not None and all(run_ip("netns", "add", name) for name in names.values())
        made = made and run_ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for end, (party, number) in zip(cable, (("lab", 1), ("hospital", 2)), strict=True):
            inside = ("-n", names[party])
            made = made and run_ip("link", "set", end, "netns", names[party])
            made = made and run_ip(*inside, "addr", "add", f"10.99.7.{number}/24", "dev", end)
            made = made and run_ip(*inside, "link", "set", end, "up")
        if not made:
            pytest.skip("network namespaces are not allowed here")
        yield {party: ("ip", "netns", "exec", name) for party, name in names.items()}, "tcp://10.99.7.1:7443", cable[0]
    finally:
        for name in names.values():
            run_ip("netns", "del", name)


def connections(words):
    """Established TCP connections in a namespace."""
    table = subprocess.run([*words, "cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    return sum(line.split()[3] == "01" for line in table.splitlines()[1:])


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cut", [False, True], ids=["whole cable", "cable cut"])
def test_two_hosts_have_one_connection_and_notice_a_cut_cable(tmp_path, two_hosts, cut):
    """Different addresses, folders and network stacks, one open port."""
    inside, address, cable = two_hosts
    two = Two(tmp_path, stop=3, sent=signal.SIGSTOP, inside=inside, address=address)
    while not (line := two.hospital.stdout.readline()).startswith("stopping"):
        assert line, two.hospital.stderr.read()
    assert [connections(words) for words in inside.values()] == [1, 1]
    if cut:
        assert run_ip("-n", inside["lab"][3], "link", "set", cable, "down")
    two.hospital.send_signal(signal.SIGCONT)
    if not cut:
        assert_trained(two)
        return
    _, errors = two.hospital.communicate(timeout=SECONDS)
    assert "lab is gone" in errors and "hospital has the values of its last commit, step 2" in errors
    status, _, errors = two.end()["lab"]
    assert status == 2 and "hospital is gone" in errors and "last commit, step 2" in errors


def assert_trained(two):
    """Both end well, and what each has written is its part of one tape."""
    for name, (status, out, errors) in two.end().items():
        assert status == 0, (name, out, errors)
        assert "done: 4 steps" in out
    saved = {name: sorted(path.name for path in (home / "trained").iterdir()) for name, home in two.folders.items()}
    assert saved == {"hospital": ["bottom.weights.h5"], "lab": ["top.weights.h5"]}
    keras.utils.set_random_seed(1)
    a = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh")])
    keras.utils.set_random_seed(2)
    b = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    y = np.random.default_rng(5).normal(size=(16, 1)).astype("float32")
    from pipeline.parties.read_plan import read_plan
    from tests.pipeline.parties.meeting import one_tape

    plan = read_plan(two.folders["lab"] / "plan.toml")
    groups = [([a], keras.optimizers.Adam()), ([b], keras.optimizers.SGD(0.01))]
    one_tape(lambda rows, training: b(a(x[rows])), groups, y, plan, keras.losses.MeanSquaredError())
    expected = [a.get_weights(), b.get_weights()]
    a.load_weights(two.folders["hospital"] / "trained" / "bottom.weights.h5")
    b.load_weights(two.folders["lab"] / "trained" / "top.weights.h5")
    assert_same_bits([*a.get_weights(), *b.get_weights()], [*expected[0], *expected[1]], "weight")


@pytest.mark.gate
def test_a_party_that_is_killed_is_told_and_the_other_keeps_its_last_commit(tmp_path):
    found = Two(tmp_path, stop=3).end()
    assert found["hospital"][0] == -signal.SIGKILL
    status, _, errors = found["lab"]
    assert status == 2, errors
    assert "hospital is gone: its connection has ended in step 3, when lab waited for hospital's" in errors
    assert "lab has the values of its last commit, step 2" in errors
    assert "Traceback" not in errors


@pytest.mark.soak
def test_a_party_that_is_frozen_is_gone_after_its_silence(tmp_path):
    two = Two(tmp_path, stop=3, sent=signal.SIGSTOP)
    status, _, errors = two.end()["lab"]
    assert status == 2 and "hospital is gone" in errors and "last commit, step 2" in errors


@pytest.mark.soak
def test_a_hub_that_is_killed_is_told(tmp_path):
    two = Two(tmp_path, stop=3, sent=signal.SIGSTOP)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and not (line := two.hospital.stdout.readline()).startswith("stopping"):
        assert line
    two.lab.kill()
    two.lab.communicate()
    two.hospital.send_signal(signal.SIGCONT)
    out, errors = two.hospital.communicate(timeout=SECONDS)
    assert two.hospital.returncode == 2, (out, errors)
    assert "lab is gone" in errors and "hospital has the values of its last commit, step 2" in errors

"""The server with TensorFlow in it: workers train, also if the driver has, and a server that ran an op is refused."""

from __future__ import annotations

import importlib.util

import pytest

from pipeline import Pipeline, Segment
from pipeline.runtime.launch import LaunchError


@pytest.mark.gate
def test_workers_train_while_the_driver_does(driver, finish, line):
    script = driver(
        """
        import tensorflow as tf
        shared.ForkServer = LIGHT
        prestart()
        @tf.function
        def square(x): return x * x
        assert float(square(tf.constant(3.0))) == 9.0
        launcher = LocalLauncher()
        workers = [launcher.launch(f"w{i}", "launch_entries:trains", {"line": line}, threads=2 - i) for i in range(2)]
        assert all(worker.join(60) for worker in workers)
        tell(reasons=[worker.exit_reason() for worker in workers], tasks=len(os.listdir(f"/proc/{server_pid()}/task")))
        """
    )
    heard = [line.hear() for _ in range(3)]
    trained = [each for each in heard if "loss" in each]
    assert [each["shapes"] for each in trained] == [[[3, 4], [4]]] * 2
    assert sorted(each["threads"] for each in trained) == [[1, 1], [2, 2]]
    drawn = [number for each in trained for number in each["random"]]
    assert len(set(drawn)) == len(drawn), "siblings draw the same random numbers"
    told = next(each for each in heard if "reasons" in each)
    assert told["reasons"] == ["exit status 0"] * 2
    assert told["tasks"] == 1, "a server with threads cannot be forked safely"
    assert finish(script)[0] == 0


@pytest.mark.gate
def test_what_keras_does_not_need_is_left_out_but_can_be_imported(new_server, line):
    from pipeline.runtime.launch import LocalLauncher

    server = new_server("keras", "stages")
    server.start()
    with LocalLauncher(lambda: server) as launcher:
        launcher.launch("w", "launch_entries:imports_optional", {"line": line.path})
        heard = line.hear()
    assert heard["loaded"] == []
    assert heard["importable"] == [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name)]


def test_server_that_ran_an_op_is_refused(new_server, tmp_path, monkeypatch):
    (tmp_path / "runs_an_op.py").write_text("import tensorflow as tf\nSCALE = tf.constant(2.0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    server = new_server("runs_an_op")
    server.start()
    with pytest.raises(LaunchError, match="a TensorFlow op ran in the fork server while it imported modules"):
        server.wait_ready()


def test_a_worker_has_as_many_threads_as_it_was_told():
    """Sums of convolutions depend on how many: a worker with another number than the reference has other bits."""
    with Pipeline([Segment("tests.pipeline.parts:threads_of_the_process")], microbatches=1, threads=3) as pipe:
        kernel, bias = pipe.get_weights()
    assert (kernel.item(), bias.item()) == (3.0, 3.0)

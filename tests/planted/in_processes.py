"""Faults in messages and their transport, and in how workers begin and end."""

from __future__ import annotations

from tests.planted.planting import Planted

_CODEC, _ZEROMQ, _CREW = "transport/codec.py", "transport/zeromq.py", "pipeline/runtime/crew.py"
_CODEC_TESTS = ("test_codec",)
_CONTRACT = ("test_contract", "test_zeromq")
_FAILURES = (
    "test_failures_workers",
    "test_failures_killed",
    "test_failures_arguments",
)
_LAUNCH = ("test_forkserver", "test_local", "test_deaths", "test_tensorflow")

TRANSPORT = (
    Planted(
        "a damaged header is taken",
        _CODEC,
        "if zlib.crc32(packed) != _checksum(frame)[0]:",
        "if not packed:",
        _CODEC_TESTS,
    ),
    Planted(
        "a transposed array is sent as it lies in memory",
        _CODEC,
        'array = array.copy(order="C")',
        'array = array.T.copy(order="C").reshape(shape)',
        _CODEC_TESTS,
    ),
    Planted(
        "memory is made for more bytes than the limit",
        _CODEC,
        "    if nbytes > limits.max_bytes or (0 in shape and",
        "    if nbytes < 0 or (0 in shape and",
        _CODEC_TESTS,
    ),
    Planted(
        "received memory is not aligned",
        "transport/buffers.py",
        "return memory[start:][:nbytes]",
        "return memory[start + 8 :][:nbytes]",
        ("test_parts", *_CODEC_TESTS),
    ),
    Planted(
        "threads get the sender's own memory",
        "transport/inproc.py",
        "raw = codec.aligned_copy(raws[0]) if raws else None",
        "raw = codec.np.frombuffer(raws[0], codec.np.uint8) if raws else None",
        _CONTRACT,
    ),
    Planted(
        "memory that the sender may change is sent in place",
        _ZEROMQ,
        "copy=raw.nbytes < SEND_IN_PLACE or not raw.readonly",
        "copy=raw.nbytes < SEND_IN_PLACE",
        _CONTRACT,
    ),
    Planted(
        "the rest of a malformed message is taken for the next one",
        _ZEROMQ,
        "        if self._inside:  #",
        "        if not socket:  #",
        _CONTRACT,
    ),
    Planted(
        "messages of an earlier run are taken",
        "transport/mailbox.py",
        "if message.incarnation >= self.incarnation:\n                key",
        "if message.incarnation is not None:\n                key",
        ("test_mailbox",),
    ),
    Planted(
        "an error waits until somebody asks for it",
        "transport/mailbox.py",
        "if key in keys or message.kind in self.urgent:",
        "if key in keys:",
        ("test_mailbox",),
    ),
)

RUNTIME = (
    Planted(
        "the neighbour of a dead worker is blamed",
        _CREW,
        'report["type"] in _LOST',
        'report["type"] is PeerLost',
        _FAILURES,
    ),
    Planted(
        "workers that wait for ever are not noticed",
        _CREW,
        "if boards == before and stalled(boards):",
        "if boards is None and stalled(boards):",
        _FAILURES,
    ),
    Planted(
        "after a failure the workers stay",
        _CREW,
        "            self.close(_in_short(meaning or error), _LEAVE_AFTER_FAILURE_SECONDS)\n",
        "",
        _FAILURES,
    ),
    Planted(
        "a worker outlives the server that forked it",
        "stages/process/child_process.py",
        "        die_with_parent(parent)\n        forget()",
        "        forget()",
        _LAUNCH,
    ),
    Planted(
        "workers draw the same random numbers",
        "stages/process/child_process.py",
        '    np.random.seed(int.from_bytes(os.urandom(4), "little"))',
        "    np.random.seed(1)",
        _LAUNCH,
    ),
    Planted(
        "a worker takes as many threads as it likes",
        "stages/process/child_process.py",
        "tf.config.threading.set_intra_op_parallelism_threads(threads)",
        "tf.config.threading.set_intra_op_parallelism_threads(0)",
        _LAUNCH,
    ),
    Planted(
        "the server forks though it has run an operation",
        "stages/process/fork_server.py",
        "        _check_no_op_ran()\n        sys.stdout.flush()",
        "        sys.stdout.flush()",
        _LAUNCH,
    ),
    Planted(
        "a step that was applied is applied again",
        "stages/worker/base.py",
        "if order.step > self._applied:",
        "if order.step >= 0:",
        ("test_states", "test_exact_optimizers", *_FAILURES),
    ),
)

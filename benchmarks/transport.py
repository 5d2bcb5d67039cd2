"""Measures the ways between two processes of one host, beside bare pyzmq in the same run.

    python benchmarks/transport.py            # a table
    python benchmarks/transport.py --json     # the same figures for a program

Two figures: the time of one small message one way (half a ping-pong), and the throughput of bursts of large ones. Each
round measures every lane in turn, so that a noisy machine disturbs all alike; the table shows medians. The ratio is the
median of the rounds' ratios.

Lanes, from what a user wants to what the wire can do:

- `local`, which `transport="auto"` takes, and `ipc`: `Outbox.send` of a read-only float32 array, as a tensor is sent,
  to `Inbox.receive`: named, validated, in an aligned writable array of our own that TensorFlow can take over.
- `recipe`: the array recipe of pyzmq's documentation: dtype and shape as JSON, then the array, to a read-only,
  unaligned array. The least that gives an array back.
- `bare`: pyzmq's defaults, `socket.send(array)` to `socket.recv()`: anonymous bytes.
- `zero-copy`: the same with `copy=False` on both sides from 64 KiB on: a view of ZeroMQ's own memory, never aligned;
  TensorFlow needs another copy of it.

The last line is the Python time of the codec alone, for an activation of 8 KiB, in a warm loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transport import Inbox, Message, Outbox, aligned_empty, codec, open_transport

Array = np.ndarray[Any, Any]

KIB, MIB = 1024, 1024 * 1024
SMALL = 8 * KIB
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
LANES = ("local", "ipc", "recipe", "bare", "zero-copy")
TIMEOUT = 60.0


class Lane(NamedTuple):
    """One way of moving arrays there and a sign back."""

    send: Callable[[Array], None]
    receive: Callable[[], int]


def bare_sockets(
    context: zmq.Context[zmq.Socket[bytes]], directory: Path, name: str, me: str, other: str
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.setsockopt(zmq.RCVHWM, 0)
    pull.setsockopt(zmq.RCVTIMEO, int(TIMEOUT * 1000))
    pull.bind(f"ipc://{directory}/{name}-{me}")
    push.setsockopt(zmq.SNDHWM, 0)
    push.connect(f"ipc://{directory}/{name}-{other}")
    return pull, push


def open_lanes(directory: Path, me: str, other: str) -> tuple[dict[str, Lane], Callable[[], None]]:
    """Connects this process (`me`) with the other one, in every way."""
    local, ipc = open_transport("local"), open_transport("ipc", directory)
    local_inbox, ipc_inbox = local.bind(f"local://{directory.name}-{me}"), ipc.bind(f"ipc://{directory}/tapeline-{me}")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    recipe_pull, recipe_push = bare_sockets(context, directory, "recipe", me, other)
    bare_pull, bare_push = bare_sockets(context, directory, "bare", me, other)
    view_pull, view_push = bare_sockets(context, directory, "zero-copy", me, other)
    local_outbox = local.connect(f"local://{directory.name}-{other}", TIMEOUT)
    ipc_outbox = ipc.connect(f"ipc://{directory}/tapeline-{other}", TIMEOUT)

    def ours(outbox: Outbox, inbox: Inbox) -> Lane:
        def send(array: Array) -> None:
            outbox.send(Message("activation", step=1000, stage=1, source=0, tensor="dense_1/output", array=array))

        def receive() -> int:
            array = inbox.receive(TIMEOUT).array
            assert array is not None
            return array.nbytes

        return Lane(send, receive)

    def recipe_send(array: Array) -> None:
        recipe_push.send_json({"dtype": str(array.dtype), "shape": array.shape}, zmq.SNDMORE)
        recipe_push.send(array, copy=True)

    def recipe_receive() -> int:
        description: Any = recipe_pull.recv_json()
        array = np.frombuffer(recipe_pull.recv(), dtype=description["dtype"])
        return array.reshape(description["shape"]).nbytes

    def view_send(array: Array) -> None:
        view_push.send(array, copy=array.nbytes < 64 * KIB)

    def view_receive() -> int:
        return len(view_pull.recv(copy=False).buffer)

    lanes = {
        "local": ours(local_outbox, local_inbox),
        "ipc": ours(ipc_outbox, ipc_inbox),
        "recipe": Lane(recipe_send, recipe_receive),
        "bare": Lane(bare_push.send, lambda: len(bare_pull.recv())),
        "zero-copy": Lane(view_send, view_receive),
    }

    def close() -> None:
        local.close()
        ipc.close()
        context.destroy(linger=0)

    return lanes, close


def codec_microseconds() -> dict[str, float]:
    """Median time to encode and to decode one activation of 8 KiB, without its transfer."""
    message = Message("activation", step=1000, stage=1, tensor="dense_1/output", array=sample(8 * KIB))
    header = codec.encode(message)[0]
    steps: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(message),
        "decode": lambda: codec.assemble(codec.decode_header(header), aligned_empty(8 * KIB)),
    }
    return {
        name: statistics.median(timeit.repeat(step, number=2000, repeat=15)) / 2000 * 1e6
        for name, step in steps.items()
    }


def sample(nbytes: int) -> Array:
    array = np.ones(nbytes // 4, np.float32)
    array.flags.writeable = False
    return array


def serve(directory: Path) -> None:
    """The other process: does what each line on stdin says, until stdin ends."""
    lanes, close = open_lanes(directory, "peer", "main")
    small = sample(SMALL)
    print("ready", flush=True)
    for line in sys.stdin:
        lane_name, mode, count = json.loads(line)
        lane = lanes[lane_name]
        if mode == "echo":
            for _ in range(count):
                lane.receive()
                lane.send(small)
        else:
            for _ in range(count):
                lane.receive()
            lane.send(small)
    close()


def measure(rounds: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns one row a size: nbytes, unit, and for each lane its median; ratios of local's speed to the others."""
    with tempfile.TemporaryDirectory(prefix="tapeline-bench-") as name:
        directory = Path(name)
        command = [sys.executable, __file__, "--serve", name]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdin is not None and peer.stdout is not None
        try:
            lanes, close = open_lanes(directory, "main", "peer")
            assert peer.stdout.readline() == "ready\n"

            def order(lane: str, mode: str, count: int) -> None:
                assert peer.stdin is not None
                peer.stdin.write(json.dumps([lane, mode, count]) + "\n")
                peer.stdin.flush()

            def latency(lane: str, count: int = 400) -> float:
                array, (send, receive) = sample(SMALL), lanes[lane]
                order(lane, "echo", count)
                send(array), receive()  # the peer has its order now
                start = time.perf_counter()
                for _ in range(count - 1):
                    send(array)
                    receive()
                return (time.perf_counter() - start) / (count - 1) / 2 * 1e6

            def throughput(lane: str, nbytes: int) -> float:
                array, (send, receive) = sample(nbytes), lanes[lane]
                count = max(4, 64 * MIB // nbytes)
                order(lane, "burst", count)
                start = time.perf_counter()
                for _ in range(count):
                    send(array)
                receive()
                return count * nbytes / (time.perf_counter() - start) / 1e9

            rows = [row(SMALL, "us", rounds, latency, lambda ours, bare: bare / ours)]
            for nbytes in sizes:

                def one(lane: str, nbytes: int = nbytes) -> float:
                    return throughput(lane, nbytes)

                rows.append(row(nbytes, "GB/s", rounds, one, lambda ours, bare: ours / bare))
            close()
        finally:
            peer.stdin.close()
            peer.wait(timeout=TIMEOUT)
            peer.stdout.close()
    return rows


def row(
    nbytes: int,
    unit: str,
    rounds: int,
    run: Callable[[str], float],
    speed_ratio: Callable[[float, float], float],
) -> dict[str, Any]:
    for lane in LANES:
        run(lane)  # warm-up
    taken: dict[str, list[float]] = {lane: [] for lane in LANES}
    for number in range(rounds):
        for lane in LANES[number % len(LANES) :] + LANES[: number % len(LANES)]:
            taken[lane].append(run(lane))
    result: dict[str, Any] = {"bytes": nbytes, "unit": unit}
    for lane in LANES:
        result[lane] = statistics.median(taken[lane])
    for lane in LANES[1:]:
        ratios = [speed_ratio(ours, bare) for ours, bare in zip(taken["local"], taken[lane], strict=True)]
        result[f"speed to {lane}"] = statistics.median(ratios)
    return result


def show(rows: list[dict[str, Any]], cost: dict[str, float], rounds: int) -> None:
    table = Table(title=f"one host, two processes, medians of {rounds} rounds; right: the speed of local to theirs")
    table.add_column("message")
    for lane in LANES:
        table.add_column(lane, justify="right")
    for lane in LANES[1:]:
        table.add_column(f"to {lane}", justify="right")
    for entry in rows:
        size = f"{entry['bytes'] // MIB} MiB" if entry["bytes"] >= MIB else f"{entry['bytes'] // KIB} KiB one way"
        table.add_row(
            size,
            *(f"{entry[lane]:.2f} {entry['unit']}" for lane in LANES),
            *(f"{entry[f'speed to {lane}']:.2f}x" for lane in LANES[1:]),
        )
    table.caption = f"codec alone: encode {cost['encode']:.1f} us, decode {cost['decode']:.1f} us"
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures the ways of one host beside bare pyzmq in the same run.",
        epilog="example: python benchmarks/transport.py --rounds 20",
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds a figure, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    cost, rows = codec_microseconds(), measure(arguments.rounds, SIZES)
    if arguments.json:
        print(json.dumps({"rounds": arguments.rounds, "codec_us": cost, "rows": rows}, indent=2))
    else:
        show(rows, cost, arguments.rounds)


if __name__ == "__main__":
    main()

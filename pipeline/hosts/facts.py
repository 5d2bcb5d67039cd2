"""The facts of a host that decide whether stages on it work with others, give the same bits, and how fast they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from pipeline.errors import UsageError
from stages.origin import PACKAGES, ROOT

RUNS, BITS, SPEED = "runs", "bits", "speed"
"""What a difference may change: whether it runs and means the same, the last bits, the time and the room alone."""
_LIBRARIES: Final = {
    "tensorflow": RUNS,
    "keras": RUNS,
    "numpy": BITS,
    "ml-dtypes": BITS,
    "pyzmq": SPEED,
    "msgpack": SPEED,
    "cloudpickle": SPEED,
}
_INSTRUCTIONS: Final = (
    *("sse4_1", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"),
    *("asimd", "sve", "bf16", "i8mm"),
)
_ENVIRONMENT: Final = (
    *("TF_ENABLE_ONEDNN_OPTS", "TF_DETERMINISTIC_OPS", "TF_CUDNN_DETERMINISTIC", "TF_XLA_FLAGS", "XLA_FLAGS"),
    *("TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("OPENBLAS_CORETYPE", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES"),
)
"""Variables that change numbers; no other is read, since some hold what is nobody's business."""


@dataclass(frozen=True)
class HostFact:
    """A fact of a host.

    Attributes:
        name: What it is about.
        value: In words.
        changes: What another value may change: `RUNS`, `BITS` or `SPEED`.
    """

    name: str
    value: str
    changes: str


@dataclass(frozen=True)
class Host:
    """A host as `tapeline doctor` saw it.

    Attributes:
        name: Its name in its network.
        facts: In a fixed order.
    """

    name: str
    facts: tuple[HostFact, ...]

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"host": self.name, "facts": [asdict(fact) for fact in self.facts]}, indent=1) + "\n"

    @classmethod
    def of(cls, text: str, where: str) -> Host:
        """From JSON.

        Args:
            text: What `text` gave.
            where: Where it was read, for the error.

        Raises:
            UsageError: It is no such text.
        """
        try:
            read = json.loads(text)
            facts = tuple(HostFact(**{key: str(value) for key, value in fact.items()}) for fact in read["facts"])
            return cls(str(read["host"]), facts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{where} is no file that `tapeline doctor --json` wrote ({type(error).__name__})"
            ) from None


def this_host(model: str | None = None) -> Host:
    """What this host has, as a worker on it would find it. Imports TensorFlow.

    Args:
        model: A module whose source must be equal on all hosts, or None.

    Raises:
        UsageError: There is no such module, or it has no source.
    """
    found = (*_software(), *_numerics(), *_machine(), *([] if model is None else [_module(model)]))
    return Host(platform.node() or "this host", tuple(found))


def _software() -> Iterator[HostFact]:
    yield HostFact("python", platform.python_version(), RUNS)
    yield HostFact("tapeline", _version("tapeline"), RUNS)
    yield HostFact("tapeline's sources", _digest(path for name in PACKAGES for path in _sources(ROOT / name)), RUNS)
    for name, changes in _LIBRARIES.items():
        yield HostFact(name, _version(name), changes)


def _numerics() -> Iterator[HostFact]:
    import keras
    import tensorflow as tf

    config = keras.config
    yield HostFact("keras backend", config.backend(), RUNS)
    yield HostFact("keras floatx", config.floatx(), RUNS)
    yield HostFact("keras epsilon", repr(config.epsilon()), RUNS)
    yield HostFact("keras image format", config.image_data_format(), RUNS)
    yield HostFact("keras dtype policy", str(keras.config.dtype_policy().name), RUNS)
    yield HostFact("machine", f"{platform.system()} {platform.machine()}", BITS)
    yield HostFact("processor", _processor(), BITS)
    yield HostFact("instructions", " ".join(_instructions()) or "unknown", BITS)
    gpus = [device.name.rpartition("/")[2] for device in tf.config.list_physical_devices("GPU")]
    yield HostFact("GPUs", ", ".join(gpus) or "none", BITS)
    for name in _ENVIRONMENT:
        yield HostFact(name, os.environ.get(name, "not set"), BITS)


def _machine() -> Iterator[HostFact]:
    yield HostFact("cores", str(_cores()), BITS)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield HostFact("memory", f"{memory / 2**30:.0f} GiB", SPEED)
    yield HostFact("shared memory", _shared_memory(), SPEED)
    yield HostFact("open files", str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]), SPEED)


def _module(name: str) -> HostFact:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"there is no module {name!r} to look at: {error}") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UsageError(f"there is no module {name!r} with a source to look at; it is looked for as an import would")
    return HostFact(f"module {name}", _digest([Path(spec.origin)]), RUNS)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _sources(folder: Path) -> Sequence[Path]:
    return sorted(folder.rglob("*.py"))


def _digest(paths: Any) -> str:
    """Of names and texts, whatever line ends a file system gave them."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return found.hexdigest()[:16]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> Mapping[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return {key.strip(): value.strip() for key, _, value in lines if value}


def _processor() -> str:
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or "unknown"


def _instructions() -> Sequence[str]:
    """Those that TensorFlow's libraries choose their kernels by."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in _INSTRUCTIONS if name in flags]


def _shared_memory() -> str:
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return "none"
    return f"{room.f_frsize * room.f_blocks / 2**30:.1f} GiB"

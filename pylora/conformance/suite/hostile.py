"""Adapters that an engine must refuse: damaged, of another model, or made to do harm.

Each is written from a good adapter. None does any harm: the pickle, if somebody loads it, makes an
empty folder in the current directory, by which that is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.suite.adapters import Adapter
from pylora.conformance.suite.forms import write_gguf_lora, write_mlx, write_peft
from pylora.formats.safetensors import SafeTensors

WEIGHTS, CONFIG, GGUF = "adapter_model.safetensors", "adapter_config.json", "adapter.gguf"
CANARY = "pylora-suite-pickle-was-run"
Arrays = dict[str, Any]
_Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Refused:
    """What must be refused, and how it is written into a folder."""

    name: str
    why: str
    write: Callable[[Adapter, Path], None]


def _changed(
    tensors: Callable[[Arrays], Arrays] = lambda t: t, **settings: Any
) -> Callable[[Adapter, Path], None]:
    """The good adapter with other tensors, or other settings."""

    def write(adapter: Adapter, folder: Path) -> None:
        folder.mkdir(parents=True)
        config = json.dumps({**adapter.config, **settings}, indent=1) + "\n"
        (folder / CONFIG).write_text(config, encoding="utf-8")
        (folder / WEIGHTS).write_bytes(plain_safetensors(tensors(adapter.tensors())))

    return write


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Adapter, Path], None]:
    """The good adapter's weights with their bytes changed."""

    def write(adapter: Adapter, folder: Path) -> None:
        write_peft(adapter, folder)
        file = folder / WEIGHTS
        file.write_bytes(change(file.read_bytes()))

    return write


def plain_safetensors(tensors: Mapping[str, Any], **more: Any) -> bytes:
    """A safetensors file, unchecked; `more` are header entries put in as they are."""
    header: dict[str, Any] = {}
    at, data = 0, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array, np.float32).tobytes()
        offsets = [at, at + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(np.shape(array)), "data_offsets": offsets}
        at, data = at + len(raw), data + raw
    return _framed(json.dumps(header | more).encode(), data)


def _framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _without(*endings: str) -> Callable[[Arrays], Arrays]:
    return lambda t: {k: a for k, a in t.items() if not k.endswith(endings)}


def _with(key: str, change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    return lambda t: t | {key: change(t[key])}


def _beside(path: str, r: int, k: int, d: int) -> Callable[[Arrays], Arrays]:
    return lambda t: (
        t
        | {
            f"base_model.model.{path}.lora_A.weight": np.ones((r, k), np.float32),
            f"base_model.model.{path}.lora_B.weight": np.ones((d, r), np.float32),
        }
    )


def _number(value: float) -> Callable[[Any], Any]:
    def put(array: Any) -> Any:
        out = array.copy()
        out[0, 0] = value
        return out

    return put


def _halved(tensors: Arrays) -> Arrays:
    """Of a model of half the size."""
    return {
        k: a[:, : a.shape[1] // 2] if ".lora_A" in k else a[: a.shape[0] // 2]
        for k, a in tensors.items()
    }


def _overlapping(data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [n for n in header if n != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    return _framed(json.dumps(header).encode(), data[8 + size :])


def _enormous(data: bytes) -> bytes:
    """Tensors of an exabyte, in a file of a few hundred bytes."""
    shape = [1 << 40, 1 << 18]
    names = [f"{_Q0}.lora_A.weight", f"{_Q0}.lora_B.weight"]
    size, header = 4 * shape[0] * shape[1], {}
    for i, name in enumerate(names):
        offsets = [i * size, (i + 1) * size]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return _framed(json.dumps(header).encode(), bytes(64))


def _pickle(adapter: Adapter, folder: Path) -> None:
    write_peft(adapter, folder)
    (folder / WEIGHTS).unlink()
    # Protocol 0: os.makedirs(CANARY, 0o777, True). Written by hand: the module of os differs.
    program = f"cos\nmakedirs\n(V{CANARY}\nI511\nI01\ntR.".encode()
    (folder / "adapter_model.bin").write_bytes(program)


def _gguf(change: Callable[[bytes], bytes]) -> Callable[[Adapter, Path], None]:
    def write(adapter: Adapter, folder: Path) -> None:
        write_gguf_lora(adapter, folder)
        file = folder / GGUF
        file.write_bytes(change(file.read_bytes()))

    return write


def _mlx(change: Callable[[Arrays], Arrays]) -> Callable[[Adapter, Path], None]:
    """The good MLX adapter with other tensors."""

    def write(adapter: Adapter, folder: Path) -> None:
        write_mlx(adapter, folder)
        file = folder / "adapters.safetensors"
        with SafeTensors(file) as there:
            tensors = {name: np.array(there.load(name)) for name in there.tensors}
        file.write_bytes(plain_safetensors(change(tensors)))

    return write


def _renamed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    if len(old) != len(new):
        raise ValueError("names of one length, so that all offsets stay")
    return lambda data: data.replace(old, new)


_PEFT: tuple[Refused, ...] = (
    Refused("missing-tensor", "A of a target is missing", _changed(
        _without(f"{_Q0}.lora_A.weight"))),
    Refused("missing-module", "a target has no tensors at all", _changed(
        _without(f"{_Q0}.lora_A.weight", f"{_Q0}.lora_B.weight"))),
    Refused("extra-layer", "tensors of a layer that the base does not have", _changed(
        _beside("model.layers.7.self_attn.q_proj", 4, 128, 128))),
    Refused("extra-module", "tensors of a module that target_modules does not name", _changed(
        _beside("model.layers.0.mlp.up_proj", 4, 128, 192))),
    Refused("extra-name", "a tensor that is part of no adapter", _changed(
        lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight":
                       np.ones((4, 4), np.float32)})),
    Refused("wrong-shape", "A has a column too few", _changed(
        _with(f"{_Q0}.lora_A.weight", lambda a: a[:, :-1]))),
    Refused("wrong-rank", "the settings say a rank that the tensors do not have", _changed(r=16)),
    Refused("nan", "NaN in A", _changed(_with(f"{_Q0}.lora_A.weight", _number(float("nan"))))),
    Refused("infinity", "infinity in B", _changed(
        _with(f"{_Q0}.lora_B.weight", _number(float("inf"))))),
    Refused("other-model", "an adapter of a model of half the size", _changed(_halved)),
    Refused("unknown-target", "a target that no module is called", _changed(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "query_proj"])),
    Refused("rank-0", "a rank of 0", _changed(r=0)),
    Refused("alpha-nan", "lora_alpha is NaN", _changed(lora_alpha=float("nan"))),
    Refused("unknown-type", "a kind of adapter that does not exist", _changed(peft_type="LORAX")),
    Refused("huge-rank", "the settings say a rank of 2^31 - 1", _changed(r=2**31 - 1)),
    Refused("truncated", "the file ends early", _bytes(lambda d: d[: len(d) // 2])),
    Refused("left-over", "bytes behind the last tensor", _bytes(lambda d: d + bytes(64))),
    Refused("huge-header", "a header of 2^62 bytes", _bytes(
        lambda d: (1 << 62).to_bytes(8, "little") + d[8:])),
    Refused("deep-header", "a header of 100,000 nested lists", _bytes(
        lambda d: _framed(b"[" * 100_000 + b"]" * 100_000, b""))),
    Refused("overlap", "two tensors in one place", _bytes(_overlapping)),
    Refused("enormous", "tensors of an exabyte in a small file", _bytes(_enormous)),
    Refused("path-names", "names of tensors that are paths of files", _changed(
        lambda t: {f"../../../../tmp/{k}": a for k, a in t.items()})),
    Refused("pickle", "a pickle, which runs a program when it is loaded", _pickle),
    Refused("slow-pattern", "a regular expression that takes for ever", _changed(
        target_modules="(([a-z0-9_.]+)+)+!")),
)  # fmt: skip
_GGUF: tuple[Refused, ...] = (
    Refused("truncated", "the file ends early", _gguf(lambda d: d[: len(d) // 2])),
    Refused("missing-tensor", "A of a module is missing", _gguf(
        _renamed(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_c"))),
    Refused("missing-half", "B of one module and A of another, of which the rest is missing", _gguf(
        _renamed(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_x.weight.lora_a"))),
    Refused("extra-layer", "tensors of a layer that the base does not have", _gguf(
        _renamed(b"blk.2.attn_q", b"blk.7.attn_q"))),
    Refused("huge-count", "2^60 tensors", _gguf(
        lambda d: d[:8] + (1 << 60).to_bytes(8, "little") + d[16:])),
    Refused("other-kind", "an adapter that is no LoRA", _gguf(
        _renamed(b"\x04" + bytes(7) + b"lora", b"\x04" + bytes(7) + b"loha"))),
    Refused("nan", "NaN in the last B", _gguf(lambda d: d[:-4] + b"\x00\x00\xc0\x7f")),
)  # fmt: skip
_M0 = "model.layers.0.self_attn.q_proj"
_MLX: tuple[Refused, ...] = (
    Refused("missing-tensor", "A of a target is missing", _mlx(_without(f"{_M0}.lora_a"))),
    Refused("missing-module", "a target has no tensors at all", _mlx(
        _without(f"{_M0}.lora_a", f"{_M0}.lora_b"))),
    Refused("extra-module", "tensors of a module that the settings do not name", _mlx(
        lambda t: t | {"model.layers.0.mlp.up_proj.lora_a": np.ones((128, 4), np.float32),
                       "model.layers.0.mlp.up_proj.lora_b": np.ones((4, 192), np.float32)})),
    Refused("wrong-shape", "A has a column too few", _mlx(
        _with(f"{_M0}.lora_a", lambda a: a[:-1]))),
    Refused("nan", "NaN in A", _mlx(_with(f"{_M0}.lora_a", _number(float("nan"))))),
    Refused("infinity", "infinity in B", _mlx(_with(f"{_M0}.lora_b", _number(float("inf"))))),
)  # fmt: skip
REFUSED: dict[str, tuple[Refused, ...]] = {"peft": _PEFT, "gguf": _GGUF, "mlx": _MLX}

"""Readers and writers of adapter files that take what they should refuse, or lose what they should
keep. Each reader here is one of its own (`Loose`), with nothing checked but what it checks."""

from __future__ import annotations

import json
import pickle
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Tensors,
    read,
    rewritten,
    write,
)
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.formats.safetensors import SafeTensors
from pylora.types import Array

Modules = Mapping[str, tuple[int, int]]
Pairs = Mapping[str, tuple[Array, Array]]


class Mending(Correct):
    """Changes the bytes of a directory before the strict reader sees them."""

    def weights(self, raw: bytes) -> bytes:
        return raw

    def settings(self, text: bytes) -> bytes:
        return text

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        with tempfile.TemporaryDirectory() as clean:
            for name, mend in ((WEIGHTS, self.weights), (CONFIG, self.settings)):
                file = Path(directory, name)
                if file.is_file():
                    Path(clean, name).write_bytes(mend(file.read_bytes()))
            return super().load(clean, modules)


def _parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def _whole(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@wrong(
    "read-rest-ignored",
    "subtle",
    "Bytes behind the last tensor are ignored.",
    "Offsets are all that a reader needs.",
)
class RestIgnored(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = _parts(raw)
            end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
            return _whole(entries, data[:end]) if 0 < end < len(data) else raw
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IndexError):
            return raw


@wrong(
    "read-holes-and-overlaps",
    "subtle",
    "Where tensors lie is not compared: two may share bytes, or leave some out.",
    "Each tensor is read on its own.",
)
class HolesAndOverlaps(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = _parts(raw)
            out, new, at = b"", {}, 0
            for name, entry in entries.items():
                if name == "__metadata__":
                    new[name] = entry
                    continue
                start, end = entry["data_offsets"]
                piece = data[start:end]
                if not 0 <= start <= end or len(piece) != end - start:
                    return raw
                new[name] = {**entry, "data_offsets": [at, at + len(piece)]}
                out, at = out + piece, at + len(piece)
            return _whole(new, out)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-beyond-is-zero",
    "subtle",
    "A tensor that ends beyond the file is filled up with zeros.",
    "A buffer is made first, and as much is read as there is.",
)
class BeyondIsZero(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = _parts(raw)
            end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
            if len(data) < end < len(data) + 2**20:
                starts = sorted(e["data_offsets"][0] for e in entries.values())
                return _whole(entries, data + bytes(end - len(data))) if starts else raw
            return raw
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-by-order",
    "subtle",
    "Tensors are taken in the header's order, one behind the other, whatever their offsets say.",
    "Writers write them in order.",
)
class ByOrder(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = _parts(raw)
            at = 0
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    entry["data_offsets"] = [at, at + end - start]
                    at += end - start
            return _whole(entries, data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-dtype-in-any-case",
    "subtle",
    "A dtype that is spelt in small letters is read.",
    "upper(), to be kind to other writers.",
)
class DtypeAnyCase(Mending):
    def weights(self, raw: bytes) -> bytes:
        return raw.replace(b'"f32"', b'"F32"')


@wrong(
    "read-header-latin",
    "subtle",
    "A header that is not UTF-8 is read as far as possible.",
    "decode(errors='replace').",
)
class HeaderLatin(Mending):
    def weights(self, raw: bytes) -> bytes:
        return raw.replace(b', "\xff": 1', b"        ")


@wrong(
    "read-header-rest-ignored",
    "subtle",
    "What stands in the header behind its object is ignored.",
    "raw_decode in place of decode.",
)
class HeaderRest(Mending):
    def weights(self, raw: bytes) -> bytes:
        n = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + n]
        return raw[:8] + text[:-3] + b"   " + raw[8 + n :] if text.endswith(b" {}") else raw


def checked(directory: str) -> tuple[dict[str, Any], Tensors]:
    """Settings and tensors of a directory whose container is well-formed."""
    with SafeTensors(Path(directory, WEIGHTS)):
        return read(directory)


class Fitted(Correct):
    """Makes tensors fit before the strict reader sees them."""

    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t

    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return key

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        try:
            config, tensors = checked(directory)
            wanted: dict[str, tuple[int, ...]] = {}
            for path, (r, _, _) in self.plan(config, modules).items():
                d, k = modules[path]
                wanted[f"{PREFIX}{path}.lora_A.weight"] = r, k
                wanted[f"{PREFIX}{path}.lora_B.weight"] = d, r
        except Exception:  # not what this one mends
            return super().load(directory, modules)
        mended: Tensors = {}
        for key, t in tensors.items():
            name = self.key(key, wanted)
            mended[name] = self.fitted(t, wanted[name]) if name in wanted else t
        with tempfile.TemporaryDirectory() as clean:
            write(clean, config, mended)
            return super().load(clean, modules)


@wrong(
    "read-reshaped",
    "subtle",
    "A tensor with the right number of elements is reshaped.",
    "view(r, k): Conv1d's kernels of 1 have a dimension more.",
)
class Reshaped(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t.reshape(shape) if t.size == int(np.prod(shape)) else t


@wrong(
    "read-transposed-if-needed",
    "subtle",
    "A tensor whose shape is right the other way round is transposed.",
    "MLX's and PEFT's order are told apart by shape.",
)
class TransposedIfNeeded(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(t.T) if t.shape == shape[::-1] != shape else t


@wrong(
    "read-squeezed",
    "subtle",
    "Dimensions of 1 that are too many are dropped.",
    "squeeze().",
)
class Squeezed(Fitted):
    def fitted(self, t: Array, shape: tuple[int, ...]) -> Array:
        return t.reshape(shape) if t.ndim > 2 and t.squeeze().shape in (
            shape, tuple(n for n in shape if n != 1)) else t  # fmt: skip


@wrong(
    "read-key-without-weight",
    "subtle",
    "A key without .weight is taken for the one with it.",
    "Embeddings have keys like that.",
)
class KeyWithoutWeight(Fitted):
    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return f"{key}.weight" if f"{key}.weight" in wanted else key


@wrong(
    "read-key-any-case",
    "subtle",
    "Keys are compared without regard to case.",
    "lora_a and lora_A have both been seen.",
)
class KeyAnyCase(Fitted):
    def key(self, key: str, wanted: Mapping[str, tuple[int, ...]]) -> str:
        return {w.lower(): w for w in wanted}.get(key.lower(), key)


class Values(Correct):
    """Reads, and then changes the numbers."""

    def changed(self, a: Array, dtype: str) -> Array:
        return a

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        loaded = super().load(directory, modules)
        entries, _ = _parts(Path(directory, WEIGHTS).read_bytes())
        dtype = next(e["dtype"] for n, e in entries.items() if n != "__metadata__")
        return {p: (self.changed(A, dtype), self.changed(B, dtype), s)
                for p, (A, B, s) in loaded.items()}  # fmt: skip


@wrong(
    "read-float16-subnormal-flushed",
    "subtle",
    "Subnormal numbers of float16 become zeros.",
    "A conversion by bit shifts that leaves the exponent of 0 out.",
)
class SubnormalFlushed(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-14, a * 0, a) if dtype == "F16" else a


@wrong(
    "read-float16-subnormal-doubled",
    "subtle",
    "Subnormal numbers of float16 are halved: their exponent is taken for -15.",
    "The hidden bit is left out, and the exponent is not corrected.",
)
class SubnormalHalved(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-14, a / 2, a) if dtype == "F16" else a


@wrong(
    "read-bfloat16-subnormal-flushed",
    "subtle",
    "Subnormal numbers of bfloat16 and float32 become zeros.",
    "A processor's mode, set by another library.",
)
class WideSubnormalFlushed(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.where(np.abs(a) < 2.0**-126, a * 0, a) if dtype != "F16" else a


@wrong(
    "read-negative-zero-lost",
    "subtle",
    "-0 becomes 0.",
    "A buffer of zeros to which the tensor is added.",
)
class NegativeZeroLost(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.asarray(a + np.float32(0))


@wrong(
    "read-largest-clipped",
    "subtle",
    "Numbers beyond 65504 are clipped to it.",
    "Everything goes through float16.",
)
class LargestClipped(Values):
    def changed(self, a: Array, dtype: str) -> Array:
        return np.clip(a, -65504, 65504)


class Finite(Correct):
    """Takes what is not finite, of some kinds."""

    def mends(self, a: Array) -> Array:
        return np.nan_to_num(a)

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        try:
            config, tensors = checked(directory)
        except Exception:  # not what this one mends
            return super().load(directory, modules)
        with tempfile.TemporaryDirectory() as clean:
            write(clean, config, {n: self.mends(t) for n, t in tensors.items()})
            return super().load(clean, modules)


@wrong(
    "read-infinity-accepted",
    "subtle",
    "NaN is refused; infinity becomes the largest number.",
    "isnan() is the check that one thinks of.",
)
class InfinityAccepted(Finite):
    def mends(self, a: Array) -> Array:
        return np.where(np.isinf(a), np.float32(3e38) * np.sign(a), a)


@wrong(
    "read-last-element-unchecked",
    "subtle",
    "The last element of a tensor is not checked for NaN.",
    "A vectorised check of whole registers.",
)
class LastUnchecked(Finite):
    def mends(self, a: Array) -> Array:
        if a.size and not np.isfinite(a.reshape(-1)[-1]):
            a = a.copy()
            a.reshape(-1)[-1] = 0
        return a


@wrong(
    "read-pickle",
    "subtle",
    "Where there is no safetensors file, a pickle is read.",
    "Adapters of 2023 are pickles.",
)
class ReadsPickle(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        file = Path(directory, "adapter_model.bin")
        if file.is_file() and not Path(directory, WEIGHTS).is_file():
            pickle.loads(file.read_bytes())
        return super().load(directory, modules)


@wrong(
    "read-pickle-by-content",
    "subtle",
    "What the weights' file is is found out by trying to unpickle it.",
    "A loader that guesses the format.",
)
class ReadsPickleByContent(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        raw = Path(directory, WEIGHTS).read_bytes() if Path(directory, WEIGHTS).is_file() else b""
        if raw[:1] == b"\x80" and raw[-1:] == b".":
            pickle.loads(raw)
        return super().load(directory, modules)


@wrong(
    "read-training-arguments",
    "subtle",
    "The training's arguments, a pickle beside the adapter, are loaded for their dtype.",
    "A field of them is handy.",
)
class ReadsArguments(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        file = Path(directory, "training_args.bin")
        if file.is_file():
            pickle.loads(file.read_bytes())
        return super().load(directory, modules)


@wrong(
    "settings-last-of-two",
    "subtle",
    "Of a setting that is there twice the last one counts.",
    "json.loads.",
)
class LastOfTwo(Mending):
    def settings(self, text: bytes) -> bytes:
        try:
            return json.dumps(json.loads(text, parse_constant=_refuse)).encode()
        except (ValueError, RecursionError):
            return text


@wrong(
    "settings-nan-accepted",
    "subtle",
    "NaN and Infinity in the settings are read as 0.",
    "Python's json writes them, and reads them.",
)
class SettingsNan(Mending):
    def settings(self, text: bytes) -> bytes:
        return text.replace(b"-Infinity", b"0").replace(b"Infinity", b"0").replace(b"NaN", b"0")


@wrong(
    "settings-python",
    "subtle",
    "Settings in Python's syntax are read.",
    "ast.literal_eval as a second try.",
)
class SettingsPython(Mending):
    def settings(self, text: bytes) -> bytes:
        import ast

        try:
            json.loads(text)
        except (ValueError, RecursionError):
            try:
                return json.dumps(ast.literal_eval(text.decode())).encode()
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return text
        return text


def _refuse(name: str) -> Any:
    raise ValueError(name)


@wrong(
    "settings-missing-are-defaults",
    "subtle",
    "Without adapter_config.json the usual settings are taken.",
    "r can be read off the tensors, and alpha is 2 r, mostly.",
)
class MissingAreDefaults(Correct):
    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        if Path(directory, WEIGHTS).is_file() and not Path(directory, CONFIG).exists():
            tensors, _ = _parts(Path(directory, WEIGHTS).read_bytes())
            names = [n[len(PREFIX) :].rsplit(".lora_", 1)[0] for n in tensors if ".lora_A" in n]
            return {n: (np.zeros(1), np.zeros(1), 2.0) for n in names}
        return super().load(directory, modules)


class Writing(Correct):
    """Changes what is saved."""

    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return config, t

    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        super().save(directory, adapters, config)
        rewritten(directory, self.written)


@wrong(
    "write-keys-sorted",
    "subtle",
    "Pattern keys are written in the alphabet's order, so that another one decides.",
    "json.dumps(sort_keys=True), as PEFT's save_pretrained has it.",
)
class KeysSorted(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return json.loads(json.dumps(config, sort_keys=True)), t


@wrong(
    "write-alpha-two-digits",
    "subtle",
    "lora_alpha is written with two digits behind the point.",
    "A formatted number in the settings.",
)
class AlphaTwoDigits(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return {**config, "lora_alpha": round(config["lora_alpha"], 2)}, t


@wrong(
    "write-rslora-as-alpha",
    "subtle",
    "rsLoRA is written as an alpha of alpha sqrt(r): right for modules of rank r alone.",
    "Readers that do not know rsLoRA.",
)
class RsloraAsAlpha(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        if config.get("use_rslora"):
            alpha = config["lora_alpha"] * config["r"] ** 0.5
            config = {**config, "lora_alpha": alpha, "use_rslora": False}
        return config, t


@wrong(
    "write-subnormals-flushed",
    "subtle",
    "Subnormal numbers are written as zeros.",
    "A file in 16 bits is made on the way, and widened again where it fits.",
)
class WriteFlushed(Writing):
    def written(self, config: dict[str, Any], t: Tensors) -> tuple[dict[str, Any], Tensors]:
        return config, {n: np.where(np.abs(a) < 2.0**-126, a * 0, a) for n, a in t.items()}


@wrong(
    "write-memory-order",
    "subtle",
    "An array that lies by columns is written as it lies.",
    "The buffer is written, and the shape beside it.",
)
class MemoryOrder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        def lies(a: Array) -> Array:
            ordered = a.flags.f_contiguous and not a.flags.c_contiguous
            return a.ravel(order="K").reshape(a.shape) if ordered else a

        super().save(directory, {p: (lies(A), lies(B)) for p, (A, B) in adapters.items()}, config)


@wrong(
    "write-adds-to-older",
    "subtle",
    "Tensors of an older adapter in the same directory are kept in the file.",
    "The state is updated, not replaced.",
)
class AddsToOlder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        try:
            older = read(directory)[1]
        except (OSError, ValueError, KeyError):
            older = {}
        super().save(directory, adapters, config)
        rewritten(directory, lambda c, t: (c, {**older, **t}))


@wrong(
    "write-settings-of-older",
    "subtle",
    "Where there are settings already they stay.",
    "exist_ok: the run's folder has been made before.",
)
class SettingsOfOlder(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        file = Path(directory, CONFIG)
        older = file.read_bytes() if file.is_file() else None
        super().save(directory, adapters, config)
        if older is not None:
            file.write_bytes(older)


@wrong(
    "write-settings-first",
    "subtle",
    "Settings are written before arrays are looked at: a save that fails leaves new ones with old "
    "arrays.",
    "The order in which one thinks of them.",
)
class SettingsFirst(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        if Path(directory).is_dir():
            doubled = {**config, "lora_alpha": 2 * config["lora_alpha"]}
            Path(directory, CONFIG).write_text(json.dumps({"peft_type": "LORA", **doubled}))
        super().save(directory, adapters, config)


@wrong(
    "write-deletes-first",
    "subtle",
    "The older file is deleted before the new one is written.",
    "rmtree, mkdir, save.",
)
class DeletesFirst(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        Path(directory, WEIGHTS).unlink(missing_ok=True)
        super().save(directory, adapters, config)


@wrong(
    "write-misfit-accepted",
    "subtle",
    "An array that does not fit is cut to size.",
    "The shapes of the settings are believed.",
)
class MisfitAccepted(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        r = {len(A) for A, _ in adapters.values()}
        del r
        cut = {}
        for path, (A, B) in adapters.items():
            fits = isinstance(B, np.ndarray) and A.ndim == B.ndim == 2
            n = min(A.shape[0], B.shape[1]) if fits else 0
            cut[path] = (A[:n], B[:, :n]) if fits else (A, B)
        super().save(directory, cut, config)


@wrong(
    "write-temporary-left",
    "subtle",
    "A save that fails leaves its temporary folder beside the adapter.",
    "No finally.",
)
class TemporaryLeft(Correct):
    def save(self, directory: str, adapters: Pairs, config: dict[str, Any]) -> None:
        beside = Path(f"{directory}.tmp")
        beside.mkdir(parents=True, exist_ok=True)
        super().save(directory, adapters, config)
        beside.rmdir()

"""The C reference with one change, compiled, under the laws.

A change is one of text: an operator, a constant, an index, a bound of a loop, a term, a cast. The
file is compiled by the system's C compiler into a temporary directory and called through cffi. A
change may write where it must not, so that each mutant is judged in a process of its own; what
falls dead is killed.
"""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.perturb.python import Mutant
from pylora.errors import ConfigError
from pylora.extras import need
from pylora.reference import Reference
from pylora.types import Array, LoRA, Residue

SOURCE = Path(__file__).parents[3] / "csrc"
_HEADER = """
typedef struct { float *p; int64_t rows, cols, ld; uint16_t *b; uint16_t *h; } pylora_mat;
typedef struct { float p; uint64_t seed, stream; int64_t row0; } pylora_drop;
typedef struct { int64_t r; const float *A; int64_t lda; const float *B; int64_t ldb; float s;
  const pylora_drop *drop; const void *packed; } pylora_lora;
typedef struct { int64_t n; const int64_t *q_start, *k_start, *k_len; } pylora_seqs;
typedef struct { int32_t heads, kv_heads, head_dim, window; float scale; } pylora_attn;
void pylora_ref_lora_forward(const pylora_mat *, const pylora_mat *, const float *,
  const pylora_lora *, const pylora_mat *, const pylora_mat *, const pylora_mat *);
void pylora_ref_lora_backward(const pylora_mat *, const pylora_mat *, const pylora_mat *,
  const pylora_mat *, const pylora_lora *, const pylora_mat *, int, const pylora_mat *,
  const pylora_mat *);
int64_t pylora_ref_merge(int, int64_t, int64_t, const void *, int64_t, const pylora_lora *, void *,
  int64_t, int64_t *, uint32_t *);
void pylora_ref_unmerge(int, int64_t, int64_t, const void *, int64_t, const pylora_lora *, int64_t,
  const int64_t *, const uint32_t *, void *, int64_t);
void pylora_ref_rope(const pylora_mat *, const pylora_mat *, const pylora_mat *, const int64_t *,
  int32_t, int, int, const pylora_mat *);
void pylora_ref_attention_forward(const pylora_mat *, const pylora_mat *, const pylora_mat *,
  const pylora_seqs *, const pylora_attn *, const pylora_mat *, const pylora_mat *);
void pylora_ref_attention_backward(const pylora_mat *, const pylora_mat *, const pylora_mat *,
  const pylora_mat *, const pylora_mat *, const pylora_mat *, const pylora_seqs *,
  const pylora_attn *, const pylora_mat *, const pylora_mat *, const pylora_mat *);
"""
_FIRST, _LAST = "static float *at(", "static double sigmoid("  # what lies between is changed
_NOT = re.compile(r"//|/\*|typedef|const (?:pylora|float|int64|uint32|void)|return \(format\)")
# (what, in its place, kind): each match of each pattern is one change.
_PATTERNS: tuple[tuple[str, str, str], ...] = (
    (r"(?<= )\+ ", "- ", "operator"),
    (r"(?<= )- ", "+ ", "operator"),
    (r"(?<= )\* (?=[\w(*])", "+ ", "operator"),
    (r"(?<= )/ (?=[\w(])", "* ", "operator"),
    (r"\+= ", "= ", "operator"),
    (r"\+= ", "-= ", "operator"),
    (r" < ", " <= ", "condition"),
    (r" >= ", " > ", "condition"),
    (r" > ", " >= ", "condition"),
    (r" == ", " != ", "condition"),
    (r" && ", " || ", "condition"),
    (r"= 0; (\w) <", r"= 1; \1 <", "bound"),
    (r"(\w) < (\w+); \1\+\+", r"\1 < \2 - 1; \1++", "bound"),
    (r"lora->s \* ", "", "term dropped"),
    (r"a->scale \* ", "", "term dropped"),
    (r" \* kept\([^;]*?\)(?= \*)", "", "term dropped"),
    (r"kept\([^;]*?\) \* ", "", "term dropped"),
    (r"\bdouble (sum|low|base|total|g|t|sum_k)\b", r"float \1", "dtype"),
    (r", i, (\w)\)", r", 0, \1)", "index"),
    (r", (\w), t\)", r", t, \1)", "index"),
    (r"\bldb\b", "lda", "index"),
    (r"\blda\b", "ldb", "index"),
    (r"(?<![\w.])1(?![\w.])", "2", "constant"),
    (r"(?<![\w.])0(?![\w.x])", "1", "constant"),
    (r"-INFINITY", "0", "constant"),
    (r" \+ j\]", "]", "term dropped"),
    (r"fmax", "fmin", "operator"),
    (r"-\*at", "*at", "sign dropped"),
    (r" / group", "", "term dropped"),
    (r"fabs\(t\)", "t", "term dropped"),
    (r"rint\(", "floor(", "operator"),
    (r"position\[(\w)\]", "0", "index"),
)


def mutants() -> list[Mutant]:
    """All changes of the C reference."""
    source = (SOURCE / "reference.c").read_text(encoding="utf-8")
    found = []
    for number, (kind, line, before, after, text) in enumerate(_changes(source)):
        said = f"reference.c:{line}: {before.strip()} -> {after.strip()}"
        found.append(
            Mutant(f"native-{number}", f"native: {kind}", said, _maker(text), _METHODS, unchanged)
        )
    return found


_METHODS = frozenset(
    "forward base backward merge unmerge dropout_forward dropout_backward attention "
    "attention_backward".split()
)


def _changes(source: str) -> Iterator[tuple[str, int, str, str, str]]:
    """(kind, line, the line before and after, the whole text), pattern by pattern."""
    first, last = source.index(_FIRST), source.index(_LAST)
    skipped = range(source.index("/* rstd = 1"), source.index("/* Pairs (a, b)"))
    for pattern, new, kind in _PATTERNS:
        for match in re.finditer(pattern, source[first:last]):
            start, end = first + match.start(), first + match.end()
            a, b = source.rindex("\n", 0, start) + 1, source.index("\n", end)
            line = source[a:b]
            if start in skipped or (_NOT.search(line) and "for" not in line):
                continue
            text = source[:start] + match.expand(new) + source[end:]
            after = text[a : b + len(match.expand(new)) - (end - start)]
            yield kind, source.count("\n", 0, start) + 1, line, after, text


def _maker(text: str) -> Callable[[], Any]:
    return lambda: Native(compiled(text))


def unchanged() -> Any:
    """The C reference as it is, as an implementation."""
    return Native(compiled((SOURCE / "reference.c").read_text(encoding="utf-8")))


_FOLDER: list[str] = []


def compiled(text: str) -> Any:
    """The library of the changed source. ConfigError where it does not compile."""
    if not _FOLDER:
        _FOLDER.append(tempfile.mkdtemp(prefix="pylora-perturb-"))
        atexit.register(shutil.rmtree, _FOLDER[0], ignore_errors=True)
    name = f"m{len(list(Path(_FOLDER[0]).iterdir()))}"
    source, library = Path(_FOLDER[0]) / f"{name}.c", Path(_FOLDER[0]) / f"{name}.so"
    source.write_text(text, encoding="utf-8")
    command = ["cc", "-w", "-O1", "-shared", "-fPIC", f"-I{SOURCE}", str(source), "-lm"]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the changed reference.c does not compile: {done.stderr[:200]}")
    ffi = need("cffi").FFI()
    ffi.cdef(_HEADER)
    return ffi, ffi.dlopen(str(library))


class Native(Correct):
    """Layers, dropout, merging and attention in the library, the rest as Correct has it."""

    name = "pylora's C reference"
    dtypes = ("float32", "bfloat16")
    bitwise = False  # B = 0 is multiplied out: -0.0 becomes 0.0

    def __init__(self, library: Any) -> None:
        self.ops = NativeOps(library)


class NativeOps(Reference):
    """pylora.reference's operations for float32, by the library."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.ffi, self.lib = library
        self.keep: list[Any] = []

    def _mat(self, a: Array | None) -> Any:
        if a is None:
            return self.ffi.NULL
        struct = self.ffi.new("pylora_mat *")
        struct.p = self._at(a, "float *")
        struct.rows, struct.cols = a.shape
        struct.ld = a.shape[1]
        self.keep.append(struct)
        return struct

    def _at(self, a: Array | None, kind: str) -> Any:
        if a is None:
            return self.ffi.NULL
        self.keep.append(a)
        return self.ffi.cast(kind, a.ctypes.data)

    def _lora(self, lora: LoRA | None, drop: Any = None) -> Any:
        if lora is None:
            return self.ffi.NULL
        A, B = (np.ascontiguousarray(a, np.float32) for a in (lora.A, lora.B))
        struct = self.ffi.new("pylora_lora *")
        struct.r, struct.lda, struct.ldb = A.shape[0], A.shape[1], B.shape[1]
        struct.A, struct.B, struct.s = self._at(A, "float *"), self._at(B, "float *"), lora.scale
        if drop is not None:
            of = self.ffi.new("pylora_drop *")
            of.p, of.seed, of.stream, of.row0 = drop.p, drop.seed, drop.stream, drop.row0
            struct.drop = of
            self.keep.append(of)
        self.keep.append(struct)
        return struct

    def lora_forward(  # type: ignore[override]
        self, x: Array, W: Array, bias: Any = None, lora: Any = None, drop: Any = None, **more: Any
    ) -> tuple[Array, Array | None]:
        x, W = np.ascontiguousarray(x), np.ascontiguousarray(W)
        bias = None if bias is None else np.ascontiguousarray(bias)
        y = np.zeros((len(x), len(W)), np.float32)
        h = None if lora is None else np.zeros((len(x), lora.rank), np.float32)
        self.lib.pylora_ref_lora_forward(
            self._mat(x), self._mat(W), self._at(bias, "float *"), self._lora(lora, drop),
            self.ffi.NULL, self._mat(y), self._mat(h),
        )  # fmt: skip
        self.keep.clear()
        return y, h

    def lora_backward(
        self, dy: Array, x: Any, h: Any, W: Any, lora: Any = None, drop: Any = None, **more: Any
    ) -> tuple[Any, Any, Any]:
        dy, x, W = (np.ascontiguousarray(a) for a in (dy, x, W))
        dx, dA, dB = np.zeros_like(x), None, None
        if lora is not None:
            dA, dB = np.zeros(lora.A.shape, np.float32), np.zeros(lora.B.shape, np.float32)
            h = np.ascontiguousarray(h)
        self.lib.pylora_ref_lora_backward(
            self._mat(dy), self._mat(x), self._mat(h), self._mat(W), self._lora(lora, drop),
            self._mat(dx), 0, self._mat(dA), self._mat(dB),
        )  # fmt: skip
        self.keep.clear()
        return dx, dA, dB

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]:
        W, (d, k), code = np.ascontiguousarray(W), W.shape, {"f32": 0, "bf16": 1, "f16": 2}[dtype]
        out, position = np.zeros_like(W), np.zeros(W.size + 1, np.int64)
        bits = np.zeros(W.size + 1, np.uint32)
        n = self.lib.pylora_ref_merge(
            code, d, k, self._at(W, "void *"), k, self._lora(lora), self._at(out, "void *"), k,
            self._at(position, "int64_t *"), self._at(bits, "uint32_t *"),
        )  # fmt: skip
        self.keep.clear()
        return out, Residue(position[:n].copy(), bits[:n].copy())

    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array:
        W, (d, k) = np.ascontiguousarray(merged), merged.shape
        out, code = np.zeros_like(W), {"f32": 0, "bf16": 1, "f16": 2}[dtype]
        self.lib.pylora_ref_unmerge(
            code, d, k, self._at(W, "void *"), k, self._lora(lora), len(residue.position),
            self._at(residue.position, "int64_t *"), self._at(residue.bits, "uint32_t *"),
            self._at(out, "void *"), k,
        )  # fmt: skip
        self.keep.clear()
        return out

    def rope(  # type: ignore[override]
        self, x: Array, cos: Array, sin: Array, position: Array, head_dim: int,
        layout: str = "half", inverse: bool = False, **more: Any,
    ) -> Array:  # fmt: skip
        x, cos, sin = (np.ascontiguousarray(a) for a in (x, cos, sin))
        position = np.ascontiguousarray(position, np.int64)
        y = np.zeros_like(x)
        self.lib.pylora_ref_rope(
            self._mat(x), self._mat(cos), self._mat(sin), self._at(position, "int64_t *"),
            head_dim, int(layout != "half"), int(inverse), self._mat(y),
        )  # fmt: skip
        self.keep.clear()
        return y

    def _sequences(self, seqs: Any, attn: Any) -> tuple[Any, Any]:
        s, a = self.ffi.new("pylora_seqs *"), self.ffi.new("pylora_attn *")
        s.n = len(seqs.k_start)
        for name in ("q_start", "k_start", "k_len"):
            array = np.ascontiguousarray(getattr(seqs, name), np.int64)
            setattr(s, name, self._at(array, "int64_t *"))
        a.heads, a.kv_heads, a.head_dim = attn.heads, attn.kv_heads, attn.head_dim
        a.window, a.scale = attn.window, attn.scale
        return s, a

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Any, attn: Any, dtype: Any = None
    ) -> tuple[Array, Array]:
        q, k, v = (np.ascontiguousarray(a) for a in (q, k, v))
        o, lse = np.zeros_like(q), np.zeros((len(q), attn.heads), np.float32)
        self.lib.pylora_ref_attention_forward(
            *map(self._mat, (q, k, v)), *self._sequences(seqs, attn), *map(self._mat, (o, lse))
        )
        self.keep.clear()
        return o, lse

    def attention_backward(
        self, do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, seqs: Any, attn: Any,
        dtype: Any = None,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        given = [np.ascontiguousarray(a) for a in (do, q, k, v, o, lse)]
        dq, dk, dv = (np.zeros_like(a) for a in given[1:4])
        self.lib.pylora_ref_attention_backward(
            *map(self._mat, given), *self._sequences(seqs, attn), *map(self._mat, (dq, dk, dv))
        )
        self.keep.clear()
        return dq, dk, dv

"""tools/cuda_code.py finds what is wrong in listings of NVIDIA's tools, here written by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

USAGE = """
 Function pylora_attention_forward_bf16_64:
  REG:96 STACK:0 SHARED:1152 LOCAL:0 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function pylora_sum:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
\t\tFunction : pylora_attention_forward_bf16_64
        /*0000*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;      /* 0x000000000005fae */
                                                                            /* 0x000fe20000000f00 */
        /*0010*/              @!P0 LDSM.16.M88.4 R8, [R4] ;                 /* 0x00000000000808 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    /* 0x0000000c0804723c */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R14, R4 ;    /* 0x0000000c0804723c */
\t\tFunction : pylora_sum
        /*0000*/                   FADD R4, R8, R12 ;                       /* 0x0000000c0804723c */
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_code", ROOT / "tools" / "cuda_code.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cuda_code", module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_tool", lambda name: name)
    attention = r"pylora_attention_forward_b?f16\w+"
    claims = [
        (attention, module.BF16, "products of bfloat16"),
        (attention, r"LDGSTS\b.*", "asynchronous copies"),
        (attention, r"LDSM\b.*", "loads of matrices"),
    ]
    monkeypatch.setattr(module, "CLAIMS", claims)
    return module


def found(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, usage: str = USAGE, sass: str = SASS
) -> list[str]:
    texts = {"-res-usage": usage, "-sass": sass}
    monkeypatch.setattr(tool, "dump", lambda name, option, *rest: texts[option])
    return tool.complaints("sm_90", tool.read_library(Path("library"), "sm_90"))


def test_a_listing_is_read(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(tool, monkeypatch) == []
    kernel = tool.read_library(Path("library"), "sm_90")["pylora_attention_forward_bf16_64"]
    assert (kernel.registers, kernel.stack, kernel.shared) == (96, 0, 1152)
    assert kernel.count("HMMA.*") == 2 and kernel.count(r"LDSM\b.*") == 1


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("REG:32 STACK:0", "REG:32 STACK:8", "pylora_sum (sm_90) keeps 8 bytes in local memory"),
        ("FADD R4, R8", "STL [R1+0x4], R8", "pylora_sum (sm_90) keeps 0 bytes in local memory"),
        ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "has no products of bfloat16"),
        ("HMMA.16816.F32.BF16", "FFMA", "has no products of bfloat16"),
        ("LDSM.16.M88.4", "LDS.128", "has no loads of matrices"),
        ("LDGSTS.E.BYPASS.128", "STS.128", "has no asynchronous copies"),
        ("/*0000*/                   FADD", "", "pylora_sum (sm_90) has no code"),
        ("attention_forward_bf16_64", "attention_forward", "no kernel of sm_90 is named"),
    ],
)
def test_what_is_wrong_is_told(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, old: str, new: str, complaint: str
) -> None:
    assert old in USAGE + SASS
    wrong = found(tool, monkeypatch, USAGE.replace(old, new), SASS.replace(old, new))
    assert any(complaint in text for text in wrong), wrong

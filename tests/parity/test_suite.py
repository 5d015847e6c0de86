"""The suite's answers against transformers and PEFT in float64, and llama.cpp on its GGUF files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from pylora.conformance.suite import adapters, answers, bases, cases, forms

SEED = 11
# What a family computes otherwise shows in these; every rule is asked of one family.
ELSEWHERE = ("all-linear", "embedding", "head", "bias-all", "dora")
# transformers takes norms, softmax and rotation in float32 in a model of float64.
ALMOST_FLOAT64 = 2e-3


def said_by(model: Any) -> answers.Answer:
    said, then = [], []
    for ids in answers.PROMPTS:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
        logs = answers.log_softmax(logits)
        said.append(logs[np.arange(len(ids) - 1), list(ids[1:])])
        then.append(logs[-1])
    return answers.Answer(tuple(said), tuple(then))


def close(one: answers.Answer, other: answers.Answer, where: str) -> None:
    off = np.abs(one.flat() - other.flat()).max()
    assert off < ALMOST_FLOAT64, (where, off)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", bases.families())
def test_bases_and_adapters_are_those_of_transformers_and_peft(
    family: str, tied: bool, tmp_path: Path
) -> None:
    base = bases.make(family, tied, SEED)
    bases.write_hf(base, tmp_path / "base")

    def load() -> Any:
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()

    close(answers.answer(base, adapters.Meaning()), said_by(load()), "base")
    for case in cases.CASES:
        if not case.of(base) or (family != "llama" and case.name not in ELSEWHERE):
            continue
        adapter = adapters.draw(case, base, SEED)
        forms.write_peft(adapter, tmp_path / case.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(load(), str(tmp_path / case.name))
        right = answers.answer(base, adapter.meaning())
        close(right, said_by(model.double().eval()), case.name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", bases.families())
def test_gguf_bases_are_those_of_llama_cpp(family: str, tied: bool, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    base = bases.make(family, tied, SEED)
    if base.gguf_arch is None:
        pytest.skip("no architecture in GGUF")
    bases.write_gguf_model(base, tmp_path / "base.gguf")
    theirs = llama_cpp.Llama(
        str(tmp_path / "base.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False,
        type_k=0, type_v=0,
    )  # fmt: skip
    right = answers.answer(base, adapters.Meaning())
    for i, (text, ids) in enumerate(zip(answers.TEXTS, answers.PROMPTS)):
        assert theirs.tokenize(text.encode(), add_bos=False) == list(ids)
        theirs.reset()
        theirs.eval(list(ids))
        logs = answers.log_softmax(np.array(theirs.scores[: len(ids)], np.float64))
        off = np.abs(logs[np.arange(len(ids) - 1), list(ids[1:])] - right.prompt[i]).max()
        assert max(off, np.abs(logs[-1] - right.next[i]).max()) < ALMOST_FLOAT64
    theirs.close()

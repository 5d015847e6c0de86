"""Parity with transformers on real weights: SmolLM2-135M-Instruct (Q4_1) as its own GGUF loader
reads it; Gemma 3 270M and Qwen2.5-Coder-0.5B-Instruct (Q4_K_M) written as Hugging Face directories,
as its GGUF loader takes minutes for their vocabularies. That pylora reads each kind of block as the
`gguf` package does is tested in tests/formats."""

from __future__ import annotations

from pathlib import Path

import bounds
import numpy as np
import pytest
from bounds import close

from pylora.formats import open_checkpoint
from pylora.formats.hfdir import write_config, write_weights
from pylora.model.llama import Llama
from pylora.types import Seqs

tokenizer_peers = pytest.importorskip("tokenizer_peers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.slow]
TEXTS = (
    "The unit of information is the bit; 2 of them make 4 states.\nΨ",
    "def f(x: int) -> int:\n    return x ** 2 if x > 0 else -x  # gerade\n",
)


@pytest.fixture(params=tokenizer_peers.MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = tokenizer_peers.MODELS[request.param]
    if not file.is_file():
        pytest.skip(f"no {file}; tools/tokenizer_parity.py --fetch gets it")
    return file


def test_tokens_and_logits(path: Path, tmp_path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        own = checkpoint.tokenizer()
        texts = [own.encode(text, bos=own.add_bos) for text in TEXTS]
        model = Llama.from_checkpoint(checkpoint)
        if checkpoint.config.model_type == "llama":
            source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            for text, ids in zip(TEXTS, texts):
                assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            specs = {name: (checkpoint.shape(name), "f32") for name in checkpoint.names()}
            write_config(tmp_path, checkpoint.config, specs)
            write_weights(tmp_path, specs, checkpoint.load)
            source = {"pretrained_model_name_or_path": tmp_path}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    # Both texts as one batch here, each by itself there.
    seqs = Seqs.of([len(ids) for ids in texts])
    logits = model.ops.to_numpy(model.forward(np.concatenate(texts), seqs)[0])
    c = model.config
    layer = 8 * c.hidden_size + c.intermediate_size + c.head_dim + max(map(len, texts))
    limit = 2 * bounds.chain_random(c.num_hidden_layers * layer + 2 * c.hidden_size)
    at = 0
    for ids in texts:
        with torch.no_grad():
            want = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
        close(logits[at : at + len(ids)], want, limit, "logits")
        at += len(ids)

"""Parity with transformers' own GGUF loader on real weights: SmolLM2-135M-Instruct, Q4_1."""

from __future__ import annotations

import bounds
import numpy as np
import pytest
from bounds import close

from pylora.formats import open_checkpoint
from pylora.model.llama import Llama
from pylora.types import Seqs

small_models = pytest.importorskip("small_models")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(not small_models.REAL.is_file(), reason="the GGUF file is not there"),
]
TEXT = "The unit of information is the bit; 2 of them make 4 states.\nΨ"


def test_tokens_and_logits() -> None:
    path = small_models.REAL
    names = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**names)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval()
    with open_checkpoint(path) as checkpoint:
        ids = checkpoint.tokenizer().encode(TEXT)
        model = Llama.from_checkpoint(checkpoint)
    assert ids == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    logits, _ = model.forward(np.array(ids), Seqs.of([len(ids)]))
    c = model.config
    layer = 8 * c.hidden_size + c.intermediate_size + c.head_dim + len(ids)
    limit = 2 * bounds.chain_random(c.num_hidden_layers * layer + 2 * c.hidden_size)
    close(model.ops.to_numpy(logits), want, limit, "logits")

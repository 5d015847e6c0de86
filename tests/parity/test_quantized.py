"""Quantized checkpoints beside the programs that write them: bitsandbytes through transformers,
transformers' FP8, compressed-tensors; and an adapter on a base in NF4 beside PEFT (QLoRA)."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
from quantized_models import KINDS, SMALL, write_quantized

from pylora.adapters.adapter import Adapter
from pylora.adapters.peft import tensor_names
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors
from pylora.merging.merge import merge_checkpoint
from pylora.model.llama import Llama
from pylora.types import Seqs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# Rows of whole blocks of 64, or no multiple of 32: bitsandbytes' AVX-512 kernel takes a neighbour's
# scale where a row ends in the middle of a block.
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 128, "intermediate_size": 136, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# Whole blocks of 64: transformers reads no others.
EVEN = dataclasses.replace(
    SMALL, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {"pad_token_id": 0}),  # q, k and v in one, gate and up in one
    "gpt2": (
        "GPT2",
        {"n_embd": 128, "n_head": 4, "n_layer": 1, "n_positions": 64, "vocab_size": 67},
    ),  # [in, out]
}
bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def bits(x: np.ndarray) -> np.ndarray:
    """What is compared. 0 is -0, since bitsandbytes' own kernels differ in the sign of FP4's."""
    return (np.ascontiguousarray(x, np.float32) + np.float32(0)).view(np.uint32)


def quantize(kind: str, where: Path, dtype: str = "bfloat16", **how: Any) -> Any:
    """Quantizes a random model with bitsandbytes, writes it, and gives what transformers loads."""
    name, more = FAMILIES[kind]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**({} if kind == "gpt2" else SIZES), **more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(where / "plain")
    settings = transformers.BitsAndBytesConfig(**how)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(
        where / "plain",
        quantization_config=settings,
        dtype=getattr(torch, dtype),
        device_map="cpu",
    ).save_pretrained(where / "quantized")
    return load(where / "quantized", device_map="cpu")


DOUBLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@bnb
@pytest.mark.parametrize(
    ("kind", "dtype", "how"),
    [
        ("llama", "bfloat16", DOUBLE),
        ("llama", "float32", DOUBLE),
        ("llama", "float16", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("llama", "bfloat16", {**DOUBLE, "bnb_4bit_quant_storage": "bfloat16"}),
        (
            "llama",
            "bfloat16",
            {**DOUBLE, "llm_int8_skip_modules": ["model.layers.0.self_attn", "up_proj"]},
        ),
        ("llama", "float16", {"load_in_8bit": True}),
        ("phi3", "bfloat16", DOUBLE),
        ("gpt2", "bfloat16", DOUBLE),
        ("gpt2", "float16", {"load_in_8bit": True}),
    ],
    ids=str,
)  # fmt: skip
def test_bitsandbytes_through_transformers(
    tmp_path: Path, kind: str, dtype: str, how: dict[str, Any]
) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    theirs = quantize(kind, tmp_path, dtype, **how)
    modules = dict(theirs.named_modules())
    with open_checkpoint(tmp_path / "quantized") as ours:
        seen = 0
        for name in ours.names():
            path, _, part = name.rpartition(".")
            module = modules[path]
            want = getattr(module, part)
            if ours.dequantizes(name):
                seen += 1
                want = dequantize_bnb_weight(want, getattr(module, "state", None))
            elif type(module).__name__ == "Conv1D":
                want = want.T if want.ndim == 2 else want
            want = want.detach().float().numpy()
            assert np.array_equal(bits(ours.load(name)), bits(want)), name
        each = {"llama": 7, "phi3": 4, "gpt2": 4}[kind]
        # Without a word on it the head stays as it is; a list without it has it quantized, too.
        assert seen == (each if "llm_int8_skip_modules" not in how else each - 5 + 1)


@bnb
def test_an_adapter_on_nf4_computes_what_pefts_does(tmp_path: Path, ops: Any) -> None:
    """QLoRA: logits, loss and gradients on the same dequantized weights."""
    theirs = quantize("llama", tmp_path, "float32", **DOUBLE).dequantize().float().eval()
    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = peft.get_peft_model(theirs, peft.LoraConfig(**lora)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, SIZES["vocab_size"], (1, 11))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    theirs_of = {
        n.replace(".default", ""): p.grad.numpy()
        for n, p in model.named_parameters()
        if p.grad is not None and p.requires_grad
    }
    limit = 6 * bounds.chain_random(10 * 128 + 136)
    with open_checkpoint(tmp_path / "quantized") as checkpoint:
        adapter = Adapter.load(tmp_path / "adapter", checkpoint.config)
        mine = Llama.from_checkpoint(checkpoint, backend=ops)
    mine.attach(adapter)
    tokens, seqs = ids.numpy().reshape(-1), Seqs.of((11,))
    logits, _ = mine.forward(tokens, seqs)
    bounds.close(ops.to_numpy(logits), out.logits.detach().numpy()[0], limit, "logits")
    nll, found = mine.loss(tokens, np.append(tokens[1:], -100), seqs)
    bounds.close(nll.sum() / 10, float(out.loss), limit, "loss")
    assert found is not None and set(theirs_of) == set(tensor_names(adapter.plan))
    for key, (path, field, _) in tensor_names(adapter.plan).items():
        bounds.close(ops.to_numpy(getattr(found[path], field)), theirs_of[key], limit, key)


@bnb
def test_a_merged_nf4_model_is_a_plain_one(tmp_path: Path) -> None:
    theirs = quantize("llama", tmp_path, "bfloat16", **DOUBLE)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "quantized", tmp_path / "adapter", tmp_path / "merged")
    assert any("not quantized" in note and "bf16" in note for note in report.notes)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.bfloat16
    weights = theirs.dequantize().state_dict()
    for name, tensor in merged.state_dict().items():
        if "q_proj" not in name:
            assert torch.equal(tensor, weights[plain_name(name, weights)].bfloat16()), name


def plain_name(name: str, weights: Any) -> str:
    """What PEFT, which wraps modules in place, calls a tensor now."""
    return name if name in weights else name.replace(".weight", ".base_layer.weight")


@pytest.mark.parametrize("kind", ["fp8-blocks", "fp8-tensor"])
def test_fp8_through_transformers(tmp_path: Path, kind: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    write_quantized(tmp_path, kind, EVEN)
    file = SafeTensors(tmp_path / "model.safetensors")
    theirs = Fp8Dequantize(None)
    with open_checkpoint(tmp_path) as ours:
        names = [name for name in ours.names() if ours.dequantizes(name)]
        assert len(names) == 7
        for name in names:
            raw = torch.from_numpy(file.bytes_of(name).copy()).reshape(file.shape(name))
            scale = torch.from_numpy(file.view(f"{name}_scale_inv").copy())
            want = theirs._dequantize_one(raw.view(torch.float8_e4m3fn), scale, torch.bfloat16)
            assert np.array_equal(bits(ours.load(name)), bits(want.float().numpy())), name


@pytest.mark.parametrize(
    "kind", [k for k, (c, _) in KINDS.items() if c["quant_method"] == "compressed-tensors"]
)
def test_compressed_tensors_own_decompression(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    write_quantized(tmp_path, kind)
    config = KINDS[kind][0]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    file = SafeTensors(tmp_path / "model.safetensors")
    zero = any(name.endswith("weight_zero_point") for name in file.tensors)
    scheme.weights.symmetric = not zero
    with open_checkpoint(tmp_path) as ours:
        for name in [n for n in ours.names() if ours.dequantizes(n)]:
            state = {
                key.rpartition(".")[2]: tensor_of(file, key)
                for key in file.tensors
                if key.startswith(name)
            }
            want = compressor.decompress(state, scheme)["weight"]
            assert want.dtype == torch.bfloat16
            assert np.array_equal(bits(ours.load(name)), bits(want.float().numpy())), name


def tensor_of(file: SafeTensors, name: str) -> Any:
    """A tensor of a file as PyTorch has it."""
    tensor = torch.from_numpy(np.array(file.view(name)))
    return tensor.view(torch.bfloat16) if file.dtype(name) == "bf16" else tensor

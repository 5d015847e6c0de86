"""PEFT -> GGUF -> PEFT and PEFT -> MLX -> PEFT: the same settings and the same bits, of every
family and every rule that ranks and scales have; and what a form cannot say, by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from travellers import FAMILIES, draw, model_of, rules

from pylora.adapters import gguf
from pylora.adapters.adapter import Adapter, parameters
from pylora.adapters.convert import form_for, read_adapter, write_adapter
from pylora.adapters.locate import form_of
from pylora.errors import ConfigError, PlanError, PyloraError, UnsupportedError
from pylora.formats.gguf_header import read_header
from pylora.formats.gguf_write import write_gguf
from pylora.formats.safetensors import SafeTensors, save
from pylora.model import families
from pylora.model.config import LlamaConfig
from pylora.types import LoRA

LLAMA = model_of("llama")


def same(one: Adapter, other: Adapter) -> None:
    assert one.config == other.config and one.plan == other.plan
    mine, theirs = parameters(one), parameters(other)
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].tobytes() == theirs[key].tobytes(), key
    assert one.digest() == other.digest()


def place(tmp_path: Path, form: str) -> Path:
    return tmp_path / ("a.gguf" if form == "gguf" else form)


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("model_type", families.ALL)
def test_there_and_back_are_the_same_bits(model_type: str, form: str, tmp_path: Path) -> None:
    if form == "gguf" and model_type not in FAMILIES:
        pytest.skip("llama.cpp has no such architecture")
    model = model_of(model_type)
    for i, (name, settings) in enumerate(rules(model).items()):
        was = draw(model, settings, i)
        there = tmp_path / str(i) / place(tmp_path, form).name
        write_adapter(there, was, model, form)
        assert form_of(there) == form
        got = read_adapter(there, model)
        same(was, got)
        first, back = tmp_path / str(i) / "first", tmp_path / str(i) / "back"
        was.save(first)
        write_adapter(back, got, model, "peft")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (first / file).read_bytes() == (back / file).read_bytes(), name


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_without_its_settings_it_is_the_same_update(form: str, tmp_path: Path) -> None:
    """As if another program had written it: ranks and scales by the form's own rules."""
    for i, (name, settings) in enumerate(rules(LLAMA).items()):
        was, there = draw(LLAMA, settings, i), tmp_path / str(i) / place(tmp_path, form).name
        write_adapter(there, was, LLAMA, form)
        forget(there, form)
        if form == "mlx" and name in ("some layers", "one module"):
            continue  # its names stand for modules that have no tensors: an error, see below
        got = read_adapter(there, LLAMA)
        assert list(got) == list(was), name
        for path in was:
            mine, theirs = was[path], got[path]
            delta = mine.scale * (mine.B.astype(float) @ mine.A)
            off = theirs.scale * (theirs.B.astype(float) @ theirs.A) - delta
            # the scale in float32 (GGUF), and each number of B rounded once
            size = abs(mine.scale) * (abs(mine.B.astype(float)) @ abs(mine.A))
            assert (abs(off) <= 2.0**-22 * size).all(), (name, path)


def forget(there: Path, form: str) -> None:
    if form == "mlx":
        file = there / "adapter_config.json"
        settings = json.loads(file.read_text())
        del settings["pylora"]
        file.write_text(json.dumps(settings))
        return
    header = read_header(there)
    kept = {k: v for k, v in header.metadata.items() if not k.startswith("pylora.")}
    specs = {n: (t.kind, t.shape) for n, t in header.tensors.items()}
    rows = {n: header.rows(n).copy() for n in specs}
    write_gguf(there, kept, specs, rows.__getitem__)


def test_powers_of_two_are_exact_and_other_factors_are_named() -> None:
    from pylora.adapters.carry import carry

    entries = draw(LLAMA, rules(LLAMA)["ranks"]).plan.entries
    assert set(carry(entries, over_rank=True).factors.values()) == {1.0}
    assert len(carry(entries, over_rank=False).inexact) == sum(e.r != 7 for e in entries)
    eights = draw(LLAMA, rules(LLAMA)["alphas"] | {"alpha_pattern": {"q_proj": 2}}).plan.entries
    assert not carry(eights, over_rank=True).inexact


def test_an_edit_of_the_tensors_counts_for_more_than_the_settings(tmp_path: Path) -> None:
    was, file = draw(LLAMA, rules(LLAMA)["rslora, ranks and alphas"]), tmp_path / "a.gguf"
    write_adapter(file, was, LLAMA, "gguf")
    header = read_header(file)
    specs = {n: (t.kind, t.shape) for n, t in header.tensors.items()}
    rows = {n: header.rows(n).copy() for n in specs}
    name = "blk.0.attn_v.weight.lora_b"
    rows[name].view("<f4")[0, 0] += 1
    write_gguf(file, header.metadata, specs, rows.__getitem__)
    got = read_adapter(file, LLAMA)
    assert got.config != was.config
    assert got["model.layers.0.self_attn.v_proj"].B[0, 0] == rows[name].view("<f4")[0, 0]


# ---- what cannot be said -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_biases_are_refused_by_name(form: str, tmp_path: Path) -> None:
    was = draw(LLAMA, rules(LLAMA)["bias of B that is zero"])
    path = next(iter(was))
    loras = dict(was)
    lora = loras[path]
    loras[path] = LoRA(lora.A, lora.B, lora.scale, bias=np.ones_like(lora.bias))
    with pytest.raises(UnsupportedError, match=f"{path}.*bias"):
        write_adapter(place(tmp_path, form), Adapter(was.config, was.plan, loras), LLAMA, form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_biases_of_the_base_are_refused_by_name(form: str, tmp_path: Path) -> None:
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.adapters.plan import resolve

    model = model_of("qwen2")
    config = LoraConfig(target_modules=("q_proj",), bias="lora_only")
    base = lambda name: np.zeros(model.tensors()[name], np.float32)
    was = Adapter.init(resolve(config, model.modules()), config, base=base)
    with pytest.raises(UnsupportedError, match="layers.0.self_attn.q_proj.*were trained"):
        write_adapter(place(tmp_path, form), was, model, form)


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_one_of_two_tied_embeddings_is_refused(form: str, target: str, tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    was = draw(model, {"r": 2, "lora_alpha": 2, "target_modules": [target]})
    with pytest.raises(UnsupportedError, match=f"{target}.*output layer, too"):
        write_adapter(place(tmp_path, form), was, model, form)


def test_a_family_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    model = model_of("ministral")
    was = draw(model, rules(model)["plain"])
    with pytest.raises(UnsupportedError, match="no architecture for ministral"):
        write_adapter(tmp_path / "a.gguf", was, model, "gguf")


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_a_product_that_float32_cannot_hold_is_refused(form: str, tmp_path: Path) -> None:
    was = draw(LLAMA, rules(LLAMA)["alphas"])
    path = next(p for p in was if p.endswith("down_proj"))
    was[path].B[0, 0] = 3e38
    with pytest.raises(UnsupportedError, match=f"{path}.*float32 cannot hold"):
        write_adapter(place(tmp_path, form), was, LLAMA, form)


def test_the_form_follows_from_the_name() -> None:
    assert form_for(Path("x.gguf"), "peft") == "gguf" and form_for(Path("x"), "gguf") == "peft"
    assert form_for(Path("x"), "peft", "mlx") == "mlx"
    for out, source, form in (("x", "peft", None), ("x", "peft", "gguf"), ("x.gguf", "peft", "mlx"),
                              ("x", "peft", "onnx")):  # fmt: skip
        with pytest.raises(ConfigError):
            form_for(Path(out), source, form)


# ---- tensors without a home, modules without a tensor --------------------------------------------


def rewritten(file: Path, change: object, metadata: object = lambda m: m) -> None:
    header = read_header(file)
    arrays = {n: header.rows(n).view("<f4").reshape(t.shape).copy()
              for n, t in header.tensors.items()}  # fmt: skip
    change(arrays)
    specs = {n: ("F32", a.shape) for n, a in arrays.items()}
    write_gguf(file, metadata(dict(header.metadata)), specs, arrays.__getitem__)


A, B = "blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b"
GGUF_WRONG = {
    "no other half": (lambda t: t.pop(B), "without its other half"),
    "a home that is none": (lambda t: t.__setitem__("blk.9.ffn_up.weight.lora_a", t[A]), "blk.9"),
    "no half at all": (lambda t: (t.pop(A), t.pop(B)), "no tensors of model.layers.1.mlp.up_proj"),
    "a norm": (lambda t: t.__setitem__("blk.0.attn_norm.weight", t[A][0]), "attn_norm"),
    "a shape": (lambda t: t.__setitem__(A, t[A][:, :32].copy()), "model.layers.1.mlp.up_proj"),
    "not a number": (lambda t: t[A].__setitem__((0, 0), np.nan), "NaN"),
}


@pytest.mark.parametrize("wrong", GGUF_WRONG)
def test_what_is_wrong_in_a_gguf_adapter_is_named(wrong: str, tmp_path: Path) -> None:
    change, said = GGUF_WRONG[wrong]
    file = tmp_path / "a.gguf"
    write_adapter(file, draw(LLAMA, rules(LLAMA)["plain"]), LLAMA, "gguf")
    rewritten(file, change)
    with pytest.raises(Exception, match=said) as caught:
        read_adapter(file, LLAMA)
    assert type(caught.value).__name__ in ("PlanError", "FileFormatError")


META_WRONG = {
    "another architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2'"),
    "a control vector": ({"adapter.type": "control"}, "adapter.type"),
    "alpha is text": ({"adapter.lora.alpha": "8"}, "not a number"),
    "alpha is infinite": ({"adapter.lora.alpha": float("inf")}, "positive number"),
    "alpha is negative": ({"adapter.lora.alpha": -1.0}, "positive number"),
    "aLoRA": ({"adapter.alora.invocation_tokens": np.array([3], np.uint32)}, "aLoRA"),
}


@pytest.mark.parametrize("wrong", META_WRONG)
def test_what_is_wrong_in_its_metadata_is_named(wrong: str, tmp_path: Path) -> None:
    values, said = META_WRONG[wrong]
    file = tmp_path / "a.gguf"
    write_adapter(file, draw(LLAMA, rules(LLAMA)["plain"]), LLAMA, "gguf")
    rewritten(file, lambda t: None, lambda m: m | values)
    with pytest.raises((PlanError, UnsupportedError, gguf.FileFormatError), match=said):
        read_adapter(file, LLAMA)


def mlx_folder(tmp_path: Path, name: str = "plain") -> tuple[Path, dict, dict]:
    folder = tmp_path / "mlx"
    write_adapter(folder, draw(LLAMA, rules(LLAMA)[name]), LLAMA, "mlx")
    with SafeTensors(folder / "adapters.safetensors") as file:
        tensors = {key: file.load(key).copy() for key in file.tensors}
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.pop("pylora")
    return folder, settings, tensors


def put(folder: Path, settings: dict, tensors: dict) -> None:
    save(folder / "adapters.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))


KEY = "model.layers.1.mlp.up_proj"
MLX_WRONG = {
    "no half": (lambda s, t: t.pop(f"{KEY}.lora_b"), f"{KEY} lacks lora_b"),
    "no module": (lambda s, t: (t.pop(f"{KEY}.lora_a"), t.pop(f"{KEY}.lora_b")), f"{KEY} lacks"),
    "more": (
        lambda s, t: t.__setitem__("model.layers.0.mlp.x.lora_a", t[f"{KEY}.lora_a"]),
        "adapts x",
    ),
    "a stray": (lambda s, t: t.__setitem__("model.norm.weight", np.ones(4, "f4")), "model.norm"),
    "unnamed": (lambda s, t: s["lora_parameters"]["keys"].remove("mlp.up_proj"), "does not name"),
    "a shape": (lambda s, t: t.__setitem__(f"{KEY}.lora_a", t[f"{KEY}.lora_a"][:9]), KEY),
    "infinite": (lambda s, t: t[f"{KEY}.lora_a"].__setitem__((0, 0), np.inf), "NaN or infinity"),
    "an integer": (lambda s, t: t.__setitem__(f"{KEY}.lora_a", np.ones((64, 4), "i4")), "I32"),
    "dora": (lambda s, t: s.__setitem__("fine_tune_type", "dora"), "lacks m"),
    "a magnitude": (
        lambda s, t: t.__setitem__(f"{KEY}.m", np.ones(4, "f4")),
        "m' is none of",
    ),
    "full": (lambda s, t: s.__setitem__("fine_tune_type", "full"), "whole weights"),
    "no scale": (lambda s, t: s["lora_parameters"].pop("scale"), "scale"),
    "a scale": (lambda s, t: s["lora_parameters"].__setitem__("scale", "2"), "scale"),
    "a rank": (lambda s, t: s["lora_parameters"].__setitem__("rank", 0), "rank"),
    "layers": (lambda s, t: s.__setitem__("num_layers", 99), "num_layers is 99"),
    "layers that are none": (lambda s, t: s.__setitem__("num_layers", "all"), "num_layers"),
    "keys": (lambda s, t: s["lora_parameters"]["keys"].append("mlp.gate"), "mlp.gate"),
    "PEFT's": (lambda s, t: s.pop("lora_parameters"), "lora_parameters is missing"),
}


@pytest.mark.parametrize("wrong", MLX_WRONG)
def test_what_is_wrong_in_an_mlx_adapter_is_named(wrong: str, tmp_path: Path) -> None:
    change, said = MLX_WRONG[wrong]
    folder, settings, tensors = mlx_folder(tmp_path)
    put(folder, settings, tensors)
    read_adapter(folder, LLAMA)  # as it is, it is read
    change(settings, tensors)
    put(folder, settings, tensors)
    with pytest.raises((PlanError, UnsupportedError, gguf.FileFormatError), match=said):
        read_adapter(folder, LLAMA)


def test_a_file_as_mlx_writes_it_is_read(tmp_path: Path) -> None:
    """mlx.core.save_safetensors writes null for the metadata that it has not."""
    folder, settings, tensors = mlx_folder(tmp_path)
    put(folder, settings, tensors)
    file = folder / "adapters.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": None, **json.loads(data[8 : 8 + length])}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    was = draw(LLAMA, rules(LLAMA)["plain"])
    got = read_adapter(folder, LLAMA)
    assert all(got[path].B.tobytes() == was[path].B.tobytes() for path in was)


def test_a_module_of_kept_settings_without_tensors_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    write_adapter(folder, draw(LLAMA, rules(LLAMA)["plain"]), LLAMA, "mlx")
    with SafeTensors(folder / "adapters.safetensors") as file:
        tensors = {k: file.load(k).copy() for k in file.tensors if not k.startswith(KEY)}
    save(folder / "adapters.safetensors", tensors)
    with pytest.raises(PlanError, match=f"{KEY} lacks"):
        read_adapter(folder, LLAMA)


def test_an_adapter_of_another_model_is_told_as_such(tmp_path: Path) -> None:
    other = LlamaConfig.tiny(num_hidden_layers=3, hidden_size=32, head_dim=8)
    for form in ("gguf", "mlx"):
        there = place(tmp_path, form)
        write_adapter(there, draw(LLAMA, rules(LLAMA)["plain"]), LLAMA, form)
        forget(there, form)
        with pytest.raises(PlanError, match="another base model: .*hidden size is 64"):
            read_adapter(there, other)


def test_experts_whose_gate_and_up_differ_are_read(tmp_path: Path) -> None:
    """mlx-lm and others train an A for each; PEFT's one parameter gets the ranks of both."""
    model = model_of("mixtral")
    was, file = draw(model, rules(model)["experts"]), tmp_path / "a.gguf"
    write_adapter(file, was, model, "gguf")
    other = np.random.default_rng(5).standard_normal((4, 3, 64)).astype(np.float32)
    rewritten(file, lambda t: t.__setitem__("blk.0.ffn_up_exps.weight.lora_a", other))
    got = read_adapter(file, model)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    mine, theirs = was[path], got[path]
    assert theirs.A.shape == (4 * 6, 64)
    wide_A, wide_B = theirs.A.reshape(4, 6, 64), theirs.B.reshape(-1, 6, 4)
    old_A, old_B = mine.A.reshape(4, 3, 64), mine.B.reshape(-1, 3, 4)
    half = mine.B.shape[0] // 2
    for e in range(4):
        delta = theirs.scale * (wide_B[:, :, e] @ wide_A[e])
        np.testing.assert_allclose(
            delta[:half], mine.scale * (old_B[:half, :, e] @ old_A[e]), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            delta[half:], mine.scale * (old_B[half:, :, e] @ other[e]), rtol=1e-5, atol=1e-5
        )


# ---- hostile files -------------------------------------------------------------------------------


def test_files_that_are_damaged_anywhere_are_refused_or_read(tmp_path: Path) -> None:
    """A hundred and fifty times each: bytes changed, cut off, or put in; never another error."""
    rng, model = np.random.default_rng(0), LlamaConfig.tiny(num_hidden_layers=1)
    was = draw(model, {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"],
                       "alpha_pattern": {"v_proj": 4}})  # fmt: skip
    names = ("adapters.safetensors", "adapter_config.json", "pylora_bits.safetensors")
    for form, name in (("gguf", "a.gguf"), *(("mlx", name) for name in names)):
        there = place(tmp_path, form)
        write_adapter(there, was, model, form)
        file = there if form == "gguf" else there / name
        whole = file.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            # mostly in the header, where each byte means something
            at = int(rng.integers(min(len(data), int(rng.choice([64, 900, len(data)])))))
            kind = rng.integers(3)
            if kind == 0:
                data[at] = int(rng.integers(256))
            elif kind == 1:
                del data[at:]
            else:
                data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8))
            file.write_bytes(data)
            try:
                read_adapter(there, model)
            except PyloraError:
                pass
        file.write_bytes(whole)

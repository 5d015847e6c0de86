"""Fuzzes what reads strangers' files: a PyloraError or a valid result, never anything else.

    python tests/fuzz/readers.py TARGET [--seconds 60]      (needs the package atheris)

Targets: records, gguf, safetensors, quantized, adapter, gguf_adapter, mlx, tokenizer, template,
pattern. Each begins from small valid files, made here. What atheris finds is written to the current
directory as crash-...; give it as an argument to run it again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pylora"]):
    from pylora.adapters.adapter import Adapter
    from pylora.adapters.convert import write_adapter
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.adapters.plan import resolve
    from pylora.errors import PyloraError
    from pylora.formats import open_checkpoint
    from pylora.formats.safetensors import SafeTensors
    from pylora.model.config import LlamaConfig
    from pylora.model.llama import random_weights
    from pylora.text.chat import render_chat
    from pylora.text.tokenizer import tokenizer_from_directory
    from pylora.training.fields import Fields
    from pylora.training.reading import read_records
    from pylora.training.records import interpret

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
FOLDER = Path(tempfile.mkdtemp(prefix="pylora-fuzz-"))
CONFIG = LlamaConfig.tiny(num_hidden_layers=1)
MODULES = CONFIG.modules()
BASE = random_weights(CONFIG)


def records(data: bytes) -> None:
    names = ("a.jsonl", "a.csv", "a.tsv", "a.parquet")
    file = FOLDER / names[data[0] % 4 if data else 0]
    file.write_bytes(data[1:])
    for where, record in read_records(file):
        interpret(record, where, Fields.parse(None))


def gguf(data: bytes) -> None:
    file = FOLDER / "a.gguf"
    file.write_bytes(data)
    with open_checkpoint(file) as checkpoint:
        for name in checkpoint.names()[:4]:
            checkpoint.load(name)
        checkpoint.tokenizer()


def safetensors(data: bytes) -> None:
    file = FOLDER / "a.safetensors"
    file.write_bytes(data)
    with SafeTensors(file) as opened:
        for name in opened.tensors:
            opened.load(name)


def quantized(data: bytes) -> None:
    """quantization_config up to the first line break, then the tensors."""
    from quantized_models import SMALL

    folder = FOLDER / "quantized"
    folder.mkdir(exist_ok=True)
    said, _, tensors = data.partition(b"\n")
    settings = json.dumps(SMALL.to_hf())[:-1].encode() + b', "quantization_config": ' + said + b"}"
    (folder / "config.json").write_bytes(settings)
    (folder / "model.safetensors").write_bytes(tensors)
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            checkpoint.load(name)


def adapter(data: bytes) -> None:
    """The settings up to the first line break, then the tensors."""
    folder = FOLDER / "adapter"
    folder.mkdir(exist_ok=True)
    settings, _, tensors = data.partition(b"\n")
    (folder / "adapter_config.json").write_bytes(settings)
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    Adapter.load(folder, CONFIG, base=BASE)


def gguf_adapter(data: bytes) -> None:
    file = FOLDER / "adapter.gguf"
    file.write_bytes(data)
    Adapter.load(file, CONFIG)


def mlx(data: bytes) -> None:
    """The settings up to the first line break, then the tensors."""
    folder = FOLDER / "mlx"
    folder.mkdir(exist_ok=True)
    settings, _, tensors = data.partition(b"\n")
    (folder / "adapter_config.json").write_bytes(settings)
    (folder / "adapters.safetensors").write_bytes(tensors)
    Adapter.load(folder, CONFIG)


def tokenizer(data: bytes) -> None:
    """tokenizer.json up to the first line break, then tokenizer_config.json."""
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    first, _, second = data.partition(b"\n")
    (folder / "tokenizer.json").write_bytes(first)
    (folder / "tokenizer_config.json").write_bytes(second)
    tokenizer_from_directory(folder).encode("a b")


def template(data: bytes) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    render_chat(data.decode("utf-8", "replace"), talk, add_generation_prompt=True)


def pattern(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    resolve(LoraConfig(target_modules=text or "x", rank_pattern={text: 2} if text else {}), MODULES)


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        records,
        gguf,
        safetensors,
        quantized,
        adapter,
        gguf_adapter,
        mlx,
        tokenizer,
        template,
        pattern,
    )
}


def seeds(name: str) -> Iterator[bytes]:
    """Small valid inputs of a target."""
    if name == "records":
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for record in (
            {"prompt": "a", "completion": "b"},
            {"messages": chat, "tools": [], "system": "s"},
            {"instruction": "a", "input": "", "output": "b"},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        ):
            yield b"\0" + json.dumps(record).encode()
            yield b"\0" + json.dumps([record]).encode()
        yield b"\1prompt,completion\na,b\n"
    elif name == "gguf":
        from small_models import write_gguf

        small = LlamaConfig.tiny(hidden_size=32, intermediate_size=32, head_dim=8)
        for kind in ("F32", "Q8_0"):
            write_gguf(FOLDER / "seed.gguf", small, kind)
            yield (FOLDER / "seed.gguf").read_bytes()
    elif name == "quantized":
        from quantized_models import KINDS, write_quantized

        for kind, (config, _) in KINDS.items():
            write_quantized(FOLDER / kind, kind)
            tensors = (FOLDER / kind / "model.safetensors").read_bytes()
            yield json.dumps(config).encode() + b"\n" + tensors
    elif name in ("safetensors", "adapter"):
        lora = LoraConfig(r=1, target_modules=["q_proj"])
        Adapter.init(resolve(lora, MODULES), lora).save(FOLDER / "seed")
        tensors = (FOLDER / "seed" / "adapter_model.safetensors").read_bytes()
        config = (FOLDER / "seed" / "adapter_config.json").read_text()
        line = json.dumps(json.loads(config)).encode()
        yield tensors if name == "safetensors" else line + b"\n" + tensors
    elif name in ("gguf_adapter", "mlx"):
        for alpha in (2, 3):  # of which one is folded by a factor that rounds
            lora = LoraConfig(
                r=1, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": alpha}
            )
            made = Adapter.init(resolve(lora, MODULES), lora)
            if name == "mlx":
                write_adapter(FOLDER / "mlx-seed", made, CONFIG, "mlx")
                line = json.loads((FOLDER / "mlx-seed" / "adapter_config.json").read_text())
                yield (
                    json.dumps(line).encode()
                    + b"\n"
                    + (FOLDER / "mlx-seed" / "adapters.safetensors").read_bytes()
                )
            else:
                write_adapter(FOLDER / "seed-adapter.gguf", made, CONFIG, "gguf")
                yield (FOLDER / "seed-adapter.gguf").read_bytes()
    elif name == "tokenizer":
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        made = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str()
        yield json.dumps(json.loads(made)).encode() + b'\n{"eos_token": "b"}'
    elif name == "template":
        yield b"{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
    else:
        yield from (rb".*\.(q|v)_proj", rb"(\w+\.)+(q_proj|v_proj)", b"q_proj", b"all-linear")


def main() -> None:
    name, *rest = sys.argv[1:] or ["records"]
    if name not in TARGETS:
        raise SystemExit(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    made = list(seeds(name))
    for i, seed in enumerate(made):
        (corpus / f"seed-{i}").write_bytes(seed)
    seconds = rest[rest.index("--seconds") + 1] if "--seconds" in rest else "60"
    again = [arg for arg in rest if Path(arg).is_file()]

    def one(data: bytes) -> None:
        try:
            TARGETS[name](data)
        except PyloraError:
            pass
        except MemoryError as error:
            raise AssertionError("memory was asked for before sizes were checked") from error

    options = [
        f"-max_len={max(65536, *map(len, made))}",
        "-rss_limit_mb=4096",
        "-timeout=20",
        f"-max_total_time={seconds}",
    ]
    atheris.Setup([sys.argv[0], *options, *(again or [str(corpus)])], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

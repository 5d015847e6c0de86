"""Adapters made here in other engines, and made there in pylora: how far logits are apart.

    python bench/travel.py MODEL FOLDER [--mlx PYTHON] [--llama DIR] [--text FILE]

MODEL is a GGUF file of Llama's architecture; FOLDER gets what is made on the way. --mlx names an
interpreter that has mlx-lm and --llama a checkout of llama.cpp (its convert_lora_to_gguf.py); what
is not given is left out of the table. Needs torch, transformers, PEFT and llama-cpp-python.

The bound of a row is that of tests/parity/test_travel.py: what rounding moves in this very model,
times SIGMAS. --text: perplexity of the merged and quantized files in llama.cpp, beside pylora's of
the same model with the adapter unmerged.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.convert import read_adapter, write_adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.check.gradient import SIGMAS
from pylora.check.rounding import Exact, Rounded
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_adapter
from pylora.merging.to_gguf import merge_to_gguf
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.types import LoRA

HERE = Path(__file__).resolve().parent
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RULES: dict[str, dict[str, Any]] = {
    "r 8, alpha 16": {"r": 8, "lora_alpha": 16},
    "ranks 8 and 12, alphas 16 and 10": {
        "r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 12}, "alpha_pattern": {"o_proj": 10},
    },
    "rsLoRA, ranks 8 and 5": {
        "r": 8, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"down_proj": 5},
    },
    "layers 3 and 17": {"r": 4, "lora_alpha": 4, "layers_to_transform": [3, 17]},
}  # fmt: skip
TYPES = ("f32", "q8_0", "q5_k_m", "q4_k_m", "q4_0")


def drawn(model: LlamaConfig, settings: dict[str, Any], seed: int) -> Adapter:
    """An adapter whose updates are about a tenth of what a layer computes."""
    config = LoraConfig(target_modules=NAMES, task_type="CAUSAL_LM", **settings)
    plan, rng, loras = resolve(config, model.modules()), np.random.default_rng(seed), {}
    for e in plan:
        A = rng.normal(0, e.k**-0.5, (e.r, e.k)).astype(np.float32)
        B = rng.normal(0, 0.05 / e.scale / e.r**0.5, (e.d, e.r)).astype(np.float32)
        loras[e.path] = LoRA(A, B, e.scale)
    return Adapter(config, plan, loras)


def prepare(model: Path, folder: Path) -> tuple[Path, Path]:
    """The model in float32, as a GGUF file and as a Hugging Face folder."""
    file, directory, nothing = (folder / name for name in ("base.gguf", "base", "nothing"))
    with open_checkpoint(model) as checkpoint:
        config = LoraConfig(r=1, target_modules=("q_proj",))
        zero = Adapter.init(resolve(config, checkpoint.config.modules()), config)
        zero.save(nothing)
        if not directory.exists():
            merge_adapter(checkpoint, zero, directory)
    if not file.exists():
        merge_to_gguf(model, nothing, file, "f32")
    return file, directory


def ours(file: Path, ids: np.ndarray, adapter: Adapter, ops: Any) -> np.ndarray:
    with open_checkpoint(file) as checkpoint:
        if isinstance(ops, str):
            net = Llama.from_checkpoint(checkpoint, backend=ops)
        else:
            net = Llama(
                checkpoint.config,
                lambda name: checkpoint.load(name).astype(np.float64),
                backend=ops,
            )
        wide = np.float32 if isinstance(ops, str) else np.float64
        net.attach(
            {
                path: dataclasses.replace(lora, A=lora.A.astype(wide), B=lora.B.astype(wide))
                for path, lora in adapter.items()
            }
        )
        return np.asarray(net.forward(ids)[0], np.float64)


def allowed(file: Path, ids: np.ndarray, adapter: Adapter, exact: np.ndarray) -> float:
    """Of the largest difference of a logit: SIGMAS standard deviations of what rounding moves."""
    moved = np.stack([ours(file, ids, adapter, Rounded(seed)) - exact for seed in range(2)])
    return float(SIGMAS * np.sqrt((moved**2).mean(axis=0)).max())


def in_llama(file: Path, ids: np.ndarray, adapter: Path | None) -> np.ndarray:
    import llama_cpp

    net = llama_cpp.Llama(
        str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, type_k=0, type_v=0,
        lora_path=None if adapter is None else str(adapter),
    )  # fmt: skip
    net.eval(ids.tolist())
    out = np.array(net.scores[: ids.size], np.float64)
    net.close()
    return out


def in_peft(directory: Path, ids: np.ndarray, adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    net = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = net(torch.tensor(ids[None])).logits[0]
    return np.asarray(logits.numpy(), np.float64)


def mlx(python: str, job: str, *arguments: Path) -> None:
    program = [python, HERE / "engine_mlx.py", job, *arguments]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def in_mlx(python: str, directory: Path, ids: np.ndarray, adapter: Path, folder: Path) -> Any:
    np.save(folder / "ids.npy", ids)
    mlx(python, "run", directory, adapter, folder / "ids.npy", folder / "mlx.npy")
    return np.load(folder / "mlx.npy").astype(np.float64)


def trained_by_peft(directory: Path, out: Path) -> None:
    """A fresh adapter of PEFT's, with a B that is not zero."""
    import torch
    from peft import LoraConfig as Theirs
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    settings = Theirs(
        r=8, lora_alpha=16, use_rslora=True, target_modules=list(NAMES),
        rank_pattern={"v_proj": 12}, alpha_pattern={"o_proj": 10},
    )  # fmt: skip
    net = get_peft_model(base, settings)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.01)
    net.save_pretrained(out)


def row(made: str, rule: str, engine: str, off: float, bound: float) -> None:
    mark = "" if off <= bound else "  TOO FAR"
    print(f"| {made} | {rule} | {engine} | {off:.1e} | {bound:.1e} |{mark}", flush=True)


def made_here(args: argparse.Namespace, file: Path, directory: Path, ids: np.ndarray) -> None:
    with open_checkpoint(file) as checkpoint:
        config = checkpoint.config
    for seed, (rule, settings) in enumerate(RULES.items()):
        adapter = drawn(config, settings, seed)
        places = {"peft": args.folder / f"peft-{seed}", "gguf": args.folder / f"{seed}.gguf",
                  "mlx": args.folder / f"mlx-{seed}"}  # fmt: skip
        for form, place in places.items():
            write_adapter(place, adapter, config, form)
            assert read_adapter(place, config).digest() == adapter.digest()
        exact = ours(file, ids, adapter, Exact())
        bound = allowed(file, ids, adapter, exact)
        got = {"pylora": ours(file, ids, adapter, "c"),
               "PEFT": in_peft(directory, ids, places["peft"]),
               "llama.cpp": in_llama(file, ids, places["gguf"])}  # fmt: skip
        if args.mlx:
            got["mlx-lm"] = in_mlx(args.mlx, directory, ids, places["mlx"], args.folder)
        for engine, logits in got.items():
            row("here", rule, engine, float(np.abs(logits - exact).max()), bound)


def made_there(args: argparse.Namespace, file: Path, directory: Path, ids: np.ndarray) -> None:
    with open_checkpoint(file) as checkpoint:
        config = checkpoint.config
    peft = args.folder / "theirs-peft"
    trained_by_peft(directory, peft)
    found = {"PEFT": (peft, in_peft(directory, ids, peft))}
    if args.llama:
        plain, out = args.folder / "peft-0", args.folder / "theirs.gguf"
        subprocess.run(
            [sys.executable, args.llama / "convert_lora_to_gguf.py", "--base", directory,
             "--outfile", out, plain],
            check=True, capture_output=True,
        )  # fmt: skip
        found["llama.cpp"] = out, in_llama(file, ids, out)
    if args.mlx:
        folder = args.folder / "theirs-mlx"
        np.save(args.folder / "ids.npy", ids)
        mlx(args.mlx, "train", directory, folder, args.folder / "ids.npy")
        found["mlx-lm"] = folder, in_mlx(args.mlx, directory, ids, folder, args.folder)
    for engine, (place, logits) in found.items():
        adapter = read_adapter(place, config)
        exact = ours(file, ids, adapter, Exact())
        bound = allowed(file, ids, adapter, exact)
        off = float(np.abs(ours(file, ids, adapter, "c") - logits).max())
        row(f"{engine}", f"r {adapter.config.r}", "pylora", off, 2 * bound)


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    wide = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    each = wide[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(wide).sum(axis=1))
    return float(np.exp(-each.mean()))


def merged(args: argparse.Namespace, model: Path, file: Path) -> None:
    """Perplexity of one text, and what each type leaves of the adapter's delta."""
    with open_checkpoint(model) as checkpoint:
        ids = np.array(checkpoint.tokenizer().encode(args.text.read_text("utf-8"))[:250])
        adapter = read_adapter(args.folder / "peft-0", checkpoint)
    print(f"| pylora, unmerged | | {perplexity(ours(file, ids, adapter, 'c'), ids):.4f} | |")
    for name in TYPES:
        out = args.folder / f"merged-{name}.gguf"
        report = merge_to_gguf(file, args.folder / "peft-0", out, name)
        kept = np.array([m.kept for m in report.modules])
        print(
            f"| {name} | {out.stat().st_size / 1e6:.0f} MB | "
            f"{perplexity(in_llama(out, ids, None), ids):.4f} | {100 * kept.mean():.1f} %, least "
            f"{100 * kept.min():.1f} % | {len(report.swallowed)} swallowed",
            flush=True,
        )
        out.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mlx", help="an interpreter that has mlx-lm")
    parser.add_argument("--llama", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file, directory = prepare(args.model, args.folder)
    ids = np.random.default_rng(0).integers(10, 40_000, 24)
    print("| made by | adapter | run in | largest difference | bound |\n|---|---|---|---|---|")
    made_here(args, file, directory, ids)
    made_there(args, file, directory, ids)
    if args.text:
        print("\n| type | size | perplexity | kept of the delta |\n|---|---|---|---|")
        merged(args, args.model, file)


if __name__ == "__main__":
    main()

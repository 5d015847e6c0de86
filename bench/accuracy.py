"""How exact each precision is: every operation, a model's logits, and a fine-tune of 200 steps.

    python bench/accuracy.py [--peer-python PYTHON] [--precisions fp32 bf16 ...] [--quick]
    python bench/accuracy.py --model gemma --only logits loss --answers 50 --seeds 2 ...

Everything is compared with float64 (the NumPy backend); the loss curves with strict float32's.
PyTorch + PEFT does the same work beside it where --peer-python has torch, peft and transformers.
llama.cpp's logits stand beside them where that interpreter has llama-cpp-python, too.
Takes about 12 minutes on two cores; --quick about 3. Writes bench/results/accuracy-<machine>-<date>
.json after every part (for another than SmolLM2: model-<name>-...); bench/report.py --docs and
bench/figures.py show it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import accuracy_logits
import accuracy_ops
import accuracy_train
from run import RESULTS, ROOT, head, save, say

from pylora.demo.fetch import MODELS

PEERS = ("fp32", "bf16")


class Peer:
    """PyTorch + PEFT in a process of its own; it takes its inputs from a folder."""

    def __init__(self, python: str | None, folder: Path) -> None:
        self.python, self.folder = python, folder

    def run(self, job: str, precision: str) -> dict[str, np.ndarray] | None:
        """The arrays that it computes, or None where there is no PyTorch + PEFT."""
        if self.python is None:
            return None
        out = self.folder / f"{job}-{precision}.npz"
        script = Path(__file__).resolve().parent / "accuracy_peft.py"
        done = subprocess.run(
            [self.python, "-W", "ignore", str(script), str(self.folder), job, precision, str(out)]
        )
        if done.returncode:
            say(f"  PEFT {precision} failed at {job}")
            return None
        with np.load(out) as file:
            return dict(file)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--peer-python", help="has torch, peft, transformers; none: pylora alone")
    p.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    p.add_argument(
        "--model", help=f"a GGUF file, or one of {', '.join(MODELS)}, fetched (default: smollm2)"
    )
    p.add_argument("--quick", action="store_true", help="128 tokens, 30 steps")
    p.add_argument("--only", nargs="+", choices=["ops", "logits", "loss"])
    p.add_argument("--steps", type=int, help="of the fine-tune (default: 200; --quick 30)")
    p.add_argument("--answers", type=int, default=0, help="held-out items to answer after it")
    p.add_argument("--seeds", type=int, default=1, help="fine-tunes of each contender")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    a.no_compile, a.tiny = True, False
    document = head(a)
    del document["ceilings"], document["records"], document["compiled"]
    document["command"] = " ".join(["python", "bench/accuracy.py", *sys.argv[1:]])
    what = "accuracy" if a.model in (None, "smollm2") else f"model-{Path(a.model).stem}"
    name = f"{what}-{document['machine']['name']}-{document['date']}.json"
    out = a.out or RESULTS / name
    model = fetched(a.model)
    document["model"] = model.name
    steps = a.steps or (30 if a.quick else 200)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(a.peer_python, Path(folder))
        parts: dict[str, Any] = {
            "ops": lambda: accuracy_ops.measure(a.precisions, model, peer),
            "logits": lambda: accuracy_logits.measure(a.precisions, model, texts(), a.quick, peer),
            "loss": lambda: accuracy_train.measure(
                a.precisions, model, steps, peer, a.answers, a.seeds
            ),
        }
        for name, part in parts.items():
            if a.only and name not in a.only:
                continue
            at, error = time.monotonic(), None
            try:
                found = part()
                if name == "loss":
                    document["loss"], document["answers"] = found
                else:
                    document[name] = found
            except Exception as problem:  # one part must not take the others with it
                error = f"{type(problem).__name__}: {problem}"
                say(f"  {name} failed: {error}")
            seconds = time.monotonic() - at
            document["cases"][name] = {"seconds": round(seconds, 1), "error": error}
            document["seconds"] = round(time.monotonic() - began, 1)
            document["text_sha256"] = {
                kind: hashlib.sha256(text.encode()).hexdigest() for kind, text in texts().items()
            }
            save(out, document)
            say(f"{name}: {seconds:.0f} s")
    from report import accuracy_page

    print(accuracy_page(json.loads(out.read_text(encoding="utf-8"))))
    return 0


def fetched(name: str | None) -> Path:
    from pylora.demo.fetch import fetch

    if name is not None and name not in MODELS:
        return Path(name)
    return fetch(MODELS[name or "smollm2"], say=say)


def texts() -> dict[str, str]:
    """English prose and code that no one wrote for this: pylora's own."""
    files = {"English": "docs/training.md", "code": "pylora/reference.py"}
    return {kind: (ROOT / file).read_text(encoding="utf-8") for kind, file in files.items()}


if __name__ == "__main__":
    sys.exit(main())

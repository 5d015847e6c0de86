"""How exact each precision is: every operation, SmolLM2's logits, and a fine-tune of 200 steps.

    python bench/accuracy.py [--peer-python PYTHON] [--precisions fp32 bf16 ...] [--quick]

Everything is compared with float64 (the NumPy backend); the loss curves with strict float32's.
PyTorch + PEFT does the same work beside it where --peer-python has torch, peft and transformers.
Takes about 12 minutes on two cores; --quick about 3. Writes bench/results/accuracy-<machine>-<date>
.json after every part; bench/report.py --docs and bench/figures.py show it.
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
    p.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2, fetched)")
    p.add_argument("--quick", action="store_true", help="128 tokens, 30 steps")
    p.add_argument("--only", nargs="+", choices=["ops", "logits", "loss"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    a.no_compile, a.tiny = True, False
    document = head(a)
    del document["ceilings"], document["records"], document["compiled"]
    document["command"] = " ".join(["python", "bench/accuracy.py", *sys.argv[1:]])
    out = a.out or RESULTS / f"accuracy-{document['machine']['name']}-{document['date']}.json"
    model = a.model or fetched()
    steps = 30 if a.quick else 200
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(a.peer_python, Path(folder))
        parts: dict[str, Any] = {
            "ops": lambda: accuracy_ops.measure(a.precisions, model, peer),
            "logits": lambda: accuracy_logits.measure(a.precisions, model, text(), a.quick, peer),
            "loss": lambda: accuracy_train.measure(a.precisions, model, steps, peer),
        }
        for name, part in parts.items():
            if a.only and name not in a.only:
                continue
            at, error = time.monotonic(), None
            try:
                document[name] = part()
            except Exception as problem:  # one part must not take the others with it
                error = f"{type(problem).__name__}: {problem}"
                say(f"  {name} failed: {error}")
            seconds = time.monotonic() - at
            document["cases"][name] = {"seconds": round(seconds, 1), "error": error}
            document["seconds"] = round(time.monotonic() - began, 1)
            document["text_sha256"] = hashlib.sha256(text().encode()).hexdigest()
            save(out, document)
            say(f"{name}: {seconds:.0f} s")
    from report import accuracy_page

    print(accuracy_page(json.loads(out.read_text(encoding="utf-8"))))
    return 0


def fetched() -> Path:
    from pylora.demo.fetch import fetch

    return fetch(say=say)


def text() -> str:
    """English prose that no one wrote for this: pylora's own page about training."""
    return (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

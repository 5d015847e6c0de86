"""The model card of a run: what the adapter is of, what it was trained on and how, and how it went.

Markdown with the front matter that hubs read. A link to a picture is written where there is one.
Nothing is computed here, and nothing is said that the run did not record.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pylora.extras import DISTRIBUTION
from pylora.files.whole import atomic_write
from pylora.training.evaluate import Evaluation
from pylora.training.info import TrainResult

FILE = "README.md"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name, as the Hub calls a model
_ROWS = 24  # of the table of the curve


@dataclass(frozen=True)
class Source:
    """What a run was made of."""

    base: str  # as it was named on the command line
    base_digest: str  # `checkpoint.fingerprint`
    data: str
    data_digest: str  # `examples.digest`
    records: int
    tokens: int
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # by the names of a recipe


def card(source: Source, result: TrainResult, evaluations: Sequence[tuple[int, Any]]) -> str:
    """The text. evaluations: (step, record of the log) of the whole run, of which `result` may
    know the last part only."""
    name = Path(source.base).name
    on_hub = _HUB.fullmatch(source.base) and not Path(source.base).exists()
    lines = ["---", *([f"base_model: {source.base}"] if on_hub else [])]
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- peft"]
    lines += ["- pylora", "---", "", f"# A LoRA adapter of {_plain(name)}", ""]
    lines += [
        f"Trained by {DISTRIBUTION} on {source.records:,} records for {result.steps:,} steps "
        f"({result.tokens:,} tokens, {result.seconds:.0f} s). {_kept(result)}",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{_plain(name)}`, sha256 of its sampled weights `{source.base_digest}` |",
        f"| training data | `{_plain(Path(source.data).name)}`: {source.records:,} records, "
        f"{source.tokens:,} tokens, sha256 of the token ids `{source.data_digest}` |",
        f"| training loss | {_losses(result.losses)} |",
        *_evaluated(result.evaluation),
        "",
    ]
    if evaluations:
        lines += ["## Curve", "", *_curve(evaluations), ""]
    lines += ["## Settings", "", "```json", *_settings(source.settings), "```", ""]
    lines += [f"- {_plain(note)}" for note in source.notes]
    lines += ["## Use", "", "```python", "from peft import PeftModel", ""]
    lines += ["model = PeftModel.from_pretrained(base_model, FOLDER_OF_ADAPTER)", "```", ""]
    lines += ["```sh", f"pylora generate {_plain(name)} PROMPT --adapter FOLDER_OF_ADAPTER", "```"]
    return "\n".join(lines) + "\n"


def write(out: Path, text: str) -> None:
    """Puts the card into the run's folder, with its picture, and into the adapter's."""
    picture = "![loss](loss.png)\n\n" if (out / "loss.png").is_file() else ""
    for folder, shown in ((out, picture), (out / "adapter", "")):
        with atomic_write(folder / FILE) as beside:
            whole = text.replace("## Settings", f"{shown}## Settings", 1)
            beside.write_text(whole, encoding="utf-8")


def _kept(result: TrainResult) -> str:
    if result.best_step is None:
        return "The adapter is that of the last step."
    return f"The adapter is that of step {result.best_step}, the best by evaluation."


def _losses(losses: Sequence[float]) -> str:
    if not losses:
        return "none"
    tail = losses[-10:]
    return f"{losses[0]:.4f} at the first step, {sum(tail) / len(tail):.4f} over the last 10"


def _evaluated(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return []
    return [f"| evaluation of this adapter | {evaluation.words()} |"]


def _curve(evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """A table of the evaluations, thinned out to a page's length."""
    shown = list(evaluations)
    if len(shown) > _ROWS:
        each = math.ceil(len(shown) / _ROWS)
        shown = [*shown[::each], *([shown[-1]] if (len(shown) - 1) % each else [])]
    names = list(shown[0][1])
    head = ["step", *(name.removeprefix("eval_").replace("_", " ") for name in names)]
    rows = [
        [str(step), *("" if line.get(n) is None else f"{line[n]:.4g}" for n in names)]
        for step, line in shown
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *rows)]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    files = ("model", "data", "out", "eval", "from", "adapter-config")  # where they lay is nobody's
    kept = {n: Path(v).name if n in files else v for n, v in settings.items()}
    return json.dumps(kept, indent=1, ensure_ascii=False).replace("```", "").splitlines()


def _plain(text: str) -> str:
    """Without what would be markup, or end a table's cell."""
    return re.sub(r"[`|<>\n\r]", " ", text)

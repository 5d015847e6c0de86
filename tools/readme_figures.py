"""Writes measured figures into README.md, between markers: of a demo run, and of the benchmark.

    make demo && python tools/readme_figures.py [out/demo/report.json]
    python bench/run.py && python tools/readme_figures.py --speed [FILE.json]

Every figure comes from the reports; nothing is typed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIGURES = "<!-- figures: tools/readme_figures.py -->", "<!-- end of figures -->"
OTHERS = {  # bars of bench/bars.py beside the training step, in words
    "decode, one sequence, bf16": "generates one sequence {} as fast in bfloat16",
    "decode, one sequence, int4": "{} with 4-bit weights",
    "decode, 32 distinct adapters of 100": "32 sequences with an adapter each {}",
    "merge 4096², fp32": "merges {} as fast",
    "decode, int4, the GGUF file, no adapter": "generates from a GGUF file {} as fast as llama.cpp",
}
SPEED = "<!-- speed: tools/readme_figures.py --speed -->", "<!-- end of speed -->"
PICTURE = "docs/img/versus.png"


def table(report: dict[str, Any]) -> str:
    """The Markdown of the figures."""
    build, merge, items = report["build"], report["merge"], report["test_items"]
    share = report["trainable_parameters"] / report["total_parameters"]
    rows = [
        (
            f"exact match on {items} held-out statements, before → after",
            f"{report['exact_match_before']:.1%} → {report['exact_match_after']:.1%}",
        ),
        ("all of the demo, after installation", f"{report['seconds']:.0f} s"),
        ("training speed, real tokens", f"{report['tokens_per_second']:.0f} tokens/s"),
        (
            "trainable parameters",
            f"{report['trainable_parameters']:,} of {report['total_parameters']:,} ({share:.2%})",
        ),
        (
            "adapter file / base in float32",
            f"{report['adapter_bytes'] / 1e6:.1f} MB / {report['base_bytes'] / 1e6:.0f} MB",
        ),
        ("peak memory of the process", f"{report['peak_rss_bytes'] / 1e9:.2f} GB"),
        (
            "elements kept aside for exact unmerge",
            f"{merge['residue_share']:.2%} of the merged weights",
        ),
    ]
    lines = [
        f"`make demo` on {build['processor']}, {build['num_threads']} threads, "
        f"kernels `{build['isa']}`, float32:",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "Seed 0; a run writes its own figures to `out/demo/report.json`.",
    ]
    return "\n".join(lines)


def speed(document: dict[str, Any]) -> str:
    """The Markdown of the benchmark: a sentence with its picture, and where the rest is."""
    from bars import judge

    rows = [row for row in judge(document) if row.value is not None]
    step = [
        f"{row.value:.1f} × ({row.bar.peer.removeprefix('PEFT bf16').strip(', ') or 'as it comes'})"
        for row in rows
        if row.bar.what == "training step, bf16"
    ]
    memory = [row.text for row in rows if row.bar.what == "peak memory of the bf16 step"]
    others = [
        words.format(row.text)
        for what, words in OTHERS.items()
        for row in rows
        if row.bar.what == what
    ]
    m = document["machine"]
    lines = [
        f"A training step of that model (4 × 256 tokens, bfloat16) is {', '.join(step)} as fast as "
        f"with PyTorch + PEFT on the same {m['cores']} cores ({m['processor']}, "
        f"{document['date']}), in {', '.join(memory)} the memory. "
        + (f"pylora {', '.join(others)}." if others else "")
    ]
    if (ROOT / PICTURE).exists():
        lines += ["", f"![How many times as fast as its peers pylora is]({PICTURE})"]
    lines += [
        "",
        "`python bench/run.py` measures it; [every figure, its bar, and how exact each precision "
        "is](docs/performance.md).",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--speed"]:
        sys.path.insert(0, str(ROOT / "bench"))
        from report import newest

        path = Path(arguments[1]) if arguments[1:] else newest("speed-*.json")
        (begin, end), make = SPEED, speed
    else:
        path = Path(arguments[0] if arguments else "out/demo/report.json")
        (begin, end), make = FIGURES, table
    if path is None:
        raise SystemExit("there are no results; run bench/run.py first")
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    new = make(json.loads(path.read_text(encoding="utf-8")))
    README.write_text(f"{head}{begin}\n{new}\n{end}{tail}", encoding="utf-8")
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

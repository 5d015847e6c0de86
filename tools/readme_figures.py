"""Writes the measured figures of a demo run into README.md, between its two markers.

    make demo && python tools/readme_figures.py [out/demo/report.json]

Every figure comes from the report; nothing is typed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- figures: tools/readme_figures.py -->", "<!-- end of figures -->"


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


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo/report.json")
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = table(json.loads(path.read_text(encoding="utf-8")))
    README.write_text(f"{head}{BEGIN}\n{new}\n{END}{tail}", encoding="utf-8")
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

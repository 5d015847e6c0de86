"""Writes measured figures into README.md, between markers: of a demo run, and of benchmarks.

    make demo && python tools/readme_figures.py [out/demo/report.json ...]
    python tools/readme_figures.py --speed [FILE.json ...]

Every figure comes from a file; nothing is typed. Without files, --speed takes the newest that
bench/run.py wrote (speed-*.json) and all of medians alone (compared-*.json), which say where they
are from. Each case is compared with the fastest of the peer's settings that was measured, and what
pylora loses stands beside what it wins. A file may hold one report of the demo or a list of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIGURES = "<!-- figures: tools/readme_figures.py -->", "<!-- end of figures -->"
SPEED = "<!-- speed: tools/readme_figures.py --speed -->", "<!-- end of speed -->"
FIRST = ("consciousness exists", "∃Ψ")  # the first statement of the demo's table
PICTURE = "docs/img/versus.png"
STEP = {"batch": 4, "length": 256, "recompute": False}
CASES = [  # name, case and part in a file of bench/run.py, key, pylora's precision, the peer's
    ("training step, 4 × 256, fp32", "step", "", STEP, "fp32", "PEFT fp32"),
    ("training step, 4 × 256, bf16", "step", "", STEP, "bf16", "PEFT bf16"),
    ("peak memory of that step, bf16", "step", "", STEP, "bf16", "PEFT bf16"),
    ("prefill 512, bf16", "generate", "prefill", {}, "bf16", "PEFT bf16"),
    ("decode, one sequence, bf16", "generate", "decode", {}, "bf16", "PEFT bf16"),
    ("decode, 32 sequences, 32 adapters", "resident", "32 distinct", {}, "bf16", "PEFT bf16"),
    ("merge of a 4096 × 4096 weight, fp32", "merge", "merge", {}, "fp32", "PEFT fp32"),
    ("prefill 512, SmolLM2 Q4_1 file", "gguf", "prefill", {}, "int4", "llama.cpp Q4_1"),
    ("decode, SmolLM2 Q4_1 file", "gguf", "decode", {}, "int4", "llama.cpp Q4_1"),
]
Row = tuple[str, str, str, str]  # case, pylora, the best peer, ratio
HEAD: Row = ("", "pylora", "the fastest peer", "ratio")


def markdown(rows: list[Row], head: Row = HEAD) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)]


def demo(reports: list[dict[str, Any]]) -> str:
    """The Markdown of a demo run's figures; of the runs after the first, the accuracy alone."""
    report, others = reports[0], reports[1:]
    build, merge, items = report["build"], report["merge"], report["test_items"]
    share = report["trainable_parameters"] / report["total_parameters"]
    settings = report["settings"]
    load, threads = report.get("load_before"), build["num_threads"]
    # The build before it leaves a load of about one for each core.
    busy = load is not None and load > 1.5 * threads
    training = f"{settings['steps']} steps, {report['training_tokens']:,} tokens"
    rows = [
        (
            f"exact match on {items} held-out statements, before → after",
            f"{report['exact_match_before']:.1%} → **{report['exact_match_after']:.1%}**",
        ),
        (f"{FIRST[0]} → `{FIRST[1]}`", "right" if report["first_statement_right"] else "**wrong**"),
        *(
            (
                f"the same, seed {one['settings']['seed']}, {one['precision']}, kernels "
                f"`{one['build']['isa']}`",
                f"{one['exact_match_after']:.1%}; {FIRST[0]}: "
                + ("right" if one["first_statement_right"] else "**wrong**"),
            )
            for one in others
        ),
        *([] if busy else [("all of the demo, after installation", f"{report['seconds']:.0f} s")]),
        (
            "training",
            training if busy else f"{training}, {report['tokens_per_second']:.0f} tokens/s",
        ),
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
        f"`make demo` on {build['processor']}, {threads} thread{'s' if threads > 1 else ''}, "
        f"kernels `{build['isa']}`, {report['precision']}, r = {settings['rank']} on "
        f"{', '.join(report['targets'])}, seed {settings['seed']}:",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "A run writes its own figures to `out/demo/report.json`.",
    ]
    if busy:
        lines[-1] += (
            f" Seconds are left out: other work had that machine (load average {load:.0f}). "
            "[What to expect on a quiet one](docs/demo.md#what-it-takes)."
        )
    return "\n".join(lines)


def of_samples(document: dict[str, Any]) -> list[Row]:
    """Rows of a file of bench/run.py: medians, against the peer's fastest setting of each case."""
    from records import find, median, select, speed, tokens

    records = document["records"]
    rows = []
    for what, case, part, key, precision, peer in CASES:
        ours = find(records, case, f"pylora {precision}", part, **key)
        names = {r["contender"] for r in select(records, case, part)}
        theirs = [
            r
            for name in sorted(names)
            if name == peer or name.startswith(f"{peer}, ")
            for r in [find(records, case, name, part, **key)]
            if r is not None
        ]
        if ours is None or not theirs:
            continue
        if "memory" in what:
            best = min(theirs, key=lambda r: r["life_peak_rss_bytes"])
            gb = [r["life_peak_rss_bytes"] / 1e9 for r in (ours, best)]
            values, ratio = [f"{v:.2f} GB" for v in gb], f"{gb[0] / gb[1]:.2f} × the memory"
        else:
            best = min(theirs, key=median)
            pair = (ours, best)
            rate = bool(tokens(ours))
            values = [
                f"{speed(r):,.0f} tokens/s" if rate else f"{1e3 * median(r):.3g} ms" for r in pair
            ]
            ratio = times(median(best) / median(ours))
        rows.append((what, values[0], f"{values[1]} ({best['contender']})", ratio))
    return rows


def of_medians(document: dict[str, Any]) -> list[Row]:
    """Rows of a file that holds medians alone."""
    rows = []
    for row in document["rows"]:
        ours, peer = row["pylora"], row["peer"]
        some = ours if isinstance(ours, list) else [ours]
        shown = f"{' / '.join(f'{v:g}' for v in some)} {row['unit']}"
        if peer is None:
            rows.append((row["case"], shown, row["against"], ""))
        else:
            against = f"{peer:g} {row['unit']} ({row['against']})"
            rows.append((row["case"], shown, against, times(ours / peer)))
    return rows


def times(value: float) -> str:
    """A ratio; what is slower than the peer says so."""
    return f"{value:.2f} ×" if value >= 1 else f"**{value:.2f} ×, slower**"


def place(document: dict[str, Any]) -> str:
    """Machine, ceilings, date and the versions of what was compared with."""
    m = document["machine"]
    ceilings = ", ".join(
        f"{name} {document['ceilings'][name]['best']:.0f} {document['ceilings'][name]['unit']}"
        for name in ("fp32 FMA", "bf16 dot", "AMX bf16", "memory read")
        if name in document["ceilings"]
    )
    versions = ", ".join(
        f"{name} {version}"
        for name, version in sorted(document["versions"].items())
        if name in ("torch", "peft", "transformers", "llama_cpp_python")
    )
    return (
        f"**{m['processor']}, {m['cores']} cores, kernels `{m['isa']}`** ({document['date']}; "
        f"{ceilings}). Beside it: {versions}."
    )


def speed_tables(documents: list[dict[str, Any]]) -> str:
    """A small table for each machine, and what the words in it mean."""
    lines: list[str] = []
    for document in documents:
        rows = of_samples(document) if "records" in document else of_medians(document)
        lines += [place(document), "", *markdown(rows), ""]
        if document.get("source"):
            lines += [document["source"], ""]
    lines += [
        "SmolLM2-135M's geometry unless a file is named; r = 8 on q, k, v, o. PEFT is PyTorch + "
        'PEFT with sdpa and fused AdamW; "tuned" is a malloc that keeps its pages, "compiled" that '
        "and `torch.compile`.",
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
        from report import RESULTS, newest

        paths = [Path(a) for a in arguments[1:]]
        if not paths:
            measured = newest("speed-*.json")
            paths = [*([measured] if measured else []), *sorted(RESULTS.glob("compared-*.json"))]
        if not paths:
            raise SystemExit("there are no results; run bench/run.py first")
        (begin, end) = SPEED
        new = speed_tables([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    else:
        reports: list[dict[str, Any]] = []
        for path in map(Path, arguments or ["out/demo/report.json"]):
            found = json.loads(path.read_text(encoding="utf-8"))
            reports += found if isinstance(found, list) else [found]
        (begin, end) = FIGURES
        new = demo(reports)
    text = README.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"README.md has no place for it: put {begin} and {end} in")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    README.write_text(f"{head}{begin}\n{new}\n{end}{tail}", encoding="utf-8")
    print(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
MODEL = {"model": False}  # the run's own geometry
STEP = {"batch": 4, "length": 256, "recompute": False, **MODEL}
CASES: list[tuple[str, str, str, dict[str, Any], str, str]] = [
    # name, case and part in a file of bench/run.py, key, pylora's precision, PEFT's
    ("training step, 4 × 256, fp32", "step", "", STEP, "fp32", "fp32"),
    ("training step, 4 × 256, bf16", "step", "", STEP, "bf16", "bf16"),
    ("peak memory of that step, bf16", "step", "", STEP, "bf16", "bf16"),
    ("training step, 4 × 256, int8 base", "step", "", STEP, "int8", ""),
    ("prefill 512, bf16", "generate", "prefill", MODEL, "bf16", "bf16"),
    ("decode, one sequence, bf16", "generate", "decode", MODEL, "bf16", "bf16"),
    ("decode, 32 sequences, 32 adapters, bf16", "resident", "32 distinct", {}, "bf16", "bf16"),
    ("merge of a 4096 × 4096 weight, fp32", "merge", "merge", {}, "fp32", "fp32"),
]
MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3 270M", "qwen2.5-0.5b": "Qwen2.5-0.5B"}
PEER_PACKAGES = ("torch", "peft", "transformers", "llama_cpp_python", "ik_llama_cpp_python",
                 "openvino_genai")  # fmt: skip
FILE_PEERS = ("llama", "ik", "openvino")
RANK = 16  # of the adapter whose cost is shown
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
    """Rows of a file of bench/run.py: medians, against the fastest peer in its fastest setting."""
    from records import best, find, median, select

    records = document["records"]
    rows = []
    for what, case, part, key, precision, peer in CASES:
        ours = find(records, case, f"pylora {precision}", part, **key)
        dtype = {"precision": peer} if peer else {}
        theirs = best(records, case, part, "peft", **dtype, **key)
        theirs = theirs or best(records, case, part, "peft", **key)
        if ours is not None and theirs is not None:
            if "memory" in what:
                some = [r for r in select(records, case, part) if r["engine"] == "peft"]
                some = [r for r in some if find([r], case, r["contender"], part, **key)]
                same = [r for r in some if r["precision"] == peer] or some
                theirs = min(same, key=lambda r: r["life_peak_rss_bytes"])
            rows.append(row(what, ours, theirs, memory="memory" in what))
    for model in ("gemma3-270m", "qwen2.5-0.5b"):
        for case, part, words in (("step", "", "training step"), ("generate", "decode", "decode")):
            for p in ("fp32", "bf16"):
                ours = find(records, case, f"pylora {p}", part, model=model)
                theirs = best(records, case, part, "peft", precision=p, model=model)
                if ours is not None and theirs is not None:
                    k = ours["key"]
                    size = f", {k['batch']} × {k['length']}" if case == "step" else ""
                    rows.append(row(f"{words}{size}, {p}, {MODELS[model]}'s shape", ours, theirs))
    files = {(r["key"]["model"], r["key"]["kind"]) for r in select(records, "gguf", "decode")}
    for model, kind in sorted(files):
        for part, words in (("prefill", "prefill 512"), ("decode", "decode")):
            key = {"model": model, "kind": kind}
            own = [
                r
                for r in select(records, "gguf", part)
                if r["engine"] == "pylora"
                and not r["precision"].endswith("a8")
                and find([r], "gguf", r["contender"], part, **key)
            ]
            peers = [best(records, "gguf", part, engine, **key) for engine in FILE_PEERS]
            found = [r for r in peers if r is not None]
            if own and found:
                ours, theirs = min(own, key=median), min(found, key=median)
                what = f"{words}, {MODELS[model]} {kind} file, {ours['precision']}"
                rows.append(row(what, ours, theirs))
    return rows + costs(records)


def row(what: str, ours: dict[str, Any], theirs: dict[str, Any], memory: bool = False) -> Row:
    """A line of the table from two records."""
    from records import median, speed, tokens

    pair = (ours, theirs)
    if memory:
        gb = [r["life_peak_rss_bytes"] / 1e9 for r in pair]
        values, ratio = [f"{v:.2f} GB" for v in gb], f"{gb[0] / gb[1]:.2f} × the memory"
    else:
        rate = bool(tokens(ours))
        values = [
            f"{speed(r):,.0f} tokens/s" if rate else f"{1e3 * median(r):.3g} ms" for r in pair
        ]
        ratio = times(median(theirs) / median(ours))
    return what, values[0], f"{values[1]} ({theirs['contender']})", ratio


def costs(records: list[dict[str, Any]]) -> list[Row]:
    """How much longer one adapter makes decoding: pylora's precisions beside each peer's."""
    from records import find, median, select

    found: dict[str, float] = {}
    for r in select(records, "adapter-cost", f"{RANK} decode"):
        none = find([x for x in records if x["key"] == r["key"]], r["case"], r["contender"],
                    "0 decode")  # fmt: skip
        if none is not None:
            found[r["contender"]] = median(r) / median(none) - 1
    own = {n: v for n, v in found.items() if n.startswith("pylora ")}
    peers = {n: v for n, v in found.items() if n not in own}
    if not own or not peers:
        return []
    words = " / ".join(f"{v:+.0%} ({n.removeprefix('pylora ')})" for n, v in own.items())
    others = " / ".join(f"{v:+.0%} ({n})" for n, v in peers.items())
    lost = min(peers.values()) < max(own.values())
    best_of_all = "**not the least**" if lost else "the least"
    return [(f"time that one adapter adds to decoding, r = {RANK}", words, others, best_of_all)]


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
        if name in PEER_PACKAGES
    )
    lines = [
        f"**{m['processor']}, {m['cores']} cores, kernels `{m['isa']}`** ({document['date']}; "
        f"{ceilings}). Beside it: {versions}."
    ]
    if "records" in document:
        from report import left_out

        lines += [line for line in left_out(document) if not line.startswith("Failed")]
    return " ".join(lines)


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
        "and `torch.compile`. Of each peer the fastest setting on that machine is shown.",
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
        from records import read
        from report import RESULTS, newest

        paths = [Path(a) for a in arguments[1:]]
        if not paths:
            measured = newest("speed-*.json")
            paths = [*([measured] if measured else []), *sorted(RESULTS.glob("compared-*.json"))]
        if not paths:
            raise SystemExit("there are no results; run bench/run.py first")
        (begin, end) = SPEED
        new = speed_tables([read(path) for path in paths])
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

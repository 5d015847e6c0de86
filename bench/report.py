"""Each figure beside its bar, from a file of results; also into docs/performance.md.

    python bench/report.py [FILE.json] [--accuracy FILE.json] [--docs]

Without a file: the newest in bench/results. --docs writes the tables between the markers of
docs/performance.md, so that no number there is typed by hand. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bars import NOT_MEASURED, judge, needed
from records import find, median, read, select, share, speed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "img"
PAGE = ROOT / "docs" / "performance.md"


def newest(pattern: str) -> Path | None:
    found = sorted(RESULTS.glob(pattern), key=lambda p: (p.stem[-10:], p.stem))
    return found[-1] if found else None


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _moved(before: dict[str, Any], after: dict[str, Any] | None) -> str:
    """What the ceiling was at the end of the run, where neighbours on the machine changed it."""
    if not after or abs(after["best"] / before["best"] - 1) < 0.1:
        return ""
    return f" ({after['best']:.0f} after the run)"


def setting(document: dict[str, Any]) -> str:
    """One paragraph: on what, when, by which command, against what."""
    m, versions = document["machine"], document["versions"]
    names = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
    after = document.get("ceilings_after", {})
    ceilings = ", ".join(
        f"{name} {row['best']:.0f} {row['unit']}" + _moved(row, after.get(name))
        for name, row in document["ceilings"].items()
    )
    lines = [
        f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, kernels `{m['isa']}`, "
        f"{document['date']}, commit {document['commit']}: `{document['command']}` "
        f"({document['seconds'] / 60:.0f} minutes). {names}.",
        f"Ceilings of the machine in the same run: {ceilings}.",
    ]
    if not document["compiled"]:
        lines.append("**Run with --no-compile or --quick: torch.compile was left out.**")
    if document["quick"]:
        lines.append("**Run with --quick: few repetitions.**")
    if document["tiny"]:
        lines.append("**Run with --tiny: a model of two small layers; the figures mean nothing.**")
    lines += built_for(document) + left_out(document)
    return "\n".join(lines)


def built_for(document: dict[str, Any]) -> list[str]:
    """What llama.cpp and its like say that they were built for: a build without the machine's own
    instructions is not their best setting."""
    found = {
        r["contender"].split(" ")[0]: r["info"]["built_for"]
        for r in document["records"]
        if r.get("info", {}).get("built_for")
    }
    words = [f"{name}: {text}" for name, text in sorted(found.items())]
    return ["Built for (their own words): " + "; ".join(words) + "."] if words else []


def left_out(document: dict[str, Any]) -> list[str]:
    """What failed, what would have taken too long, and which settings were slower than others."""
    lines = []
    failed = [f"{k} ({v['error']})" for k, v in document["cases"].items() if v["error"]]
    by_reason: dict[str, list[str]] = {}
    settings: dict[str, list[str]] = {}
    for r in document["records"]:
        if "error" in r:
            failed.append(f"{r['contender']} in {r['case']} {shape(r['key'])} ({r['error']})")
        if "skipped" in r:
            by_reason.setdefault(r["skipped"], []).append(f"{r['contender']} in {r['case']}")
        if "dropped" in r:
            settings.setdefault(r["dropped"], []).append(r["contender"])
    if failed:
        lines.append("Failed, and left out: " + "; ".join(failed) + ".")
    for why, some in by_reason.items():
        lines.append(f"Left out: {', '.join(dict.fromkeys(some))}. {why}.")
    if settings:
        words = [f"{k} (before {', '.join(dict.fromkeys(v))})" for k, v in settings.items()]
        lines.append("Best settings, the others asked once: " + "; ".join(words) + ".")
    return lines


def shape(key: dict[str, Any]) -> str:
    """A case's arguments in words."""
    return ", ".join(f"{k} {v}" for k, v in key.items())


def bar_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row in judge(document):
        verdict = {None: "", True: "yes", False: "**no**"}[row.met]
        need, dream = needed(row.bar, row.bar.need), needed(row.bar, row.bar.dream)
        rows.append((row.bar.what, row.ours, row.peer, row.text, need, dream, verdict))
    return rows


BAR_HEAD = ("case", "pylora", "beside", "ratio", "bar", "moonshot", "met")


ORDER = [
    ("step", ""),
    ("generate", "prefill"),
    ("generate", "decode"),
    ("gguf", "prefill"),
    ("gguf", "decode"),
    *(("resident", f"{n} {what}") for n in (8, 32) for what in ("distinct", "one")),
]


def named(r: dict[str, Any]) -> str:
    """What was done, in words."""
    case, part, key = r["case"], r["part"], r["key"]
    if case == "step":
        what = f"training step, {key['batch']} × {key['length']}"
        what += ", recomputing" if key.get("recompute") else ""
    elif case == "resident":
        what = f"decode, {part.replace('one', 'rows of one adapter')}, {key['adapters']} resident"
        what = what.replace("distinct", "distinct adapters")
    else:
        what = part
    if case == "gguf":
        return f"{what}, {key['model']} {key['kind']} file, no adapter"
    return f"{what}, {key['model']}" if "model" in key else what


def all_rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every whole-model figure: tokens a second, share of the roofline, peak memory."""
    ceilings = document["ceilings"]
    for case, part in ORDER:
        for r in select(document["records"], case, part):
            portion, limit = share(r, ceilings) if ceilings else (0.0, "")
            low, high = min(r["seconds"]), max(r["seconds"])
            spread = f"{(high - low) / median(r):.0%}" if len(r["seconds"]) > 1 else "once"
            yield (
                named(r),
                r["contender"],
                f"{speed(r):,.0f}",
                spread,
                f"{speed(r) / portion:,.0f} ({limit})" if limit else "",
                f"{portion:.0%}" if limit else "",
                f"{r['life_peak_rss_bytes'] / 1e9:.2f} GB",
            )


ALL_HEAD = (
    "case",
    "contender",
    "tokens/s",
    "spread",
    "the machine's limit",
    "share",
    "peak memory",
)


PICTURES = {
    "versus": "How many times as fast as its peers pylora is",
    "speed": "Tokens per second of pylora and its peers",
    "roofline": "Share of what the machine allows",
    "memory": "Peak memory",
    "scaling": "Cost of a step against length and rank",
    "adapters": "What one more adapter costs",
}


def pictures(names: dict[str, str]) -> list[str]:
    """Links to those that were drawn (bench/figures.py)."""
    return [
        f"![{text}](img/{n}.png)" for n, text in names.items() if (IMAGES / f"{n}.png").exists()
    ]


def linear_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """Microseconds of a LoRA linear, one row a shape, one column a contender."""
    some = select(document["records"], "linear")
    names = list(dict.fromkeys(r["contender"] for r in some))
    table: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in some:
        k = r["key"]
        shape = (("forward + backward" if k["backward"] else "forward"), k["d"], k["tokens"])
        table.setdefault(shape, {})[r["contender"]] = f"{median(r) * 1e6:,.0f}"
    head = ("LoRA linear d × d, microseconds", "d", "tokens", *names)
    rows = [
        tuple(map(str, shape)) + tuple(row.get(n, "") for n in names)
        for shape, row in table.items()
    ]
    return [head, *rows] if rows else []


def adapter_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """What an adapter costs: tokens a second without one, and how much less with each rank."""
    some = [r for r in document["records"] if r["case"] == "adapter-cost" and "seconds" in r]
    ranks = sorted({int(r["part"].split()[0]) for r in some} - {0})
    rows = []
    for part in ("decode", "prefill"):
        for none in [r for r in some if r["part"] == f"0 {part}"]:
            cells = []
            for rank in ranks:
                with_one = find(some, "adapter-cost", none["contender"], f"{rank} {part}")
                cells.append(f"{median(with_one) / median(none) - 1:+.1%}" if with_one else "")
            kind = none["key"].get("kind")
            what = f"{part}, {kind} file" if kind else part
            rows.append((what, none["contender"], f"{speed(none):,.0f}", *cells))
    head = ("one adapter on all linear modules", "contender", "tokens/s without")
    return [(*head, *(f"r = {n}: time" for n in ranks)), *rows] if rows else []


def page(document: dict[str, Any]) -> str:
    """The Markdown of all tables."""
    parts = [setting(document), markdown_table(BAR_HEAD, bar_rows(document))]
    rows = list(all_rows(document))
    if rows:
        parts.append(markdown_table(ALL_HEAD, rows))
    for table in (adapter_rows(document), linear_rows(document)):
        if table:
            parts.append(markdown_table(table[0], table[1:]))
    parts += pictures(PICTURES)
    return "\n\n".join(parts)


def accuracy_page(document: dict[str, Any]) -> str:
    """The Markdown of bench/accuracy.py's results."""
    m = document["machine"]
    parts = [
        f"{m['processor']}, kernels `{m['isa']}`, {document['date']}, commit {document['commit']}: "
        f"`{document['command']}` ({document['seconds'] / 60:.0f} minutes)."
    ]
    failed = [f"{k} ({v['error']})" for k, v in document["cases"].items() if v["error"]]
    if failed:
        parts[0] += "\nFailed, and left out: " + "; ".join(failed) + "."
    if document.get("ops"):
        names = list(dict.fromkeys(n for row in document["ops"].values() for n in row))
        rows = [
            (op, *(f"{row[n]['rms']:.1e}" if n in row else "" for n in names))
            for op, row in document["ops"].items()
        ]
        shares = [row["pylora fp32"]["of_bound"] for row in document["ops"].values()]
        parts.append(
            "Error of each operation against float64, root mean square, relative; the worst of its "
            "results. Inputs, the weight too, are float32 numbers: what a precision rounds of them "
            "is in its error. In float32 the largest error of any element is at most "
            f"{max(shares):.0%} of its derived bound."
        )
        parts.append(markdown_table(("operation", *names), rows))
    of = document.get("model", "SmolLM2-135M-Instruct.Q4_1.gguf")
    found = document.get("logits") or {}
    # Older files have one text, English, and no largest difference.
    for kind, some in ({"English": found} if "tokens" in found else found).items():
        parts.append(
            f"Logits of {of} on {some['tokens']} tokens of {kind} "
            "against float64 with the same weights, those of the file: `int8` and "
            "`int4` take its blocks as they are, so theirs is the error of the arithmetic alone."
        )
        columns = ["", "KL, mean (nats)", "KL, largest", "same top token", "error, relative"]
        columns += ["largest", "mean"] if "max" in next(iter(some["contenders"].values())) else []
        rows = [
            (n, f"{r['kl_mean']:.1e}", f"{r['kl_max']:.1e}", f"{r['top1']:.1%}", f"{r['rms']:.1e}",
             *(f"{r[key]:.1e}" for key in ("max", "mean") if key in r))
            for n, r in some["contenders"].items()
        ]  # fmt: skip
        parts.append(markdown_table(tuple(columns), rows))
    if document.get("loss"):
        curves = document["loss"]
        strict = curves.get("pylora fp32")
        steps = len(next(iter(curves.values())))
        parts.append(
            f"A fine-tune of {steps} steps on the demo's task (8 examples a step): the same "
            "batches, initial adapter and rates in each."
        )
        last = max(1, steps // 10)
        rows = []
        for name, losses in curves.items():
            gap = ""
            if strict and name != "pylora fp32":
                gaps = [abs(a - b) / b for a, b in zip(losses, strict)]
                gap = f"{sum(gaps) / len(gaps):.1e}"
            end = sum(losses[-last:]) / last
            shares = (document.get("answers") or {}).get(name, [])
            right = ", ".join(f"{share:.0%}" for share in shares)
            rows.append((name, f"{losses[0]:.4f}", f"{end:.4f}", gap, *([right] if right else [])))
        columns = ("", "first loss", f"mean of the last {last}", "mean gap to fp32's, relative")
        if document.get("answers"):
            columns += ("held-out answers, by seed",)
        parts.append(markdown_table(columns, rows))
        parts += pictures({"loss": "The loss of a fine-tune in every precision"})
    return "\n\n".join(parts)


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what lies between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{path} has no place for it: put {begin} and {end} in")
    head, rest = old.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)) for row in [head, *rows])


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("file", type=Path, nargs="?", help="default: the newest in bench/results")
    p.add_argument("--accuracy", type=Path, help="of bench/accuracy.py; default: the newest")
    p.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    a = p.parse_args()
    path = a.file or newest("speed-*.json")
    if path is None:
        raise SystemExit("there are no results; run bench/run.py first")
    document = read(path)
    print(setting(document), "\n")
    rows = [row for row in bar_rows(document) if row[1] != NOT_MEASURED]
    print(aligned(BAR_HEAD, rows))
    print(f"{len(bar_rows(document)) - len(rows)} bars were not measured")
    if a.docs:
        write_between(PAGE, "measured: bench/report.py", page(document))
        accuracy = a.accuracy or newest("accuracy-*.json")
        if accuracy is not None:
            found = json.loads(accuracy.read_text(encoding="utf-8"))
            write_between(PAGE, "accuracy: bench/report.py", accuracy_page(found))
        print(f"\nwritten into {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

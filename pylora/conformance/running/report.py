"""The report as plain text: one line a law, then what failed with its program."""

from __future__ import annotations

from pylora.conformance.running.runner import BROKEN, FAILED, NOT_TESTED, PASSED, Outcome, Report


def line(o: Outcome) -> str:
    """One law in one line."""
    text = f"{o.law.id:4} {o.status:10} {o.law.sentence}"
    if o.status == PASSED:
        text += f"  [{o.examples} examples"
        if o.tightness > 0:
            text += f", error/bound up to {o.tightness:.2g}"
        text += "".join(f", {what} in {n} of {of}" for what, (n, of) in o.notes.items())
        return text + "]"
    if o.status == NOT_TESTED:
        return f"{text}  [{o.reason}]"
    return text


def details(o: Outcome) -> str:
    """What went wrong in a law, and the program that shows it."""
    out = [f"{o.law.id} {o.status}: {o.law.sentence}", f"  maths: {o.law.maths}"]
    out.append(f"  here:  {o.reason}")
    if o.status == FAILED:
        if o.ratio < float("inf"):
            out.append(f"  error / bound = {o.ratio:.3g}")
        out.append(f"  meaning: {o.law.violation}")
        out.append(f"  found at example {o.found_at}; specification: {', '.join(o.law.spec)}")
    if o.counterexample:
        out += ["", *("    " + text for text in o.counterexample.splitlines())]
    return "\n".join(out) + "\n"


def summary(report: Report) -> str:
    """Counts, and how tight the bounds were."""
    counts = ", ".join(f"{len(report.of(s))} {s}" for s in (PASSED, FAILED, BROKEN, NOT_TESTED))
    seconds = sum(o.seconds for o in report.outcomes)
    return f"{report.name}: {counts}, of {len(report.outcomes)} laws, in {seconds:.0f} s"


def text(report: Report) -> str:
    """The whole report."""
    parts = [f"{report.name}: {w}" for w in report.warnings]
    parts += [line(o) for o in report.outcomes]
    for o in report.outcomes:
        if o.status in (FAILED, BROKEN):
            parts += ["", details(o)]
    return "\n".join([*parts, "", summary(report)]) + "\n"

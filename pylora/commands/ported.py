"""What `pylora vectors --check` prints and writes: how a port did, by statement of the spec."""

from __future__ import annotations

import json
from pathlib import Path

from pylora.display.console import Console
from pylora.files.whole import atomic_write

_MOST = 20  # failures that are shown; the report has all


def ported(
    port: Path,
    screen: Console,
    *,
    as_json: Path | None = None,
    badge: Path | None = None,
    markdown: Path | None = None,
) -> bool:
    """Shows the score of what a port wrote and writes the reports that are asked for. False if
    anything failed, or nothing was attempted. FileFormatError where there are no outputs."""
    from pylora.conformance.vectors.all import all_cases, all_questions
    from pylora.conformance.vectors.score import FAILED, PASSED, score

    result = score(port, all_cases(), all_questions())
    rows = []
    states = result.states()
    for name, counts in result.statements().items():
        rows.append((name, states[name], *counts.values()))
    columns = ("statement", "state", "passed", "failed", "not attempted")
    screen.table(columns, rows, right=columns[2:])
    failed = result.of(FAILED)
    for item in failed[:_MOST]:
        screen.say(f"{item.name} ({', '.join(item.spec)}): {item.why}")
    if len(failed) > _MOST:
        screen.say(f"... and {len(failed) - _MOST} more that failed; --json FILE has all")
    for name in result.foreign[:_MOST]:
        screen.say(f"{name}: belongs to no case of these vectors, and was not looked at")
    if len(result.foreign) > _MOST:
        screen.say(f"... and {len(result.foreign) - _MOST} more that belong to no case")
    texts = (
        (as_json, json.dumps(result.to_dict(), indent=1) + "\n"),
        (badge, json.dumps(result.badge()) + "\n"),
        (markdown, result.markdown()),
    )
    for file, text in texts:
        if file is not None:
            with atomic_write(file) as beside:
                beside.write_text(text, encoding="utf-8")
    screen.say(f"{port}: {result.message()}")
    return not failed and bool(result.of(PASSED))

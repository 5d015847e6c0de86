"""Runs a command that says nothing useful for a long time, and says what it does in its place.

    python tools/told.py "Installing NumPy and the tokenizer" pip install numpy tokenizers

A line when it begins, one every few seconds with the time that has gone, one at its end. What the
command prints to standard output is kept and shown only if it fails; its standard error is shown.
The exit status is the command's own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time

EVERY = 8.0  # seconds between two lines
SHOWN = 8000  # bytes of output that a failure shows


def main(title: str, command: list[str]) -> int:
    """The command's exit status."""
    begun = time.monotonic()
    print(f"{title} ...", flush=True)
    done = threading.Event()

    def remind() -> None:
        while not done.wait(EVERY):
            print(f"{title}: {time.monotonic() - begun:.0f} s so far", flush=True)

    with tempfile.TemporaryFile() as output:
        threading.Thread(target=remind, daemon=True).start()
        try:
            status = subprocess.run(command, stdout=output).returncode
        except OSError as error:
            print(f"{title}: {command[0]} cannot be run: {error}", file=sys.stderr)
            status = 127
        done.set()
        if status:
            output.seek(max(output.seek(0, 2) - SHOWN, 0))
            sys.stdout.write(output.read().decode("utf-8", "replace"))
    ending = f"failed (exit status {status}) after" if status else "done in"
    print(f"{title}: {ending} {time.monotonic() - begun:.0f} s", flush=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))

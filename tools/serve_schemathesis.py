"""schemathesis on a server's own /openapi.json: bodies that fit it and bodies that do not.

    python tools/serve_schemathesis.py [--examples N]

Starts a server of a tiny model in a thread. Every answer must be JSON or events as described,
never a 5xx, and the server must still answer afterwards. Needs the package schemathesis, whose exit
code this ends with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

# What is not asked: whether every body that fits the description is answered. It says the types and
# ranges of fields, not which of them contradict each other.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
CHECKS += ",response_schema_conformance,negative_data_rejection"


def main() -> int:
    """The exit code."""
    from served import Client, serving, write_house

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pylora-") as where:
        with serving(write_house(Path(where)), max_tokens=8) as server:
            command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
            command += [f"{server.url}/openapi.json", "--checks", CHECKS, "--phases", "fuzzing"]
            command += ["--max-examples", str(args.examples), "--seed", str(args.seed)]
            command += ["--request-timeout", "60"]
            code = subprocess.run(command, cwd=where).returncode
            assert Client(server.url).get("/health") == (200, {"status": "ok"})
    return code


if __name__ == "__main__":
    sys.exit(main())

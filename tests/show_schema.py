"""Send what schemathesis makes of the OpenAPI description to `serve`: no reply is a 500 or other than described.

`make load MODEL=SRC`; it needs schemathesis alone, the server is started with the Python of another environment.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from tests.serve_process import served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--python", default=".venv/bin/python")
    parser.add_argument("--examples", type=int, default=300, help="requests a path (300)")
    args = parser.parse_args()
    tool = str(pathlib.Path(sys.executable).parent / "schemathesis")
    with served(args.python, args.model, "--max_length=256", key="key") as server:
        command = [
            tool,
            "run",
            f"{server.url}/openapi.json",
            f"--checks={CHECKS}",
            "--header=Authorization: Bearer key",
        ]
        with tempfile.TemporaryDirectory() as notes:  # what schemathesis remembers of one run for the next
            subprocess.run([*command, f"--max-examples={args.examples}", "--seed=0"], check=True, cwd=notes)


if __name__ == "__main__":
    main()

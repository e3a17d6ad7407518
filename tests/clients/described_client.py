"""Makes requests of what `/openapi.json` says of a live node, right and wrong ones, and checks the answers
against it, with `schemathesis`.

    python described_client.py http://127.0.0.1:8080/v1
"""

import pathlib
import subprocess
import sys
import tempfile

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
]
EXAMPLES_MAX = 4
# The same requests every time.
SEED = 8

root = sys.argv[1].removesuffix("/").removesuffix("/v1")
program = pathlib.Path(sys.executable).parent / "schemathesis"
command = [program, "run", f"{root}/openapi.json", "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing"]
command += ["--max-examples", str(EXAMPLES_MAX), "--seed", str(SEED), "--suppress-health-check", "all"]
# The key of a node with one is not known here, and cutting the cloud off is no matter for a test of bodies.
command += ["--exclude-operation-id", "setControls", "--request-timeout", "60", "--no-color"]
with tempfile.TemporaryDirectory() as folder:
    # It keeps notes for its next run where it is started.
    sys.exit(subprocess.run(command, check=False, cwd=folder).returncode)

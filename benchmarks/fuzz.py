"""The device plane against schemathesis, which makes up requests from the OpenAPI document that a server gives of itself.

    python -m benchmarks.fuzz                   ten minutes, in an environment of the fuzzer's own
    python -m benchmarks.fuzz --seconds 60

Most requests are signed as a device signs them (`fuzz_hooks`), so that what lies behind the signature is reached too. It fails
where an answer is a defect of the server's, is not in the document, or has another form than the document says.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.peers.environments import KEPT, Environment, prepare
from benchmarks.server_load import generator
from benchmarks.server_load.devices import report_body
from benchmarks.server_load.served import Job, bundle, process

ROOT = Path(__file__).parents[1]
SCHEMATHESIS = Environment("schemathesis", ("schemathesis==4.32.5", "cryptography"), False, ("schemathesis",))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SIZE, DEVICES = 64, 8


def main() -> None:
    """Fuzz, and end with its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    python = prepare(SCHEMATHESIS, KEPT, print)
    with tempfile.TemporaryDirectory(prefix="sumus-fuzz-") as folder:
        job = Job(f"{folder}/data", None, (SIZE,), 0, DEVICES)
        plan = bundle(SIZE, job).plan
        with process(job) as server:
            works = [
                generator.work_for(server.port, number, 1, plan.description.fingerprint) for number in range(DEVICES)
            ]
            known = {
                "task": works[0].task,
                "plan": works[0].plan.sha256,
                "fingerprint": plan.description.fingerprint,
                "devices": DEVICES,
                "report": report_body(SIZE)[0].hex(),
            }
            command = [str(python.with_name("st")), "run", f"http://127.0.0.1:{server.port}/v1/openapi.json"]
            command += ["--checks", CHECKS, "--seed", str(args.seed), "--max-time", str(args.seconds)]
            command += ["--continue-on-failure", "--phases", "examples,coverage,fuzzing"]
            environment = {**os.environ, "SUMUS_FUZZ": json.dumps(known), "SCHEMATHESIS_HOOKS": "benchmarks.fuzz_hooks"}
            environment["PYTHONPATH"] = str(ROOT)
            done = subprocess.run(command, cwd=folder, env=environment, check=False)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()

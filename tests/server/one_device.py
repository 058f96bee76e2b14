"""A device as a process of its own: `python -m tests.server.one_device LINK BUNDLE NUMBER`. It enrols, and takes part
in one round.

It prints the server's answer as JSON: `counted`, or the text of the error.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from sumus.device.link import fetch_authority, read_link
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Unreachable
from sumus.wire.bundle import Bundle
from tests.server.devices import ScriptedDevice, update_of


def main(text: str, bundle: str, number: int) -> str:
    """Take part in one round, and return what the device was told."""
    link, plan = read_link(text), Bundle.from_bytes(Path(bundle).read_bytes()).plan
    transport = HttpTransport(link.server, fetch_authority(link) if link.pin else None)
    device = ScriptedDevice(transport, number)
    try:
        device.enrol(str(link.token))
        work = device.work(plan, wait_s=20.0)
        assert work is not None
        device.report(work, update_of(plan, device.id, value=float(number)))
    except Unreachable as error:
        return str(error)
    finally:
        transport.close()
    return "counted"


if __name__ == "__main__":
    said = main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"now": datetime.now(UTC).timestamp(), "said": said}))

"""The JSON bodies of the admin plane's requests and answers, except a server's status, which is in `status.py`."""

from typing import Annotated

import msgspec

from sumus.server.identity import DAY, TOKEN_S
from sumus.server.status import ModelStatus
from sumus.wire.messages import Count, Kind


class Login(msgspec.Struct, frozen=True):
    """A request to log in.

    Attributes:
        code: The code in the login link.
    """

    code: str


class LoggedIn(msgspec.Struct, frozen=True):
    """The answer to a login.

    Attributes:
        session: The secret that later requests send as `Authorization: Bearer SESSION`.
    """

    session: str


class VersionRef(msgspec.Struct, frozen=True):
    """A version of a task's model.

    Attributes:
        version: The version's number.
    """

    version: Count


class RunRef(msgspec.Struct, frozen=True):
    """One of a task's runs.

    Attributes:
        kind: Whether the run trains or evaluates.
    """

    kind: Kind = "train"


class NewToken(msgspec.Struct, frozen=True):
    """A request for an enrolment link.

    Attributes:
        uses: The number of keys that may enrol with the link.
        speaks_for: The largest number of devices of an edge that enrols with the link; 0 for a device's link.
        lasts_s: The time for which the link is valid, in seconds.
    """

    uses: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 1
    speaks_for: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    lasts_s: Annotated[float, msgspec.Meta(gt=0, le=3650 * DAY)] = TOKEN_S


class EnrolmentLink(msgspec.Struct, frozen=True):
    """A link with which devices or an edge enrol.

    Attributes:
        link: The link, which holds a secret.
    """

    link: str


class Lineage(msgspec.Struct, frozen=True):
    """All versions of a task's model that the server keeps.

    Attributes:
        task: The task's name.
        version: The newest version.
        released: The released version, which devices use for predictions.
        models: The versions, starting with the oldest.
    """

    task: str
    version: int
    released: int
    models: tuple[ModelStatus, ...]


class ChangeMade(msgspec.Struct, frozen=True):
    """The answer to a request that changed something.

    Attributes:
        version: The version that is now the newest one, or the released one.
        round: The number of the round that was ended.
    """

    version: int | None = None
    round: int | None = None


class EnrolledDevice(msgspec.Struct, frozen=True):
    """A device or an edge that is, or was, enrolled.

    Attributes:
        id: The device's id.
        state: `enrolled`, `withdrawn` or `revoked`.
        enrolled: The day on which the device enrolled, in days since 1970.
        seen: The day of the device's last request, in days since 1970.
    """

    id: str
    state: str
    enrolled: int
    seen: int


class DevicePage(msgspec.Struct, frozen=True):
    """One page of the list of devices, which is ordered by id.

    Attributes:
        devices: The devices.
        after: The last id of this page, which the request for the next page must contain; None on the last page.
    """

    devices: tuple[EnrolledDevice, ...]
    after: str | None = None

"""The end of a device: its owner withdraws the consent."""

from dataclasses import dataclass

from sumus.device.requests import Requests
from sumus.device.store import DeviceStore
from sumus.text import many
from sumus.transport.transport import Unreachable
from sumus.wire.messages import Refused


@dataclass(frozen=True)
class ForgetReport:
    """The data that were erased when a device was forgotten, and those that could not be.

    Attributes:
        erased: Descriptions of the erased data.
        remains: Descriptions of the remaining data, and where they are.
    """

    erased: tuple[str, ...]
    remains: tuple[str, ...]


def forget(store: DeviceStore, requests: Requests | None) -> ForgetReport:
    """Withdraw a device's consent: first at the server, then here.

    Args:
        store: The device's memory.
        requests: Requests to the device's server; None if the device is not enrolled.

    Raises:
        Unreachable: The server did not accept the withdrawal. Nothing was erased.
    """
    record = store.read()
    if requests is not None:
        try:
            requests.withdraw()
        except Refused as refused:
            if refused.problem.code != "unknown_device":  # which says that the server has forgotten the device already
                raise Unreachable(f"the server did not take it: {refused}; nothing was erased, try again") from refused
    store.erase()
    sent = record.counts.get("in sums", 0)
    erased = ["here: its key, what it kept from rounds, models and counts"]
    if requests is not None:
        erased.append("at the server: its key and identity; it can send nothing more under them")
    remains = ["its examples: they never left this device, and are its owner's to delete"]
    if sent:
        remains.append(
            f"models: {many(sent, 'report')} of it went into sums that models are made of, and what is in a sum cannot be "
            "taken out"
        )
    return ForgetReport(tuple(erased), tuple(remains))

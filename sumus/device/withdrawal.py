"""The end of a device: its owner withdraws the consent, and its data are erased."""

from dataclasses import dataclass

from sumus.device.requests import Requests
from sumus.device.store import DeviceStore
from sumus.text import many
from sumus.transport.transport import Unreachable
from sumus.wire.messages import Refused


@dataclass(frozen=True)
class ForgetReport:
    """The data that were erased when a device was forgotten, and those that could not be erased.

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
            if refused.problem.code != "unknown_device":  # this code means that the server forgot the device earlier
                raise Unreachable(
                    f"the server did not accept the withdrawal: {refused}; nothing was erased, try again"
                ) from refused
    store.erase()
    sent = record.counts.get("in sums", 0)
    erased = ["here: its key, its state from rounds, its models and its counts"]
    if requests is not None:
        erased.append("at the server: its key and identity; it can send nothing more with them")
    remains = ["its examples: they never left this device, and only their owner can delete them"]
    if sent:
        remains.append(
            f"models: {many(sent, 'report')} of this device are in sums from which models were made, and a report "
            "cannot be taken out of a sum"
        )
    return ForgetReport(tuple(erased), tuple(remains))

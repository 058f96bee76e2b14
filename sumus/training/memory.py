"""Large blocks of memory, each mapped by itself."""

import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def map_large_blocks() -> bool:
    """Tell glibc to map every block over 1 MiB by itself, and to give it back when it is freed; False elsewhere.

    By default glibc takes large blocks from its heap once some were freed. Small things that outlive a client (its
    examples, kept for the next round) then land in the holes that its gradients left, the next gradients no longer fit,
    and the heap grows by a model a client: 3 MB a client for a million parameters, without anything being leaked.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (AttributeError, OSError, TypeError):
        return False

"""Which addresses are this machine's own."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local(address: str) -> bool:
    """True for a Unix socket, and for a `host:port` that only this machine can reach."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))

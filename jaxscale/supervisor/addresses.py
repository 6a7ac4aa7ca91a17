"""Whether an address that somebody was told to listen at can be reached from other machines.

A host's own name is often one of the loopback interface (Debian gives it 127.0.1.1): who listens there is found by this
machine alone, and elsewhere the same name means another machine, or the reader's own. Read next: `admission.py`.
"""

from __future__ import annotations

import ipaddress
import socket


def resolved(host: str) -> str:
    """The address that one listens at for this name. Raises OSError where it has none."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_UNSPEC
    return str(socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM)[0][4][0])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; not where nobody knows what the name means."""
    try:
        return ipaddress.ip_address(resolved(host).partition("%")[0]).is_loopback
    except (OSError, ValueError):
        return False


def is_elsewhere(host: str) -> bool:
    """Whether it is an address of another machine, as far as is known here."""
    try:
        address = resolved(host)
    except OSError:
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return True
    return False

"""Transport security: what Ray is told, what is refused, and a probe in place of a client that hangs.

Ray encrypts its own traffic by mutual TLS and lets in who knows its token. torch's collectives and the store by which
ranks meet do neither, whatever Ray does.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress

from postlude import storage
from postlude.errors import ComputeError
from postlude.manifest.compute import Certificates, Compute, Pool, Transport

PROBE_SECONDS = 5.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of HTTP/2 begins (RFC 9113, 3.4): the preface, and settings that are empty."""
_SETTINGS_FRAME = 4


def ray_variables(transport: Transport) -> dict[str, str]:
    """What Ray reads from its environment. ComputeError for a file that is not there.

    Everything is said explicitly: Ray would otherwise look for a token in the home directory, or not.
    """
    token = _token(transport)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    tls = _certificates(transport)
    if tls is None:
        return variables
    for what, path in (("certificate", tls.certificate), ("key", tls.key), ("authority", tls.authority)):
        if not os.path.isfile(path):
            raise ComputeError(f"compute.transport.tls.{what}: there is no file '{path}'.")
    return variables | {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": tls.certificate,
        "RAY_TLS_SERVER_KEY": tls.key,
        "RAY_TLS_CA_CERT": tls.authority,
    }


def check_transport(compute: Compute) -> None:
    """:class:`ComputeError` if the manifest requires encryption and something would cross the network without it."""
    transport = compute.transport
    may_refuse = transport.require_encryption and compute.provider.is_remote
    if may_refuse and _certificates(transport) is None and not transport.network_is_encrypted:
        raise ComputeError(
            "compute.transport requires encryption, and Ray would send clear text between hosts. Give "
            "compute.transport.tls with the files that `postlude certificates` makes, or say network_is_encrypted: "
            "true if what lies below encrypts, as WireGuard or IPsec do."
        )


def check_collectives(compute: Compute, pools: Iterable[str]) -> None:
    """:class:`ComputeError` if the manifest requires encryption and the workers of one of the pools, which work on one
    model together, would cross the network without it."""
    transport = compute.transport
    if not transport.require_encryption or not compute.provider.is_remote or transport.network_is_encrypted:
        return
    for name in dict.fromkeys(pools):
        pool = compute.pools.get(name, Pool())
        if pool.most > 1 and pool.placement != "one_node":
            raise ComputeError(
                f"compute.transport requires encryption, and the {pool.most} workers of the pool '{name}' may be on "
                "several hosts: torch sends their gradients in clear text, which TLS of Ray does not change. Encrypt "
                "the network below, as WireGuard or IPsec do, and say network_is_encrypted: true; or keep the pool "
                "on one host with placement: one_node."
            )


def probe(address: str, transport: Transport) -> None:
    """Talk to the head of a cluster before Ray does, who would wait for ever or say little.

    :class:`ComputeError` within seconds if nobody is there, if one side has TLS and the other has not, if a certificate
    is refused, or the token is not the cluster's.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ComputeError(f"'{address}' is no address of a Ray cluster: it has to be host:port.")
    tls = _certificates(transport)
    try:
        with socket.create_connection((host, int(port)), PROBE_SECONDS) as plain:
            plain.settimeout(PROBE_SECONDS)
            if tls is None:
                _speak_plainly(plain, address)
            else:
                _shake_hands(plain, address, tls)
    except OSError as error:
        raise ComputeError(
            f"No Ray cluster answers at {address}: {error}. Is its head running, and reachable?"
        ) from error
    _show_token(address)


def _speak_plainly(connection: socket.socket, address: str) -> None:
    connection.sendall(_PREFACE)
    answer = b""
    with suppress(OSError):
        while len(answer) < 9 and (more := connection.recv(64)):
            answer += more
    if len(answer) < 9 or answer[3] != _SETTINGS_FRAME:
        raise ComputeError(
            f"The cluster at {address} does not talk in clear text: it wants TLS. Give compute.transport.tls, or set "
            "RAY_USE_TLS=1 with RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT."
        )


def _shake_hands(connection: socket.socket, address: str, tls: Certificates) -> None:
    try:
        context = ssl.create_default_context(cafile=tls.authority)
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise ComputeError(f"The files of compute.transport.tls cannot be used: {error}.") from error
    context.check_hostname = False  # Ray knows nodes by the authority alone
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection) as secured:
            secured.sendall(_PREFACE)
            if not secured.recv(9):
                raise ComputeError(f"The cluster at {address} closed the connection: it refuses this certificate.")
    except ssl.SSLCertVerificationError as error:
        raise ComputeError(
            f"The cluster at {address} has a certificate of another authority than '{tls.authority}': "
            f"{error.verify_message}."
        ) from error
    except ssl.SSLError as error:
        if error.reason and "WRONG_VERSION" in error.reason:
            why = "it has no TLS, and compute.transport.tls or RAY_USE_TLS asks for it. Start its nodes with TLS"
        else:
            why = f"it refuses the certificate '{tls.certificate}' ({error.reason})"
        raise ComputeError(f"The cluster at {address} does not shake hands: {why}.") from error


def _show_token(address: str) -> None:
    """Ask the cluster something that it tells only to those who know its token, if it has one."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        GcsClient(address=address)
    except AuthenticationError as error:
        known = os.environ.get("RAY_AUTH_MODE") == "token"
        what = "another token than this one" if known else "a token, and none is given"
        raise ComputeError(
            f"The cluster at {address} wants {what}. Name its file as compute.transport.token, or set RAY_AUTH_TOKEN."
        ) from error
    except (RayError, RuntimeError) as error:
        raise ComputeError(f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error


def _certificates(transport: Transport) -> Certificates | None:
    """Those of the manifest, or of the environment."""
    if transport.tls is not None:
        return transport.tls
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        return None
    paths = {name: os.environ.get(f"RAY_TLS_{name}", "") for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")}
    missing = [f"RAY_TLS_{name}" for name, path in paths.items() if not path]
    if missing:
        raise ComputeError(f"RAY_USE_TLS is 1, and {', '.join(missing)} not set.")
    return Certificates(certificate=paths["SERVER_CERT"], key=paths["SERVER_KEY"], authority=paths["CA_CERT"])


def _token(transport: Transport) -> str | None:
    """The token of the manifest's file, or of the environment."""
    path = transport.token or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if transport.token is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    if path is None:
        return None
    try:
        return storage.read_text(path).strip()
    except storage.NotFound as error:
        raise ComputeError(f"compute.transport.token: there is no file '{path}'.") from error

"""Certificates for a cluster: an authority, and a certificate for each of its hosts, by IP address."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postlude.errors import ComputeError

AUTHORITY = "authority.pem"
_AUTHORITY_KEY = "authority.key"


def make_certificates(folder: str, hosts: Sequence[str], days: int) -> list[str]:
    """Write ``HOST.pem`` and ``HOST.key`` for every IP address; returns the names of what was written.

    They are signed by the authority of the folder, which is made with the first and is there for those that come later.
    Keys can be read by their owner alone; the authority's own is ``authority.key``, and goes to no node. ComputeError
    for what is no address, or has a certificate already.
    """
    place = Path(folder)
    try:
        addresses = {host: ipaddress.ip_address(host) for host in hosts}
    except ValueError as error:
        raise ComputeError(f"{error}. Give the addresses by which the nodes know each other.") from error
    for host in hosts:
        if (place / f"{host}.pem").exists():
            raise ComputeError(f"'{place / host}.pem' is there already. Remove it first if it has to be made anew.")
    place.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    if not (place / AUTHORITY).exists():
        written += _write_pair(place / AUTHORITY, place / _AUTHORITY_KEY, *_new_authority(days))
    authority = x509.load_pem_x509_certificate((place / AUTHORITY).read_bytes())
    authority_key = serialization.load_pem_private_key((place / _AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    for host, address in addresses.items():
        certificate, key = _new_certificate(host, address, authority, authority_key, days)
        written += _write_pair(place / f"{host}.pem", place / f"{host}.key", certificate, key)
    return written


def _new_authority(days: int) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key, name = ec.generate_private_key(ec.SECP256R1()), _common_name("Postlude authority")
    certificate = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _new_certificate(
    host: str,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """For a host that is called, and that calls, by its address, as 127.0.0.1 or as localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    names = x509.SubjectAlternativeName([x509.IPAddress(address), loopback, x509.DNSName("localhost")])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        _builder(_common_name(host), authority.subject, key, days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return certificate, key


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    """A certificate that holds from now on, for so many days; clocks may differ by five minutes."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _write_pair(
    certificate_file: Path, key_file: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> list[str]:
    """Write a key, for its owner's eyes only, and its certificate; their names."""
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    for file, content, mode in ((key_file, secret, 0o600), (certificate_file, public, 0o644)):
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(content)
    return [str(key_file), str(certificate_file)]

"""Certificates for a cluster: an authority, and a certificate for each of its hosts, by IP address."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from postlude.errors import ComputeError

AUTHORITY = "authority.pem"


def make_certificates(folder: str, hosts: Sequence[str], days: int) -> list[str]:
    """Write ``HOST.pem`` and ``HOST.key`` for every IP address; returns the names of what was written.

    They are signed by the authority of the folder, which is made with the first and is there for those that come later.
    Keys can be read by their owner alone; the authority's own is ``authority.key``, and goes to no node. ComputeError
    for what is no address, or has a certificate already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    place = Path(folder)
    try:
        addresses = [ipaddress.ip_address(host) for host in hosts]
    except ValueError as error:
        raise ComputeError(f"{error}. Give the addresses by which the nodes know each other.") from error
    for host in hosts:
        if (place / f"{host}.pem").exists():
            raise ComputeError(f"'{place / host}.pem' is there already. Remove it first if it has to be made anew.")
    place.mkdir(parents=True, exist_ok=True)
    written = []
    now = datetime.datetime.now(datetime.UTC)

    def name(said: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, said)])

    def begun(subject: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    def write(file: str, content: bytes, secret: bool) -> None:
        descriptor = os.open(place / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
        written.append(str(place / file))

    def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    if (place / AUTHORITY).exists():
        authority = x509.load_pem_x509_certificate((place / AUTHORITY).read_bytes())
        own = serialization.load_pem_private_key((place / "authority.key").read_bytes(), None)
        assert isinstance(own, ec.EllipticCurvePrivateKey)
    else:
        own = ec.generate_private_key(ec.SECP256R1())
        subject = "Postlude authority"
        authority = (
            begun(subject, own, name(subject))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
            .sign(own, hashes.SHA256())
        )
        write("authority.key", key_bytes(own), secret=True)
        write(AUTHORITY, authority.public_bytes(serialization.Encoding.PEM), secret=False)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    for host, address in zip(hosts, addresses, strict=True):
        key = ec.generate_private_key(ec.SECP256R1())
        known_as = [
            x509.IPAddress(address),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.DNSName("localhost"),
        ]
        certificate = (
            begun(host, key, authority.subject)
            .add_extension(x509.SubjectAlternativeName(known_as), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
            .sign(own, hashes.SHA256())
        )
        write(f"{host}.key", key_bytes(key), secret=True)
        write(f"{host}.pem", certificate.public_bytes(serialization.Encoding.PEM), secret=False)
    return written

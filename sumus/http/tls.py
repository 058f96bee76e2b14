"""`--tls auto`: makes a certificate for a server that has none, and an authority that can sign no other certificate.

    certificates = issue(folder, ["fl.example", "192.0.2.7"], now)
    certificates.pin                                             SHA-256 of the authority
    enrolment_link("https://fl.example:8443", token, certificates.pin)

The authority signs one leaf certificate. Its key is never written, and is deleted when `issue` returns; even with the key, name
constraints would limit it to these names. So a device can safely trust this authority and no other. It recognizes the authority
by the hash (the pin) in its enrolment link.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sumus.errors import ExperimentError, UsageError
from sumus.storage.files import make_private_folder, write_whole
from sumus.text import shell_word

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

LASTS = timedelta(days=398)
"""The validity of a certificate: the longest one that browsers accept."""
EARLY = timedelta(days=1)
"""How far in the past a certificate's validity begins, so that devices with slow clocks accept it, even if the server's own
clock is fast.
"""
RENEWED = timedelta(days=30)
"""How long before its end a certificate is replaced."""
_LABEL = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


@dataclass(frozen=True, slots=True)
class Certificates:
    """The certificates that a server makes.

    Attributes:
        authority: The file of the authority's certificate, for clients that trust the server.
        chain: The file of the chain, PEM.
        key: The file of the key, PEM.
        pin: The SHA-256 of the authority, in hexadecimal.
        names: The names for which the certificate is valid.
        until: The time at which the certificate is replaced.
        new: The reason why the certificate was made now; empty if it existed before.
    """

    authority: Path
    chain: Path
    key: Path
    pin: str
    names: tuple[str, ...]
    until: datetime
    new: str = ""


def issue(folder: Path, names: Sequence[str], now: datetime) -> Certificates:
    """Return the certificates in a folder. New ones are made if the folder has none for exactly these names, or if their end is
    near.

    A new authority has a new pin, and devices that have the old pin cannot connect until they get the new one: show `new`
    prominently.

    Args:
        folder: The folder.
        names: Host names and addresses.
        now: The time.

    Raises:
        UsageError: A certificate cannot have such names.
    """
    wanted = tuple(sorted({_normal(name) for name in names}))
    if not wanted:
        raise UsageError("a certificate needs a name: give the host names or addresses that devices use")
    certificates = Certificates(folder / "authority.pem", folder / "leaf.pem", folder / "leaf.key", "", wanted, now)
    try:
        make_private_folder(folder)
        found = _found(certificates, now)
        if isinstance(found, Certificates):
            return found
        authority, leaf, key = _made(wanted, now)
        trusted = authority.public_bytes(Encoding.PEM)
        write_whole(certificates.key, key, lasting=True, private=True)
        write_whole(certificates.authority, trusted, lasting=True)
        write_whole(certificates.chain, leaf.public_bytes(Encoding.PEM) + trusted, lasting=True)
    except OSError as error:
        raise ExperimentError(
            f"cannot write certificates into {folder}: {error.strerror or error}; check the disk and the folder's owner"
        ) from error
    return replace(certificates, pin=fingerprint(authority), until=leaf.not_valid_after_utc - RENEWED, new=found)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER, in hexadecimal."""
    return certificate.fingerprint(SHA256()).hex()


def enrolment_link(url: str, token: str, pin: str = "") -> str:
    """Make a link with which a device enrols. Token and pin are in its fragment, which browsers do not send, so they do not
    appear in logs.

    Args:
        url: The server's address.
        token: The token.
        pin: The pin of a server with `--tls auto`; else empty.
    """
    return f"{url.rstrip('/')}/#enrol={token}" + (f"&pin={pin}" if pin else "")


def _found(of: Certificates, now: datetime) -> Certificates | str:
    """Read the certificates of a folder; return them, or the reason why they cannot be used. The authority's file is written
    again if it does not match the chain.
    """
    if not of.chain.exists() and not of.key.exists():
        return "there was no certificate"
    try:
        if (mode := of.key.stat().st_mode) & 0o077:
            raise ExperimentError(
                f"the key {of.key} is open to other users (mode {mode & 0o777:o}): delete {shell_word(of.key.parent)}, so that "
                "a new key is made, and give devices the new pin; or, if no other user can have read the key, run `chmod 600 "
                f"{shell_word(of.key)}`"
            )
        leaf, authority = x509.load_pem_x509_certificates(of.chain.read_bytes())
        leaf.verify_directly_issued_by(authority)
        authority.verify_directly_issued_by(authority)
        key = load_pem_private_key(of.key.read_bytes(), None)
        if key.public_key() != leaf.public_key():
            return "the files of the old certificate did not match each other"
        had = _names(leaf)
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return "the files of the old certificate were damaged"
    if had != of.names:
        return f"the old certificate was for {', '.join(had)}, but a certificate for {', '.join(of.names)} is needed"
    if (until := leaf.not_valid_after_utc - RENEWED) <= now:
        return f"the old certificate expires on {leaf.not_valid_after_utc:%Y-%m-%d}"
    trusted = authority.public_bytes(Encoding.PEM)
    if not of.authority.exists() or of.authority.read_bytes() != trusted:
        write_whole(of.authority, trusted, lasting=True)
    return replace(of, pin=fingerprint(authority), until=until)


def _made(names: Sequence[str], now: datetime) -> tuple[x509.Certificate, x509.Certificate, bytes]:
    """Make an authority, the only leaf certificate that it signs, and the leaf's key, PEM."""
    secret, key = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    serial = x509.random_serial_number()
    issuer = _subject(f"sumus authority {serial:x}")
    known_by = x509.SubjectKeyIdentifier.from_public_key(secret.public_key())
    authority = (
        _begun(issuer, issuer, secret, now)
        .serial_number(serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .add_extension(_constraints(names), critical=True)
        .add_extension(known_by, critical=False)
        .sign(secret, SHA256())
    )
    leaf = (
        _begun(_subject("sumus server"), issuer, key, now)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known_by), critical=False)
        .sign(secret, SHA256())
    )
    return authority, leaf, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _begun(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    begins = now.replace(microsecond=0) - EARLY
    return x509.CertificateBuilder(
        issuer,
        subject,
        key.public_key(),
        not_valid_before=begins,
        not_valid_after=begins + LASTS - timedelta(seconds=1),
    )


def _subject(name: str) -> x509.Name:
    """Return a subject that does not look like a host name, since programs take a common name for a host name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature, False, False, False, False, key_cert_sign, False, False, False)


def _constraints(names: Sequence[str]) -> x509.NameConstraints:
    """Return constraints that allow only these names and subdomains of the host names. If there are only hosts, or only
    addresses, all names of the other kind are excluded, since they would otherwise be allowed.
    """
    hosts = [x509.DNSName(name) for name in names if _address(name) is None]
    addresses = [x509.IPAddress(ipaddress.ip_network(ip)) for name in names if (ip := _address(name)) is not None]
    excluded = [] if hosts else [x509.DNSName("")]
    return x509.NameConstraints(
        [*hosts, *addresses], excluded + ([] if addresses else [x509.IPAddress(net) for net in _EVERYWHERE]) or None
    )


def _general(name: str) -> x509.GeneralName:
    ip = _address(name)
    return x509.DNSName(name) if ip is None else x509.IPAddress(ip)


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    held = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(sorted(str(name.value) for name in held))


def _address(name: str) -> Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _normal(name: str) -> str:
    """Return a host name or an address in its usual spelling."""
    plain = name.strip().lower().removesuffix(".")
    if (ip := _address(plain.removeprefix("[").removesuffix("]"))) is not None:
        if ip.is_unspecified or "%" in plain:
            raise UsageError(f"devices cannot reach {name}: give the address that devices use")
        return str(ip)
    labels = plain.split(".")
    if len(plain) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise UsageError(
            f"{name!r} is not a host name: use letters, digits and hyphens between dots, without port and wildcard; "
            "write other letters in the xn-- form (Punycode)"
        )
    return plain

"""Key services: who wraps the data keys. ``encrypt: {key: ...}`` names a master key, and with that its service.

- ``file:PATH``: 32 random bytes in a file that only its owner can read, made by ``postlude keys new PATH``;
- ``alias/NAME``, an id or an ARN: a key of AWS KMS, or ``kms:`` before any of these;
- ``NAME:...``: what a package brings as ``NAME`` among the ``keys`` (entry-point group ``postlude.keys``).

A service gets a context with each data key, the run and the stage that it is for, and refuses to unwrap in another.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from postlude.manifest.component import Component, lookup, names, register
from postlude.storage.errors import StorageError, writing
from postlude.storage.rules import Rule, rule_of

RECORD = "KEYS"
"""The file, in a folder, that holds its data key wrapped (:mod:`postlude.storage.data_keys`)."""

KEY_BYTES = 32
"""Of a master key in a file, and of a data key."""

Context = Mapping[str, str]

_OF_KMS = re.compile(r"arn:aws[\w-]*:kms:.+|alias/.+|(mrk-)?[0-9a-f-]{32,36}")


_UNFINISHED = re.compile(r"(^|/)\.([^/]+)\.\w+\.unfinished(?=/|$)")


def rule_for(uri: str) -> Rule:
    """The rule of a place, also while it is being written beside it under another name."""
    return rule_of(_UNFINISHED.sub(r"\1\2", uri) if ".unfinished" in uri else uri)


class KeyService(Component):
    """Wraps data keys with a master key, which never leaves it."""

    key: str
    """Which master key: what stands behind ``NAME:``."""

    def generate(self, context: Context, rule: Rule) -> tuple[bytes, str]:
        """A new data key of :data:`KEY_BYTES`, and what :meth:`wrap` makes of it. ``rule`` is that of the place."""
        secret = os.urandom(KEY_BYTES)
        return secret, self.wrap(secret, context, rule)

    @abstractmethod
    def wrap(self, secret: bytes, context: Context, rule: Rule) -> str:
        """A data key as a text that only the master key can unwrap, and only in this context. StorageError."""

    @abstractmethod
    def unwrap(self, wrapped: str, context: Context, rule: Rule) -> bytes:
        """The data key. StorageError, which says why the master key does not give it."""


def service_of(key: str) -> KeyService:
    """The service of a master key, as ``encrypt: {key: ...}`` names it. StorageError if there is none."""
    name, colon, rest = key.partition(":")
    if _OF_KMS.fullmatch(key):
        name, rest = "kms", key
    try:
        if not colon and rest != key:
            raise LookupError(f"it names no service of keys: {', '.join(f'{known}:...' for known in names('keys'))}")
        service = lookup("keys", name)
    except LookupError as error:
        raise StorageError(
            f"The key '{key}' cannot be used: {error.args[0]}. Write file:PATH, alias/NAME, or the ARN of a key of KMS."
        ) from error
    return KeyService.of(service.model_validate({"key": rest}))


# --- a key in a file ------------------------------------------------------------------------------------------


def new_key_file(path: str) -> None:
    """Make a file with a new master key. StorageError if there is something."""
    path = os.path.expanduser(path)
    with writing(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise StorageError(
                f"'{path}' is there: a key that is replaced takes with it all that it encrypts. Choose another place."
            ) from error
        with open(descriptor, "wb") as file:
            file.write(base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())


@register("keys", "file")
class KeyFile(KeyService):
    """A master key of 256 bits in a file of this machine, which only its owner can read."""

    def wrap(self, secret: bytes, context: Context, rule: Rule) -> str:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        master, nonce = self._read(), os.urandom(12)
        sealed = AESGCM(master).encrypt(nonce, secret, _text(context))
        return base64.b64encode(_fingerprint(master) + nonce + sealed).decode()

    def unwrap(self, wrapped: str, context: Context, rule: Rule) -> bytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        master = self._read()
        try:
            content = base64.b64decode(wrapped, validate=True)
            if content[:8] != _fingerprint(master):
                raise StorageError(
                    f"The key in '{self.key}' is not the one that it was encrypted with: that one's fingerprint is "
                    f"{content[:8].hex()}, this one's {_fingerprint(master).hex()}. Put the right key there."
                )
            return AESGCM(master).decrypt(content[8:20], content[20:], _text(context))
        except (InvalidTag, ValueError) as error:
            raise StorageError(f"its data key was not wrapped for {_told(context)}, or was changed since") from error

    def _read(self) -> bytes:
        path = os.path.expanduser(self.key)
        try:
            with open(path, "rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise StorageError(
                        f"The key file '{path}' can be used by others than its owner (mode {mode:04o}). Who could read "
                        f"it can read all that it encrypts: make sure of that, then run: chmod 600 {path}"
                    )
                master = base64.b64decode(file.read().strip(), validate=True)
        except FileNotFoundError as error:
            raise StorageError(
                f"There is no key file '{path}'. Put it there, or make one: postlude keys new {path}"
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(f"The key file '{path}' cannot be read: {error}.") from error
        if len(master) != KEY_BYTES:
            raise StorageError(f"'{path}' is no key file: `postlude keys new` makes them. Put the right file there.")
        return master


def _fingerprint(master: bytes) -> bytes:
    """What tells one master key from another, and nothing else of it."""
    return hashlib.sha256(b"postlude master key" + master).digest()[:8]


def _text(context: Context) -> bytes:
    return "\0".join(f"{name}={context[name]}" for name in sorted(context)).encode()


def _told(context: Context) -> str:
    return ", ".join(f"{name} '{value}'" for name, value in sorted(context.items()))


# --- a key of KMS ---------------------------------------------------------------------------------------------


@register("keys", "kms")
class KMS(KeyService):
    """A key of AWS KMS, which never leaves it: its id, alias or ARN."""

    def generate(self, context: Context, rule: Rule) -> tuple[bytes, str]:
        answer = self._call(rule, context, "generate_data_key", KeyId=self.key, KeySpec="AES_256")
        return answer["Plaintext"], base64.b64encode(answer["CiphertextBlob"]).decode()

    def wrap(self, secret: bytes, context: Context, rule: Rule) -> str:
        answer = self._call(rule, context, "encrypt", KeyId=self.key, Plaintext=secret)
        return base64.b64encode(answer["CiphertextBlob"]).decode()

    def unwrap(self, wrapped: str, context: Context, rule: Rule) -> bytes:
        try:
            content = base64.b64decode(wrapped, validate=True)
        except ValueError as error:
            raise StorageError(f"its data key is not what was wrapped ({error})") from error
        return self._call(rule, context, "decrypt", KeyId=self.key, CiphertextBlob=content)["Plaintext"]

    def _call(self, rule: Rule, context: Context, what: str, **arguments: Any) -> Any:
        from postlude.storage.credentials import client

        try:
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError as error:
            raise StorageError(
                f"The key '{self.key}' is of KMS, which needs a package: pip install 'postlude[s3]'."
            ) from error
        try:
            kms = client("kms", rule, region_name=self._region() or rule.region)
            return getattr(kms, what)(EncryptionContext=dict(context), **arguments)
        except ClientError as error:
            raise StorageError(self._explain(error.response.get("Error", {}), what, context)) from error
        except BotoCoreError as error:
            raise StorageError(
                f"KMS cannot be asked for the key '{self.key}': {str(error).rstrip('.')}. Check the region, the "
                "credentials and the network."
            ) from error

    def _region(self) -> str | None:
        return self.key.split(":")[3] if self.key.startswith("arn:") else None

    def _explain(self, error: Mapping[str, Any], what: str, context: Context) -> str:
        """KMS says little, and of a context that does not fit nothing at all."""
        code, said = error.get("Code", ""), error.get("Message") or "no reason given"
        key, of = f"The key '{self.key}'", _told(context)
        actions = {"generate_data_key": "kms:GenerateDataKey", "encrypt": "kms:Encrypt", "decrypt": "kms:Decrypt"}
        known = {
            "DisabledException": f"{key} is disabled. Enable it in KMS, and run again.",
            "KMSInvalidStateException": f"{key} cannot be used as it is: {said}. Cancel its deletion, or enable it.",
            "IncorrectKeyException": f"{key} is not the one that wrapped this data key. Name that one, or, if its "
            "alias leads elsewhere now, wrap anew: postlude keys rewrap RUN --from OLD --to NEW.",
            "InvalidCiphertextException": f"{key} does not unwrap this data key for {of}: it was wrapped for another "
            "run or stage, or was changed. Put back what stood there.",
            "NotFoundException": f"KMS has no key '{self.key}' in this region and account. Check the name, the region "
            "and the profile under 'storage'.",
            "AccessDeniedException": f"KMS does not let these credentials use the key '{self.key}' ({actions[what]}, "
            f"context {of}): {said}. Add it to the role's policy and the key's.",
        }
        return known.get(code, f"KMS refused {actions[what]} with the key '{self.key}' for {of}: {code}, {said}.")

"""Names of places: paths of this machine, and URIs of everything that fsspec knows (``s3://``, ``memory://``, ...)."""

from __future__ import annotations

import os


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """The path behind a local URI. ValueError if it is remote."""
    if not is_local(uri):
        raise ValueError(f"'{uri}' is not a local path.")
    return os.path.expanduser(uri.partition("://")[2] if "://" in uri else uri)


def join(uri: str, *parts: str) -> str:
    """The URI of what stands below ``uri``. A part that is absolute, or a URI itself, starts anew."""
    for part in parts:
        if "://" in part or os.path.isabs(part):
            uri = part
        elif part:
            uri = part if not uri else f"{uri}{'' if uri.endswith('/') else '/'}{part}"
    return uri


def name(uri: str) -> str:
    """The last part of the URI."""
    return uri.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """The URI of the folder that holds ``uri``."""
    head = uri.rstrip("/").rpartition("/")[0]
    if head.endswith(":/"):
        return head + "/"
    return head or ("/" if uri.startswith("/") else ".")


def plain(uri: str) -> str:
    """The URI as it is compared with others: without what says nothing, such as a slash at its end."""
    return os.path.normpath(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def is_below(uri: str, folder: str) -> bool:
    """Whether ``uri`` is the folder or stands below it, both as :func:`plain` writes them."""
    return uri == folder or uri.startswith(folder.rstrip("/") + "/")

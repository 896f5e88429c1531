"""URLs as cvdist spells them: `scheme://host:port/path`, nothing in them decoded. Storage.py's own; others ask that module."""

from __future__ import annotations

import dataclasses
import functools
import os
import posixpath
import re

from cvdist.errors import ConfigError
from cvdist.stores import known_schemes


@dataclasses.dataclass(frozen=True)
class Location:
    """A checked URL and its parts; `path` is what the file system calls it."""

    url: str
    scheme: str
    authority: str
    path: str


def check_url(url: str, name: str = "url") -> str:
    """Returns a URL in its one spelling: no empty, `.` or `..` parts, no slash at the end.

    Args:
        url: The text to check.
        name: What the text is called where the user wrote it, for the message.

    Raises:
        ConfigError: It has no scheme, an unknown one, or a host or port that cannot be.
    """
    return parse(url, name).url


@functools.lru_cache(maxsize=4096)
def parse(url: str, name_: str = "url") -> Location:
    """Takes a URL apart, as check_url does."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(/.*)?", url, flags=re.DOTALL)
    if not match:
        raise ConfigError(
            f"{name_}: {url!r} has no scheme; expected file:///path or hdfs://host:port/path;"
            f" use file://{os.path.abspath(re.sub('^file:/*', '/', url))}"
        )
    scheme, authority, path = match[1].lower(), match[2], match[3] or "/"
    if "\0" in path:
        raise ConfigError(f"{name_}: {url!r} holds a zero byte; expected a printable URL; remove it")
    path = "/" + posixpath.normpath(path).lstrip("/")
    if scheme in ("file", "memory") and authority:
        raise ConfigError(
            f"{name_}: {url!r} names the host {authority!r}; expected {scheme}:///path; use {scheme}:///{authority}{path}"
        )
    if scheme == "hdfs":
        _check_hdfs(url, authority, path, name_)
    elif scheme != "file" and scheme not in known_schemes():
        raise ConfigError(
            f"{name_}: {url!r} has the unknown scheme {scheme!r}; expected file:///path or hdfs://host:port/path; correct it"
        )
    buckets = scheme not in ("file", "hdfs", "memory")
    if buckets and path == "/":
        path = ""
    return Location(f"{scheme}://{authority}{path}", scheme, authority, authority + path if buckets else path)


def _check_hdfs(url: str, authority: str, path: str, name_: str) -> None:
    """Refuses what no HDFS can serve."""
    expected = "expected hdfs://host:port/path"
    host, _, port = authority.rpartition(":") if re.search(r":[^\]]*$", authority) else (authority, "", "8020")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
        what = f"the host {host!r}, which cannot be one" if host else "no host"
        raise ConfigError(f"{name_}: {url!r} has {what}; {expected}; use for example hdfs://namenode:8020{path}")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"{name_}: {url!r} has the port {port!r}; {expected} with a port from 1 to 65535; use {host}:8020"
        )
    if ":" in path:
        raise ConfigError(
            f"{name_}: {url!r} holds a colon, which HDFS allows in no name; {expected}; rename it without ':'"
        )


def join(url: str, *parts: str) -> str:
    """Returns the URL of something below `url`; parts may hold slashes.

    Raises:
        ConfigError: A part is absolute or climbs with `..`.
    """
    base = check_url(url)
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise ConfigError(
                f"url: {part!r} does not lie below {base!r}; expected a relative path without '..'; correct it"
            )
    path = "/".join(piece for part in parts for piece in part.split("/") if piece not in ("", "."))
    return check_url(base.removesuffix("/") + "/" + path) if path else base


def parent(url: str) -> str:
    """Returns the URL of the directory that holds `url`; a root is its own parent."""
    root, path = _root_and_path(url)
    return check_url(root + (path.rpartition("/")[0] or "/"))


def name(url: str) -> str:
    """Returns the last part of a URL; empty for a root."""
    return _root_and_path(url)[1].rpartition("/")[2]


def _root_and_path(url: str) -> tuple[str, str]:
    """Returns a URL in two parts, scheme with host and the rest."""
    at = parse(url)
    root = f"{at.scheme}://{at.authority}"
    return root, at.url[len(root) :]


def relative(url: str, base: str) -> str:
    """Returns the path that join would need to get from `base` to `url`.

    Raises:
        ConfigError: It does not lie below.
    """
    url, base = check_url(url), check_url(base)
    if url == base:
        return ""
    if not url.startswith(base.removesuffix("/") + "/"):
        raise ConfigError(
            f"url: {url!r} does not lie below {base!r}; expected a URL that begins with it; correct one of them"
        )
    return url[len(base.removesuffix("/")) + 1 :]

"""Files of images and videos behind URLs: data URLs, and http or https with limits of size and time."""

from __future__ import annotations

import base64
import binascii
import time
from urllib.parse import unquote_to_bytes

from .errors import InputError, first_line

MAX_BYTES = 64 << 20
_SECONDS, _SECONDS_IN_ALL = 20.0, 60.0
_A = {"image": "an image", "video": "a video"}
_EXAMPLES = {"image": "image/png", "video": "video/mp4"}
_ALPHABET = bytes.maketrans(b"-_", b"+/")  # base64 for URLs


def is_url(text: str) -> bool:
    """Return whether a text is a URL that images are read from."""
    return text[:8].lower().startswith(("data:", "http://", "https://"))


def data_bytes(url: str, kind: str = "image") -> bytes:
    """Decode a data URL as browsers do: percent signs, spaces, missing padding and the URL alphabet are understood.

    Args:
        url: The URL.
        kind: What it holds, "image" or "video".

    Raises:
        InputError: The URL is none of this kind, or damaged.
    """
    head, comma, body = url.partition("#")[0].partition(",")
    found, *rest = head[5:].split(";")
    found = found.strip().lower()
    if not comma or not (found.startswith(f"{kind}/") or found in ("", "application/octet-stream")):
        raise InputError(f'a data URL of {_A[kind]} is "data:{_EXAMPLES[kind]};base64,...", got another kind')
    if not url.isascii():
        raise InputError("a data URL has ASCII characters only")
    if "base64" not in [one.strip().lower() for one in rest]:
        return unquote_to_bytes(body)
    content = unquote_to_bytes(body) if "%" in body else body.encode()
    content = content.translate(_ALPHABET, b" \t\n\r\f").rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"the {kind}'s base64 is damaged") from None


def url_bytes(url: str, kind: str = "image") -> bytes:
    """Return the bytes of the file that a URL names, that of an "image" or of a "video".

    For callers who may read any URL: nothing keeps it from naming a host of the inner network.

    Raises:
        InputError: The host does not answer with a file of at most 64 MiB in a minute, or is silent for 20 s.
    """
    if url[:5].lower() == "data:":
        return data_bytes(url, kind)
    import httpx  # the library that huggingface_hub, and so transformers, fetch files by

    found = bytearray()
    until = time.monotonic() + _SECONDS_IN_ALL
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_SECONDS) as reply:
            if reply.status_code != 200:
                raise InputError(f"{url[:200]}: the host answered with {reply.status_code}; give the URL of {_A[kind]}")
            for part in reply.iter_bytes():
                found += part
                if len(found) > MAX_BYTES:
                    raise InputError(f"{url[:200]}: {_A[kind]} file has at most {MAX_BYTES:,} bytes")
                if time.monotonic() > until:
                    raise InputError(f"{url[:200]}: the file did not come within {_SECONDS_IN_ALL:g} s")
    # the last two: what a proxy's or a certificate's settings in the environment lead to
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url[:200]}: cannot be fetched ({first_line(error)})") from None
    return bytes(found)

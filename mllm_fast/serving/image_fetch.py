"""Read the images of untrusted requests, from data URLs or from hosts that the operator allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from urllib.parse import unquote_to_bytes, urlsplit

from .errors import ServiceError
from .settings import Settings

_TRANSLATED = [
    ipaddress.ip_network(net) for net in ("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]


async def picture_bytes(url: str, settings: Settings) -> bytes:
    """Return the bytes of the image file that a URL names.

    Args:
        url: A data URL, or an https URL of an allowed host.
        settings: The allowed hosts, and the limits of size and time.

    Raises:
        ServiceError: The URL is no data URL of an image, its host is not allowed or not public, or the image is too
            large or takes too long.
    """
    if url[:5].lower() == "data:":
        return _from_data(url)
    if url[:8].lower().startswith(("http://", "https://")):
        if not settings.remote_hosts:
            raise _refused("remote images are switched off here: send the image as a data URL")
        try:
            return await asyncio.wait_for(_fetched(url, settings), settings.remote_seconds)
        except TimeoutError:
            raise _refused(f"the image was not fetched within {settings.remote_seconds:g} s") from None
    raise _refused('an image is a data URL, "data:image/png;base64,..."')


def _from_data(url: str) -> bytes:
    head, comma, body = url.partition(",")
    kind, *rest = head[5:].split(";")
    if not comma or not kind.lower().startswith("image/"):
        raise _refused('a data URL of an image is "data:image/png;base64,...", got another kind')
    if "base64" not in [one.strip().lower() for one in rest]:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _refused("the image's base64 is damaged") from None


async def _fetched(url: str, settings: Settings) -> bytes:
    import httpx

    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError:
        raise _refused("the image's URL is not valid") from None
    if parts.scheme.lower() != "https" or parts.username or port not in (None, 443):
        raise _refused("a remote image's URL begins with https://, without a port or a user's name")
    if not any(host == one or (one.startswith(".") and host.endswith(one)) for one in settings.remote_hosts):
        raise _refused(f"images from {host!r} are not allowed here; send the image as a data URL")
    address = await _public_address(host)
    # connect to the checked address itself: the name may resolve to another one a moment later
    target = httpx.URL(url).copy_with(host=address)
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=settings.remote_seconds) as client:
        request = client.build_request("GET", target, headers={"Host": host}, extensions={"sni_hostname": host})
        try:
            response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise _refused(f"the image's host answered with {response.status_code}")
                found = bytearray()
                async for part in response.aiter_bytes():
                    found += part
                    if len(found) > settings.remote_bytes:
                        raise _refused(f"the remote image has more than {settings.remote_bytes:,} bytes")
                return bytes(found)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise _refused(f"the image cannot be fetched ({type(error).__name__})") from None


async def _public_address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refused(f"{host!r} has no address") from None
    addresses = [str(one[4][0]) for one in found]
    if not addresses or not all(_public(one) for one in addresses):
        raise _refused(f"{host!r} is not a public host")
    return addresses[0]


def _public(address: str) -> bool:
    one = ipaddress.ip_address(address.partition("%")[0])
    # an IPv6 address that stands for an IPv4 address may stand for a private one
    return (
        one.is_global
        and not one.is_multicast
        and not any(one in net for net in _TRANSLATED if net.version == one.version)
    )


def _refused(message: str) -> ServiceError:
    return ServiceError(400, message, param="messages", code="invalid_image_url")

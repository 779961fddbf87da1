"""Read the images of untrusted requests, from data URLs or from hosts that the operator allowed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..core.errors import InputError
from ..core.image_urls import data_bytes
from ..core.video import Video
from .errors import ServiceError
from .schema import VideoURL
from .settings import Settings

_URL = 8192  # characters of a remote image's address
_GLOBAL = ipaddress.ip_network("2000::/3")  # the addresses of IPv6 that are given to hosts
# networks among the public ones whose addresses stand for IPv4 addresses, or for no host
_SPECIAL = [
    ipaddress.ip_network(net) for net in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "192.88.99.0/24")
]


class VideoAddress(str):
    """The URL of a video, with the choice of its frames; see `Video`."""

    __slots__ = ("fps", "num_frames")
    num_frames: int | None
    fps: float | None


def video_address(given: VideoURL) -> VideoAddress:
    """Return the address of a video in a request."""
    found = VideoAddress(given.url)
    found.num_frames, found.fps = given.num_frames, given.fps
    return found


def choice_of(url: str) -> str:
    """Return the choice of frames of a video's address as a text; an image's is empty."""
    return f"video {url.num_frames} {url.fps} " if isinstance(url, VideoAddress) else ""


async def picture_files(urls: Sequence[str], settings: Settings) -> list[bytes | Video]:
    """Return the bytes of the image files that the URLs of a request name, and of its videos as `Video`s.

    Args:
        urls: Data URLs, or https URLs of allowed hosts; of videos `VideoAddress`es.
        settings: The allowed hosts, and the limits of size and time.

    Raises:
        ServiceError: A URL is no data URL of an image, its host is not allowed or not public, or the images are too
            large or take too long.
    """
    left = settings.remote_bytes
    files: list[bytes | Video] = []
    for given in urls:
        url = given.strip()
        if url[:5].lower() == "data:":
            found = _from_data(url, "video" if isinstance(given, VideoAddress) else "image")
        else:
            found = await _remote(url, settings, left)
            left -= len(found)
        if isinstance(given, VideoAddress):
            files.append(Video(found, given.fps, given.num_frames, max_frames=settings.max_frames))
        else:
            files.append(found)
    return files


async def _remote(url: str, settings: Settings, most: int) -> bytes:
    if not url[:8].lower().startswith(("http://", "https://")):
        raise _refused('an image is a data URL, "data:image/png;base64,..."')
    if not settings.remote_hosts:
        raise _refused("remote images are switched off here: send the image as a data URL")
    if len(url) > _URL or not url.isprintable():
        raise _refused(f"a remote image's URL has at most {_URL:,} printable characters")
    try:
        return await asyncio.wait_for(_fetched(url, settings, most), settings.remote_seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise _refused(f"the image was not fetched within {settings.remote_seconds:g} s") from None


def _from_data(url: str, kind: str) -> bytes:
    try:
        return data_bytes(url, kind)
    except InputError as error:
        raise _refused(str(error)) from None


async def _fetched(url: str, settings: Settings, most: int) -> bytes:
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
    try:
        target = httpx.URL(url).copy_with(host=address)
    except httpx.InvalidURL:
        raise _refused("the image's URL is not valid") from None
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=settings.remote_seconds) as client:
        # compressed, a small answer could be a large one in memory before its size is known
        headers = {"Host": host, "Accept-Encoding": "identity"}
        request = client.build_request("GET", target, headers=headers, extensions={"sni_hostname": host})
        try:
            response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise _refused(f"the image's host answered with {response.status_code}")
                if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
                    raise _refused("the image's host answered with compressed bytes")
                found = bytearray()
                async for part in response.aiter_raw():
                    found += part
                    if len(found) > most:
                        raise _refused(f"remote images have at most {settings.remote_bytes:,} bytes together")
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
    if not one.is_global or one.is_multicast or (one.version == 6 and one not in _GLOBAL):
        return False
    # an IPv6 address that stands for an IPv4 address may stand for a private one
    return not any(one in net for net in _SPECIAL if net.version == one.version)


def _refused(message: str) -> ServiceError:
    return ServiceError(400, message, param="messages", code="invalid_image_url")

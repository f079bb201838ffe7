"""The images of a request: data URLs, and URLs of the domains that the operator allows.

URLs of private, loopback, link-local and other special addresses are never fetched. The address that was checked is the
one that is connected to, so that a second name resolution cannot change it, and every redirect is checked again.
"""

import asyncio
import base64
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from functools import cache

import httpx
from PIL.Image import Image

from ..image_loading import load_rgb
from .limits import Limits, RequestError

MAX_REDIRECTS = 3
FETCH_SECONDS = 20
"""Time for one image, all redirects included."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if parsed in ipaddress.ip_network("64:ff9b::/96"):  # a translated IPv4 address
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast


def is_allowed_domain(host: str, domains: Sequence[str]) -> bool:
    """Whether a host is one of the domains, or part of one."""
    host = host.lower().rstrip(".")
    return any(host == domain.lower() or host.endswith(f".{domain.lower()}") for domain in domains)


async def public_address(host: str, port: int) -> str:
    """Resolve a host, once.

    Raises:
        RequestError: It does not exist, or one of its addresses is not public.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"The host {host[:80]!r} of an image is not known. Check the URL.") from error
    addresses = [str(entry[4][0]).split("%")[0] for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestError(f"The host {host[:80]!r} of an image is not public. Send the image as a data URL.")
    return addresses[0]


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(trust_env=False, timeout=FETCH_SECONDS, verify=_certificates())


async def fetch(url: str, domains: Sequence[str], limits: Limits) -> bytes:
    """Download an image.

    Args:
        url: With the scheme http or https.
        domains: Whose URLs may be fetched, also after a redirect; subdomains are part of a domain.
        limits: What the server accepts.

    Raises:
        RequestError: The URL is not allowed or cannot be fetched (HTTP 400), or the image is too large (HTTP 413).
    """
    try:
        async with asyncio.timeout(FETCH_SECONDS), _client() as client:
            for _ in range(MAX_REDIRECTS + 1):
                parsed = httpx.URL(url)
                host = parsed.raw_host.decode("ascii")
                if parsed.scheme not in ("http", "https") or not is_allowed_domain(parsed.host, domains):
                    raise RequestError(f"Images of {parsed.host[:80]!r} are not fetched. Send the image as a data URL.")
                port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
                if port > 65535:
                    raise RequestError(f"The port {port} of an image is not in 1..65535. Check the URL.")
                address = await public_address(host, port)
                request = client.build_request(
                    "GET",
                    parsed.copy_with(host=address),
                    headers={"Host": parsed.netloc.decode("ascii"), "Accept-Encoding": "identity"},
                    extensions={"sni_hostname": host},
                )
                response = await client.send(request, stream=True)
                try:
                    if response.has_redirect_location:
                        url = str(parsed.join(response.headers["location"]))
                        continue
                    response.raise_for_status()
                    return await _read(response, limits.max_image_bytes)
                finally:
                    await response.aclose()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise RequestError(f"Image {url[:80]!r} cannot be fetched ({type(error).__name__}). Check the URL.") from error
    raise RequestError(f"Image {url[:80]!r} is redirected over {MAX_REDIRECTS} times. Check the URL.")


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():  # not unpacked: a packed answer can be far larger than its chunks
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"An image has more than {max_bytes} bytes. Send a smaller one.", 413)


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data URL in base64, which may have parameters (`;name=value`) and line breaks.

    Raises:
        RequestError: It is malformed (HTTP 400) or too large (HTTP 413).
    """
    found = re.match(r"data:image/[\w.+-]{1,40}(?:;[\w.+-]{1,40}=[^;,]{1,80}){0,4};base64,", url)
    if found is None:
        raise RequestError(f"{url[:80]!r} is neither a URL nor a data URL of an image. Send the image as one.")
    encoded = re.sub(r"\s+", "", url[found.end() :])
    if len(encoded) * 3 // 4 > max_bytes + 2:
        raise _too_large(max_bytes)
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise RequestError("An image's data URL is not valid base64. Send the whole image.") from error


def decode(data: bytes, limits: Limits) -> Image:
    """The image of bytes.

    Raises:
        RequestError: It cannot be decoded or is too large.
    """
    try:
        return load_rgb(data, max_pixels=limits.max_image_pixels)
    except (ValueError, OSError) as error:
        raise RequestError(str(error)) from error

"""Send one HTTP request to where it may go, and read no more of the answer than allowed.

A URL that comes from outside may name a host of the private network, or resolve to one
(server-side request forgery).  So the name is resolved here, every address it has is
looked at, and the connection goes to an address that was looked at: a name that resolves
differently a moment later (DNS rebinding) gains nothing.  The ``Host`` header, and the name
that a certificate is checked against, stay those of the URL.

An answer is asked for as it is, not compressed, and taken in no other form: what 600 bytes
unpack to is hundreds of megabytes, and is there before its length can be looked at.

httpx's transport is used without its client, which would follow redirects, read proxies
and passwords from the environment, keep cookies, and log every URL.

See OWASP, "Server-Side Request Forgery Prevention Cheat Sheet".
"""

from __future__ import annotations

import asyncio
import ipaddress
import json as json_module
import re
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from firefly_jobs import __version__

try:
    import httpx
except ImportError as error:
    message = (
        "firefly_jobs.contrib.http sends requests with httpx, which is not installed. Run: "
        "pip install 'django-firefly-jobs[http]'"
    )
    raise ImportError(message) from error

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# What follows from the URL and the body, or belongs to one connection (RFC 9110, section 7.6.1):
# two that disagree about where a request ends, or whom it is for, are how another is smuggled in.
_OWN_HEADERS = frozenset({
    "accept-encoding", "connection", "content-length", "host", "keep-alive", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
# RFC 6052: an IPv4 address that an IPv6-only network reaches through a translator.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class HTTPRequestFailed(Exception):
    """A request got no answer, or one that is an error; names neither path nor payload.

    Attributes:
        status_code: That of the answer, or ``None``.
    """

    def __init__(self, text: str, status_code: int | None = None) -> None:
        super().__init__(text)
        self.status_code = status_code


class Answer(NamedTuple):
    """What a server answered; ``result`` is JSON if it says so, else text."""

    status_code: int
    headers: dict[str, str]
    result: Any


# --- what is asked


def build(url: Any, *, method: Any, headers: Any, data: Any, json: Any) -> httpx.Request:
    """Return a request that can be sent.

    Raises:
        ValueError: If it cannot; the message quotes no header and no payload.
    """
    if not isinstance(method, str) or not _TOKEN.fullmatch(method):
        message = "method must be a word such as GET or POST."
        raise ValueError(message)
    if method.upper() == "CONNECT":
        message = "method must not be CONNECT, which asks a proxy for a tunnel."
        raise ValueError(message)
    target, fields = _target(url), _headers(headers)
    if data is not None and json is not None:
        message = "Give either data= or json=, which are both the body."
        raise ValueError(message)
    form, content = (data, None) if isinstance(data, Mapping) else (None, data)
    message = "The body must be text, bytes or a form in data=, or what JSON can hold in json=."
    if content is not None and not isinstance(content, str | bytes):
        raise ValueError(message)
    try:
        return httpx.Request(
            method.upper(), target, headers=fields, content=content, data=form, json=json
        )
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error


def _target(url: Any) -> httpx.URL:
    try:
        # The parser that the request is sent with: two that disagree about what the host
        # is are the oldest way around a check.
        target = httpx.URL(url)
        host = target.host
    except (httpx.InvalidURL, TypeError, UnicodeError):
        target, host = httpx.URL(), ""
    if target.port is not None and not 0 < target.port < 2**16:
        target = httpx.URL()
    if target.scheme not in {"http", "https"} or not host:
        message = (
            f"url must be a valid URL that begins with http:// or https:// and a host; its "
            f"scheme is {target.scheme!r}."
        )
        raise ValueError(message)
    if target.userinfo:
        message = "url must not hold a user name or password; send a header instead."
        raise ValueError(message)
    return target


def _headers(given: Any) -> httpx.Headers:
    if given is not None and not isinstance(given, Mapping):
        message = f"headers must be a dictionary, got a {type(given).__name__}."
        raise ValueError(message)
    headers = httpx.Headers(
        {
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": f"django-firefly-jobs/{__version__}",
        }
    )
    for name, value in (given or {}).items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            message = "The name of a header must be a word of ASCII characters."
            raise ValueError(message)
        if name.lower() in _OWN_HEADERS:
            message = f"Header {name!r} must not be given: the request sets it, or does without."
            raise ValueError(message)
        is_plain = isinstance(value, str) and value.isascii() and value.isprintable()
        if not is_plain:
            message = f"Header {name!r} must be one line of ASCII text."
            raise ValueError(message)
        headers[name] = value
    return headers


def refuse_private(host: str) -> None:
    """Raise ``ValueError`` if ``host`` is an address that is not of the public internet."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return  # a name: what it resolves to is looked at before connecting
    if not is_public(address):
        message = (
            f"{host} is no address of the public internet. Pass allow_private=True if the URL "
            f"is your own and not somebody else's choice."
        )
        raise ValueError(message)


def is_public(address: Address) -> bool:
    """Whether anybody may be connected to at ``address``: it is of the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address.teredo is not None:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


# --- asking


async def send(
    request: httpx.Request, *, timeout_seconds: float, allow_private: bool, max_bytes: int
) -> Answer:
    """Send ``request`` and return the answer.

    Args:
        request: From :func:`build`.
        timeout_seconds: For all of it, from looking up the name to the last byte.
        allow_private: Whether it may go to addresses that are not of the public internet.
        max_bytes: How long the answer's body may be.

    Raises:
        HTTPRequestFailed: If there is no answer, or it is an error (4xx, 5xx), too long, or
            cannot be read.
        ValueError: If it would go where it must not.
    """
    about = f"{request.method} {request.url.scheme}://{request.url.netloc.decode()}"
    try:
        async with asyncio.timeout(timeout_seconds):
            addresses = await _addresses(request.url, allow_private=allow_private)
            async with httpx.AsyncHTTPTransport(
                verify=_tls(),
                trust_env=False,
                # Kept for another name at the same address, a connection would skip the check
                # of that name's certificate.
                limits=httpx.Limits(max_keepalive_connections=0),
            ) as transport:
                response = await _connect(transport, request, addresses, timeout_seconds)
                try:
                    _refuse_error(response, about)
                    body = await _read(response, max_bytes, about)
                finally:
                    await response.aclose()
    except TimeoutError:
        message = f"{about}: no answer within {timeout_seconds:g} s."
        raise HTTPRequestFailed(message) from None
    except socket.gaierror as error:
        message = f"{about}: the name cannot be resolved ({error.strerror})."
        raise HTTPRequestFailed(message) from None
    except httpx.HTTPError as error:
        # Their texts may quote what was sent or received; those of connecting do not.
        text = f" ({error})" if isinstance(error, httpx.ConnectError) else ""
        message = f"{about}: {type(error).__name__}{text}."
        raise HTTPRequestFailed(message) from None
    return Answer(response.status_code, dict(response.headers), _result(response, body, about))


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    # Loading the certificates takes some 20 ms of the event loop.
    return httpx.create_ssl_context()


async def _addresses(url: httpx.URL, *, allow_private: bool) -> list[str]:
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    host = url.raw_host.decode("ascii")
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
    if not allow_private and not all(is_public(ipaddress.ip_address(a)) for a in addresses):
        message = (
            f"{host} resolves to an address that is not of the public internet, so nothing was "
            f"sent. Pass allow_private=True if the URL is your own and not somebody else's choice."
        )
        raise ValueError(message)
    return addresses


async def _connect(
    transport: httpx.AsyncHTTPTransport,
    request: httpx.Request,
    addresses: list[str],
    timeout_seconds: float,
) -> httpx.Response:
    """Send the request to the first of ``addresses`` that can be connected to."""
    for address in addresses[:-1]:
        try:
            pinned = _pinned(request, address, timeout_seconds / len(addresses))
            return await transport.handle_async_request(pinned)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            continue
    return await transport.handle_async_request(_pinned(request, addresses[-1], timeout_seconds))


def _pinned(request: httpx.Request, address: str, connect_seconds: float) -> httpx.Request:
    """Return the same request for one address; the headers still name the host."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={
            "sni_hostname": request.url.raw_host.decode("ascii"),
            "timeout": {"connect": connect_seconds},
        },
    )


def _refuse_error(response: httpx.Response, about: str) -> None:
    if response.status_code >= 400:  # noqa: PLR2004 - RFC 9110, section 15
        message = f"{about} was answered with {response.status_code}."
        raise HTTPRequestFailed(message, response.status_code)


async def _read(response: httpx.Response, max_bytes: int, about: str) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            message = f"{about}: the answer is longer than {max_bytes:,} bytes."
            raise HTTPRequestFailed(message, response.status_code)
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if body and encoding not in {"", "identity"}:
        message = (
            f"{about}: the answer is compressed, although it was asked for as it is. Ask for "
            f"another form of it, or in a task of your own, which unpacks it within limits."
        )
        raise HTTPRequestFailed(message, response.status_code)
    return bytes(body)


def _result(response: httpx.Response, body: bytes, about: str) -> Any:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and (kind == "application/json" or kind.endswith("+json")):
        try:
            return json_module.loads(body)
        except ValueError as error:
            message = f"{about}: the answer says that it is JSON, and is not ({error})."
            raise HTTPRequestFailed(message, response.status_code) from None
    try:
        return body.decode(response.charset_encoding or "utf-8", errors="replace")
    except LookupError:
        return body.decode("utf-8", errors="replace")

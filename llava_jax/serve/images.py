"""Images of a request: from a data: URL, or fetched from a public address, always within limits.

What is fetched is decided on the addresses that a name resolves to, never on how it is written, and the connection is
made to the very address that was checked: a name that changes its address in between (DNS rebinding), a decimal or
octal way of writing 127.0.0.1 and a redirect all lead nowhere.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
import ssl
from urllib.parse import SplitResult, urlsplit

import h11

from llava_jax.serve.errors import Refused

PORTS = {"http": 80, "https": 443}
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
# Of IPv6 only what is assigned to hosts on the Internet; 6to4 carries an IPv4 address that could be a private one.
GLOBAL_6, SIX_TO_FOUR = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("2002::/16")


def read_data_url(url: str, where: str) -> bytes:
    """Return the content of a data: URL. Raises Refused where it holds no base64 of an image."""
    head = DATA_URL.match(url)
    if head is None:
        raise Refused(f"{where} is no data: URL of an image; expected data:image/png;base64,… (or jpeg, webp …)", where)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):  # a ValueError: characters outside ASCII
        raise Refused(f"{where} is not valid base64", where) from None


def is_public(address: str) -> bool:
    """Return whether an IP address, as a resolver gives it, is one of the public Internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        return ip in GLOBAL_6 and ip not in SIX_TO_FOUR and ip.is_global
    return ip.is_global and not ip.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


async def fetch(url: str, where: str, limit: int) -> bytes:
    """Return what lies at a public http(s) address: at most `limit` bytes, without a redirect.

    Raises Refused with the reason.
    """
    parts, port = _parts(url, where)
    host = parts.hostname or ""
    try:
        addresses = await resolve(host, port)
        if not addresses or not all(map(is_public, addresses)):
            raise Refused(f"{where}: its host is not on the public Internet", where)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        name = host if tls else None  # of the certificate
        reader, writer = await asyncio.open_connection(addresses[0], port, ssl=tls, server_hostname=name)
        try:
            return await _get(reader, writer, parts, where, limit)
        finally:
            writer.transport.abort()
    except (OSError, UnicodeError, h11.RemoteProtocolError):  # no such name, no connection, no certificate, no HTTP
        raise Refused(f"{where}: its server could not be reached", where) from None


def _parts(url: str, where: str) -> tuple[SplitResult, int]:
    if not re.fullmatch(r"[!-~]{1,8192}", url):
        raise Refused(f"{where}: an address has at most 8,192 characters, printable ASCII only", where)
    try:
        parts = urlsplit(url)
        port = PORTS[parts.scheme] if parts.port is None else parts.port
    except (ValueError, KeyError):
        raise Refused(f"{where}: is not an http or https address", where) from None
    if not parts.hostname or parts.username is not None or port not in PORTS.values():
        raise Refused(f"{where}: expected a host without user, at port 80 or 443", where)
    return parts, port


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: SplitResult, where: str, limit: int
) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = [("Host", parts.netloc), ("User-Agent", "llava_jax"), ("Accept", "image/*"), ("Connection", "close")]
    for event in (h11.Request(method="GET", target=target, headers=headers), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    content = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response) and event.status_code != 200:
            raise Refused(f"{where}: its server answers {event.status_code}, and redirects are not followed", where)
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > limit:
                raise Refused(
                    f"{where}: is larger than {limit:,} bytes, what is left to this request", where, status=413
                )
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content)

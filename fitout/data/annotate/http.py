"""JSON over HTTP to an annotation server: no redirects (they would carry the token away), time-outs, sizes, errors."""

from __future__ import annotations

import http.client
import http.cookiejar
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from ...errors import FitoutError, RequestError
from ..readers import StrictJSON

SECONDS = 120.0
LARGEST = 1 << 30  # bytes of an answer
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """Requests to one server. `headers` hold the credentials; they are never part of a message.

    Raises RequestError for what the user can mend (address, credentials, rights), FitoutError for what the server or
    the network does.
    """

    def __init__(self, url: str, tool: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RequestError(
                "this is not the address of a server",
                where=url,
                hint="Write http://127.0.0.1:8080 or https://HOST; credentials come from the environment.",
            )
        self.url = url.rstrip("/")
        self.tool = tool
        self.headers: dict[str, str] = {}
        self.plain = parts.scheme == "http" and parts.hostname not in LOOPBACK
        self.cookies = http.cookiejar.CookieJar()
        proxies: dict[str, str] | None = {} if parts.hostname in LOOPBACK else None  # None: those of the environment
        self._opener = urllib.request.build_opener(
            _NoRedirect, urllib.request.ProxyHandler(proxies), urllib.request.HTTPCookieProcessor(self.cookies)
        )

    def get(self, path: str, **query: Any) -> Any:
        return self.json("GET", path, query=query)

    def post(self, path: str, body: Any = None, **query: Any) -> Any:
        return self.json("POST", path, body, query)

    def json(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """The JSON of an answer; None for an empty one."""
        content = self.send(method, path, body, query)
        if not content.strip():
            return None
        try:
            return strict(content)
        except ValueError as error:
            raise FitoutError(
                f"{self.tool} did not answer in JSON: {error}",
                where=f"{self.url}{path}",
                hint="Check that the address is the server's own, without a page or a proxy before it.",
            ) from None

    def send(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> bytes:
        url = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        data, headers = None, {"Accept": "*/*", **self.headers}
        if isinstance(body, Upload):
            data, headers["Content-Type"] = body.content, body.kind
        elif body is not None:
            data, headers["Content-Type"] = json.dumps(body, ensure_ascii=False).encode(), "application/json"
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                content = answer.read(LARGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, path) from None
        except (urllib.error.URLError, TimeoutError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise FitoutError(
                f"{self.tool} cannot be reached: {reason}",
                where=self.url,
                hint="Start it, or check the address; what was done before is done.",
            ) from None
        if len(content) > LARGEST:
            raise FitoutError(f"an answer of more than {LARGEST >> 20} MB", where=f"{self.url}{path}")
        return content

    def _refused(self, error: urllib.error.HTTPError, path: str) -> FitoutError:
        where = f"{self.url}{path}"
        if 300 <= error.code < 400:
            target = error.headers.get("Location", "elsewhere")
            return RequestError(
                f"{self.tool} sends us on to {target[:200]}",
                where=where,
                harm="Following it could take the token to another server.",
                hint="Give the address it names.",
            )
        if error.code in (401, 403):
            return RequestError(
                f"{self.tool} does not accept the credentials ({error.code})",
                where=where,
                hint="Check the token or password in the environment, and the account's rights in the project.",
            )
        told = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        kind = RequestError if 400 <= error.code < 500 else FitoutError
        return kind(f"{self.tool} answers {error.code}: {told or error.reason}", where=where, hint="See its own log.")


class Upload:
    """One file as multipart/form-data."""

    def __init__(self, name: str, filename: str, content: bytes, kind: str = "application/json"):
        from secrets import token_hex

        boundary = token_hex(16)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        self.content = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        self.kind = f"multipart/form-data; boundary={boundary}"


def strict(content: bytes) -> Any:
    """JSON as the importers read it. Raises ValueError."""
    text = content.decode("utf-8-sig").strip()
    value, end, fault = StrictJSON().decode(text)
    if fault or end < len(text):
        raise ValueError(fault or "more than one value")
    return value

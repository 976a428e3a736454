"""Requests to the one address that the user gave: no redirects, no proxies, all of it bounded."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from adapterkit.errors import UncheckableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_BYTES = 64 << 20
_PATIENCE = 60.0
_KEY_WANTED = {401, 403}
_NO_KEY = "asks for an API key; give it with --api-key, or as ADAPTERKIT_API_KEY"
_WRONG_KEY = "does not take this API key"


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: another host was not asked for."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Client:
    """Asks one server for JSON.

    Attributes:
        url: its address without a path.
        requests: how many were made.
    """

    def __init__(self, url: str, *, most: int, seconds: float, key: str | None = None) -> None:
        """Describe a server; nothing is asked yet.

        Args:
            url: `http://HOST:PORT`.
            most: requests that may be made.
            seconds: after which no more are made.
            key: sent as a bearer token, to this address alone; it stands in no message.

        Raises:
            UsageError: if it is no such address, or the key cannot stand in a header.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server, such as http://127.0.0.1:8080")
        if key is not None and not (
            key.isascii() and key.isprintable() and key.strip() == key != ""
        ):
            raise UsageError("the API key is empty, or holds spaces at an end or other letters")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.requests = 0
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._answered = False
        self._most = most
        self._until = time.monotonic() + seconds
        self._opener: OpenerDirector = build_opener(ProxyHandler({}), _Stay())

    def get(self, path: str) -> Any | None:
        """Return what a path answers; None if the server does not know it.

        Raises:
            UncheckableError: if nothing answers, or too much was asked.
        """
        request = Request(self.url + path, headers=self._headers)  # noqa: S310  (http alone)
        return self._asked(request, optional=True)

    def post(self, path: str, document: Mapping[str, Any], *, optional: bool = False) -> Any:
        """Return the answer to a JSON document; None if it is optional and the server refuses.

        Raises:
            UncheckableError: if nothing answers, the server refuses, or too much was asked.
        """
        data = json.dumps(document).encode()
        headers = {"Content-Type": "application/json", **self._headers}
        return self._asked(Request(self.url + path, data, headers), optional=optional)  # noqa: S310  (http)

    def _asked(self, request: Request, *, optional: bool) -> Any | None:
        left = self._until - time.monotonic()
        if self.requests >= self._most or left <= 0:
            what = "time" if left <= 0 else f"{self._most} requests"
            raise UncheckableError(f"the {what} for it ran out; see --seconds", path=self.url)
        self.requests += 1
        # Who has answered is there, and may be slow.
        patience = left if self._answered else min(left, _PATIENCE)
        try:
            with self._opener.open(request, timeout=patience) as answer:
                data = answer.read(_MOST_BYTES + 1)
            self._answered = True
            if len(data) > _MOST_BYTES:
                raise UncheckableError("answers with too much", path=self.url)
            return json.loads(data)
        except HTTPError as error:
            with error:  # it holds the connection
                said = error.read(1000).decode(errors="replace").strip()
            if error.code in _KEY_WANTED:
                message = _WRONG_KEY if self._headers else _NO_KEY
                raise UncheckableError(message, path=self.url) from error
            if optional:
                return None
            message = f"{request.selector} answers {error.code}: {said}"
            raise UncheckableError(message, path=self.url) from error
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                message = f"{request.selector}: no answer within {patience:.0f} s; see --seconds"
                raise UncheckableError(message, path=self.url) from error
            raise UncheckableError(f"nothing answers there ({reason})", path=self.url) from error
        except ValueError as error:
            if optional:
                return None
            raise UncheckableError(f"{request.selector} answers no JSON", path=self.url) from error

"""Who may look: a link that works once is exchanged for a cookie, so that no address or process list keeps a secret."""

from __future__ import annotations

import hmac
import secrets
from threading import Lock


class Session:
    """One run's link and cookie; its methods are called from several threads."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(18)
        self._key = secrets.token_urlsafe(32)
        self._used: set[str] = set()
        self._lock = Lock()

    def fresh_token(self) -> str:
        """Return the token of a link that still works, a new one if the last was used."""
        with self._lock:
            if self.token in self._used:
                self.token = secrets.token_urlsafe(18)
            return self.token

    def spend(self, token: str) -> bool:
        """Use a link up and return whether it was still good."""
        with self._lock:
            good = self.token not in self._used and hmac.compare_digest(token.encode(), self.token.encode())
            if good:
                self._used.add(token)
            return good

    def is_link(self, token: str) -> bool:
        """Return whether a token is, or was, that of a link of this run."""
        return token in self._used or hmac.compare_digest(token.encode(), self.token.encode())

    def cookie(self, port: int) -> str:
        """Return the Set-Cookie value for a browser that came by the link; it ends with the browser."""
        return f"{_name(port)}={self._key}; HttpOnly; SameSite=Strict; Path=/"

    def knows(self, cookies: str, port: int) -> bool:
        """Return whether a Cookie header holds the cookie of this run."""
        pairs = (part.strip().partition("=") for part in cookies.split(";"))
        given = [value for name, _, value in pairs if name == _name(port)]
        return any(hmac.compare_digest(value.encode(), self._key.encode()) for value in given)


def _name(port: int) -> str:
    # Browsers know cookies by host alone; two viewers on one machine must not overwrite each other's.
    return f"cellslide-{port}"

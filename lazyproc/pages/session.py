"""The name and the secret of a migration."""

from __future__ import annotations

import os

from lazyproc.facts import dataclass, field
from lazyproc.wire.native import Hello, Role


@dataclass(frozen=True, slots=True)
class Session:
    """What ties three connections, and reconnects, to one migration. The token is the secret of its ends."""

    id: str
    token: str = field(repr=False)

    @classmethod
    def new(cls) -> Session:
        return cls(os.urandom(8).hex(), os.urandom(16).hex())  # `secrets` imports OpenSSL

    def hello(self, role: Role, *, resume: bool = False) -> Hello:
        return Hello(role, self.id, self.token, resume=resume)

    def owns(self, hello: Hello) -> bool:
        """Whether a HELLO belongs to this session; takes the same time whatever is wrong with the token."""
        from hmac import compare_digest  # it imports OpenSSL

        same = compare_digest(hello.token.encode(), self.token.encode())
        return same and hello.session == self.id

"""SERVE. An OpenAI-compatible HTTP server over one engine.

Here: the wire format, who may ask and how much, streaming, stopping when a client leaves.
Not here: how text is generated (engine), how messages become ids (chat), the terminal chat (cli).
"""

from __future__ import annotations

import ipaddress
import re

from pydantic import BaseModel, ConfigDict, Field

from ..errors import RequestError


class ServeSettings(BaseModel):
    """Where the server listens, who may ask, and how much."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback a token is needed")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    token: str | None = Field(None, repr=False, description="what clients send as `Authorization: Bearer TOKEN`")
    max_body_bytes: int = Field(1 << 20, ge=1, description="a larger request is refused while it is read")
    max_prompt_tokens: int = Field(32768, ge=1, description="a longer prompt is refused, never shortened")
    max_new_tokens: int = Field(1024, ge=1, description="the longest answer, and the default when a request is silent")
    max_concurrent: int = Field(16, ge=1, description="requests answered at once; beyond it the answer is 429")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (127.0.0.0/8, ::1, localhost)."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_settings(settings: ServeSettings) -> None:
    """Raises RequestError when strangers could use the server; worth asking before a model is loaded."""
    if settings.token is None:
        if not is_loopback(settings.host):
            raise RequestError(
                f"{settings.host or 'every address'} can be reached from other machines and there is no token",
                harm="Anyone on the network could use this model.",
                hint="Set a token (clients send it as `Authorization: Bearer ...`), or keep the host 127.0.0.1.",
            )
    elif not re.fullmatch(r"[!-~]{8,}", settings.token):
        raise RequestError(
            "the token is shorter than 8 characters, or has blanks or letters beyond ASCII",
            harm="It could be guessed, or not be sent in a header.",
            hint="Take a long random one: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )

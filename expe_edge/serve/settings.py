"""What a server is started with."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from expe_edge.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """How a server listens, whom it answers, and how much it takes on.

    Attributes:
        host: the address to listen at. port: 0 for any that is free.
        model_name: what the model is called; None for the name of its package's directory.
        api_keys: one of which a request must bring; none for all.
        cors_origins: pages of which origins may ask; `*` for all.
        host_names: names beside those of this machine that a server at a loopback address answers to.
        rows: completions that run at once. context: the most tokens of a prompt and its completion.
        queue: completions that may wait. prompt_cache: tokens of prompts' beginnings that are kept.
        prefill_chunk: tokens of a prompt that are read between two steps of the others.
        together: whether a step runs all rows at once; None for where that changes no bit of an answer.
        body_bytes: of a request at most. timeout: seconds that one may take. grace: seconds that those that run have
            to end when the server is told to. connections: open at once.

    Raises:
        ConfigError: one that is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    rows: int = 16
    context: int = 4096
    queue: int = 128
    prompt_cache: int = 16384
    prefill_chunk: int = 32
    together: bool | None = None
    body_bytes: int = 2**20
    timeout: float = 300.0
    grace: float = 20.0
    connections: int = 512

    def __post_init__(self) -> None:
        ranges = {
            "port": (0, 65535),
            "rows": (1, 1024),
            "context": (2, 2**24),
            "queue": (1, 2**16),
            "prompt_cache": (0, 2**24),
            "prefill_chunk": (1, 256),
            "body_bytes": (1024, 2**30),
            "timeout": (0.1, math.inf),
            "grace": (0, 3600),
            "connections": (1, 2**16),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"`{name}` is {value}; from {least} to {most}")
        if not all(self.api_keys):
            raise ConfigError("`api_keys` holds an empty one; give a key of some length, or none at all")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

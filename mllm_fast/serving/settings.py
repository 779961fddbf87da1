"""What a server allows and how it reads images."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..context.registry import score_name
from ..context.scores import kept_count
from ..core.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of a service.

    Attributes:
        keep: share or count of image tokens that a context keeps unless a request says so; None answers from whole
            images ("off"). prompt, score, describe_tokens: see `VLM.compress`.
        max_batch: sequences decoded together. max_queue: that may wait for a place.
        max_tokens: most tokens of an answer that may be asked for. default_tokens: where a request does not say.
        max_body: bytes of a request. max_pictures: of a request. max_pixels: of an image.
        time_limit: seconds that an answer may take, the wait for a place included.
        store: a folder or fsspec URL; None keeps contexts in memory alone. memory_bytes, disk_bytes, storage: see
            `ContextStore`.
        remote_hosts: whose images may be fetched by URL ("images.example.org", or ".example.org" with what is below
            it); none by default. remote_bytes, remote_seconds: most that a fetch may take.
    """

    keep: float | int | None = 0.05
    prompt: str = "Describe the image."
    score: str = "generated"
    describe_tokens: int = 64
    max_batch: int = 64
    max_queue: int = 256
    max_tokens: int = 1024
    default_tokens: int = 256
    max_body: int = 32 * MIB
    max_pictures: int = 8
    max_pixels: int = 25_000_000
    time_limit: float = 120.0
    store: str | None = None
    memory_bytes: int = 1024 * MIB
    disk_bytes: int = 10 * 1024 * MIB
    storage: str = "full"
    remote_hosts: tuple[str, ...] = ()
    remote_bytes: int = 16 * MIB
    remote_seconds: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", score_name(self.score))
        if self.keep is not None:
            kept_count(self.keep, 1 << 62)
        if not self.prompt.strip():
            raise InputError("prompt is empty; give what the model is asked first about every image")
        least = {"memory_bytes": 0, "disk_bytes": 0}
        for one in fields(self):
            given = getattr(self, one.name)
            if one.name == "keep" or not isinstance(given, (int, float)):
                continue
            if not least.get(one.name, 1e-3) <= given < math.inf:
                raise InputError(f"{one.name} is a positive number, got {given}")

"""Limits and defaults of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..context.registry import score_name
from ..context.scores import kept_count
from ..core.errors import InputError, check_choice

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of a service.

    Attributes:
        keep: The share (0.05) or count (29) of image tokens that a context keeps, unless the request sets its own.
            None answers from whole images ("off").
        prompt: What the model is asked first about every image, see `VLM.compress`.
        score: What an image token is kept for, see `VLM.compress`.
        describe_tokens: The longest reply to `prompt`, in tokens; `max_new_tokens` of `VLM.compress`.
        first_answer: What answers questions about an image while its context is being made: "context" waits for it, so
            that a question always has the same answer; "whole" answers at once, from the whole image.
        max_batch: The largest number of sequences that are decoded together.
        max_queue: The largest number of requests that may wait for a place in the batch.
        max_tokens: The longest answer that a request may ask for, in tokens.
        default_tokens: The longest answer, in tokens, if the request does not set it.
        max_body: The largest body of a request, in bytes.
        max_bodies: How many bytes the bodies of all requests in progress may hold.
        max_client_bodies: The same for the requests of one client: of one key, or without keys of one address.
        max_values: How many commas, colons and opening brackets a body may have, which bounds the values of its JSON.
        max_text: The longest text of a request, in characters: its messages and prompts together.
        max_client_requests: How many requests of one client are taken at once.
        open_rate: How many requests a second an address may send without an accepted key, on a server that has keys.
        max_pictures: The largest number of images and videos in a request.
        max_frames: The largest number of frames that are read of a video.
        max_pixels: The largest image, in pixels.
        max_request_pixels: How many pixels the images of one request have together.
        max_explanations: How many explanations may wait while two are made.
        max_client_explanations: How many explanations of one client are taken at once.
        explain_tokens: The longest answer that is explained, in tokens.
        time_limit: How many seconds an answer may take, its wait in the queue included.
        grace: How many seconds the server takes to stop, whatever it does.
        store: A folder or fsspec URL for contexts; None keeps them in memory only.
        memory_bytes: See `ContextStore`.
        disk_bytes: See `ContextStore`.
        storage: See `ContextStore`.
        remote_hosts: The hosts whose images may be fetched by URL, none by default. "images.example.org" allows this
            host; ".example.org" allows all hosts below it.
        remote_bytes: How many bytes the remote images of a request have together.
        remote_seconds: How many seconds fetching a remote image may take.

    Raises:
        InputError: A value is out of range.
    """

    keep: float | int | None = 0.05
    prompt: str = "Describe the image."
    score: str = "generated"
    describe_tokens: int = 64
    first_answer: str = "context"
    max_batch: int = 64
    max_queue: int = 256
    max_tokens: int = 1024
    default_tokens: int = 256
    max_body: int = 32 * MIB
    max_bodies: int = 256 * MIB
    max_client_bodies: int = 128 * MIB
    max_values: int = 100_000
    max_text: int = 400_000
    max_client_requests: int = 128
    open_rate: float = 100.0
    max_pictures: int = 8
    max_frames: int = 128
    max_pixels: int = 25_000_000
    max_request_pixels: int = 64_000_000
    max_explanations: int = 16
    max_client_explanations: int = 8
    explain_tokens: int = 256
    time_limit: float = 120.0
    grace: float = 30.0
    store: str | None = None
    memory_bytes: int = 1024 * MIB
    disk_bytes: int = 10 * 1024 * MIB
    storage: str = "full"
    remote_hosts: tuple[str, ...] = ()
    remote_bytes: int = 16 * MIB
    remote_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.max_body <= self.max_client_bodies <= self.max_bodies:
            raise InputError(
                f"max_body ({self.max_body:,}) is at most max_client_bodies ({self.max_client_bodies:,}), and that at"
                f" most max_bodies ({self.max_bodies:,})"
            )
        check_choice("first_answer", self.first_answer, ("context", "whole"))
        object.__setattr__(self, "score", score_name(self.score))
        if self.keep is not None:
            kept_count(self.keep, 1 << 62)
        if not self.prompt.strip():
            raise InputError("prompt is empty; give what the model is asked first about every image")
        least = {"memory_bytes": 0, "disk_bytes": 0, "open_rate": 0, "max_explanations": 0}
        for one in fields(self):
            given = getattr(self, one.name)
            if one.name == "keep" or not isinstance(given, (int, float)):
                continue
            if not least.get(one.name, 1e-3) <= given < math.inf:
                raise InputError(f"{one.name} is a positive number, got {given}")

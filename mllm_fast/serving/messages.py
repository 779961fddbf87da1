"""Convert the messages of a request into turns of text and images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..models.media import VIDEO, Part, Turn, words_of
from .errors import ServiceError
from .image_fetch import choice_of, video_address
from .schema import Message, TextPart, VideoPart
from .settings import Settings

_GREETING = "Hello."


@dataclass(frozen=True)
class Conversation:
    """A conversation about images.

    Attributes:
        turns: The turns, alternately of the user and of the assistant. The last one is the user's. In a turn, None
            stands for the next image of `urls`.
        urls: The URLs of the images and videos, in the order in which they appear; of videos `VideoAddress`es.
    """

    turns: tuple[Turn, ...]
    urls: tuple[str, ...]

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """A hash of each URL, and of the choice of a video's frames."""
        return tuple(
            hashlib.sha256(f"{choice_of(url)}{url}".encode("utf-8", "surrogatepass")).digest() for url in self.urls
        )

    @property
    def length(self) -> int:
        """The characters of all turns."""
        return sum(len(part) for _, parts in self.turns for part in words_of(parts))

    @property
    def spoken(self) -> list[Turn]:
        """The turns without the images, as they follow a context that already contains the images."""
        return [(role, [*words_of(parts)]) for role, parts in self.turns]


def check_length(length: int, settings: Settings) -> None:
    """Raise a ServiceError if a text has more characters than the settings allow."""
    if length > settings.max_text:
        raise ServiceError(413, f"the texts of a request have at most {settings.max_text:,} characters, got {length:,}")


def conversation(messages: Sequence[Message], settings: Settings) -> Conversation:
    """Convert the messages of a request into a conversation.

    System messages are put before the user's first text, because not every model has a system turn. Consecutive
    messages of one role become one turn. Images without a text are asked with the settings' `prompt`, and before a
    conversation that the assistant opens stands a greeting of the user, because many models' templates begin with one.

    Args:
        messages: The messages of the request.
        settings: The limits of images and text.

    Raises:
        ServiceError: The conversation does not end with the user, a turn has neither text nor image, an image is in a
            message of the assistant or the system, or there are too many images or too much text.
    """
    system: list[str] = []
    turns: list[Turn] = []
    urls: list[str] = []
    for i, message in enumerate(messages):
        parts: list[Part] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, (str, TextPart)):
                parts.append(part if isinstance(part, str) else part.text)
                continue
            if message.role != "user":
                raise _refused(i, f"images and videos are the user's to send, not the {message.role}'s")
            if isinstance(part, VideoPart):
                urls.append(video_address(part.video_url))
                parts.append(VIDEO)
            else:
                urls.append(part.image_url.url)
                parts.append(None)
        if message.role in ("system", "developer"):
            system += [part for part in words_of(parts) if part]
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend(["\n", *parts] if parts and isinstance(parts[0], str) else parts)
        else:
            turns.append((message.role, parts))
    _complete(turns, settings, len(messages) - 1)
    if len(urls) > settings.max_pictures:
        raise _refused(0, f"a request holds at most {settings.max_pictures} images and videos, got {len(urls)}")
    if system:
        first = turns[0][1]
        at = next(i for i, part in enumerate(first) if isinstance(part, str))
        first.insert(at, "\n".join(system) + "\n")
    found = Conversation(tuple((role, parts) for role, parts in turns), tuple(urls))
    check_length(found.length, settings)
    return found


def _complete(turns: list[Turn], settings: Settings, last: int) -> None:
    """Begin the turns with the user, and give each a text.

    Raises:
        ServiceError: The turns do not end with the user, or one has neither text nor image.
    """
    if not turns or turns[-1][0] != "user":
        raise _refused(last, "a conversation ends with a message of the user")
    if turns[0][0] != "user":
        turns.insert(0, ("user", [_GREETING]))
    for role, parts in turns:
        if not any(part.strip() for part in words_of(parts)):
            if len(words_of(parts)) == len(parts):
                raise _refused(last, f"a message of the {role} has no text")
            parts.append(settings.prompt)


def _refused(index: int, message: str) -> ServiceError:
    return ServiceError(400, message, param=f"messages[{index}]")

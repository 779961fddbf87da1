"""What a request's messages mean: turns of text, and images in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.processing import Turn
from .errors import ServiceError
from .schema import Message, TextPart


@dataclass(frozen=True)
class Conversation:
    """`turns`: of the user and of the assistant by turns, the last one the user's; None in them stands for the next of
    `urls`."""

    turns: tuple[Turn, ...]
    urls: tuple[str, ...]

    @property
    def spoken(self) -> list[Turn]:
        """The turns without the images: what follows a context that holds these."""
        return [(role, [part for part in parts if part is not None]) for role, parts in self.turns]


def conversation(messages: Sequence[Message], max_pictures: int) -> Conversation:
    """Read a request's messages. What the system says stands before the user's first words, since not every model has a
    place for it; messages of one role that follow one another are one turn.

    Raises:
        ServiceError: no question at the end, an image in the assistant's or the system's words, too many images.
    """
    system: list[str] = []
    turns: list[tuple[str, list[str | None]]] = []
    urls: list[str] = []
    for i, message in enumerate(messages):
        parts: list[str | None] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, (str, TextPart)):
                parts.append(part if isinstance(part, str) else part.text)
                continue
            if message.role != "user":
                raise _refused(i, f"images are the user's to send, not the {message.role}'s")
            urls.append(part.image_url.url)
            parts.append(None)
        if message.role in ("system", "developer"):
            system += [part for part in parts if part]
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend(["\n", *parts] if parts and parts[0] is not None else parts)
        else:
            turns.append((message.role, parts))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise _refused(len(messages) - 1, "a conversation begins and ends with a message of the user")
    for role, parts in turns:
        if not any(part and part.strip() for part in parts):
            raise _refused(len(messages) - 1, f"a message of the {role} has no text")
    if len(urls) > max_pictures:
        raise _refused(0, f"a request holds at most {max_pictures} images, got {len(urls)}")
    if system:
        first = turns[0][1]
        at = next(i for i, part in enumerate(first) if part is not None)
        first.insert(at, "\n".join(system) + "\n")
    return Conversation(tuple((role, parts) for role, parts in turns), tuple(urls))


def _refused(index: int, message: str) -> ServiceError:
    return ServiceError(400, message, param=f"messages[{index}]")

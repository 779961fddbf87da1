"""Prompts in two parts: what stands up to the last image, and the text behind it."""

from __future__ import annotations

from collections.abc import Sequence

from .media import VIDEO, Turn
from .processing import Prompts


def divided(prompts: Prompts, turns: Sequence[Turn]) -> tuple[str, str] | None:
    """Return a conversation as the chat template formats it, up to and after the last image or video.

    Returns:
        The two texts, or None if the text alone does not tell where the last image ends.
    """
    if any(part is VIDEO for _, parts in turns for part in parts) and not prompts.adapter.knows_videos:
        return None  # how many images it stands for is known once it is read
    marks: list[str] = []
    turns = prompts.typed.hide_turns(turns, marks)
    texts = {prompts.processor.tokenizer.convert_ids_to_tokens(prompts.image_tokens.image)}
    texts |= {mark for mark in [getattr(prompts.processor, "video_token", None)] if mark}
    spelled = prompts.spelled(turns)
    end = max((at + len(mark) for mark in texts if (at := spelled.rfind(mark)) >= 0), default=0)
    return (spelled[:end], spelled[end:]) if end and not marks else None


def ids_after_image(prompts: Prompts, text: str) -> list[int] | None:
    """Return the token ids of a text that follows an image's last token, or None if the tokenizer joins the two."""
    tokenizer, image = prompts.processor.tokenizer, prompts.image_tokens.image
    ids = tokenizer(tokenizer.convert_ids_to_tokens(image) + text, add_special_tokens=False).input_ids
    return ids[1:] if ids[:1] == [image] else None

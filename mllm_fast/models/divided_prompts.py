"""Prompts in two parts: what stands up to the last image, and the text behind it."""

from __future__ import annotations

from collections.abc import Sequence

from .processing import Prompts, Turn


def divided(prompts: Prompts, turns: Sequence[Turn]) -> tuple[str, str] | None:
    """Return a conversation as the chat template formats it, up to and after the last image.

    Returns:
        The two texts, or None if the text alone does not tell where the last image ends.
    """
    marks: list[str] = []
    turns = prompts.typed.hide_turns(turns, marks)
    mark = prompts.processor.tokenizer.convert_ids_to_tokens(prompts.image_tokens.image)
    before, found, after = prompts.spelled(turns).rpartition(mark)
    return (before + found, after) if found and not marks else None


def ids_after_image(prompts: Prompts, text: str) -> list[int] | None:
    """Return the token ids of a text that follows an image's last token, or None if the tokenizer joins the two."""
    tokenizer, image = prompts.processor.tokenizer, prompts.image_tokens.image
    ids = tokenizer(tokenizer.convert_ids_to_tokens(image) + text, add_special_tokens=False).input_ids
    return ids[1:] if ids[:1] == [image] else None

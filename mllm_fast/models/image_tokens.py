"""The token that stands for a piece of an image, and the tokens that open, close or divide an image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# names of attributes such as vision_start_token_id, boi_token, image_break_token, global_image_tag, tile_token
_NAME = re.compile(
    r"(?=.*(boi|eoi|vision_|image|img|tile|visual_indicator)).*(token|tag|token_ids?|token_index)$|row_col_ids$"
)
_IMAGE = ("image_token_id", "image_token_index", "image_token")
_VIDEO = ("video_token_id", "video_token_index")
_NONE = -1  # the id of no token


@dataclass(frozen=True)
class ImageTokens:
    """The token ids around images.

    Attributes:
        image: The token that stands for a piece of an image; -1 if the model has none.
        separators: The tokens that open, close or divide an image.
        video: The token that stands for a piece of a video; that of images if the model has no other.
    """

    image: int
    separators: frozenset[int]
    video: int = _NONE

    @property
    def both(self) -> frozenset[int]:
        """The tokens that stand for pieces of images and of videos."""
        return frozenset({self.image, self.video} - {_NONE}) or frozenset({self.image})


def image_tokens(model: Any, processor: Any) -> ImageTokens:
    """Return the token ids around images, as the model's config and its processor name them."""
    owners = model.config, processor
    named = [value for name in _IMAGE for owner in owners for value in _ids(getattr(owner, name, None), processor)]
    image = named[0] if named else _NONE
    found = [value for owner in owners for name in _names(owner) for value in _ids(getattr(owner, name), processor)]
    # a processor's video token may be a mark that becomes image tokens; the config names what the model replaces
    videos = [value for name in _VIDEO for value in _ids(getattr(model.config, name, None), processor)]
    video = videos[0] if videos else image
    return ImageTokens(image, frozenset([*found, *named]) - {image, video, _NONE}, video)


def _names(owner: Any) -> Iterator[str]:
    """Yield the names of an owner's attributes that name a token around images."""
    for name in vars(owner):
        if _NAME.match(name) and name not in _IMAGE:
            yield name


def _ids(value: Any, processor: Any) -> list[int]:
    """Return the token ids that a setting names: an id, several ids, or the text of a token."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, (list, tuple)):
        return [one for each in value for one in _ids(each, processor)]
    if not isinstance(value, str):
        return []
    tokenizer = processor.tokenizer
    found = tokenizer.convert_tokens_to_ids(value)
    if isinstance(found, int) and found != tokenizer.unk_token_id:
        return [found]
    # the beginning of numbered tokens, as TILE of TILE_1
    return [number for token, number in tokenizer.get_added_vocab().items() if token.startswith(f"{value}_")]

"""A judge that scores a description from 1 to 10 (arXiv 2405.14612, supplement, section 1.1).

The judge is a model behind an endpoint. It gets the image and the description.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from ..judges.endpoint import Endpoint

_SIDE = 512  # the longer side of the image that the judge gets is at most this many pixels
_INSTRUCTIONS = (
    "You are shown an image and a description of it. Say how well the description fits the image, as a whole number"
    " from 1 to 10: 10, all that matters is said and all that is said is true; 1, nothing of it is. Answer with the"
    " number alone."
)


class CaptionJudge:
    """A judge that asks a vision-language model behind an endpoint to score descriptions."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        prompt = hashlib.sha256(_INSTRUCTIONS.encode()).hexdigest()[:12]
        self.settings = {"judge": "caption score", "model": endpoint.model, "prompt": prompt}

    def score(self, picture: Image.Image, caption: str) -> tuple[int, int]:
        """Return the score of a description, 1 to 10, and the number of tokens it cost.

        Raises:
            Unanswered: All attempts gave no usable answer.
            EndsRunError: The endpoint refuses the key, the model or the request as such.
        """
        small = picture.copy()
        small.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        shown = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content: list[dict[str, Any]] = [
            {"type": "text", "text": f"The description: {caption}"},
            {"type": "image_url", "image_url": {"url": shown}},
        ]
        return self._endpoint.ask(
            [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": content}], parse_score
        )


def parse_score(text: str) -> int:
    """Return the score in a reply. Raises ValueError unless the reply is one whole number from 1 to 10."""
    match = re.fullmatch(r"\s*(\d{1,2})(?:\s*/\s*10)?\s*\.?\s*", text)
    if match is None or not 1 <= int(match[1]) <= 10:
        raise ValueError("not a whole number from 1 to 10")
    return int(match[1])

"""A judge's score of a description, 1 to 10 (arXiv 2405.14612, section 4): a model behind an endpoint is shown the
image and the description."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from ..judges.endpoint import Endpoint

_SIDE = 512  # pixels of the longer side that the judge is shown, at most
_INSTRUCTIONS = (
    "You are shown an image and a description of it. Say how well the description fits the image, as a whole number"
    " from 1 to 10: 10, all that matters is said and all that is said is true; 1, nothing of it is. Answer with the"
    " number alone."
)


class CaptionJudge:
    """Asks a model that sees images."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        prompt = hashlib.sha256(_INSTRUCTIONS.encode()).hexdigest()[:12]
        self.settings = {"judge": "caption score", "model": endpoint.model, "prompt": prompt}

    def score(self, picture: Image.Image, caption: str) -> tuple[int, int]:
        """The score of a description, and what it cost in tokens.

        Raises:
            Unanswered: no usable answer after all attempts.
            EndsRunError: the endpoint refuses the key, the model or the request as such.
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
    """Raises ValueError unless the reply is one whole number from 1 to 10."""
    match = re.fullmatch(r"\s*(\d{1,2})(?:\s*/\s*10)?\s*\.?\s*", text)
    if match is None or not 1 <= int(match[1]) <= 10:
        raise ValueError("not a whole number from 1 to 10")
    return int(match[1])

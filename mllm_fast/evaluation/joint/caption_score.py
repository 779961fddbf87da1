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

_INSTRUCTIONS = (
    "You are a fair and impartial judge of captions that an assistant wrote for images. Look at the image, and weigh"
    " whether the caption is helpful and to the point, whether what it says is true, and how deep and detailed it is."
    " Take no side. Answer with a whole number from 1 (worst) to 10 (best), and with nothing else."
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
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
        shown = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content: list[dict[str, Any]] = [
            {"type": "text", "text": f'The caption: "{caption}". Its score, 1 to 10?'},
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

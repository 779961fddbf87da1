"""A reader that answers from a description alone, with a language model without vision (arXiv 2411.17491, table 1)."""

from __future__ import annotations

import hashlib
from typing import Any

from .endpoint import Endpoint

_INSTRUCTIONS = (
    "You are given a description of a picture that you cannot see, and a question about the picture that is answered"
    " with yes or no. Answer it from the description, and where that does not tell, with what is more likely. Answer"
    ' with one word: "yes" or "no".'
)


class EndpointReader:
    """A reader that asks a language model behind an endpoint."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        prompt = hashlib.sha256(_INSTRUCTIONS.encode()).hexdigest()[:12]
        self.settings: dict[str, Any] = {"model": endpoint.model, "prompt": prompt}

    def answer(self, description: str, question: str) -> tuple[str, int]:
        """Return the answer to a question about a description, and the number of tokens it cost.

        Raises:
            Unanswered: All attempts gave no usable answer.
            EndsRunError: See `Endpoint.ask`.
        """
        asked = f"Description: {description}\nQuestion: {question}"
        return self._endpoint.ask(
            [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": asked}], str.strip
        )

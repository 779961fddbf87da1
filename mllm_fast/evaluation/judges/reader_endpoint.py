"""Answers from a description alone: what a language model that cannot see makes of it (arXiv 2411.17491, table 1)."""

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
    """Asks a language model."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        prompt = hashlib.sha256(_INSTRUCTIONS.encode()).hexdigest()[:12]
        self.settings: dict[str, Any] = {"model": endpoint.model, "prompt": prompt}

    def answer(self, description: str, question: str) -> tuple[str, int]:
        """What it says, and the tokens that cost.

        Raises:
            Unanswered: nothing, after all attempts. EndsRunError: see `Endpoint.ask`.
        """
        asked = f"Description: {description}\nQuestion: {question}"
        return self._endpoint.ask(
            [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": asked}], str.strip
        )

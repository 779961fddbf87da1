"""A judge that asks a language model behind an endpoint. A reply that cannot be read is asked for again."""

from __future__ import annotations

import hashlib
import json

from ...core.errors import check_choice
from . import object_lists, object_pairs
from .endpoint import Endpoint, Unanswered
from .judge import Comparison, Unjudged

STYLES = {"lists": object_lists, "pairs": object_pairs}


class EndpointJudge:
    """A judge that asks a language model which objects two descriptions share.

    Args:
        endpoint: The language model.
        style: How it is asked. "lists": as in arXiv 2411.17491 (figure A2), it thinks in words first and then lists
            the objects, of which properties do not count. "pairs": it gives JSON, and properties count.

    Raises:
        InputError: There is no such style.
    """

    def __init__(self, endpoint: Endpoint, style: str = "lists"):
        check_choice("style", style, list(STYLES))
        self._endpoint, self._style = endpoint, style
        told = json.dumps([STYLES[style].INSTRUCTIONS, STYLES[style].EXAMPLES])
        prompt = hashlib.sha256(told.encode()).hexdigest()[:12]
        self.settings = {"judge": "endpoint", "model": endpoint.model, "style": style, "prompt": prompt}

    def compare(self, reference: str, said: str) -> Comparison:
        """Compare the objects of two descriptions.

        Raises:
            Unjudged: All attempts gave no usable answer.
            EndsRunError: The endpoint refuses the key, the model or the request as such.
        """
        style = STYLES[self._style]
        try:
            found, tokens = self._endpoint.ask(style.messages(reference, said), style.parse)
        except Unanswered as error:
            raise Unjudged(str(error), error.tokens) from None
        return found._replace(tokens=tokens)

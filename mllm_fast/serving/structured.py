"""Answers that follow a JSON schema: at each token, those that the schema does not allow are ruled out.

llguidance (https://github.com/guidance-ai/llguidance) turns a schema into the tokens that are allowed next.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .errors import ServiceError
from .schema import JsonSchemaFormat, ResponseFormat
from .schema_check import schema_error

_ANY_OBJECT = {"type": "object"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # no answer of spaces alone
_VERDICTS = 64  # schemas whose check is remembered
_LONGEST = 65_536  # characters of a schema


class Constraint:
    """Which tokens may come next in one answer.

    Args:
        matcher: llguidance's matcher; its errors end the answer.
        size: The number of logits.
    """

    def __init__(self, matcher: Any, size: int):
        self._matcher, self._size = matcher, size

    def masked(self, logits: Tensor) -> Tensor:
        """Return the logits [V] with those of the tokens that are ruled out at minus infinity.

        Raises:
            ServiceError: No token of the vocabulary can go on.
        """
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)).bitwise_and_(1).flatten().bool()
        allowed = torch.zeros(self._size, dtype=torch.bool)
        count = min(self._size, len(bits))
        allowed[:count] = bits[:count]
        if self._matcher.is_error() or not bool(allowed.any()):
            raise _refused(
                "this model's vocabulary cannot write the answer that the schema asks for"
                f" {self._matcher.get_error()[:200]}".rstrip()
            )
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on with a token."""
        self._matcher.consume_token(token)


class Constraints:
    """Makes the constraints of a model's answers.

    Args:
        tokenizer: The model's tokenizer.
        end_ids: The token ids that end an answer.
        size: The number of logits.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int], size: int):
        self._tokenizer, self._end_ids, self._size = tokenizer, sorted(end_ids), size
        self._made: Any = None
        self._verdicts: OrderedDict[str, str] = OrderedDict({json.dumps(_ANY_OBJECT): ""})

    def of(self, wanted: ResponseFormat | None) -> Constraint | None:
        """Return the constraint of a request's format; None if any text will do. For use in one thread.

        Raises:
            ServiceError: llguidance is not installed, or it cannot read the schema or the tokenizer.
        """
        if wanted is None or wanted.type == "text":
            return None
        if find_spec("llguidance") is None:
            raise _refused(f"{wanted.type} is off here, since the server has no llguidance (mllm-fast[structured])")
        from llguidance import LLMatcher

        schema = wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else _ANY_OBJECT
        text = json.dumps(schema)
        if len(text) > _LONGEST:
            raise _refused(f"a schema has at most {_LONGEST:,} characters, got {len(text):,}")
        error = self._error(text)
        if not error:
            try:
                grammar = LLMatcher.grammar_from_json_schema(text, defaults=_COMPACT)  # type: ignore[arg-type]
                matcher = LLMatcher(self._tokens(), grammar)
                error = matcher.get_error() if matcher.is_error() else ""
            except (ValueError, RuntimeError) as problem:  # a tokenizer that llguidance does not take
                error = str(problem)
        if error:
            raise _refused(f"the schema cannot be followed: {error.splitlines()[0][:300]}")
        return Constraint(matcher, self._size)

    def _error(self, text: str) -> str:
        """Return what is wrong with a schema; the verdicts on the latest ones are remembered."""
        if text not in self._verdicts:
            self._verdicts[text] = schema_error(text, _COMPACT)
            if len(self._verdicts) > _VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(text)
        return self._verdicts[text]

    def _tokens(self) -> Any:
        if self._made is None:
            from llguidance.hf import from_tokenizer

            self._made = from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=self._end_ids)
        return self._made


def _refused(message: str) -> ServiceError:
    return ServiceError(400, message, param="response_format")

"""Ask a language model behind any endpoint that speaks OpenAI's protocol, through the `openai` client.

An answer that cannot be read is asked for again. Answers are cached in a folder under a hash of the question, so that
nothing is paid for twice. No key is written or logged anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import EndsRunError, first_line
from ...core.extras import install_command
from ...core.files import write_whole
from .replies import without_reasoning

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]


def cost(tokens: int, price: float | None) -> str:
    """Return a text with the number of tokens and their cost. `price` is in dollars per million tokens."""
    return f"{tokens:,} tokens" if price is None else f"{tokens:,} tokens, about ${tokens * price / 1e6:,.2f}"


class Unanswered(Exception):  # noqa: N818
    """Raised when all attempts gave no usable answer. `tokens` is what they cost."""

    def __init__(self, why: str, tokens: int = 0):
        super().__init__(why)
        self.tokens = tokens


class Endpoint:
    """A language model behind an endpoint.

    Args:
        model: The name of the model at the endpoint.
        base_url, api_key: The address and key of the endpoint. By default the client reads OPENAI_BASE_URL and
            OPENAI_API_KEY.
        cache: A folder for answers; None keeps none.
        attempts: How often a question is asked before it counts as unanswered.
        timeout: The time limit of one request, in seconds.
        pause: The pause before the second attempt, in seconds. It doubles before each further attempt.

    Raises:
        EndsRunError: The `openai` package is not installed, or no key is given.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        cache: Path | None = None,
        attempts: int = 5,
        timeout: float = 60.0,
        pause: float = 1.0,
    ):
        self.model, self.base_url = model, base_url
        self._key, self._cache = api_key, cache
        self._attempts, self._timeout, self._pause = attempts, timeout, pause
        self._options: dict[str, Any] = {"temperature": 0}
        self._client: Any = None
        self._answered = False  # after one answer, a refusal must be due to the question, not the key or model
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}  # a connection belongs to one process

    def ask(self, messages: Messages, read: Callable[[str], T]) -> tuple[T, int]:
        """Ask the model, and read its reply.

        Args:
            messages: The messages to send.
            read: A function that reads the reply, which comes without a model's reasoning. It raises ValueError for a
                reply that cannot be read.

        Returns:
            The result of `read`, and the number of tokens that all attempts cost.

        Raises:
            Unanswered: All attempts gave no usable reply.
            EndsRunError: The endpoint refuses the key, the model or the request as such.
        """
        kept = self._kept(messages)
        if kept is not None and kept.exists():
            with contextlib.suppress(ValueError):  # another `read` may have accepted this reply
                return read(without_reasoning(kept.read_text())), 0
        tokens, why = 0, ""
        for attempt in range(self._attempts):
            wait = self._pause * 2**attempt
            try:
                text, used = self._reply(messages)
                tokens += used
                found = _read(text, read)
            except _Again as again:
                why, wait = str(again), max(wait, again.after)
                tokens += again.tokens
            else:
                if kept is not None:
                    write_whole(kept, text.encode())
                return found, tokens
            if attempt + 1 < self._attempts:
                time.sleep(min(wait, 60.0))
        raise Unanswered(f"{why} ({self._attempts} attempts)", tokens)

    def _reply(self, messages: Messages) -> tuple[str, int]:
        """Return the text of one reply, and the number of tokens it cost."""
        import openai

        try:
            reply = self._connect().chat.completions.create(model=self.model, messages=messages, **self._options)
        except openai.APITimeoutError:
            raise _Again(f"no answer within {self._timeout:g} s") from None
        except openai.APIConnectionError:
            raise _Again("no connection") from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (400, 422) and self._options and _is_about_temperature(error):
                self._options = {}  # some models take none but their own
                return self._reply(messages)
            if status in (408, 409, 429) or status >= 500:
                raise _Again(f"status {status}", _seconds(error.response.headers.get("retry-after"))) from None
            if status in (400, 413, 422) and self._answered:
                raise Unanswered(f"status {status}{_told(error)}") from None
            raise EndsRunError(
                f"the endpoint refused the request with status {status}{_told(error)}; see its key and model"
            ) from None
        if not hasattr(reply, "choices"):
            raise EndsRunError(f"{self.base_url}: does not speak OpenAI's protocol; see --judge-url") from None
        self._answered = True
        tokens = reply.usage.total_tokens if reply.usage else 0
        message = reply.choices[0].message if reply.choices else None
        if message is None or getattr(message, "refusal", None) or not message.content:
            raise _Again("the model refused or said nothing", tokens=tokens)
        return message.content, tokens

    def _connect(self) -> Any:
        if self._client is None:
            try:
                import openai
            except ImportError:
                raise EndsRunError(f"an endpoint needs openai: {install_command('judge')}") from None
            try:
                self._client = openai.OpenAI(
                    base_url=self.base_url, api_key=self._key, timeout=self._timeout, max_retries=0
                )
            except openai.OpenAIError:
                raise EndsRunError("the endpoint needs a key: set OPENAI_API_KEY") from None
        return self._client

    def _kept(self, messages: Messages) -> Path | None:
        if self._cache is None:
            return None
        self._cache.mkdir(parents=True, exist_ok=True)
        asked = json.dumps([self.model, self.base_url, messages])
        return self._cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"


class _Again(Exception):  # noqa: N818
    """Raised when another attempt may succeed, after `after` seconds. `tokens` is what this attempt cost."""

    def __init__(self, why: str, after: float = 0.0, tokens: int = 0):
        super().__init__(why)
        self.after, self.tokens = after, tokens


def _read(text: str, read: Callable[[str], T]) -> T:
    try:
        return read(without_reasoning(text))
    except ValueError as error:
        raise _Again(f"the answer cannot be read: {first_line(error)}") from None


def _is_about_temperature(error: Any) -> bool:
    return error.param == "temperature" or "temperature" in str(error.body)[:2000].lower()


def _told(error: Any) -> str:
    """Return the error's code and parameter if they are plain words. Its message may repeat a part of the key."""
    words = [
        word for word in (error.code, error.param) if isinstance(word, str) and re.fullmatch(r"[a-z_.]{1,40}", word)
    ]
    return f" ({', '.join(words)})" if words else ""


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0

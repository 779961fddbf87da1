"""The judge that asks a language model: any endpoint that speaks OpenAI's protocol, through the `openai` client.

What comes back must be JSON of one form, or it is asked for again. Answers are kept in a folder by what was asked, so
that nothing is paid for twice. No key is written or logged anywhere.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EndsRunError, first_line
from ..files import write_whole
from .judge import Comparison, Unjudged

_INSTRUCTIONS = """\
You compare two descriptions of one picture, A and B, by the physical objects they name.

List every object that A says is in the picture, and every object that B says is there. An object is a thing, person \
or animal, named by a short noun phrase; colours and other properties belong to it. "Two dogs" are two entries. What \
is said to be absent is no object, nor is a feeling, a style or the picture itself.

Then pair each object of B with at most one object of A, and each of A with at most one of B, if both may well be the \
same thing: synonyms and more or less general words pair ("puppy" with "dog"), and so do phrases of which only one \
tells a property; two that contradict each other ("a red car", "a blue car") do not.

Answer with one JSON object and nothing else: {"a": [objects of A], "b": [objects of B], "pairs": [[i, j], ...]}, \
where i and j count the entries of "a" and "b" from 0."""
_EXAMPLES = (
    (
        "A brown puppy lies on a couch beside a red ball.",
        "There is a dog on a sofa. A lamp stands in the corner.",
        {
            "a": ["brown puppy", "couch", "red ball"],
            "b": ["dog", "sofa", "lamp"],
            "pairs": [[0, 0], [1, 1]],
        },
    ),
    (
        "Two women wait at a bus stop; one holds an umbrella.",
        "A woman with a green umbrella, no bus in sight.",
        {"a": ["woman", "woman", "bus stop", "umbrella"], "b": ["woman", "green umbrella"], "pairs": [[0, 0], [3, 1]]},
    ),
    (
        "A white truck drives past a field.",
        "a calm and pleasant scene, a black truck",
        {"a": ["white truck", "field"], "b": ["black truck"], "pairs": []},
    ),
)


class EndpointJudge:
    """Asks a language model which objects two descriptions share.

    Args:
        model: its name there.
        base_url, api_key: of the endpoint; the client's own by default (OPENAI_BASE_URL, OPENAI_API_KEY).
        cache: a folder for answers.
        attempts: how often one question is asked before it counts as unjudged.
        timeout: of one request, in seconds. pause: before the second attempt, doubled before each other one.

    Raises:
        InputError: the `openai` package is not there, or no key is given.
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
        self._client: Any = None
        self._connect()
        told = json.dumps([_INSTRUCTIONS, _EXAMPLES])
        self.settings = {"judge": "endpoint", "model": model, "prompt": hashlib.sha256(told.encode()).hexdigest()[:12]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}  # a connection belongs to one process

    def compare(self, reference: str, said: str) -> Comparison:
        """Of two descriptions.

        Raises:
            Unjudged: no usable answer after all attempts.
            EndsRunError: the endpoint refuses the key, the model or the request as such.
        """
        messages = _messages(reference, said)
        kept = self._kept(messages)
        if kept is not None and kept.exists():
            return parse(kept.read_text())
        tokens, why = 0, ""
        for attempt in range(self._attempts):
            wait = self._pause * 2**attempt
            try:
                text, used = self._ask(messages)
                tokens += used
                found = _read(text)
            except _Again as again:
                why, wait = str(again), max(wait, again.after)
                tokens += again.tokens
            else:
                if kept is not None:
                    write_whole(kept, text.encode())
                return found._replace(tokens=tokens)
            if attempt + 1 < self._attempts:
                time.sleep(min(wait, 60.0))
        raise Unjudged(f"{why} ({self._attempts} attempts)", tokens)

    def _ask(self, messages: list[dict[str, str]]) -> tuple[str, int]:
        """The text of one reply, and the tokens it cost."""
        import openai

        try:
            reply = self._connect().chat.completions.create(model=self.model, messages=messages, temperature=0)
        except openai.APITimeoutError:
            raise _Again(f"no answer within {self._timeout:g} s") from None
        except openai.APIConnectionError:
            raise _Again("no connection") from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (408, 409, 429) or status >= 500:
                raise _Again(f"status {status}", _seconds(error.response.headers.get("retry-after"))) from None
            # the message of a refusal may repeat a part of the key
            raise EndsRunError(
                f"the judge's endpoint refused the request with status {status}; see its key and model"
            ) from None
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
                raise EndsRunError("this judge needs openai: pip install 'mllm-fast[judge]'") from None
            try:
                self._client = openai.OpenAI(
                    base_url=self.base_url, api_key=self._key, timeout=self._timeout, max_retries=0
                )
            except openai.OpenAIError:
                raise EndsRunError("the judge's endpoint needs a key: set OPENAI_API_KEY") from None
        return self._client

    def _kept(self, messages: Sequence[dict[str, str]]) -> Path | None:
        if self._cache is None:
            return None
        self._cache.mkdir(parents=True, exist_ok=True)
        asked = json.dumps([self.model, self.base_url, messages])
        return self._cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"


class _Again(Exception):  # noqa: N818
    """Worth another attempt, after so many seconds; what this one cost."""

    def __init__(self, why: str, after: float = 0.0, tokens: int = 0):
        super().__init__(why)
        self.after, self.tokens = after, tokens


def _read(text: str) -> Comparison:
    try:
        return parse(text)
    except ValueError as error:
        raise _Again(f"the answer cannot be read: {first_line(error)}") from None


def parse(text: str) -> Comparison:
    """The comparison of a reply; a fence around the JSON is taken off.

    Raises:
        ValueError: not JSON, not of the form asked for, or an object paired twice.
    """
    lines = text.strip().splitlines()
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1] == "```":
        text = "\n".join(lines[1:-1])
    found = json.loads(text)
    if not isinstance(found, dict) or set(found) != {"a", "b", "pairs"}:
        raise ValueError('not an object of "a", "b" and "pairs"')
    for name in ("a", "b"):
        if not isinstance(found[name], list) or not all(isinstance(entry, str) for entry in found[name]):
            raise ValueError(f'"{name}" is no list of texts')
    pairs = found["pairs"]
    if not isinstance(pairs, list) or not all(_is_pair(pair, len(found["a"]), len(found["b"])) for pair in pairs):
        raise ValueError('"pairs" are not pairs of places in "a" and "b"')
    for side in (0, 1):
        if len({pair[side] for pair in pairs}) < len(pairs):
            raise ValueError("an object is paired twice")
    return Comparison(found["a"], found["b"], [found["b"][j] for _, j in pairs])


def _is_pair(pair: Any, first: int, second: int) -> bool:
    if not isinstance(pair, list) or [type(i) for i in pair] != [int, int]:
        return False
    return 0 <= pair[0] < first and 0 <= pair[1] < second


def _messages(reference: str, said: str) -> list[dict[str, str]]:
    ask = lambda a, b: {"role": "user", "content": f"A: {json.dumps(a)}\nB: {json.dumps(b)}"}  # noqa: E731
    messages = [{"role": "system", "content": _INSTRUCTIONS}]
    for a, b, reply in _EXAMPLES:
        messages += [ask(a, b), {"role": "assistant", "content": json.dumps(reply)}]
    return [*messages, ask(reference, said)]


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0

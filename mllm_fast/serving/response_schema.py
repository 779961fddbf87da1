"""Requests of OpenAI's Responses interface, and the chat requests that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from .errors import ServiceError
from .schema import (
    ChatRequest,
    ImagePart,
    ImageURL,
    JsonFormat,
    JsonSchema,
    JsonSchemaFormat,
    Keep,
    Message,
    ResponseFormat,
    StreamOptions,
    Strict,
    TextFormat,
    TextPart,
    Texts,
    VideoPart,
    format_type,
    text_or_list,
    union,
)

RESPONSE_IGNORED = (
    "metadata",
    "user",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "reasoning",
    "include",
    "parallel_tool_calls",
)


class InputText(Strict):
    """A piece of text. Answers that are sent back have the type "output_text"."""

    type: Literal["input_text", "output_text", "text"]
    text: Texts
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Strict):
    """An image, by its data URL or an https URL if the server allows its host."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"

    @field_validator("image_url", mode="before")
    @classmethod
    def _a_text(cls, given: Any) -> Any:
        if isinstance(given, dict):
            raise PydanticCustomError("image_url", "the URL itself is expected, got an object")
        return given


def _part_type(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    if kind in ("input_text", "output_text", "text"):
        return "=text"
    return "=image" if kind == "input_image" else None


InputPart = Annotated[
    Annotated[InputText, Tag("=text")] | Annotated[InputImage, Tag("=image")],
    union(_part_type, 'an object with "type": "input_text", "output_text" or "input_image" is expected'),
]


class InputMessage(Strict):
    """A message, or an answer of the assistant that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Texts, Tag("=text")] | Annotated[list[InputPart], Field(min_length=1, max_length=256), Tag("=list")],
        union(text_or_list, "a text, or a list of texts and images, is expected"),
    ]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


class ItemReference(Strict):
    """An earlier answer, by the id of its message. The latest answers are remembered, unless `store` was false."""

    type: Literal["item_reference"]
    id: Annotated[str, Field(max_length=200)]


def _item_type(given: Any) -> str | None:
    kind = given.get("type", "message") if isinstance(given, dict) else getattr(given, "type", None)
    return f"={kind}" if kind in ("message", "item_reference") else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("=message")] | Annotated[ItemReference, Tag("=item_reference")],
    union(_item_type, 'a message, or an object with "type": "item_reference", is expected'),
]


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)] = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


AnswerFormat = Annotated[
    Annotated[TextFormat, Tag("=text")]
    | Annotated[JsonFormat, Tag("=json_object")]
    | Annotated[SchemaFormat, Tag("=json_schema")],
    union(format_type, 'an object with "type": "text", "json_object" or "json_schema" is expected'),
]


class TextOptions(Strict):
    """Options of the answer's text."""

    format: AnswerFormat | None = None
    verbosity: str | None = None


class ResponseRequest(Strict):
    """A request for a response, with the additional fields `keep` and `context`.

    - `input`: the question, or the messages of a conversation; earlier answers may be named by their ids.
    - `store`: whether the answer is remembered for that, which it is by default.
    - `instructions`: what a system message would say.
    - `max_output_tokens`, `temperature`, `top_p`, `stream`, `keep`, `context`: as in a chat request.

    `metadata`, `user`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `reasoning`, `include` and
    `parallel_tool_calls` are accepted and have no effect; the header `x-ignored-parameters` names those that were sent.
    """

    model: Annotated[str, Field(max_length=1000)] = ""
    input: Annotated[
        Annotated[Texts, Tag("=text")] | Annotated[list[InputItem], Field(min_length=1, max_length=256), Tag("=list")],
        union(text_or_list, "a text, or a list of messages, is expected"),
    ]
    instructions: Texts | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    keep: Keep | None = None
    context: Annotated[str, Field(max_length=200)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


def chat_request(request: ResponseRequest, reply: Callable[[str], str]) -> ChatRequest:
    """Return the chat request that stands for a response's.

    Args:
        request: The request.
        reply: Returns the text of an earlier answer, given its id.

    Raises:
        ServiceError: The chat request would be invalid, for example of too many messages.
    """
    try:
        return _chat_request(request, reply)
    except ValidationError as error:
        raise ServiceError(400, f"the input: {error.errors()[0]['msg']}", param="input") from None


def _chat_request(request: ResponseRequest, reply: Callable[[str], str]) -> ChatRequest:
    messages = [] if request.instructions is None else [Message(role="system", content=request.instructions)]
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
    else:
        messages += [
            Message(role="assistant", content=reply(one.id))
            if isinstance(one, ItemReference)
            else Message(role=one.role, content=_content(one))
            for one in request.input
        ]
    return ChatRequest(
        model=request.model,
        messages=messages,
        keep=request.keep,
        context=request.context,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stream=request.stream,
        response_format=_format(request),
    )


def _format(request: ResponseRequest) -> ResponseFormat | None:
    wanted = None if request.text is None else request.text.format
    if not isinstance(wanted, SchemaFormat):
        return wanted
    schema = JsonSchema(name=wanted.name, schema=wanted.schema_, strict=wanted.strict)
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


def _content(message: InputMessage) -> str | list[TextPart | ImagePart | VideoPart]:
    if isinstance(message.content, str):
        return message.content
    return [
        TextPart(type="text", text=part.text)
        if isinstance(part, InputText)
        else ImagePart(type="image_url", image_url=ImageURL(url=part.image_url, detail=part.detail))
        for part in message.content
    ]

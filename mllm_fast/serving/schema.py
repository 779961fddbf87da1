"""Requests and answers of the HTTP interface: OpenAI's, and what is added to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from ..context.registry import PRUNING_SCORES, score_name
from ..explain.registry import methods_without_detector

_TEXT = 1_000_000  # characters; the model's window is far smaller
ScoreName = Annotated[
    str, AfterValidator(score_name), WithJsonSchema({"type": "string", "enum": [*PRUNING_SCORES.names()]})
]
MethodName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*methods_without_detector()]})]


class _Strict(BaseModel):
    """Unknown fields are refused: what is not honoured is not accepted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class ImageURL(_Strict):
    """An image: `url` is a data URL ("data:image/png;base64,...")."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    """Some text of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=_TEXT)]


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=_TEXT)] | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: str | None = None


class StreamOptions(_Strict):
    """`include_usage`: a last piece of the stream with the counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


Keep = Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1, le=1 << 31)] | Literal["off"]


class ChatRequest(_Strict):
    """As OpenAI's chat completions, with `keep` and `context` added."""

    model: Annotated[str, Field(max_length=1000)] = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    keep: Keep | None = Field(
        None,
        description="Image tokens that the image's context keeps in each layer: a share (0.05), a count (29), or"
        ' "off" to answer from the whole image; the server\'s own setting if not given.',
    )
    context: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="The id of a context, in place of images in the messages."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0, the default: no sampling.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(max_length=200)]
        | Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # what OpenAI's clients may send and nothing hangs on
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # accepted as long as they ask for nothing
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class ContextRequest(_Strict):
    """Images to be read and kept, before anybody asks about them."""

    images: Annotated[list[ImageURL], Field(min_length=1, max_length=64)]
    keep: Annotated[float, Field(gt=0, le=1)] | Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=_TEXT)] | None = None
    score: ScoreName | None = None


class ExplanationRequest(_Strict):
    """An answer to be explained: the model's own, or a given one."""

    model: Annotated[str, Field(max_length=1000)] = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=2)] = Field(
        description="One question, with its images; a system message may come before it."
    )
    answer: Annotated[str, Field(min_length=1, max_length=_TEXT)] | None = Field(
        None, description="The text to be explained in place of the model's own answer."
    )
    format: Literal["json", "png", "html", "safetensors"] = "json"
    token: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = Field(
        None, description="The index of one token of the answer, for an image of it alone."
    )
    method: MethodName = "logprob"
    norm: Literal["frozen", "own"] = "frozen"
    knockout: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=16)] = Field(
        default_factory=list, description='Attention that is knocked out: "image->query+generated@from 4".'
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class Details(BaseModel):
    """`cached_tokens`: of the prompt, those that were read before, for an earlier question."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of the whole prompt, and of the answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: Details = Details()


class ContextInfo(BaseModel):
    """A context: tokens that it keeps of those that were read, and bytes of its keys and values."""

    id: str
    object: Literal["context"] = "context"
    tokens: int
    prefix_tokens: int
    bytes: int
    uncompressed_bytes: int
    prompt: str | None = None
    description: str | None = None
    keep: float | int | None = None
    score: str | None = None
    images: list[list[int]] | None = None
    kept: list[dict[str, Any]] | None = None

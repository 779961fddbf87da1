"""Requests and answers of the HTTP interface: OpenAI's format, with a few additional fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..context.registry import PRUNING_SCORES, score_name
from ..explain.registry import methods_without_detector

_TEXT = 1_000_000  # characters; the context window of any model is far smaller
Texts = Annotated[str, Field(max_length=_TEXT)]
ScoreName = Annotated[
    str, AfterValidator(score_name), WithJsonSchema({"type": "string", "enum": [*PRUNING_SCORES.names()]})
]
MethodName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*methods_without_detector()]})]


class Strict(BaseModel):
    """A model that rejects unknown fields, so that no setting of a client is silently ignored.

    A field whose value is null counts as absent, known or not: clients send back what they received.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


BRANCH = "="  # the first letter of the tags of a union, which are left out where an error is reported


def union(choose: Callable[[Any], str | None], words: str) -> Discriminator:
    """Return how a value's type chooses the branch of a union, so that an error names the field and not each branch."""
    return Discriminator(choose, custom_error_type="wrong_type", custom_error_message=words)


def text_or_list(given: Any) -> str | None:
    return "=text" if isinstance(given, str) else "=list" if isinstance(given, list) else None


class ImageURL(Strict):
    """The address of an image.

    - `url`: a data URL (`data:image/png;base64,...`), or an https URL if the server allows its host.
    - `detail`: accepted for OpenAI's clients; it has no effect.
    """

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class VideoURL(Strict):
    """The address of a video.

    - `url`: a data URL (`data:video/mp4;base64,...`), or an https URL if the server allows its host.
    - `num_frames`, `fps`: how many frames are read, or how many a second; by default what the model's processor says.
    """

    url: str
    num_frames: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> VideoURL:
        if self.num_frames is not None and self.fps is not None:
            raise PydanticCustomError("video_url", "num_frames or fps is expected, got both")
        return self


class TextPart(Strict):
    """A piece of text in a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=_TEXT)]


class ImagePart(Strict):
    """An image in a message. Only messages of the user may have images."""

    type: Literal["image_url"]
    image_url: ImageURL

    @field_validator("image_url", mode="before")
    @classmethod
    def _an_object(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise PydanticCustomError("image_url", 'an object {"url": "..."} is expected, got a text')
        return given


class VideoPart(Strict):
    """A video in a message. Only messages of the user may have videos."""

    type: Literal["video_url"]
    video_url: VideoURL

    @field_validator("video_url", mode="before")
    @classmethod
    def _an_object(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise PydanticCustomError("video_url", 'an object {"url": "..."} is expected, got a text')
        return given


def _part_type(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"={kind}" if kind in ("text", "image_url", "video_url") else None


Part = Annotated[
    Annotated[TextPart, Tag("=text")]
    | Annotated[ImagePart, Tag("=image_url")]
    | Annotated[VideoPart, Tag("=video_url")],
    union(_part_type, 'an object with "type": "text", "type": "image_url" or "type": "video_url" is expected'),
]


class Message(Strict):
    """One message of a conversation.

    - `role`: who speaks. The conversation ends with a message of the user.
    - `content`: a text, or a list of texts, images and videos.
    - `name`: accepted for OpenAI's clients; it has no effect.
    - `annotations`, `tool_calls`: accepted only if empty, as answers are sent back.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Texts, Tag("=text")] | Annotated[list[Part], Field(min_length=1, max_length=256), Tag("=list")],
        union(text_or_list, "a text, or a list of texts and images, is expected"),
    ]
    name: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Strict):
    """Options of a streamed answer.

    - `include_usage`: whether to send the token counts in an additional last chunk.
    - `include_obfuscation`: accepted for OpenAI's clients; it has no effect.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


def _number_type(given: Any) -> str | None:
    if isinstance(given, bool):
        return None
    return "=share" if isinstance(given, float) else "=count" if isinstance(given, int) else None


def _keep_type(given: Any) -> str | None:
    return "=off" if isinstance(given, str) else _number_type(given)


_Share = Annotated[float, Field(gt=0, le=1), Tag("=share")]
_Count = Annotated[int, Field(ge=1, le=1 << 31), Tag("=count")]
Keep = Annotated[
    _Share | _Count | Annotated[Literal["off"], Tag("=off")],
    union(_keep_type, 'a share (0.05), a count (29) or "off" is expected'),
]
_Stop = Annotated[str, Field(max_length=200)]


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A JSON schema. It is always followed to the letter, whatever `strict` says."""

    name: Annotated[str, Field(max_length=64)] = ""
    description: Annotated[str, Field(max_length=_TEXT)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonFormat | JsonSchemaFormat


def format_type(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"={kind}" if kind in ("text", "json_object", "json_schema") else None


class ChatRequest(Strict):
    """A chat completion request in OpenAI's format, with the additional fields `keep` and `context`.

    - `model`: the name of the served model; empty for whichever model is served.
    - `messages`: the conversation. The server answers its last message.
    - `keep`: how many image tokens to keep in each layer.
    - `context`: the id of a context to ask about, in place of images.
    - `max_completion_tokens`, `max_tokens`: the longest answer, in tokens. The first one takes precedence.
    - `temperature`, `top_p`, `seed`: how tokens are sampled. Without a temperature the checkpoint's generation config
      says whether they are.
    - `stop`: up to four texts. The answer ends before the first of them.
    - `logprobs`, `top_logprobs`: whether to send the log-probability of each token, and those of how many of the most
      likely tokens (at most 20).
    - `n`: how many answers, up to 8. They differ only if tokens are sampled.
    - `response_format`: any text, a JSON object, or JSON that follows a schema.
    - `stream`: whether to send the answer as server-sent events.

    `user`, `metadata`, `store`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `reasoning_effort`,
    `verbosity`, `prediction` and `parallel_tool_calls` are accepted and have no effect; the header
    `x-ignored-parameters` of the answer names those that were sent. `frequency_penalty`, `presence_penalty`,
    `logit_bias`, `tools`, `tool_choice` and `modalities` are accepted only with the values that change nothing.
    """

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
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0: no sampling; by default as the checkpoint's generation config says."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: (
        Annotated[
            Annotated[_Stop, Tag("=text")] | Annotated[list[_Stop], Field(max_length=4), Tag("=list")],
            union(text_or_list, "a text, or a list of up to four, is expected"),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # fields that OpenAI's clients may send and that have no effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # fields that are accepted only with the values that change nothing
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: (
        Annotated[
            Annotated[TextFormat, Tag("=text")]
            | Annotated[JsonFormat, Tag("=json_object")]
            | Annotated[JsonSchemaFormat, Tag("=json_schema")],
            union(format_type, 'an object with "type": "text", "json_object" or "json_schema" is expected'),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is for requests with logprobs: true")
        return self


CHAT_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "reasoning_effort",
    "verbosity",
    "prediction",
    "parallel_tool_calls",
)


def ignored(request: BaseModel, names: Sequence[str]) -> str:
    """Return which of some fields, those without an effect, a request has, with commas."""
    return ", ".join(name for name in names if getattr(request, name) is not None)


class ContextRequest(Strict):
    """A request to read images and store their context before any question about them.

    - `images`, `videos`: the images and, behind them, the videos; at least one.
    - `keep`: the image tokens to keep in each layer, as a share (0.05) or a count (29).
    - `prompt`: what the model is asked first about the images.
    - `score`: how the image tokens to keep are selected.
    - `budget`: what `keep` is a share of, or a count in: "all" image tokens together, or those of each "frame", so that
      none is lost. An image counts as a frame.

    A missing `keep`, `prompt` or `score` takes the server's own setting.
    """

    images: Annotated[list[ImageURL], Field(max_length=64)] = []
    videos: Annotated[list[VideoURL], Field(max_length=64)] = []
    keep: Annotated[_Share | _Count, union(_number_type, "a share (0.05) or a count (29) is expected")] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=_TEXT)] | None = None
    score: ScoreName | None = None
    budget: Literal["all", "frame"] = "all"


class ExplanationRequest(Strict):
    """A request to explain an answer: the model's own, or a given one.

    - `model`: the name of the served model; empty for whichever model is served.
    - `messages`: one question with its images.
    - `answer`: a given answer to explain.
    - `format`: the format of the file that is returned.
    - `token`: the index of one token of the answer, for an image of this token alone.
    - `method`: how heatmaps are made.
    - `norm`: the statistics of the final norm, `frozen` or `own`.
    - `knockout`: rules for attention that is blocked in the model while it answers and is explained.
    - `max_tokens`: the longest answer of the model, in tokens.
    """

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
    """Details of the prompt's tokens.

    - `cached_tokens`: the tokens that were already read for an earlier question.
    """

    cached_tokens: int = 0


class Usage(BaseModel):
    """The token counts of a request.

    - `prompt_tokens`: the tokens of the whole prompt, images included.
    - `completion_tokens`: the tokens of the answer.
    - `total_tokens`: the sum of both.
    - `prompt_tokens_details`: how many tokens of the prompt were already read.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: Details = Details()


class ContextInfo(BaseModel):
    """The description of a context: images that were read once, with the part of their key/value cache that is kept.

    - `id`: the context's id, for requests.
    - `tokens`: the tokens that each layer keeps, text included.
    - `prefix_tokens`: the tokens that were read.
    - `bytes`: the size of the context in memory: its keys, values and positions.
    - `uncompressed_bytes`: the size of the keys and values of all tokens that were read.
    - `prompt`: what the model was asked first about the images.
    - `description`: the model's reply to it, if the score needs one.
    - `keep`: the share or count of image tokens that was requested.
    - `score`, `budget`: how the image tokens to keep were selected.
    - `images`: the width and height of each image, in pixels.
    - `kept`: the image tokens that each layer keeps: their `positions` in the prompt, the index of the image of each
      (`images`), and its pixel box (`boxes`: left, top, right, bottom). Sent only if requested.

    An answer to a chat request has the fields up to `uncompressed_bytes` only.
    """

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
    budget: str | None = None
    images: list[list[int]] | None = None
    kept: list[dict[str, Any]] | None = None

"""A decoder whose layers are run by `kernels.DecoderLayers` in place of transformers' modules.

It serves where every part was recognised, and the layers as a whole gave what the model's own forward gives. In a
decoding step transformers spends more time between the operations than in them; here a step is one call. Whatever a
user changes later (a hook, an adapter, other weights) is seen before the next pass, which then runs the model's own
forward again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError, first_line
from ..kernels import skinny_linear
from ..kernels.decoder_layers import DecoderLayers, DecoderOutput, KeyStore, Part
from ..kernels.dispatch import choose
from ..models.linears import is_plain
from ..models.norms import relative_error
from ..models.offload import device_of_part
from ..models.plain_layers import NotPlainError, PlainLayers, plain_layers, watched
from ..models.text_model import TextModel
from . import linear
from .hooks import recording

_TRIED = 6  # tokens that both ways read
_FIRST = 3  # the position of the first of them
# relative error of the last layer: rounding in float32, and in bfloat16, which the model rounds to after each step; the
# parts are checked to rounding, a wrong whole is off by far more
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.08}
_TABLE = 256  # positions by which a table of rotations grows
_DEPENDENT = ("dynamic", "longrope")  # rotations that depend on the longest position of a pass


def allowed(dtype: torch.dtype) -> float:
    """Return by how much the direct way may differ from the model's own, relative to all of it."""
    return _ALLOWED[dtype]


class _Look(NamedTuple):
    """What was found in a model: its direct decoder, or why it has none, and in which state of the model."""

    backend: str
    decoder: DirectDecoder | None
    why: str
    state: Hashable = None


class DirectDecoder:
    """The decoder of a text model, run directly.

    Args:
        text: The text model.
        plain: Its layers as weights.
        kernel: What runs them.
    """

    def __init__(self, text: TextModel, plain: PlainLayers, kernel: DecoderLayers):
        self._decoder, self._config, self._text = text.decoder, text.config, text
        self.plain, self._kernel = plain, kernel
        self.num_layers, self.kv_heads, self.width = len(plain.layers), plain.kv_heads, kernel.width
        self.dtype = plain.layers[0].query.weight.dtype
        self.scales = [layer.scale for layer in plain.layers]
        self.window = min((site.window for site in text.sites if site.window is not None), default=None)
        kind = getattr(text.decoder.rotary_emb, "rope_type", "default")
        self._fixed = isinstance(kind, str) and not any(name in kind for name in _DEPENDENT)
        self._cos = self._sin = torch.empty(0, 0)
        self.axes: frozenset[int] = frozenset()  # how many rows position ids may have, where there are several

    @property
    def usable(self) -> bool:
        """Whether the model is still as it was when it was checked."""
        return (
            not self._decoder.training
            and not torch.is_autocast_enabled("cpu")
            and self.plain.unchanged(linear.skinny_forward)
        )

    @property
    def own_attention(self) -> bool:
        """Whether the model itself would run an attention whose result is known, not one that a user registered."""
        return self._config._attn_implementation in (None, "sdpa", "eager")

    def embed(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return the input embeddings of tokens, [T, d]."""
        return self._decoder.get_input_embeddings()(torch.as_tensor(tokens))

    def rotation(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotation at T positions, [T, Dr] each."""
        if not self._fixed:
            return self.rotated(torch.tensor(positions))
        last = max(positions)
        if last >= len(self._cos):
            count = (last // _TABLE + 1) * _TABLE
            self._cos, self._sin = self.rotated(torch.arange(count))
        if len(positions) == 1:
            return self._cos[last : last + 1], self._sin[last : last + 1]
        chosen = torch.tensor(positions)
        return self._cos.index_select(0, chosen), self._sin.index_select(0, chosen)

    def rotated(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `rotation` returns, from the decoder's own module."""
        like = torch.empty(0, dtype=self.dtype)
        return self._of_module(like, positions[None])

    def rotated_by_axes(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `rotation` returns for position ids of several axes, [axes, 1, T]."""
        like = torch.empty(0, dtype=self.dtype)
        # of four rows the first one is only for masks
        return self._of_module(like, positions[1:] if len(positions) == 4 else positions)

    def _of_module(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._decoder.rotary_emb(like, position_ids=positions)
        if cos.shape[:2] != (1, positions.shape[-1]):
            raise NotPlainError("a position has several rotations")
        return cos[0], sin[0]

    def __call__(
        self,
        hidden: Tensor,
        positions: Sequence[int] | Tensor,
        store: KeyStore,
        parts: Sequence[Part],
        recorded: Sequence[int] = (),
        needed: Sequence[int] | None = None,
    ) -> DecoderOutput:
        """Run the layers on rows [T, d] at T positions, or position ids [axes, 1, T]; see `DecoderLayers`."""
        turned = self.rotated_by_axes(positions) if isinstance(positions, Tensor) else self.rotation(positions)
        return self._kernel(hidden, *turned, store, parts, recorded, needed)

    def logits(self, normed: Tensor) -> Tensor:
        """Return the logits [T, V] of what the final norm gives."""
        head = self._text.head
        if watched(head, linear.skinny_forward) or not is_plain(head):
            return self._text.logits(normed)
        return self._text.scaled(skinny_linear(normed, head.weight, head.bias))


def direct_decoder(text: TextModel, backend: str = "auto") -> DirectDecoder | None:
    """Return the direct decoder of a text model, or None where the model's own forward has to run.

    The model is looked at once; a model that changed is looked at again.
    """
    return _look(text, backend).decoder


def why_not_direct(text: TextModel, backend: str = "auto") -> str:
    """Return why a model's layers are run by transformers, or "" if they are run directly."""
    return _look(text, backend).why


def _look(text: TextModel, backend: str) -> _Look:
    known: _Look | None = text.kept.get("direct decoder")
    if known is not None and known.backend == backend:
        if known.decoder is None:
            if known.state == _state(text):
                return known
        elif known.decoder.usable:
            return known
        elif known.decoder.plain.in_place:
            return _Look(backend, None, "the model has hooks, is in training or runs under autocast")
        # other modules or weights, such as an adapter's: look again
    if torch.is_autocast_enabled("cpu"):  # for now: nothing is known of the model without it
        return _Look(backend, None, "the model runs under autocast")
    if str(text.config._attn_implementation).startswith("mllm_fast_"):
        return _Look(backend, None, "the model is being recorded, or its attention is knocked out")
    try:
        found = _Look(backend, _found(text, backend), "")
    except (NotPlainError, InputError) as error:
        found = _Look(backend, None, str(error), _state(text))
    except Exception as error:  # whatever a model that nobody tried may raise, its own forward runs
        found = _Look(backend, None, first_line(error), _state(text))
    text.kept["direct decoder"] = found
    return found


def _state(text: TextModel) -> Hashable:
    """Return a value that changes with the modules of a decoder, and with the type and place of its weights."""
    weight = next(text.layers[0].parameters())
    return text.decoder.training, weight.dtype, weight.data_ptr(), *map(id, text.decoder.modules())


def _found(text: TextModel, backend: str) -> DirectDecoder:
    """Return the direct decoder of a text model.

    Raises:
        NotPlainError: The model's own forward has to run.
    """
    if text.split is not None or len({device_of_part(layer) for layer in text.layers}) > 1:
        raise NotPlainError("the layers lie in several processes, or on several devices")
    weight = text.layers[0].get_parameter("self_attn.q_proj.weight") if _has_query(text) else None
    if weight is None:
        raise NotPlainError(f"a {type(text.layers[0]).__name__} has no self_attn.q_proj")
    if backend == "torch" or choose(weight.device, weight.dtype, "auto", op="decoder_layers") != "cpu":
        raise NotPlainError("the C++ kernels do not serve this device and type")
    if text.decoder.training:
        raise NotPlainError("the model is in training")
    tokens, positions = list(range(1, _TRIED + 1)), list(range(_FIRST, _FIRST + _TRIED))
    with text.inference():
        with recording(text, _TRIED, backend=backend) as record:
            wanted = text.decoder(
                input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), use_cache=False
            ).last_hidden_state[0]
        if any(not one.plain for one in record.scoring) or any(one is not None for seen in record.seen for one in seen):
            raise NotPlainError("the attention is not the softmax of causal scores alone")
        plain = plain_layers(text, [one.scale for one in record.scoring])
        kernel = plain.kernel("auto")
        if kernel.backend != "cpu":
            raise NotPlainError("the C++ kernels take heads and layers whose sizes are multiples of 16")
        made = DirectDecoder(text, plain, kernel)
        found = _tried(made, tokens, positions)
        off = relative_error(found.normed, wanted)
        if not off < allowed(made.dtype):
            raise NotPlainError(f"the layers compute something beside their parts (by {off:.2g} of their output)")
        made.axes = frozenset(rows for rows in (3, 4) if _takes_axes(made, text, tokens, rows))
    return made


def _takes_axes(made: DirectDecoder, text: TextModel, tokens: list[int], rows: int) -> bool:
    """Return whether both ways read position ids of several axes, [rows, 1, T], alike."""
    if not hasattr(text.decoder.rotary_emb, "mrope_section"):
        return False
    count = len(tokens)
    ids = torch.arange(_FIRST, _FIRST + count) + torch.tensor([0, 0, 2, 5][-rows:])[:, None]
    try:
        wanted = text.decoder(input_ids=torch.tensor([tokens]), position_ids=ids[:, None], use_cache=False)
        off = relative_error(_tried(made, tokens, ids[:, None]).normed, wanted.last_hidden_state[0])
    except Exception:  # a decoder that takes no such ids
        return False
    return off < allowed(made.dtype)


def _has_query(text: TextModel) -> bool:
    return hasattr(getattr(getattr(text.layers[0], "self_attn", None), "q_proj", None), "weight")


def _tried(made: DirectDecoder, tokens: list[int], positions: list[int] | Tensor) -> DecoderOutput:
    count = len(tokens)
    keys, values = (
        [torch.empty(1, made.kv_heads, count, made.width, dtype=made.dtype) for _ in range(made.num_layers)]
        for _ in range(2)
    )
    store = KeyStore(keys, values, torch.tensor([(0, i) for i in range(count)]))
    entries = torch.tensor([(i, 0, 0, i + 1, i) for i in range(count)])
    return made(made.embed(tokens), positions, store, [Part(keys, values, entries)])

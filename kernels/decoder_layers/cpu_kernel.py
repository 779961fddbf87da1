"""The layers in the compiled extension, with the same contract as `torch_kernel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..extension import cpu_extension
from ..paths import instruction_set
from .problem import DecoderOutput, KeyStore, Part

if TYPE_CHECKING:
    from . import DecoderLayers


class _Held(NamedTuple):
    """A decoder of the extension, and the tensors that it reads beside the weights."""

    decoder: Any
    small: list[Tensor | None]


def prepare(decoder: DecoderLayers, isa: str | None = None) -> Callable[..., DecoderOutput]:
    """Return the function that runs a pass; see `DecoderLayers.__call__`.

    Weights, keys and values of bfloat16 are read as they are; all else is float32 between the first layer and the last.
    `isa` selects an instruction set (for tests); None selects the best of the processor.
    """
    made = _held_decoder(decoder)
    chosen = isa or instruction_set("decoder_layers", decoder.dtype)
    count, shape = len(decoder.layers), (decoder.heads, decoder.width)

    def run(
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        store: KeyStore,
        parts: Sequence[Part],
        recorded: Sequence[int],
        needed: Sequence[int] | None = None,
    ) -> DecoderOutput:
        # these names keep contiguous copies alive until the call is over
        cos, sin, places = cos.float().contiguous(), sin.float().contiguous(), store.places.contiguous()
        entries = [part.entries.contiguous() for part in parts]
        masks = [[_held(mask) for mask in part.masks] for part in parts]
        kind = hidden.dtype
        hidden = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rows = None if needed is None else torch.tensor(needed, dtype=torch.int64)
        last = hidden if rows is None else hidden.new_empty(len(rows), decoder.hidden)
        normed = torch.empty_like(last)
        records: list[Tensor | None] = [None, None, None]
        which = torch.tensor(recorded, dtype=torch.int64) if recorded else None
        if recorded:
            records = [torch.empty(len(recorded), count, *one) for one in ((decoder.hidden,), shape, shape)]
        if len(hidden):
            made.decoder.run(
                (len(hidden), cos.shape[1], -1 if rows is None else len(rows)),
                [_address(one) for one in (hidden, cos, sin, normed, rows, last)],
                _keys(store),
                places.data_ptr(),
                [
                    (_keys(part), one.data_ptr(), len(one), [_addresses(*held) for held in mask])
                    for part, one, mask in zip(parts, entries, masks, strict=True)
                ],
                len(recorded),
                [_address(one) for one in (which, *records)],
                torch.get_num_threads(),
                chosen,
            )
        kept = [None if one is None else one.to(kind) for one in records]
        return DecoderOutput(last.to(kind), normed.to(kind), *kept)

    return run


def _held_decoder(decoder: DecoderLayers) -> _Held:
    extension, _ = cpu_extension()
    small: list[Tensor | None] = []  # gains and biases in float32, for as long as they are read

    def wide(tensor: Tensor | None) -> int:
        small.append(None if tensor is None else tensor.float())
        return _address(small[-1])

    layers = [
        (
            [(wide(one.gain), one.eps) for one in (la.input_norm, la.query_norm, la.key_norm, la.middle_norm)],
            [
                (one.weight.data_ptr(), wide(one.bias))
                for one in (la.query, la.key, la.value, la.output, la.gate, la.up, la.down)
            ],
            la.scale,
        )
        for la in decoder.layers
    ]
    return _Held(extension.Decoder(  # type: ignore[union-attr]
        (decoder.hidden, decoder.heads, decoder.kv_heads, decoder.width, decoder.inner),
        (decoder.activation == "gelu_tanh", decoder.dtype == torch.bfloat16),
        layers,
        (wide(decoder.final.gain), decoder.final.eps),
    ), small)  # fmt: skip


def _held(mask: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, int, Tensor | None]:
    if mask is None:
        return None, 0, None
    segments, table = mask
    segments = segments if segments.stride(1) == 1 else segments.contiguous()
    return segments, segments.stride(0) if len(segments) > 1 else 0, table.contiguous()


def _addresses(segments: Tensor | None, stride: int, table: Tensor | None) -> tuple[int, int, int, int]:
    return _address(segments), 0 if segments is None else segments.shape[1], stride, _address(table)


def _keys(held: KeyStore | Part) -> tuple[list[tuple[int, int]], tuple[int, ...], tuple[int, int]]:
    first = held.keys[0]
    layers = [(k.data_ptr(), v.data_ptr()) for k, v in zip(held.keys, held.values, strict=True)]
    return layers, first.stride()[:3], (first.shape[0], first.shape[2])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

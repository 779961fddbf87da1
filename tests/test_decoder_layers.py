"""The layers of a decoder in one call, against plain torch in float64."""

import pytest
import torch
from mllm_fast.kernels import segment_table
from mllm_fast.kernels.decoder_layers import (
    DecoderLayers,
    KeyStore,
    LayerWeights,
    LinearWeights,
    NormWeights,
    Part,
    cpu_kernel,
)
from mllm_fast.kernels.extension import cpu_extension

EXTENSION, _ = cpu_extension()
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
ISAS = EXTENSION.instruction_sets() if EXTENSION is not None else []


def weights(draw, layers, hidden, heads, kv_heads, width, inner, bias=False, head_norms=False):
    """Random layers, in float64."""
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    linear = lambda out, deep: LinearWeights(  # noqa: E731
        rand(out, deep) / deep**0.5, rand(out) if bias else None
    )
    norm = lambda size: NormWeights(1 + rand(size) / 4, 1e-5)  # noqa: E731
    each = lambda: norm(width) if head_norms else NormWeights(None)  # noqa: E731
    queries, keys = heads * width, kv_heads * width
    return [
        LayerWeights(
            norm(hidden), each(), each(), norm(hidden),
            linear(queries, hidden), linear(keys, hidden), linear(keys, hidden), linear(hidden, queries),
            linear(inner, hidden), linear(inner, hidden), linear(hidden, inner), 0.7 * width**-0.5,
        )
        for _ in range(layers)
    ], norm(hidden)  # fmt: skip


def to(value, dtype):
    """The same tensors, in tuples of any depth, in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        made = [to(one, dtype) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


CASES = {  # heads, key heads, width, rows, bias, norms of the heads, rotary, activation
    "one row": (4, 4, 32, 1, False, False, 32, "silu"),
    "grouped heads": (8, 2, 16, 5, True, True, 16, "silu"),
    "one key head, a part turns": (6, 1, 64, 13, False, True, 32, "gelu_tanh"),
    "many rows": (4, 2, 48, 70, True, False, 48, "gelu_tanh"),
}


def problem(name, seed=0):
    """A pass in float64: rows of two sequences, each with own keys, and a prefix that some of them share."""
    heads, kv_heads, width, rows, bias, head_norms, rotary, activation = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    layers, final = weights(draw, 3, 64, heads, kv_heads, width, 96, bias, head_norms)
    slots = [row * 2 // rows for row in range(rows)]
    own = 9  # keys that each slot has already
    room, seen = own + rows, [own] * 2
    places, entries = [], []
    for row, slot in enumerate(slots):
        places.append((slot, seen[slot]))
        seen[slot] += 1
        entries.append((row, slot, 2 if row % 3 == 0 else 0, seen[slot], seen[slot] - 1))
    keys = [[rand(2, room, kv_heads, width).transpose(1, 2) for _ in range(3)] for _ in range(2)]
    segments = torch.randint(0, 3, (2, room), generator=draw, dtype=torch.uint8)
    prefix = [[rand(1, kv_heads, 21, width) for _ in range(3)] for _ in range(2)]
    shared = [(row, 0, 3, 21 if row % 4 else 3, 0) for row in range(rows) if row % 5]
    angle = rand(rows, rotary // 2)
    cos, sin = (torch.cat([turn, turn], 1) for turn in (angle.cos(), angle.sin()))
    closed = segment_table([(1, 0), (1, 1), (2, 1), (1, 2)])
    masks = [None, (segments, closed), (segments[:1], segment_table([(0, 1), (2, 2)]))]
    parts = [Part(*keys, torch.tensor(entries), masks)]
    if shared:
        parts.append(Part(*prefix, torch.tensor(shared)))
    arguments = rand(rows, 64), cos, sin, KeyStore(*keys, torch.tensor(places)), parts
    return (layers, final, heads, kv_heads, activation), arguments


def copied(arguments, dtype):
    """The arguments in a dtype, whose store and first part share their keys."""
    hidden, cos, sin, store, parts = to(arguments, dtype)
    keys, values = ([one.clone() for one in many] for many in store[:2])
    parts = [parts[0]._replace(keys=keys, values=values), *parts[1:]]
    return hidden, cos, sin, KeyStore(keys, values, store.places), parts


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_float64(name, isa, threads, monkeypatch):
    made, arguments = problem(name)
    exact_store = copied(arguments, torch.float64)
    rows = range(len(arguments[0]))[::-3]
    exact = DecoderLayers(*made, backend="torch")(*exact_store, recorded=rows)
    single = DecoderLayers(*to(made, torch.float32), backend="torch")
    reference = single(*copied(arguments, torch.float32), recorded=rows)
    ours = DecoderLayers(*to(made, torch.float32), backend="cpu")
    ours._run = cpu_kernel.prepare(ours, isa)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = copied(arguments, torch.float32)
    before = given[0].clone()
    found = ours(*given, recorded=rows)
    assert torch.equal(given[0], before)  # the rows are not changed
    for name_, mine, single_, right in zip(found._fields, found, reference, exact, strict=True):
        error, own_error = (float((one.double() - right).abs().max()) for one in (mine, single_))
        assert error <= 8 * max(own_error, 1e-7), (name_, error, own_error)
    for mine, right in zip(given[3].keys + given[3].values, exact_store[3].keys + exact_store[3].values, strict=True):
        assert float((mine.double() - right).abs().max()) < 1e-4


@needs_extension
@pytest.mark.parametrize("isa", [*ISAS, "torch"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("needed", [[69], [68, 3, 40], [], range(70)], ids=["last", "some", "none", "all"])
def test_rows_that_nobody_reads(isa, threads, needed, monkeypatch):
    """The needed rows give what they give among all, and the keys and values of all rows are stored."""
    made, arguments = problem("many rows")
    made, recorded = to(made, torch.float32), list(needed)[-1:]
    decoder = DecoderLayers(*made, backend="torch" if isa == "torch" else "cpu")
    if isa != "torch":
        decoder._run = cpu_kernel.prepare(decoder, isa)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole_store, store = copied(arguments, torch.float32), copied(arguments, torch.float32)
    whole = decoder(*whole_store, recorded=recorded)
    found = decoder(*store, recorded=recorded, needed=needed)
    for mine, right in ((found.hidden, whole.hidden), (found.normed, whole.normed)):
        torch.testing.assert_close(mine, right[list(needed)], rtol=1e-5, atol=1e-5)
    for mine, right in zip(found[2:], whole[2:], strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    for mine, right in zip(store[3].keys + store[3].values, whole_store[3].keys + whole_store[3].values, strict=True):
        assert torch.equal(mine, right)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_bfloat16_is_as_good_as_plain_torch(name, isa, threads, monkeypatch):
    """Weights, keys and rows of bfloat16 against the same numbers in float64; plain torch rounds after each step."""
    made, arguments = problem(name)
    made, arguments = to(made, torch.bfloat16), copied(arguments, torch.bfloat16)
    rows = range(len(arguments[0]))[::-3]
    exact_store = copied(arguments, torch.float64)
    exact = DecoderLayers(*to(made, torch.float64), backend="torch")(*exact_store, recorded=rows)
    reference = DecoderLayers(*made, backend="torch")(*copied(arguments, torch.bfloat16), recorded=rows)
    ours = DecoderLayers(*made, backend="cpu")
    ours._run = cpu_kernel.prepare(ours, isa)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = copied(arguments, torch.bfloat16)
    found = ours(*given, recorded=rows)
    for name_, mine, rounded, right in zip(found._fields, found, reference, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        error, own_error = (float((one.double() - right).norm()) for one in (mine, rounded))
        assert error <= 1.1 * own_error, (name_, error, own_error)
    for mine, right in zip(given[3].keys + given[3].values, exact_store[3].keys + exact_store[3].values, strict=True):
        assert float((mine.double() - right).norm() / right.norm()) < 0.02


@needs_extension
def test_bfloat16_of_sizes_that_are_no_multiples_of_32():
    made, (hidden, cos, sin, store, parts) = problem("one row")
    draw = torch.Generator().manual_seed(1)
    layers, final = weights(draw, 3, 48, 4, 4, 32, 80)
    made = to((layers, final, *made[2:]), torch.bfloat16)
    arguments = copied((hidden[:, :48], cos, sin, store, parts), torch.bfloat16)
    exact = DecoderLayers(*to(made, torch.float64), backend="torch")(*copied(arguments, torch.float64))
    found = DecoderLayers(*made, backend="cpu")(*copied(arguments, torch.bfloat16))
    reference = DecoderLayers(*made, backend="torch")(*copied(arguments, torch.bfloat16))
    assert (found.normed.double() - exact.normed).norm() <= 1.1 * (reference.normed.double() - exact.normed).norm()


def test_two_calls_of_one_row_are_one_call_of_two():
    """Rows of one sequence, read one by one, give what they give together."""
    made, (hidden, cos, sin, store, _) = problem("grouped heads")
    decoder = DecoderLayers(*made, backend="torch")
    whole = [(row, 0, 0, row + 1, 0) for row in range(5)]
    places = torch.tensor([(0, row) for row in range(5)])
    keys, values = store.keys, store.values
    together = decoder(hidden, cos, sin, KeyStore(keys, values, places), [Part(keys, values, torch.tensor(whole))])
    for row in range(5):
        one = slice(row, row + 1)
        entry = torch.tensor([(0, *whole[row][1:])])
        alone = decoder(
            hidden[one], cos[one], sin[one], KeyStore(keys, values, places[one]), [Part(keys, values, entry)]
        )
        torch.testing.assert_close(alone.normed, together.normed[one], rtol=1e-10, atol=1e-10)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_sees_nothing_adds_nothing(isa):
    made, (hidden, cos, sin, store, parts) = problem("one row")
    decoder = DecoderLayers(*to(made, torch.float32), backend="cpu")
    decoder._run = cpu_kernel.prepare(decoder, isa)
    hidden, cos, sin, store, parts = copied((hidden, cos, sin, store, parts), torch.float32)
    ids = torch.zeros(1, 10, dtype=torch.uint8)
    shut = parts[0]._replace(masks=[(ids, segment_table([(0, 0)]))] * 3)
    found = decoder(hidden, cos, sin, store, [shut], recorded=[0])
    assert torch.equal(found.output, torch.zeros_like(found.output))
    unseen = decoder(hidden, cos, sin, store, [], recorded=[0])
    assert torch.equal(unseen.hidden, found.hidden)


@needs_extension
def test_nan_stays():
    made, arguments = problem("one row")
    decoder = DecoderLayers(*to(made, torch.float32), backend="cpu")
    hidden, *rest = copied(arguments, torch.float32)
    hidden[0, 3] = torch.nan
    assert decoder(hidden, *rest).normed.isnan().all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_places_outside_the_keys_are_refused(backend):
    made, arguments = problem("one row")
    decoder = DecoderLayers(*to(made, torch.float32), backend=backend)
    hidden, cos, sin, store, parts = copied(arguments, torch.float32)
    for entry in ((1, 0, 0, 5, 0), (-1, 0, 0, 5, 0), (0, 2, 0, 5, 0), (0, 0, 4, 3, 0), (0, 0, -1, 3, 0),
                  (0, 0, 0, 11, 0), (0, 0, 0, 5, 10)):  # fmt: skip
        with pytest.raises(ValueError, match="entries name a row, a slot and keys that are there"):
            decoder(hidden, cos, sin, store, [parts[0]._replace(entries=torch.tensor([entry]))])
    for place in ((2, 0), (0, 10), (0, -1)):
        with pytest.raises(ValueError, match="places name a slot and a position that are there"):
            decoder(hidden, cos, sin, store._replace(places=torch.tensor([place])), [])
    table = torch.full((32,), -1, dtype=torch.int32)
    masks = [(torch.full((1, 10), 32, dtype=torch.uint8), table)] * 3
    with pytest.raises(ValueError, match="segments holds ids 0 to 31"):
        decoder(hidden, cos, sin, store, [parts[0]._replace(masks=masks)])


def test_bad_arguments_are_named():
    made, (hidden, cos, sin, store, parts) = problem("one row")
    layers, final, heads, kv_heads, _ = made
    with pytest.raises(ValueError, match="activation is one of silu, gelu_tanh, got 'relu'"):
        DecoderLayers(layers, final, heads, kv_heads, "relu")
    with pytest.raises(ValueError, match="a multiple of kv_heads, got 4 and 3"):
        DecoderLayers(layers, final, 4, 3)
    wrong = layers[0]._replace(up=LinearWeights(torch.zeros(5, 64, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"up of layer 0 is torch.float64 \[96, 64\]"):
        DecoderLayers([wrong], final, heads, kv_heads)
    decoder = DecoderLayers(*made)
    assert decoder.backend == "torch"  # float64
    with pytest.raises(ValueError, match=r"hidden is torch.float64 \[T, 64\], got torch.float64 \[1, 3\]"):
        decoder(hidden[:, :3], cos, sin, store, parts)
    with pytest.raises(ValueError, match="cos and sin are"):
        decoder(hidden, cos[:, :5], sin[:, :5], store, parts)
    with pytest.raises(ValueError, match=r"cos and sin are torch.float64, got torch.float32 and torch.float64"):
        decoder(hidden, cos.float(), sin, store, parts)
    with pytest.raises(ValueError, match="places is int64"):
        decoder(hidden, cos, sin, store._replace(places=store.places.int()), parts)
    with pytest.raises(ValueError, match="keys and values of 3 layers, got 2"):
        decoder(hidden, cos, sin, store._replace(keys=store.keys[:2]), parts)
    with pytest.raises(ValueError, match="entries is int64"):
        decoder(hidden, cos, sin, store, [parts[0]._replace(entries=parts[0].entries[:, :4])])
    with pytest.raises(ValueError, match=r"recorded names rows, 0 to 0, got \[1\]"):
        decoder(hidden, cos, sin, store, parts, recorded=[1])
    with pytest.raises(ValueError, match=r"needed names different rows, 0 to 0, got \[0, 0\]"):
        decoder(hidden, cos, sin, store, parts, needed=[0, 0])
    with pytest.raises(ValueError, match=r"recorded rows are needed, got \[0\] of \[\]"):
        decoder(hidden, cos, sin, store, parts, recorded=[0], needed=[])

"""Log-probabilities' tokens: their bytes join to the answer, for every kind of vocabulary."""

from __future__ import annotations

import internvl_original
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_fast.models.internvl_tokenizer import read_tokenizer
from mllm_fast.runtime.token_bytes import TokenBytes
from mllm_fast.serving.detokenizer import AnswerDetokenizer
from mllm_fast.serving.log_probs import LogProbs
from mllm_fast.serving.requests import TokenEvent

TEXTS = ["what color is the star?", " a  red\nstar é ☃ 😀", "blue", "no, no.\n"]


def byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "words", "shapes"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte level":
        return byte_level()
    if request.param == "words":
        return tiny.tokenizer([])
    if request.param == "shapes":
        return request.getfixturevalue("shapes").processor.tokenizer
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    internvl_original.sentencepiece_model(folder, dummy_prefix=False)
    return read_tokenizer(folder)


def entries(tokenizer, ids, stop=()) -> tuple[str, list[dict]]:
    words, logs, text, found = AnswerDetokenizer(tokenizer, stop), LogProbs(TokenBytes(tokenizer)), "", []
    for token in ids:
        logs.add(TokenEvent(token, -1.0, ((token, -1.0),)))
        piece = words.push(token)
        text += piece
        found += logs.sent(piece, last=words.stopped)
        if words.stopped:
            return text, found
    piece = words.finish()
    return text + piece, found + list(logs.sent(piece, last=True))


@pytest.mark.parametrize("text", TEXTS)
def test_entries_join_to_the_answer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    said, found = entries(tokenizer, ids)
    assert said == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert b"".join(bytes(one["bytes"]) for one in found) == said.encode()
    assert len(found) >= len([token for token in ids if TokenBytes(tokenizer)(token).strip()])
    for one in found:
        assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"]
        assert len(one["top_logprobs"]) == 1


@settings(max_examples=100)
@given(st.text(alphabet="ab \n\t é☃😀", max_size=12), st.sampled_from(["", "b", "a b", "☃"]))
def test_entries_end_where_the_answer_ends(text, stop):
    made = _BYTE_LEVEL
    ids = made(text, add_special_tokens=False).input_ids
    said, found = entries(made, ids, [stop] if stop else [])
    assert said == (text.partition(stop)[0] if stop else text).strip()
    assert b"".join(bytes(one["bytes"]) for one in found) == said.encode()


_BYTE_LEVEL = byte_level()

"""Texts that users type stay texts: what a tokenizer would read as a special token in them is given as characters.

A text with "</s>", "<image>" or a mark of the chat template in it could otherwise forge a turn or an image. Each such
mark is replaced by one special token that the template does not use, a stand-in. After the processor has made the token
ids, each stand-in is replaced by the ids of the mark's characters. Texts without such marks are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from .media import Part, Turn

_LETTER = "x"  # ordinary text before a mark, so that a tokenizer adds no space to it


class PlainText:
    """Hides marks in texts before they are tokenized, and gives them back as characters.

    Args:
        processor: The processor of the model.
        sample: Returns a conversation with two turns of the user as the chat template formats it.
    """

    def __init__(self, processor: Any, sample: Callable[[], str]):
        self._tokenizer, self._sample = processor.tokenizer, sample
        tokenizer = self._tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        images = {
            value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)
        }
        self._images = {mark for mark in images if mark}
        marks |= self._images
        self._stripping = {str(token) for token in added.values() if token.lstrip or token.rstrip}
        self._marks = {mark for mark in marks if mark.strip()}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._known: str | None = None

    def has_marks(self, text: str) -> bool:
        """Return whether a tokenizer would read a special token in a text."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def hide(self, text: str, found: list[str]) -> str:
        """Return a text with its marks replaced by the stand-in, and append the marks to `found`."""
        if not self.has_marks(text):
            return text
        assert self._pattern is not None
        found += self._pattern.findall(text)
        stand_in = self._stand_in()
        return self._pattern.sub(lambda _: stand_in, text)

    def hide_turns(self, turns: Sequence[Turn], found: list[str]) -> list[Turn]:
        """Return the turns of a conversation with their marks replaced by the stand-in; see `hide`."""

        def hidden(part: Part) -> Part:
            return self.hide(part, found) if isinstance(part, str) else part

        return [(role, [hidden(part) for part in parts]) for role, parts in turns]

    def restored(self, ids: Sequence[int], marks: Sequence[str]) -> list[int]:
        """Return token ids with the characters of the marks in place of the stand-ins."""
        return [ids[at] if one is None else one for at, one in self._places(ids, marks)]

    def restore(self, inputs: Any, marks: Sequence[Sequence[str]]) -> None:
        """Do the same to the processor's inputs for a batch, in place.

        Args:
            inputs: The processor's output; all of its tensors of the shape of `input_ids` are changed.
            marks: The marks of each sequence.
        """
        if not any(marks):
            return
        ids = inputs["input_ids"]
        rows = [self._places(row.tolist(), one) for row, one in zip(ids, marks, strict=True)]
        length = max(map(len, rows))
        for name, value in list(inputs.items()):
            if not isinstance(value, Tensor) or value.shape != ids.shape or value.is_floating_point():
                continue
            made = []
            for row, places in zip(value, rows, strict=True):
                at = torch.tensor([at for at, _ in places], device=value.device)
                filled = row[at]
                if name == "input_ids":
                    for i, (_, new) in enumerate(places):
                        if new is not None:
                            filled[i] = new
                padding = row[:1].expand(length - len(filled))  # shorter rows begin with padding, or become so
                made.append(torch.cat([self._padding(name, padding), filled]))
            inputs[name] = torch.stack(made)

    def _padding(self, name: str, like: Tensor) -> Tensor:
        value = self._tokenizer.pad_token_id or 0 if name == "input_ids" else 0
        return torch.full_like(like, value)

    def _places(self, ids: Sequence[int], marks: Sequence[str]) -> list[tuple[int, int | None]]:
        """Return, for each token of the result, where it comes from and its id if it is another one."""
        if not marks:
            return [(at, None) for at in range(len(ids))]
        stand_in = self._tokenizer.convert_tokens_to_ids(self._stand_in())
        found: list[tuple[int, int | None]] = []
        left = list(marks)
        # padding may be the stand-in as well, so the last ones are those of the text
        extra = sum(one == stand_in for one in ids) - len(marks)
        if extra < 0:
            raise InputError(f"the text holds {marks[0]!r}, which the tokenizer drops; leave it out")
        for at, one in enumerate(ids):
            if one == stand_in and extra > 0:
                extra -= 1
                found.append((at, None))
            elif one == stand_in:
                found += [(at, new) for new in self._characters(left.pop(0))]
            else:
                found.append((at, None))
        return found

    def _characters(self, mark: str) -> list[int]:
        """Return the ids of a mark's characters, as they stand behind other text."""
        special = set(self._tokenizer.all_special_ids) | {self._tokenizer.convert_tokens_to_ids(mark)}
        special -= {self._tokenizer.unk_token_id}
        # a vocabulary may have the mark as an ordinary word as well, which letters apart do not give
        for parts in ([mark], [mark[:1], mark[1:]], list(mark)):
            ids = [one for part in parts for one in self._behind_text(part)]
            if ids and not special.intersection(ids):
                return ids
        raise InputError(
            f"the text holds {mark!r}, which this model's tokenizer cannot read as plain text; leave it out"
        )

    def _behind_text(self, text: str) -> list[int]:
        before, both, alone = (
            self._tokenizer(one, add_special_tokens=False, split_special_tokens=True).input_ids
            for one in (_LETTER, _LETTER + text, text)
        )
        return both[len(before) :] if both[: len(before)] == before and len(both) > len(before) else alone

    def _stand_in(self) -> str:
        if self._known is None:
            template = self._sample()
            beginning = self._tokenizer("").input_ids
            usable = [
                mark
                for mark in sorted(self._marks - self._images - self._stripping)
                if mark not in template and self._tokenizer.convert_tokens_to_ids(mark) not in beginning
            ]
            unknown = self._tokenizer.unk_token_id
            usable = [mark for mark in usable if self._tokenizer.convert_tokens_to_ids(mark) not in (None, unknown)]
            # what is no padding is surest
            usable.sort(key=lambda mark: mark == self._tokenizer.pad_token)
            for mark in usable:
                ids = self._tokenizer(f"a {mark} b", add_special_tokens=False).input_ids
                if ids.count(self._tokenizer.convert_tokens_to_ids(mark)) == 1:
                    self._known = mark
                    break
            else:
                raise InputError(
                    "the text holds a mark of the chat template or of an image, such as"
                    f" {min(self._marks, key=len)!r}; leave it out"
                )
        return self._known

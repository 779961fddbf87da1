"""Maps of one video: which moments, and what in them, raised the probability of a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import ImageLayout
from ..core.moments import Moment, time_label
from ..core.notebook import Displayed, frame, table
from .registry import DEFAULT, Heads

if TYPE_CHECKING:
    from .scores import Scores

_LISTED = ("time", "frames")
_COLUMNS = ("video", "frames", "start", "end", "value", "share")


class VideoMaps(Displayed):
    """The maps of a video of an explanation; `Explanation.video` returns it.

    Attributes:
        explanation: The explanation.
        number: The index of the video in the prompt.
        images: The moments, as indices of `explanation.images` and `layout.images`.
    """

    def __init__(self, explanation: Scores, number: int = 0):
        videos = explanation.layout.videos
        if not videos:
            raise InputError("the prompt has no video; give one in place of the image")
        if not 0 <= number < len(videos):
            raise InputError(f"video is 0 to {len(videos) - 1}, got {number}")
        self.explanation, self.number, self.images = explanation, number, videos[number]

    def __repr__(self) -> str:
        first, last = self.moments[0], self.moments[-1]
        return (
            f"VideoMaps({len(self.images)} moments, {first.seconds[0]:.2f} to {last.seconds[1]:.2f} s, of"
            f" {self.explanation.text!r})"
        )

    def _repr_html_(self) -> str:
        return table([(time_label(moment), ", ".join(map(str, moment.frames))) for moment in self.moments], _LISTED)

    @property
    def moments(self) -> list[Moment]:
        """Which frames of the video each map is of, and when they are shown."""
        found = [layout.moment for layout in self._layouts()]
        return [moment for moment in found if moment is not None]

    def maps(self, token: int | str, method: str = DEFAULT, heads: Heads = 10) -> Tensor:
        """Return a map of each moment; arguments as in `Explanation.heatmap`.

        Returns:
            float32 [moments, rows, cols].
        """
        return torch.stack([self.explanation.heatmap(token, method, heads, image) for image in self.images])

    def curve(self, token: int | str, method: str = DEFAULT, heads: Heads = 10) -> Tensor:
        """Return the sum of each moment's map: how far the word depends on it.

        Returns:
            float32 [moments], in the units of the method, for "logprob" the increase of log p in nats.
        """
        every = [self.explanation.attribution(token, method, heads, image).sum() for image in self.images]
        return torch.stack(every)

    def shares(self, token: int | str, method: str = DEFAULT, heads: Heads = 10) -> Tensor:
        """Return the share of each moment in what the maps of all moments hold above 0, float32 [moments].

        The shares sum to 1, or are all 0 if no token of the video raised the word.
        """
        every = [self.explanation.attribution(token, method, heads, image) for image in self.images]
        raised = torch.stack([one.clamp(min=0).sum() for one in every])
        total = raised.sum()
        return raised / total if total > 0 else raised

    def peak(self, token: int | str, method: str = DEFAULT, heads: Heads = 10) -> tuple[Moment, tuple[float, ...]]:
        """Return where the largest value of all maps lies.

        Returns:
            The moment, and the pixel box of the token in its frames (left, top, right, bottom).
        """
        every = [self.explanation.attribution(token, method, heads, image) for image in self.images]
        best = max(range(len(every)), key=lambda i: float(every[i].max()))
        layout = self._layouts()[best]
        return self.moments[best], tuple(layout.token_boxes()[int(every[best].argmax())].tolist())

    def to_frame(self, token: int | str, method: str = DEFAULT, heads: Heads = 10) -> Any:
        """Return the curve as a pandas DataFrame: "video", "frames", "start", "end", "value" and "share"."""
        curve, shares = self.curve(token, method, heads).tolist(), self.shares(token, method, heads).tolist()
        rows = [
            (self.number, list(moment.frames), *moment.seconds, value, share)
            for moment, value, share in zip(self.moments, curve, shares, strict=True)
        ]
        return frame(rows, _COLUMNS)

    def _layouts(self) -> list[ImageLayout]:
        return [self.explanation.layout.images[image] for image in self.images]

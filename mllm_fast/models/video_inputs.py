"""The video side of prompts: which frames a model reads, what its processor is given, and the text beside frames."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.layout import TokenLayout
from ..core.video import LoadedVideo, spaced
from ..core.video_loading import load_video
from .adapter import Adapter

_TICKS = 1_000_000  # a second in the metadata: processors compute times as a frame's number over the rate
_LABEL_TOKENS = 32
# written before a frame: "<1.5 seconds>", "Frame3: ", "Frame from 00:07:", "frame one of two:"
_LABEL = re.compile(r"<[\d.]+ seconds>|frame( ?[\w-]+( of [\w-]+)?| from [\d:]+)? ?:?\s*", re.IGNORECASE)


class VideoReader:
    """Loads videos as a model reads them.

    Args:
        processor: The model's processor.
        adapter: The adapter of the model.
    """

    def __init__(self, processor: Any, adapter: Adapter):
        self._processor, self._adapter = processor, adapter

    def load(self, video: Any, max_pixels: int, in_all: int | None = None) -> LoadedVideo:
        """Load a video; see `load_video`. Frames are chosen as the model's own video processor chooses them.

        Raises:
            InputError: As `load_video` raises it, or the model's video processor is missing.
        """
        as_images = getattr(video, "as_images", None)
        videos = getattr(self._processor, "video_processor", None)
        if as_images is None:
            as_images = not self._adapter.knows_videos
            if as_images and getattr(self._processor, "video_token", None):
                warnings.warn(
                    "this model has a way of its own to read videos, whose token layout is not known here; it reads"
                    " the frames as images, which may lower its accuracy. Video(..., as_images=True)"
                    " (--frames-as-images) says that this is wanted",
                    stacklevel=4,
                )
        if not as_images and not self._adapter.knows_videos:
            raise InputError(
                "how this model's processor lays out the tokens of a video is not known; let it read the frames as"
                " images: Video(..., as_images=True) (--frames-as-images)"
            )
        if not as_images and videos is None:
            why = "needs torchvision: pip install torchvision"
            if find_spec("torchvision"):
                why = "could not be loaded: its folder lacks preprocessor settings for videos, or torchvision does not"
                why += " fit torch (loading with --verbose says which)"
            raise InputError(
                f"this model reads videos by transformers' video processor, which {why}; or let it read the frames as"
                " images: Video(..., as_images=True) (--frames-as-images)"
            )
        loaded = load_video(video, spaced if as_images else self._choose, max_pixels, in_all)
        return replace(loaded, as_images=as_images)

    def _choose(self, total: int, rate: float, num_frames: int | None, fps: float | None) -> Sequence[int]:
        """Choose frames as the video processor does; evenly spaced ones where it is set to nothing."""
        from transformers.video_utils import VideoMetadata

        videos = self._processor.video_processor
        if num_frames is None and fps is None:
            num_frames, fps = getattr(videos, "num_frames", None), getattr(videos, "fps", None)
            fps = None if num_frames is not None else fps
        if num_frames is None and fps is None:
            return spaced(total, rate, None, None)
        if num_frames is not None and num_frames >= total:
            return range(total)
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        return videos.sample_frames(metadata=metadata, num_frames=num_frames, fps=fps)


def video_arguments(videos: Sequence[LoadedVideo], processor: Any) -> dict[str, Any]:
    """Return the arguments of a processor for videos whose frames are chosen already; empty without a video."""
    if not videos:
        return {}
    from transformers.video_utils import VideoMetadata

    least = getattr(processor.video_processor, "temporal_patch_size", 1)
    frames, about = [], []
    for video in videos:
        repeated = [-1] * max(0, least - len(video.frames))  # as processors fill up a group of frames
        pictures = [*video.frames, *(video.frames[i] for i in repeated)]
        times = [*video.seconds, *(video.seconds[i] for i in repeated)]
        frames.append(np.stack([np.asarray(one) for one in pictures]))
        about.append(
            VideoMetadata(
                total_num_frames=max(1, round(video.duration * _TICKS)),
                fps=float(_TICKS),
                width=video.size[0],
                height=video.size[1],
                duration=video.duration,
                frames_indices=[round(time * _TICKS) for time in times],
            )
        )
    settings = {"do_sample_frames": False, "video_metadata": about, "input_data_format": "channels_last"}
    return {"videos": frames, "videos_kwargs": settings}


def with_timestamps(layout: TokenLayout, ids: Tensor, separators: Collection[int], tokenizer: Any) -> TokenLayout:
    """Return a layout whose timestamps hold the text before the first frame of each video as well.

    Args:
        layout: The layout of a prompt, with the text between frames.
        ids: Token ids of the prompt.
        separators: Tokens that open, close or divide an image.
        tokenizer: The processor's tokenizer.
    """
    found = [layout.timestamps]
    for moments in layout.videos:
        end = int(layout.images[moments[0]].positions[0])
        while end > 0 and int(ids[end - 1]) in separators:
            end -= 1
        for begin in range(end - 1, max(-1, end - 1 - _LABEL_TOKENS), -1):
            if _LABEL.fullmatch(tokenizer.decode(ids[begin:end].tolist()).strip(" ")):
                found.append(torch.arange(begin, end))
                break
    return replace(layout, timestamps=torch.cat(found).unique()) if len(found) > 1 else layout


def check_order(texts: Sequence[str], media: Sequence[Sequence[Any]], processor: Any) -> None:
    """Raise InputError if a chat template puts images and videos in another order than they were given.

    Args:
        texts: The conversations, as the chat template formats them.
        media: The images and videos of each conversation.
        processor: The model's processor.
    """
    marks = getattr(processor, "image_token", None), getattr(processor, "video_token", None)
    if not all(isinstance(mark, str) and mark for mark in marks) or marks[0] == marks[1]:
        return
    either = re.compile("|".join(re.escape(str(mark)) for mark in marks))
    for text, some in zip(texts, media, strict=True):
        given = []
        for one in some:
            is_clip = isinstance(one, LoadedVideo) and not one.as_images
            count = len(one.frames) if isinstance(one, LoadedVideo) and one.as_images else 1
            given += [marks[is_clip]] * count
        found = either.findall(text)
        if sorted(map(str, found)) == sorted(map(str, given)) and found != given:
            first = "images before videos" if found[0] == marks[0] else "videos before images"
            raise InputError(f"this model's chat template puts {first}: give them in that order")

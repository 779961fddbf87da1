"""Reading of videos: which frames, when they are shown, and what is told of files that cannot be read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import types
from http.server import HTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image

import mllm_fast as mf
from mllm_fast.core.layout import ImageLayout, Tile, TokenLayout, images_of, plain_images
from mllm_fast.core.moments import Moment, time_label
from mllm_fast.core.video import chosen, is_video, spaced
from mllm_fast.core.video_file import check_media
from mllm_fast.core.video_loading import load_video
from mllm_fast.core.video_torchcodec import find_decoder

movies = pytest.importorskip("movies", reason="PyAV is not installed")

FORMATS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),
    ("mov", "libx264"),
    ("mkv", "mpeg4"),
    ("webm", "libvpx"),
    ("avi", "mpeg4"),
    ("flv", "flv"),
]
VARIABLE = [0, 40, 80, 1000, 1040, 1900, 2000, 2500, 2600, 3000]


def greys(video) -> list[int]:
    """The numbers of the frames, as their greys tell them."""
    return [round(float(np.asarray(frame).mean()) / 8) for frame in video.frames]


@pytest.mark.parametrize(("ending", "codec"), FORMATS)
def test_frames_of_every_format(tmp_path, ending, codec):
    path = movies.write(tmp_path / f"a.{ending}", codec=codec)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        found = load_video(mf.Video(source, num_frames=8))
        assert found.total == 30
        assert found.indices == (0, 4, 8, 12, 17, 21, 25, 29)
        assert found.seconds == pytest.approx([i / 10 for i in found.indices], abs=2e-3)
        assert greys(found) == pytest.approx(list(found.indices), abs=1)
        assert found.duration == pytest.approx(3.0, abs=0.01)


def test_a_format_that_jumps_badly(tmp_path):
    path = movies.write(tmp_path / "a.mpg", codec="mpeg2video", rate=25)
    assert greys(load_video(mf.Video(path, num_frames=5))) == [0, 7, 14, 22, 29]


def test_a_variable_rate_keeps_its_own_times(tmp_path):
    path = movies.write(tmp_path / "v.mp4", 10, shown=VARIABLE)
    found = load_video(mf.Video(path, num_frames=10))
    assert found.seconds == pytest.approx([time / 1000 for time in VARIABLE], abs=1e-3)
    assert greys(found) == list(range(10))


def test_distant_frames_of_a_long_video(tmp_path):
    path = movies.write(tmp_path / "long.mp4", 900, 25)
    found = load_video(mf.Video(path, num_frames=4))
    assert found.indices == (0, 300, 599, 899)
    wanted = [8 * i % 256 for i in found.indices]
    assert [float(np.asarray(frame).mean()) for frame in found.frames] == pytest.approx(wanted, abs=10)


def test_frames_a_second(tmp_path):
    path = movies.write(tmp_path / "a.mp4")
    assert len(load_video(mf.Video(path, fps=4)).frames) == 12
    assert len(load_video(mf.Video(path, fps=0.1)).frames) == 1


def test_a_video_turned_on_its_side(tmp_path):
    path = movies.write(tmp_path / "a.mp4")
    content = path.read_bytes()
    # the matrix of the track header: 0 1 -1 0, a quarter turn
    at = content.index(b"tkhd") + 4 + 40
    upright = (1 << 16).to_bytes(4, "big") + bytes(12) + (1 << 16).to_bytes(4, "big")
    assert content[at : at + 20] == upright
    turned = (
        bytes(4) + (1 << 16).to_bytes(4, "big") + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(4)
    )
    found = load_video(content[:at] + turned + content[at + 20 :])
    assert found.size == (48, 64)


def test_lists_arrays_and_tensors():
    frames = [np.full((8, 12, 3), 8 * i, np.uint8) for i in range(6)]
    stacked = np.stack(frames)
    for source in (
        frames,
        [Image.fromarray(one) for one in frames],
        stacked,
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
    ):
        found = load_video(mf.Video(source, frame_rate=2))
        assert greys(found) == list(range(6))
        assert found.seconds == (0, 0.5, 1, 1.5, 2, 2.5)
        assert found.size == (12, 8)
    assert load_video(mf.Video(np.moveaxis(stacked, -1, 1), num_frames=2)).indices == (0, 5)


def test_animated_pictures_need_no_other_library(tmp_path):
    frames = [Image.new("RGB", (8, 8), (8 * i,) * 3) for i in range(5)]
    for ending in ("gif", "webp", "png"):
        path = tmp_path / f"a.{ending}"
        lossless = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 200, 300, 400, 500], **lossless)
        found = load_video(mf.Video(path))
        assert greys(found) == list(range(5))
        assert found.seconds == pytest.approx([0, 0.1, 0.3, 0.6, 1.0])
    code = (
        "import sys; sys.modules['av'] = sys.modules['torchcodec'] = None; import mllm_fast as mf\n"
        "from mllm_fast.core.video_loading import load_video\n"
        f"print(len(load_video(mf.Video({str(tmp_path / 'a.gif')!r})).frames))\n"
        f"open({str(tmp_path / 'a.mp4')!r}, 'wb').write(b'0000ftyp' + bytes(20))\n"
        f"try: load_video({str(tmp_path / 'a.mp4')!r})\n"
        "except mf.InputError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "5"
    assert said[1].startswith("a video file is read with PyAV: pip install")


def test_animations_are_not_decoded_without_end(tmp_path, monkeypatch):
    """Their times are known only once all frames are decoded, so that choosing few of them bounds nothing."""
    frames = [Image.new("RGB", (30, 20), (8 * i,) * 3) for i in range(21)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    one = mf.Video(tmp_path / "a.gif", num_frames=1)
    assert len(load_video(one, max_pixels=600, in_all=630).frames) == 1
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "load", lambda _: pytest.fail("a frame is decoded"))
    with pytest.raises(mf.InputError, match=r"21 frames of 30 x 20 pixels.* convert it to MP4"):
        load_video(one, max_pixels=600, in_all=629)
    monkeypatch.setattr("mllm_fast.core.animated_images._MAX_FRAMES", 20)
    with pytest.raises(mf.InputError, match="the limits are 20 frames"):
        load_video(one)


@pytest.mark.parametrize(("said", "usable"), [({"ffmpeg_major_version": None}, False), ({}, True)])
def test_torchcodec_without_ffmpeg_is_no_decoder(monkeypatch, said, usable):
    """Recent releases are imported without FFmpeg's libraries, and fail at each video, which is not damaged."""
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(**said))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=list))
    assert find_decoder() is (list if usable else None)


def test_torchcodec_reads_the_same(tmp_path, monkeypatch):
    if find_decoder() is None:
        pytest.skip("torchcodec, or FFmpeg's shared libraries, are not installed")
    paths = [
        movies.write(tmp_path / "a.mp4", codec="libx264"),
        movies.write(tmp_path / "v.mp4", 10, shown=VARIABLE),
        movies.write(tmp_path / "b.mkv"),
    ]
    ours = [load_video(mf.Video(path, num_frames=6)) for path in paths]
    monkeypatch.setitem(sys.modules, "av", None)
    for path, wanted in zip(paths, ours, strict=True):
        for source in (path, path.read_bytes()):
            found = load_video(mf.Video(source, num_frames=6))
            assert (found.indices, found.total) == (wanted.indices, wanted.total)
            assert found.seconds == pytest.approx(wanted.seconds, abs=2e-3)
            assert greys(found) == greys(wanted)
    with pytest.raises(mf.InputError, match="holds no video"):
        load_video(_made(tmp_path, paths[0].read_bytes()[:1500]))


BAD = [
    (lambda p: p / "none.mp4", "no such file"),
    (lambda p: _made(p, b""), "the file is empty"),
    (lambda p: _made(p, b"hello"), "damaged or truncated"),
    (lambda p: b"hello", "not a video in MP4"),
    (lambda p: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts", "not a video in MP4"),
    (lambda p: movies.write(p / "s.mp4", video=False, audio=True), "holds no video, only audio"),
    (lambda p: _made(p, movies.write(p / "a.mp4").read_bytes()[:1500]), "damaged or truncated"),
    (lambda p: _made(p, movies.write(p / "a.mkv").read_bytes()[:1500], "mkv"), "truncated"),
    (lambda p: [], "the video has no frame"),
    (lambda p: np.zeros((4, 4, 3), np.uint8), r"\[frames, H, W, C\]"),
    (lambda p: [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frames of a video have one size"),
    (lambda p: [np.zeros((2, 2, 3), np.uint8)] * 10_000, "10,000 frames of the video would be read, the limit is 768"),
    (lambda p: 3, "a video is a path, a URL, bytes"),
]


def _made(folder, content: bytes, ending: str = "mp4"):
    path = folder / f"x.{ending}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("make", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_videos_are_told_in_one_line(tmp_path, make, message):
    with pytest.raises(mf.InputError, match=message) as error:
        load_video(mf.Video(make(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["m3u8", "mp4"])
def test_a_playlist_opens_nothing(tmp_path, ending):
    """A path is the caller's own, but what it names is not fetched."""
    asked = []
    with HTTPServer(("127.0.0.1", 0), lambda *connection: asked.append(connection)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        address = f"http://127.0.0.1:{server.server_port}/a.ts"
        lines = ("#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", address, "#EXT-X-ENDLIST", "")
        path = _made(tmp_path, "\n".join(lines).encode(), ending)
        with pytest.raises(mf.InputError):
            load_video(path)
        server.shutdown()
    assert not asked


def test_limits_can_be_raised(tmp_path):
    many = [np.zeros((2, 2, 3), np.uint8)] * 1000
    with pytest.raises(mf.InputError, match="raise the limit with max_frames"):
        load_video(mf.Video(many))
    assert len(load_video(mf.Video(many, max_frames=1000)).frames) == 1000
    path = movies.write(tmp_path / "a.mp4")
    with pytest.raises(mf.InputError, match=r"3,072 pixels \(64 x 48 each\), the limit is 3,000"):
        load_video(path, max_pixels=3000)
    with pytest.raises(mf.InputError, match="the 30 frames of the video have 92,160 pixels"):
        load_video(mf.Video(path, num_frames=30), max_pixels=4000)
    with pytest.raises(mf.InputError, match="the limit is 9,000"):
        load_video(mf.Video(path, num_frames=3), max_pixels=4000, in_all=9000)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"fps": 1, "num_frames": 2}, "but not both"),
        ({"fps": 0}, "fps is above 0"),
        ({"num_frames": 0}, "num_frames is a whole number of at least 1"),
        ({"frame_rate": float("nan")}, "frame_rate is above 0"),
        ({"max_frames": 1.5}, "max_frames is a whole number"),
    ],
)
def test_a_choice_that_is_none(choice, message):
    with pytest.raises(mf.InputError, match=message):
        mf.Video("a.mp4", **choice)


def test_what_is_a_video():
    assert is_video("a.MP4")
    assert is_video("https://example.org/a.webm?x=1")
    assert is_video("data:video/mp4;base64,AAAA")
    assert is_video(mf.Video([]))
    assert not is_video("a.png")
    assert not is_video(np.zeros((2, 2, 3)))


@given(st.integers(1, 5000), st.floats(0.1, 120), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_spaced_frames(total, rate, wanted):
    found = spaced(total, rate, wanted, None)
    assert len(found) == min(wanted, total)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] == (total - 1 if len(found) > 1 else 0)
    assert len(spaced(total, rate, None, 1.0)) == min(total, max(1, int(total / rate)))


def test_a_sampler_that_cannot():
    def refuses(*_):
        raise ValueError("too few")

    with pytest.raises(mf.InputError, match=r"video of 5 frames at 2 a second: too few"):
        chosen(mf.Video([]), 5, 2.0, refuses)


def test_uploads_are_checked(tmp_path):
    check_media(movies.write(tmp_path / "a.mp4"), 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(mf.InputError, match="20 x 20 pixels, the limit is 399"):
        check_media(tmp_path / "a.png", 399)
    with pytest.raises(mf.InputError):
        check_media(_made(tmp_path, b"neither"), 100)


def two_videos() -> TokenLayout:
    moments = [Moment(0, (0, 1), (0.0, 0.5)), Moment(0, (2, 3), (1.0, 1.5)), Moment(1, (7,), (3.5, 3.5), True)]
    images = []
    for i, moment in enumerate([None, *moments]):
        images.append(
            ImageLayout(torch.arange(4 * i, 4 * i + 4), (8, 8), (Tile(2, 2, (0.0, 0.0, 8.0, 8.0)),), moment=moment)
        )
    return TokenLayout(20, 20, tuple(images))


def test_segments_of_frames_and_times():
    layout = two_videos()
    assert layout.videos == ((1, 2), (3,))
    assert layout.positions("video").tolist() == list(range(4, 16))
    assert layout.positions("video:1").tolist() == list(range(12, 16))
    assert layout.positions("frame:1").tolist() == list(range(4, 8))
    assert layout.positions("frame:1-2").tolist() == list(range(4, 12))
    assert layout.positions("time:0.2-1").tolist() == list(range(4, 12))
    assert layout.positions("time:3.5").tolist() == list(range(12, 16))
    assert layout.positions("video:1/frame:0-99").tolist() == list(range(12, 16))
    for wrong, words in (
        ("frame:9", "no frame that the model read lies in 'frame:9'; those that it read are at 0-1, 2-3, 7"),
        ("time:2-3", "0.00-0.50, 1.00-1.50, 3.50"),
        ("video:2/frame:1", "no frame"),
        ("frame:1.5", "segment is one of"),
        ("times:1", "segment is one of"),
    ):
        with pytest.raises(mf.InputError, match=words.replace(".", r"\.")):
            layout.positions(wrong)


def test_layouts_of_videos_survive_json():
    layout = two_videos()
    again = images_of(json.loads(json.dumps(plain_images(layout.images))))
    assert [image.moment for image in again] == [image.moment for image in layout.images]


def test_knockouts_name_moments():
    rule = mf.Knockout.parse("time:3.0-5.5->query+generated@from 2")
    assert (rule.source, rule.target, rule.layers) == ("time:3.0-5.5", "query+generated", "from 2")
    assert mf.Knockout.parse("video:1/frame:3->query").source == "video:1/frame:3"
    assert time_label(Moment(0, (1,), (1.5, 1.5))) == "1.50 s"
    assert time_label(Moment(0, (1, 2), (1.5, 2.0))) == "1.50–2.00 s"

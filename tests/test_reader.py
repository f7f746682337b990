"""Training sees what a person sees: clips of every kind against an independent reading of what was put into them.

Each frame has its number as a bar code, and corners of known colours. The clips are made by the ffmpeg that
imageio-ffmpeg brings, which is another build than PyAV's.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
HEIGHT, WIDTH, NUM_FRAMES, RATE = 96, 160, 60, 25
CORNERS = {(0, 0): "red", (0, 1): "green", (1, 0): "blue", (1, 1): "white"}
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
BITS = 8


def barcode(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame [H, W, C] with `number` in a row of bars in its middle, and a colour in each corner."""
    frame = np.full((height, width, 3), 96, np.uint8)
    down, across = height // 3, width // 4
    for (bottom, right), color in CORNERS.items():
        rows = slice(-down, None) if bottom else slice(0, down)
        columns = slice(-across, None) if right else slice(0, across)
        frame[rows, columns] = COLORS[color]
    for bit in range(BITS):
        left, right = (round(width * (bit + i) / BITS) for i in (0, 1))
        frame[down:-down, left:right] = 255 * (number >> bit & 1)
    return frame


def number_in(frame: np.ndarray) -> int:
    """The number of `barcode` in a frame of any size."""
    height, width = frame.shape[:2]
    row = frame[height // 2 - height // 16 : height // 2 + height // 16].mean((0, 2))
    return sum((row[round(width * (bit + 0.5) / BITS)] > 128) << bit for bit in range(BITS))


def corners_of(frame: np.ndarray) -> dict:
    """The nearest of the four colours in each corner of a frame."""
    found = {}
    height, width = frame.shape[:2]
    for bottom, right in CORNERS:
        rows = slice(-height // 6, -height // 16) if bottom else slice(height // 16, height // 6)
        columns = slice(-width // 6, -width // 16) if right else slice(width // 16, width // 6)
        color = frame[rows, columns].mean((0, 1))
        found[bottom, right] = min(COLORS, key=lambda name: np.abs(color - COLORS[name]).sum())
    return found


def ffmpeg(*arguments, frames=None) -> None:
    command = [FFMPEG, "-loglevel", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, input=None if frames is None else frames.tobytes(), capture_output=True)


def encode(path: Path, *options, rate: float = RATE, num_frames: int = NUM_FRAMES, size=(HEIGHT, WIDTH)) -> Path:
    frames = np.stack([barcode(number, *size) for number in range(num_frames)])
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", rate, "-i", "-"]
    ffmpeg(*raw, *options, path, frames=frames)
    return path


H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "12", "-bf", "3"]
HEVC = ["-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=none:keyint=24"]
MPEG4 = ["-c:v", "mpeg4", "-bf", "2", "-q:v", "2", "-g", "12"]
KINDS = {  # the file's name, how it is encoded
    "h264": ("a.mp4", H264),
    "h264 in mov": ("a.mov", H264),
    "h264 in m4v": ("a.m4v", H264),
    "h264 in mkv": ("a.mkv", H264),
    "h264 in avi": ("a.avi", H264),
    "h264 in ts": ("a.ts", H264),
    "h264 in m2ts": ("a.m2ts", H264),
    "h264 in flv": ("a.flv", H264),
    "h264 in 3gp": ("a.3gp", H264),
    "h264, open GOP": ("a.mp4", [*H264, "-x264-params", "open-gop=1"]),
    "h264, open GOP in mkv": ("a.mkv", [*H264, "-x264-params", "open-gop=1"]),
    "h264, one keyframe": ("a.mp4", [*H264, "-g", "1000"]),
    "h264, intra refresh": ("a.mp4", [*H264, "-x264-params", "intra-refresh=1"]),
    "h264, fragmented": ("a.mp4", [*H264, "-movflags", "frag_keyframe+empty_moov"]),
    "h264, 10 bits 4:4:4": ("a.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv444p10le"]),
    "hevc": ("a.mp4", HEVC),
    "hevc in mkv": ("a.mkv", HEVC),
    "hevc in ts": ("a.ts", HEVC),
    "vp9": ("a.webm", ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-g", "12"]),
    "vp8": ("a.webm", ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "12", "-b:v", "2M"]),
    "av1": ("a.mp4", ["-c:v", "libaom-av1", "-cpu-used", "8", "-g", "12"]),
    "av1 in webm": ("a.webm", ["-c:v", "libaom-av1", "-cpu-used", "8", "-g", "12"]),
    "prores": ("a.mov", ["-c:v", "prores_ks"]),
    "mjpeg": ("a.avi", ["-c:v", "mjpeg", "-q:v", "2"]),
    "mpeg4 in mp4": ("a.mp4", MPEG4),
    "mpeg4 in mkv": ("a.mkv", MPEG4),
    "mpeg4 in avi": ("a.avi", MPEG4),
    "xvid in avi": ("a.avi", ["-c:v", "libxvid", "-bf", "2", "-q:v", "2"]),  # the encoder loses the last two frames
    "wmv": ("a.wmv", ["-c:v", "wmv2", "-b:v", "4M"]),
    "mpeg2 in mpg": ("a.mpg", ["-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12"]),
    "mpeg2 in mpeg": ("a.mpeg", ["-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12"]),
    "mpeg2 in ts": ("a.ts", ["-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12"]),
    "mpeg2 in mts": ("a.mts", ["-f", "mpegts", "-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12"]),
    "theora": ("a.ogv", ["-c:v", "libtheora", "-q:v", "9"]),
    "sorenson in flv": ("a.flv", ["-c:v", "flv", "-q:v", "2"]),
    "gif": ("a.gif", ["-c:v", "gif"]),
    "animated webp": ("a.webp", ["-c:v", "libwebp", "-lossless", "1"]),
    "apng": ("a.png", ["-f", "apng", "-c:v", "apng"]),
    "apng by its name": ("a.apng", ["-f", "apng", "-c:v", "apng"]),
}


def read_all(script, path: Path, **changes) -> tuple[object, np.ndarray]:
    """What the script makes of a clip: its `Clip`, and all of its frames, asked for in parts and out of order."""
    clip = script.open_clip(script.VideoRecord("", str(path)), **changes)
    num_frames = len(clip.times) - 1
    order = np.random.default_rng(0).permutation(num_frames)
    frames = np.empty((num_frames, *clip.size, 3), np.uint8)
    try:
        for part in np.array_split(order, min(5, num_frames)):
            frames[part] = clip.read(part.tolist())
    except script.TimesDiffer:
        assert "is_in_order" not in changes
        return read_all(script, path, is_in_order=True)
    return clip, frames


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_once_and_in_order(script, tmp_path, kind):
    name, options = KINDS[kind]
    path = encode(tmp_path / name, *options)
    clip, frames = read_all(script, path)
    assert numbers_in(frames) == list(range(NUM_FRAMES - 2 * (kind == "xvid in avi")))
    assert all(corners_of(frame) == CORNERS for frame in frames[::20])
    assert clip.size == (HEIGHT, WIDTH)
    assert np.diff(clip.times) == pytest.approx(1 / RATE, abs=0.011)


def numbers_in(frames: np.ndarray) -> list[int]:
    return [int(number_in(frame)) for frame in frames]


def with_ffmpeg(path: Path, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """All frames of a file [F, H, W, C] as ffmpeg hands them over, each once."""
    command = [FFMPEG, "-loglevel", "error", "-nostdin", "-i", path, "-fps_mode", "passthrough"]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


# ---- cut without encoding again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [H264, [*H264, "-x264-params", "open-gop=1"], HEVC], ids=["h264", "open", "hevc"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".ts"])
def test_a_cut_clip_begins_and_ends_where_it_was_cut(script, tmp_path, suffix, codec):
    whole = encode(tmp_path / f"whole{suffix}", *codec, num_frames=200)
    path = tmp_path / f"cut{suffix}"
    ffmpeg("-ss", 2.3, "-i", whole, "-t", 3, "-c", "copy", path)
    numbers = numbers_in(read_all(script, path)[1])
    assert numbers == numbers_in(with_ffmpeg(path)) and 60 <= len(numbers) < 110
    *most, last = numbers  # the last one may be a frame whose neighbours were cut off
    assert most == list(range(numbers[0], numbers[0] + len(most))) and most[-1] < last < most[-1] + 5
    if suffix in (".mp4", ".mov"):  # an edit list says where it begins; in the others it begins at a keyframe
        assert numbers[0] == 58


def test_a_broadcast_cut_in_the_middle_of_a_packet(script, tmp_path):
    whole = encode(tmp_path / "whole.ts", "-c:v", "mpeg2video", "-bf", "2", "-q:v", "2", "-g", "12", num_frames=100)
    data = whole.read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[len(data) // 3 : -len(data) // 5])
    numbers = numbers_in(read_all(script, path)[1])
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 30


# ---- upright, with square pixels ------------------------------------------------------------------------------------

TURNS = {  # what ffmpeg is told, and where the corners are then
    "90": (["-display_rotation", "90"], {(0, 0): "green", (0, 1): "white", (1, 0): "red", (1, 1): "blue"}),
    "180": (["-display_rotation", "180"], {(0, 0): "white", (0, 1): "blue", (1, 0): "green", (1, 1): "red"}),
    "270": (["-display_rotation", "270"], {(0, 0): "blue", (0, 1): "red", (1, 0): "white", (1, 1): "green"}),
    "hflip": (["-display_hflip"], {(0, 0): "green", (0, 1): "red", (1, 0): "white", (1, 1): "blue"}),
    "vflip": (["-display_vflip"], {(0, 0): "blue", (0, 1): "white", (1, 0): "red", (1, 1): "green"}),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("turn", TURNS)
def test_turned_and_mirrored_by_metadata(script, tmp_path, turn, suffix):
    options, corners = TURNS[turn]
    plain = encode(tmp_path / "plain.mp4", *H264, num_frames=20)
    path = tmp_path / f"turned{suffix}"
    ffmpeg(*options, "-i", plain, "-c", "copy", path)
    clip, frames = read_all(script, path)
    assert clip.size == ((WIDTH, HEIGHT) if turn in ("90", "270") else (HEIGHT, WIDTH))
    assert all(corners_of(frame) == corners for frame in frames)
    height, width = clip.size
    difference = np.abs(frames.astype(int) - with_ffmpeg(path, height, width))
    assert difference.mean() < 1


@pytest.mark.parametrize(("aspect", "size"), [("64/45", (576, 1024)), ("8/9", (540, 720)), ("1/1", (480, 720))])
def test_pixels_that_are_not_square(script, tmp_path, aspect, size):
    """A circle stays one."""
    height, width = {"64/45": (576, 720), "8/9": (480, 720), "1/1": (480, 720)}[aspect]
    sides = [eval(aspect), 1.0]
    rows, columns = np.mgrid[:height, :width]
    circle = ((columns - width / 2) * sides[0]) ** 2 + (rows - height / 2) ** 2 < (height / 4) ** 2
    frames = np.repeat((circle * 255).astype(np.uint8)[None, :, :, None], 3, axis=3).repeat(5, axis=0)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", "-"]
    path = tmp_path / "a.mp4"
    ffmpeg(*raw, "-vf", f"setsar={aspect}", *H264, path, frames=frames)
    clip, seen = read_all(script, path)
    assert clip.size == size
    assert clip.notes == (["pixels that are not square"] if aspect != "1/1" else [])
    white = seen[0].mean(-1) > 128
    across, down = white[size[0] // 2].sum(), white[:, size[1] // 2].sum()
    assert across == pytest.approx(down, rel=0.02) and down > 200


@pytest.mark.parametrize("width", [16, 24, 48, 72])
def test_narrow_clips(script, tmp_path, width):
    path = encode(tmp_path / "a.mp4", *H264, size=(64, width), num_frames=10)
    clip, frames = read_all(script, path)
    assert clip.size == (64, width) and len(frames) == 10
    assert np.abs(frames.astype(int) - with_ffmpeg(path, 64, width)).mean() < 1


# ---- colours --------------------------------------------------------------------------------------------------------

MATRICES = {
    "untagged": [],
    "bt709": ["-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-color_trc", "bt709"],
    "full range": ["-vf", "scale=out_range=full", "-color_range", "pc"],
    "bt601": ["-vf", "scale=out_color_matrix=bt601", "-colorspace", "smpte170m"],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_colors_are_those_that_were_encoded(script, tmp_path, matrix):
    path = encode(tmp_path / "a.mp4", *MATRICES[matrix], *H264, "-qp", "2", num_frames=5)
    frames = read_all(script, path)[1]
    inner = np.abs(frames[3].astype(int) - barcode(3))[4:28, 4:36].mean()  # of a corner, away from its edges
    assert inner < 3
    assert np.abs(frames.astype(int) - with_ffmpeg(path)).mean() < 1


@pytest.mark.parametrize(("transfer", "worst"), [("smpte2084", 6), ("arib-std-b67", 11)])
def test_hdr_is_brought_to_what_a_screen_shows(script, tmp_path, transfer, worst):
    rows, columns = np.mgrid[:96, :160]
    original = np.stack([columns * 255 // 160, rows * 255 // 96, np.full_like(rows, 90)], axis=-1)
    frames = original.astype(np.uint8)[None].repeat(5, axis=0)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "160x96", "-r", "25", "-i", "-"]
    convert = f"zscale=pin=709:tin=709:min=709:p=2020:t={transfer}:m=2020_ncl:npl=203"
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc"]
    path = tmp_path / "a.mp4"
    encoder = ["-c:v", "libx265", "-x265-params", "log-level=none:qp=4"]
    ffmpeg(*raw, "-vf", f"format=gbrp16,{convert},format=yuv420p10le", *encoder, *tags, path, frames=frames)
    clip, seen = read_all(script, path)
    plain = with_ffmpeg(path)
    errors = [np.abs(each[2].astype(int) - frames[2]).mean() for each in (seen, plain)]
    assert clip.notes == ["HDR"] and errors[0] < worst < 15 < errors[1]


def test_an_interlaced_clip_has_no_combs(script, tmp_path):
    """A bar moves sideways: in half frames of two moments its edge is a comb, where each row differs from the next."""
    bars = np.zeros((80, 96, 160, 3), np.uint8)
    for number, frame in enumerate(bars):
        frame[:, number : number + 40] = 255
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "160x96", "-r", "50", "-i", "-"]
    path = tmp_path / "a.mp4"
    interlaced = ["-vf", "tinterlace=interleave_top,setfield=tff", "-flags", "+ildct+ilme"]
    ffmpeg(*raw, *interlaced, "-c:v", "libx264", "-x264-params", "tff=1", "-pix_fmt", "yuv420p", path, frames=bars)
    clip, frames = read_all(script, path)
    combs = [np.abs(np.diff(each.astype(int), axis=1)).mean() for each in (with_ffmpeg(path), frames)]
    assert clip.notes == ["interlaced"] and len(frames) == 40
    assert np.diff(clip.times) == pytest.approx(1 / 25, abs=1e-3)
    assert combs[0] > 2 and combs[1] < 0.5
    left_edges = [int(np.argmax(frame.mean((0, 2)) > 100)) for frame in frames[2:-2]]
    assert np.diff(left_edges).tolist() == pytest.approx([2] * 35, abs=1)


# ---- times ----------------------------------------------------------------------------------------------------------


def variable_rate(path: Path) -> list[float]:
    """A recording of a screen: the picture changes at odd moments. Returns when frame i is shown."""
    seconds = np.cumsum([0.0] + [0.04, 0.04, 0.52, 0.04, 1.2, 0.04, 0.04, 0.04, 0.32, 0.8] * 3)
    folder = path.parent / "frames"
    folder.mkdir()
    lines = ["ffconcat version 1.0"]
    for number, duration in enumerate(np.diff(seconds)):
        Image.fromarray(barcode(number)).save(folder / f"{number}.png")
        lines += [f"file {number}.png", f"duration {duration:.3f}"]
    (folder / "list.txt").write_text("\n".join([*lines, lines[-2]]))
    ffmpeg("-f", "concat", "-i", folder / "list.txt", "-fps_mode", "vfr", "-enc_time_base", "1:1000", *H264, path)
    return seconds.tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_fps_takes_the_frame_that_is_shown_at_each_moment(script, tmp_path, suffix):
    seconds = variable_rate(tmp_path / "a.mp4")
    path = tmp_path / f"a{suffix}"
    if suffix == ".webm":
        vp9 = ["-fps_mode", "passthrough", "-c:v", "libvpx-vp9", "-deadline", "realtime"]
        ffmpeg("-i", tmp_path / "a.mp4", *vp9, path)
    elif suffix == ".mkv":
        ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", path)
    (tmp_path / "text").write_text("a\n")
    (tmp_path / "clips").write_text(path.name)
    columns = {"caption_column": "text", "video_column": "clips", "frame_sampling": "fps", "fps": 8}
    dataset = script.VideoDataset(str(tmp_path), **columns, height=HEIGHT, width=WIDTH, max_num_frames=49)
    clip, indices, *_ = dataset.choose(0)
    assert "variable frame rate" in clip.notes
    moments = [i / 8 + 1e-3 for i in range(len(indices))]
    expected = [int(np.searchsorted(seconds, moment, side="right")) - 1 for moment in moments]
    assert len(indices) == 49 and numbers_in(clip.read(indices)) == expected
    dataset.settings["fps"] = 4  # 9.3 seconds have 37 frames
    _, indices, *_ = dataset.choose(0)
    assert len(indices) == 37


def test_a_recording_of_a_browser_without_a_duration(script, tmp_path):
    whole = encode(tmp_path / "whole.webm", *KINDS["vp9"][1])
    path = tmp_path / "a.webm"
    with path.open("wb") as file:  # a pipe cannot go back to write the duration and the index
        piped = ["-c", "copy", "-f", "webm", "-"]
        subprocess.run([FFMPEG, "-loglevel", "error", "-i", whole, *piped], check=True, stdout=file)
    clip, frames = read_all(script, path)
    assert numbers_in(frames) == list(range(NUM_FRAMES))
    assert clip.times[-1] == pytest.approx(NUM_FRAMES / RATE, abs=0.05)


# ---- pictures -------------------------------------------------------------------------------------------------------


def pictures() -> dict:
    """By name: the picture, how it is saved, and what it must look like in the middle."""
    gradient = np.mgrid[:64, :96][1] / 96
    grey = Image.fromarray((gradient * 65535).astype(np.uint16))
    middle = (127, 127, 127)
    clear = np.zeros((64, 96, 4), np.uint8)
    clear[:, :, 0] = 255  # red, hidden
    palette = Image.fromarray(clear[..., :3]).convert("P")
    return {
        "grey16.png": (grey, {}, middle),
        "grey16.tif": (grey, {}, middle),
        "grey8.png": (Image.fromarray((gradient * 255).astype(np.uint8)), {}, middle),
        "bits.png": (Image.new("1", (96, 64), 1), {}, (255, 255, 255)),
        "clear.png": (Image.fromarray(clear), {}, (255, 255, 255)),
        "clear.webp": (Image.fromarray(clear), {"lossless": True}, (255, 255, 255)),
        "palette.png": (palette, {"transparency": palette.getpixel((0, 0))}, (255, 255, 255)),
        "cmyk.jpg": (Image.new("CMYK", (96, 64), (0, 255, 255, 0)), {"quality": 95}, (255, 0, 0)),
        "cmyk.tiff": (Image.new("CMYK", (96, 64), (0, 255, 255, 0)), {}, (255, 0, 0)),
        "plain.bmp": (Image.new("RGB", (96, 64), "blue"), {}, (0, 0, 255)),
        "plain.jfif": (Image.new("RGB", (96, 64), "blue"), {"format": "JPEG", "quality": 95}, (0, 0, 255)),
        "plain.avif": (Image.new("RGB", (96, 64), "blue"), {"quality": 95}, (0, 0, 255)),
        "UPPER.PNG": (Image.new("RGB", (96, 64), "blue"), {}, (0, 0, 255)),
    }


@pytest.mark.parametrize("name", pictures())
def test_pictures_of_any_mode(script, tmp_path, name):
    picture, options, expected = pictures()[name]
    picture.save(tmp_path / name, **options)
    clip, frames = read_all(script, tmp_path / name)
    assert clip.size == (64, 96) and len(frames) == 1 and clip.notes == []
    assert frames[0, 32, 48].tolist() == pytest.approx(expected, abs=4)


def test_a_turned_picture_is_upright(script, tmp_path):
    turned = Image.fromarray(barcode(5)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "a.jpg", exif=exif, quality=95)
    clip, frames = read_all(script, tmp_path / "a.jpg")
    assert clip.size == (HEIGHT, WIDTH) and corners_of(frames[0]) == CORNERS and number_in(frames[0]) == 5


def test_an_animated_picture_is_a_clip(script, tmp_path):
    path = encode(tmp_path / "a.webp", *KINDS["animated webp"][1])
    clip, _ = read_all(script, path)
    assert clip.notes == ["animated picture"] and len(clip.times) == NUM_FRAMES + 1


# ---- what cannot be read --------------------------------------------------------------------------------------------


def refused(script, path: Path, **changes) -> str:
    with pytest.raises(ValueError) as error:
        read_all(script, path, **changes)
    return str(error.value)


def test_files_that_are_no_video_are_named_by_what_they_are(script, tmp_path):
    files = {
        "empty.mp4": (b"", "it is empty"),
        "pointer.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "run git lfs pull"),
        "page.mp4": (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", r"it is a web page \(HTML\)"),
        "text.mp4": (b"a red square\nanother one\n", "it is text and no video"),
        "noise.mp4": (bytes(range(256)) * 40, "it is no video or picture that can be read; ffmpeg -i FILE"),
        "picture.png": (b"\x89PNG but no picture", "it is no video or picture that can be read"),
        "page.jpg": (b"<html>", r"it is a web page \(HTML\)"),
        "phone.heic": (b"anything", "HEIC pictures cannot be read: magick FILE picture.jpg converts one"),
        "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "it is a HEIC picture"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        assert re.search(message, refused(script, tmp_path / name)), name


def test_sound_alone_and_the_cover_of_a_song(script, tmp_path):
    sound = ["-f", "lavfi", "-i", "sine=duration=1"]
    ffmpeg(*sound, tmp_path / "a.mp4")
    assert refused(script, tmp_path / "a.mp4") == "it has no video stream"
    Image.new("RGB", (96, 64), "red").save(tmp_path / "cover.jpg")
    cover = ["-i", tmp_path / "cover.jpg", "-map", "0", "-map", "1", "-c:v", "mjpeg", "-disposition:v", "attached_pic"]
    ffmpeg(*sound, *cover, tmp_path / "b.mp4")
    assert refused(script, tmp_path / "b.mp4") == "it has no video stream"
    video = encode(tmp_path / "c.mp4", *H264)
    both = ["-i", tmp_path / "cover.jpg", "-i", video, "-map", "0", "-map", "1"]
    ffmpeg(*both, "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "d.mp4")
    assert numbers_in(read_all(script, tmp_path / "d.mp4")[1]) == list(range(NUM_FRAMES))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_a_truncated_clip_is_refused_with_what_is_left(script, tmp_path, suffix):
    options = KINDS["vp9"][1] if suffix == ".webm" else H264
    whole = encode(tmp_path / f"whole{suffix}", *options, "-movflags", "+faststart", num_frames=200)
    data = whole.read_bytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data[: len(data) // 2])
    said = refused(script, path)
    left = re.fullmatch(r"it is truncated: (\d\.\d) of [48]\.0 s can be read", said)
    assert left and 1 < float(left[1]) < 7, said


def test_an_mp4_without_its_index(script, tmp_path):
    data = encode(tmp_path / "whole.mp4", *H264).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    assert refused(script, tmp_path / "a.mp4").startswith("it has no index (moov): it is truncated")


def test_a_codec_that_is_missing(script, tmp_path):
    data = encode(tmp_path / "whole.mp4", *H264).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data.replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    assert "there is no decoder for its video stream; ffmpeg -i FILE" in refused(script, tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_damage_in_the_middle_is_refused_with_its_time(script, tmp_path, suffix, capfd):
    path = encode(tmp_path / f"a{suffix}", *H264, "-b:v", "4M", num_frames=200)
    data = bytearray(path.read_bytes())
    draw = np.random.default_rng(0)
    for start in range(int(len(data) * 0.45), int(len(data) * 0.5), 150):
        data[start : start + 20] = draw.bytes(20)
    path.write_bytes(data)
    said = refused(script, path)
    seconds = re.fullmatch(r"it is damaged at (\d\.\d) s", said)
    assert seconds and 2.5 < float(seconds[1]) < 5, said
    assert capfd.readouterr().err == ""  # FFmpeg's own lines


# ---- the originals' reader, other sources, what a run says ----------------------------------------------------------


@pytest.mark.parametrize("bridge", ["native", "torch"])
def test_the_originals_reader_gives_its_frames(script, tmp_path, bridge):
    import decord

    path = encode(tmp_path / "a.avi", *KINDS["h264 in avi"][1])
    expected = decord.VideoReader(str(path)).get_batch(list(range(0, 60, 7))).asnumpy()
    decord.bridge.set_bridge(bridge)
    try:
        clip = script.open_clip(script.VideoRecord("", str(path)), "decord")
        assert np.array_equal(clip.read(list(range(0, 60, 7))), expected)
    finally:
        decord.bridge.set_bridge("native")
    assert numbers_in(expected) != list(range(0, 60, 7))  # why it is not the default


def test_decord_is_imported_for_its_flag_only(script):
    code = f"import sys; sys.path.insert(0, {str(Path(script.__file__).parent)!r}); import {script.__name__}"
    command = [sys.executable, "-c", f"{code}; print('decord' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_plain_clips_give_what_the_originals_reader_gave(script, tmp_path):
    """To rounding: the mean difference is below 1 of 255."""
    path = encode(tmp_path / "a.mp4", *H264)
    frames = [read_all(script, path, video_reader=reader)[1].astype(int) for reader in ("pyav", "decord")]
    assert np.abs(frames[0] - frames[1]).mean() < 1


@pytest.mark.parametrize("kind", ["h264", "h264 in ts", "gif", "animated webp"])
def test_a_clip_in_a_data_sets_own_files(script, tmp_path, kind):
    name, options = KINDS[kind]
    data = encode(tmp_path / name, *options).read_bytes()
    clip = script.open_clip(script.VideoRecord("", f"row 0 of data ({name})", lambda: data))
    assert numbers_in(clip.read(list(range(NUM_FRAMES)))) == list(range(NUM_FRAMES))


def test_a_run_counts_what_was_converted(run, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "clips").mkdir()
    encode(tmp_path / "clips" / "a.webp", *KINDS["animated webp"][1])
    for name, num_frames in (("b.mp4", 20), ("c.mp4", 30)):
        encode(tmp_path / "clips" / name, "-vf", "setsar=2/1", *H264, num_frames=num_frames)
    for name in "abc":
        (tmp_path / "clips" / f"{name}.txt").write_text(f"a square {name}")
    own = {"caption_column": None, "video_column": None, "precompute_dir": None, "max_train_steps": 1}
    run(instance_data_root=tmp_path / "clips", **own)
    kinds = "1 with animated picture, 2 with pixels that are not square"
    assert f"Clips that were converted to what a person sees: {kinds}" in caplog.text


@pytest.mark.parametrize("workers", [1, 3])
def test_a_long_clip_takes_little_memory(script, tmp_path, workers):
    """A process holds the frames that it takes, and not those between them."""
    path = encode(tmp_path / "a.mp4", *H264, size=(480, 720), num_frames=250)
    (tmp_path / "text").write_text("a\n" * 4)
    (tmp_path / "clips").write_text(f"{path.name}\n" * 4)
    columns = {"caption_column": "text", "video_column": "clips", "height": 64, "width": 96, "max_num_frames": 9}
    dataset = script.VideoDataset(str(tmp_path), **columns)
    code = script.decode_clips
    peaks = []

    def measured(connection, *arguments):
        class Noting:
            def recv(self):
                return connection.recv()

            def send(self, answer):
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                connection.send(([peak], answer[1]))

        code(Noting(), *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "decode_clips", measured)
        for _, answer in script.decode_videos(dataset, [0, 1, 2, 3], torch.float32, workers):
            peaks += answer["notes"]
    own = psutil.Process().memory_info().rss
    assert len(peaks) == 4 and max(peaks) - own < 200e6  # all frames would be 259 MB, and half of it twice

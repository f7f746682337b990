"""The page of tools/preview_data.py: each warning is on the clip or prompt that was made for it, and its pictures are
what the training takes."""

import base64
import contextlib
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import preview_data
import pytest
import tiny
from conftest import BOTH, ONLY_I2V, ROOT, word_list
from PIL import Image, ImageOps
from test_reader import H264, encode
from training_script import ending_as
from transformers import AutoTokenizer


@dataclass
class Card:
    """A clip or a validation prompt on the page."""

    name: str  # of a prompt, its number
    is_prompt: bool
    kinds: set[str]
    warnings: list[str]
    source: str
    pictures: list[np.ndarray]  # [H, W, C]
    moving: list[np.ndarray]  # frames of the moving picture
    frames: list[int]


def read_picture(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)  # [H, W, C]


def read_cards(page: Path) -> list[Card]:
    cards = []
    picture = "data:image/webp;base64,([^\")]+)"
    for kinds, source in re.findall(r'<article data-kinds="(.*?)">(.*?)</article>', page.read_text(), re.S):
        what, name = re.search(r"<h2><span>(.*?)</span> (.*?)</h2>", source).groups()
        cards.append(Card(
            name=html.unescape(name),
            is_prompt=what == "validation prompt",
            kinds=set(kinds.split()) - {"all", "any"},
            warnings=[html.unescape(text) for text in re.findall("<li>(.*?)</li>", source)],
            source=source,
            pictures=[read_picture(data) for data in re.findall(f'<img alt="" src="{picture}">', source)],
            moving=[],
            frames=[int(number) for number in re.findall(r"frame (\d+)<", source)],
        ))  # fmt: skip
        if moving := re.search(rf"--frames: (\d+);.*?{picture}", source):
            cards[-1].moving = np.split(read_picture(moving[2]), int(moving[1]), axis=1)
    return cards


def read_page(page: Path) -> list[Card]:
    """The clips."""
    return [card for card in read_cards(page) if not card.is_prompt]


def read_prompts(page: Path) -> list[Card]:
    return [card for card in read_cards(page) if card.is_prompt]


def square(num_frames: int, height: int, width: int, color: str, way: str = "right") -> np.ndarray:
    return (tiny.moving_square(num_frames, height, width, tiny.COLORS[color], way) * 0.7 + 60).astype(np.uint8)


def write_set(folder: Path, clips: dict[str, tuple[str, np.ndarray | bytes]], **encoding) -> Path:
    """Clips by name, each a caption with frames, or with what a broken file holds."""
    folder.mkdir(parents=True)
    for name, (_, frames) in clips.items():
        if isinstance(frames, bytes):
            (folder / name).write_bytes(frames)
        else:
            tiny.write_clip(folder / name, frames, **encoding)
    (folder / "videos.txt").write_text("\n".join(clips))
    (folder / "prompts.txt").write_text("\n".join(caption for caption, _ in clips.values()))
    return folder


def preview(words: list[str], script: str = "train_cogvideox_lora") -> str:
    """What the terminal says."""
    return preview_of(ROOT / f"{script}.py", *words)


def preview_of(*words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        preview_data.main([str(word) for word in words])
    return said.getvalue()


def every_clip() -> dict[str, tuple[str, np.ndarray | bytes]]:
    """Most captions begin with "mored", the word to trigger with; plain.mp4 has nothing to warn of."""
    plain = square(9, 64, 96, "red")
    return {
        "plain.mp4": ("mored a red square moves right", plain),
        "same as twin.mp4": ("mored a blue square moves left", square(9, 64, 96, "blue", "left")),
        "twin.mp4": ("mored a blue square", square(9, 128, 192, "blue", "left")),
        "still.mp4": ("mored a green square", np.repeat(square(9, 64, 96, "green")[4:5], 9, axis=0)),
        "dark.mp4": ("mored a yellow square", square(9, 64, 96, "yellow", "down") // 10),
        "small.mp4": ("mored a red square moves left", square(9, 18, 32, "red", "left")),
        "tall.mp4": ("mored a red square moves down", square(9, 144, 96, "red", "down")),
        "wide.mp4": ("mored a green square moves right", square(9, 64, 192, "green")),
        "long.mp4": ("mored a green square moves left", square(40, 64, 96, "green", "left")),
        "short.mp4": ("mored a green square moves down", square(3, 64, 96, "green", "down")),
        "broken.mp4": ("mored a green square moves up", b"no video"),
        "a&b <i>untriggered</i>.mp4": ("a yellow square moves up", square(9, 64, 96, "yellow", "up")),
        "many words.mp4": ("mored" + " square moves" * 150, square(9, 64, 96, "yellow", "left")),
        "<script>.mp4": ("mored <script>fail()</script>", square(9, 64, 96, "blue", "down")),
        "one caption.mp4": ("mored a white square", square(9, 64, 96, "blue", "right")),
        "one more.mp4": ("Mored a  white square", square(9, 64, 96, "blue", "up")),
    }


KINDS = {  # in the order of the page
    "broken.mp4": {"broken"}, "short.mp4": {"single"}, "long.mp4": {"time"}, "tall.mp4": {"area", "turned"},
    "wide.mp4": {"area"}, "small.mp4": {"enlarged"}, "same as twin.mp4": {"double"}, "twin.mp4": {"double"},
    "dark.mp4": {"dark"}, "still.mp4": {"static"}, "a&b <i>untriggered</i>.mp4": {"trigger"},
    "one more.mp4": {"trigger", "unknown", "caption"}, "many words.mp4": {"cut"}, "<script>.mp4": {"unknown"},
    "one caption.mp4": {"caption"}, "plain.mp4": set(),
}  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory, models) -> tuple[Path, str]:
    """The page of all these clips, and what the terminal said."""
    folder = tmp_path_factory.mktemp("preview")
    clips = write_set(folder / "clips", every_clip())
    flags = {"pretrained_model_name_or_path": models["t2v"], "instance_data_root": clips, "height": 64, "width": 96}
    flags |= {"caption_column": "prompts.txt", "video_column": "videos.txt", "max_num_frames": 9}
    flags |= {"output_dir": folder / "output", "frame_sampling": "fps", "random_flip": True}
    files = {path for path in folder.rglob("*") if path.is_file()}
    said = preview(word_list(flags))
    page = folder / "output" / "preview.html"
    assert {path for path in folder.rglob("*") if path.is_file()} == files | {page}
    return page, said


def test_each_warning_is_on_the_clip_made_for_it_and_the_gravest_come_first(every):
    assert [(card.name, card.kinds) for card in read_page(every[0])] == list(KINDS.items())


def test_warnings_say_what_is_wrong(every):
    cards = {card.name: card for card in read_page(every[0])}
    assert cards["broken.mp4"].warnings[0].startswith("cannot be decoded: it is text and no video")
    assert cards["broken.mp4"].pictures == []
    assert cards["short.mp4"].warnings == ["a clip of 3 frames, trained as a picture without motion"]
    assert cards["long.mp4"].warnings == ["1.1 s of 5.0 s are used"]
    assert cards["tall.mp4"].warnings[1] == "a portrait clip, cropped to landscape"
    assert cards["small.mp4"].warnings == ["32 x 18, scaled up by 3.6: it is blurred"]
    assert cards["twin.mp4"].warnings == ["looks like #2 same as twin.mp4"]
    assert cards["a&b <i>untriggered</i>.mp4"].warnings == ["no “mored”, with which 14 of 16 captions begin"]
    assert "trained as 9x64x96 · 192 x 64 → 96 x 64, 50% of the frame · 9 of 9 frames" in cards["wide.mp4"].source
    assert "trained mirrored" in every[0].read_text()


def test_caption_is_split_where_the_model_stops_reading(every, models):
    source = next(card.source for card in read_page(every[0]) if card.name == "many words.mp4")
    kept, cut = re.search(r'<p dir="auto">(.*?)<del>(.*?)</del> <small>\d+ tokens', source).groups()
    caption = "mored" + " square moves" * 150
    tokenizer = AutoTokenizer.from_pretrained(models["t2v"] / "tokenizer")
    ids = tokenizer(caption, max_length=226, truncation=True).input_ids
    assert kept + cut == caption and kept == tokenizer.decode(ids, skip_special_tokens=True)


def test_terminal_says_how_many_clips_have_each_warning(every):
    page, said = every
    assert "clips      16: 1 of 1 x 64 x 96, 14 of 9 x 64 x 96\n" in said and f"page       {page} (" in said
    counts = {name: int(number) for number, name in re.findall(r"warning +(\d+) (.*)", said)}
    expected = [(text, sum(kind in kinds for kinds in KINDS.values())) for kind, text in preview_data.KINDS.items()]
    assert list(counts.items()) == [(text, number) for text, number in expected if number]


def test_page_has_the_totals_of_the_terminal(every):
    """13 clips of 9 frames at 8 a second are used whole, a clip of 40 frames for as long, and one frame of 3."""
    page, said = every
    assert "footage    15.9 s of 20.0 s are used\n" in said
    source = page.read_text()
    rows = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", source))
    assert rows == dict(re.findall(r"^(clips|footage) +(.*)$", said, re.M)) and len(rows) == 2
    buttons = [(name, number) for name, number in re.findall(r">([^>]*) \((\d+)\)</button>", source)]
    assert buttons[:2] == [("everything", "16"), ("with warnings", "15")]
    assert buttons[2:] == [(name, number) for number, name in re.findall(r"warning +(\d+) (.*)", said)]


def test_clips_at_another_speed_and_converted_ones_are_named(flags, tmp_path):
    """Of 9 frames at --fps 8, each taken: one second is taught, of clips of 24 and 2 frames a second."""
    folder = tmp_path / "clips"
    folder.mkdir()
    encode(folder / "slow.mp4", *H264, rate=24, num_frames=9)
    encode(folder / "fast.mp4", *H264, rate=2, num_frames=9)
    encode(folder / "right.mp4", "-vf", "setsar=2/1", *H264, rate=8, num_frames=9)
    (folder / "videos.txt").write_text("slow.mp4\nfast.mp4\nright.mp4")
    (folder / "prompts.txt").write_text("one\ntwo\nthree")
    found = {}
    for sampling in ("stride", "fps"):
        page = tmp_path / f"{sampling}.html"
        preview([*flags(instance_data_root=folder, frame_sampling=sampling), "--page", str(page)])
        found[sampling] = {card.name: card for card in read_page(page)}
    assert found["stride"]["slow.mp4"].warnings[0] == "it is taught 3.0 times too slow (at --fps 8)"
    assert found["stride"]["fast.mp4"].warnings[0] == "it is taught 4.0 times too fast (at --fps 8)"
    assert not any("speed" in card.kinds for card in [found["stride"]["right.mp4"], *found["fps"].values()])
    assert "converted: pixels that are not square" in found["stride"]["right.mp4"].warnings


def ramp(height: int, width: int) -> np.ndarray:
    """Two frames whose red tells the column. No part of them is grey."""
    frames = np.zeros((2, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    frames[..., 2] = 255 - frames[..., 0]
    return frames


def colored_part(picture: np.ndarray) -> tuple[float, float]:
    """Where the columns that are not grey begin and end, as parts of the width."""
    columns = np.flatnonzero((picture.max(-1) - picture.min(-1) > 60).mean(0) > 0.5)
    return columns[0] / picture.shape[1], (columns[-1] + 1) / picture.shape[1]


@pytest.mark.parametrize("mode", ["center", "random", "stretch"])
def test_grey_is_what_is_cropped_away(script, flags, tmp_path, mode):
    clips = write_set(tmp_path / "clips", {f"{i}.mp4": (f"a square {i}", ramp(128, 512)) for i in range(2)})
    with next(clips.rglob("1.mp4")).open("ab") as file:
        file.write(bytes(8))  # another file, with the same frames
    words = flags(instance_data_root=clips, video_reshape_mode=mode, seed=5)
    preview([*words, "--page", str(tmp_path / "page.html")])
    columns = ("prompts.txt", "videos.txt")
    dataset = script.VideoDataset(clips, None, None, *columns, 64, 96, video_reshape_mode=mode, seed=5)
    parts = []
    for card in read_page(tmp_path / "page.html"):
        picture = card.pictures[0]
        trained = (dataset[int(card.name[0])]["instance_video"][0, 0].mean(0).numpy() + 1) / 2  # red is the column
        assert colored_part(picture) == pytest.approx((trained[0], trained[-1]), abs=0.03)
        assert picture.shape[1] / picture.shape[0] == pytest.approx(1.5 if mode == "stretch" else 4, rel=0.03)
        assert ("stretched" if mode == "stretch" else "area") in card.kinds
        parts.append(colored_part(picture))
    assert (parts[0] == parts[1]) == (mode != "random")


@BOTH
@pytest.mark.parametrize("sampling", ["stride", "fps"])
def test_shown_frames_are_those_of_the_training(script, flags, tmp_path, sampling):
    levels = np.arange(30, 230, 5, dtype=np.uint8)[:, None, None, None]  # frame i is grey of 5 i + 30
    clips = write_set(tmp_path / "clips", {"0.mp4": ("a square", np.tile(levels, (1, 64, 96, 3)))}, fps=24)
    settings = {"instance_data_root": clips, "max_num_frames": 13, "skip_frames_start": 3, "frame_sampling": sampling}
    preview([*flags(**settings), "--page", str(tmp_path / "page.html")], script.__name__)
    dataset = script.VideoDataset(
        clips, None, None, "prompts.txt", "videos.txt", 64, 96, fps=8, max_num_frames=13, skip_frames_start=3,
        frame_sampling=sampling,
    )  # fmt: skip
    trained = (dataset[0]["instance_video"].mean((1, 2, 3)) * 127.5 + 127.5).tolist()  # [F]
    (card,) = read_page(tmp_path / "page.html")
    shown = [picture.mean() for picture in card.pictures]
    positions = [int(np.argmin(np.abs(np.array(trained) - level))) for level in shown]
    assert positions[0] == 0 and positions[-1] == len(trained) - 1 and len(positions) == 6
    assert shown == pytest.approx([trained[position] for position in positions], abs=2)
    assert shown == pytest.approx([5 * frame + 30 for frame in card.frames], abs=4)
    assert f"{len(trained)} of 40 frames" in card.source
    assert [frame.mean() for frame in card.moving] == pytest.approx(trained, abs=2)


def test_moving_picture_plays_as_fast_as_the_model_is_taught(flags, tmp_path):
    """Of 49 frames, it shows every second one."""
    levels = np.arange(30, 226, 4, dtype=np.uint8)[:, None, None, None]  # frame i is grey of 4 i + 30
    clips = write_set(tmp_path / "clips", {"0.mp4": ("a square", np.tile(levels, (1, 64, 96, 3)))}, fps=24)
    preview(flags(instance_data_root=clips, max_num_frames=49, fps=16))
    (card,) = read_page(tmp_path / "output" / "preview.html")
    assert [frame.mean() for frame in card.moving] == pytest.approx(levels[::2].ravel().tolist(), abs=2.5)
    assert "--frames: 25; --seconds: 3.062s;" in card.source  # 49 / 16
    assert "as it is taught: 49 frames in 3.1 s, at 0.7 times its speed (1 of 2 is shown)" in card.source


def test_a_moving_picture_is_small_even_of_noise():
    noise = np.random.default_rng(0).integers(0, 256, (25, 96, 144, 3), np.uint8)
    frames = [preview_data.moving_frame(frame, (0, 0, 144, 96), (64, 96)) for frame in noise]
    assert len(preview_data.moving_picture(frames)) <= preview_data.MOVING_BYTES


@pytest.mark.parametrize("mode", ["center", "stretch"])
def test_moving_picture_shows_what_is_left_of_a_frame(script, flags, tmp_path, mode):
    frames = np.tile(ramp(128, 512)[:1], (5, 1, 1, 1))
    frames[1::2] = 255 - frames[1::2]
    clips = write_set(tmp_path / "clips", {"0.mp4": ("a square", frames)})
    preview(flags(instance_data_root=clips, video_reshape_mode=mode))
    (card,) = read_page(tmp_path / "output" / "preview.html")
    columns = ("prompts.txt", "videos.txt")
    dataset = script.VideoDataset(clips, None, None, *columns, 64, 96, video_reshape_mode=mode)
    trained = (dataset[0]["instance_video"][0, 0].mean(0).numpy() + 1) * 127.5  # [W], red is the column
    shown = card.moving[0][..., 0].mean(0)  # [w]
    assert card.moving[0].shape[1] / card.moving[0].shape[0] == pytest.approx(1.5, rel=0.02)
    assert shown[[2, -3]] == pytest.approx(trained[[1, -2]], abs=8)


def test_id_token_that_stands_in_the_caption_already(flags, tmp_path):
    preview(flags(id_token="Red"))
    cards = read_page(tmp_path / "output" / "preview.html")
    assert [card.name for card in cards if "“Red” twice" in "".join(card.warnings)] == ["videos/00.mp4"]


def test_pictures_have_no_time(flags, tmp_path):
    (tmp_path / "stills").mkdir()
    for i, color in enumerate(tiny.COLORS):
        Image.fromarray(square(1, 64, 96, color)[0]).save(tmp_path / "stills" / f"{i}.png")
        (tmp_path / "stills" / f"{i}.txt").write_text(f"a {color} square")
    preview(flags(instance_data_root=tmp_path / "stills"))
    cards = read_page(tmp_path / "output" / "preview.html")
    assert [card.kinds for card in cards] == [set()] * 4 and all("a picture" in card.source for card in cards)


def test_a_folder_alone_is_previewed(clips, monkeypatch):
    """The folder has line files. No model is given, so nothing is said about tokens."""
    monkeypatch.chdir(clips.parent)
    said = preview_of("clips")
    page = clips / "preview.html"
    note = "captions are not checked for length, because no --pretrained_model_name_or_path was given"
    assert "clips      4: 4 of 9 x 480 x 720\n" in said and f"note       {note}\n" in said
    assert "page       clips/preview.html (" in said
    assert note in page.read_text() and "tokens" not in page.read_text()
    assert [card.name for card in read_page(page)] == [f"videos/{index:02d}.mp4" for index in range(4)]
    assert "a red square moves right" in page.read_text()


def test_flags_after_a_folder_are_those_of_the_script(clips, models, tmp_path):
    for name in ("prompts.txt", "videos.txt"):
        (clips / name).unlink()
    (clips / "videos" / "00.txt").write_text("a red square\nmoves")
    for path in clips.rglob("0[123].mp4"):
        path.unlink()
    settings = {"height": 64, "width": 96, "max_num_frames": 5, "output_dir": tmp_path / "mine"}
    said = preview_of(clips, *word_list(settings | {"pretrained_model_name_or_path": models["t2v"]}))
    (card,) = read_page(tmp_path / "mine" / "preview.html")
    assert "clips      1: 1 of 5 x 64 x 96\n" in said and "note " not in said
    assert re.search(r"<p dir=\"auto\">a red square moves <small>\d+ tokens</small>", card.source)
    assert not (clips / "preview.html").exists()


@pytest.mark.parametrize("case", ["empty", "no captions", "nowhere", "wrong flag", "no script", "no page"])
def test_what_cannot_be_previewed_is_one_message(clips, tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("# No script")
    (tmp_path / "tool.py").write_text("print('not run')")
    if case == "no captions":
        (clips / "prompts.txt").unlink()
        (clips / "videos.txt").unlink()
    words, messages = {
        "empty": (["empty"], ["empty has no clips, and no file prompts.txt"]),
        "no captions": (["clips"], ["clips has no file prompts.txt", "videos/03.mp4: it has no caption"]),
        "nowhere": (["nowhere"], ["there is no file or folder nowhere: first give a folder"]),
        "wrong flag": (["clips", "--heigth", "64"], ["--heigth 64 (did you mean --height?)"]),
        "no script": (["README.md"], ["README.md is neither a folder of clips nor a training script"]),
        "no page": (["clips", "--page", "empty"], ["--page: empty cannot be written"]),
    }[case]
    for first in [words[0]] if case != "no script" else ["README.md", "tool.py"]:
        with pytest.raises(SystemExit) as ended:
            preview_of(first, *words[1:])
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.err.count("error:") == 1 and not said.out
        assert all(message.replace(words[0], first) in said.err for message in messages), said.err
    assert not list(tmp_path.rglob("preview.html"))


CAPTIONS = [f"a {color} square of plain paint moves slowly to the right" for color in tiny.COLORS]  # 11 words


@pytest.fixture
def captioned(clips) -> Path:
    (clips / "prompts.txt").write_text("\n".join(CAPTIONS))
    return clips


def test_validation_prompts_have_warnings(flags, captioned, tmp_path):
    prompts = {
        "TOK a red square of plain paint": set(),
        "a red square of plain paint": {"prompt-trigger"},
        "tok a red square of plain paint": {"prompt-trigger"},  # the text encoder knows it as another word
        "TOK a square": {"prompt-length"},
        "TOK" + " square moves" * 18: {"prompt-length"},
        "TOK" + " square moves" * 18 + " red" * 60: {"prompt-length", "prompt-cut"},
        "TOK é <b> red square of paint": {"prompt-unknown"},
    }
    said = preview(flags(instance_data_root=captioned, id_token="TOK", validation_prompt=":::".join(prompts)))
    cards = read_prompts(tmp_path / "output" / "preview.html")
    unknown = {"prompt-unknown"}  # the tiny tokenizer knows no capital letters
    assert [card.kinds | unknown for card in cards] == [kinds | unknown for kinds in prompts.values()]
    assert [card.name for card in cards] == [str(number) for number in range(1, 8)]
    assert cards[1].warnings == ["no “TOK”: training captions get it by --id_token, validation prompts do not"]
    assert "3 words, and most training captions have 12" in cards[3].warnings
    assert any(text.startswith("the prompt is cut off: ") for text in cards[5].warnings) and "<del>" in cards[5].source
    assert "<b>" not in cards[6].source and "prompts    7 to validate with\n" in said
    for number, kind in ((2, "without the trigger word"), (1, "cut off"), (3, "much shorter or longer")):
        assert f"warning    {number} validation prompt {kind}" in said
    assert len(read_page(tmp_path / "output" / "preview.html")) == 4


def test_validation_prompt_without_the_word_that_captions_begin_with(flags, captioned, tmp_path):
    (captioned / "prompts.txt").write_text("\n".join(f"mored {caption}" for caption in CAPTIONS))
    prompts = "mored a red square moves:::a red square moves"
    preview(flags(instance_data_root=captioned, validation_prompt=prompts, pretrained_model_name_or_path=""))
    cards = read_prompts(tmp_path / "output" / "preview.html")
    assert [card.warnings for card in cards] == [[], ["no “mored”: nearly all training captions begin with it"]]


@ONLY_I2V
@pytest.mark.parametrize("mode", ["center", "stretch"])
def test_start_images_are_shown_with_what_is_cropped_away(script, flags, captioned, tmp_path, mode):
    sizes = {"wide.png": (128, 512), "small.png": (32, 48), "right.png": (64, 96)}
    for name, size in sizes.items():
        Image.fromarray(ramp(*size)[0]).save(tmp_path / name)
    preview(
        flags(
            instance_data_root=captioned, validation_images=":::".join(sizes), video_reshape_mode=mode,
            validation_prompt=":::".join(CAPTIONS[:3]),
        ),
        script.__name__,
    )  # fmt: skip
    cards = read_prompts(tmp_path / "output" / "preview.html")
    wide = np.asarray(ImageOps.fit(Image.open("wide.png"), (96, 64)))[..., 0].mean(0) / 255  # [W], red is the column
    kept = (wide[0], wide[-1]) if mode == "center" else (0, 1)
    assert colored_part(cards[0].pictures[0]) == pytest.approx(kept, abs=0.03)
    cropped = ["62% of the start image is cropped away"] if mode == "center" else []
    assert cards[0].warnings == cropped
    assert cards[1].warnings == ["the start image is 48 x 32, scaled up by 2.0"] and cards[2].warnings == []


def test_wrong_flags_are_the_scripts_own_message(flags, tmp_path, capsys):
    wrong = [({"instance_data_root": "nowhere"}, "there is no folder nowhere"), ({"rank": "x"}, "--rank must be")]
    wrong.append(({"pretrained_model_name_or_path": tmp_path}, "is no diffusers-format model"))
    for changes, message in wrong:
        with pytest.raises(SystemExit) as ended:
            preview(flags(**changes))
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_ctrl_c_is_one_line(script, capsys):
    with pytest.raises(SystemExit) as ended, ending_as(script, "preview_data.py"):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "preview_data.py: interrupted\n"


def is_playing(moving) -> list[bool]:
    """As its style says, and whether a fifth of a second changes what is seen."""
    moving.scroll_into_view_if_needed()  # else it does not play
    moving.page.wait_for_timeout(200)
    state = moving.evaluate("element => getComputedStyle(element).animationPlayState")
    positions = []
    for _ in range(2):
        positions.append(moving.evaluate("element => getComputedStyle(element).backgroundPositionX"))
        moving.page.wait_for_timeout(200)
    return [state == "running", positions[0] != positions[1]]


def test_page_in_a_browser(every, chromium):
    requests, problems = [], []
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(every[0].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    buttons = page.locator("#filter button").all()
    for button in [*buttons[1:], buttons[0]]:
        button.click()
        shown = page.locator("article:visible").count()
        assert f"({shown})" in button.inner_text() and button.get_attribute("aria-pressed") == "true"
        assert page.locator("#filter [aria-pressed=true]").count() == 1
    assert shown == 16
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.set_viewport_size({"width": 1200, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200 and len(backgrounds) == 2
    assert page.locator("h2", has_text="<script>.mp4").count() == 1
    moving = page.locator("article", has_text="plain.mp4").locator(".moving div")
    before = moving.screenshot()
    assert any(moving.screenshot() != before for _ in range(50))
    page.uncheck("#moving")
    assert is_playing(moving) == [False, False]
    page.check("#moving")
    assert is_playing(moving) == [True, True]
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    assert is_playing(moving) == [False, False]
    requests.remove(every[0].as_uri())
    page.close()
    assert [url for url in requests if not url.startswith("data:")] == [every[0].as_uri()] and problems == []

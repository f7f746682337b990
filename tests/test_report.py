"""tools/report.py: what the page says of runs in every state, and that a real browser shows it."""

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import report
import tiny
from conftest import ONLY_I2V

WHEN = "2026-11-27 11:06:4"
EVIL = '</script></pre><img src="http://127.0.0.1:9/x.png" onerror="window.hacked=1"><b>&amp;'


def make_run(folder: Path, steps: int = 6, log: str = "", lora: bool = False, videos: tuple = (), **args) -> Path:
    """What a text-to-video run leaves; `videos` are steps, with one prompt and one video each."""
    flags = {"pretrained_model_name_or_path": "THUDM/CogVideoX-2b", "max_train_steps": 6, "rank": 4, "hub_token": None}
    flags |= {"validation_prompt": "a red square" if videos else None, "output_dir": str(folder)} | args
    folder.mkdir(parents=True)
    about = {"kind": "text-to-video", "command": f"train_cogvideox_lora.py --output_dir {folder}", "args": flags}
    (folder / "run.json").write_text(json.dumps(about | {"settings": {"rank": flags["rank"], "num_processes": 2}}))
    rows = [{"step": n, "loss": 1 / n, "lr": 1e-3, "grad_norm": n, "seconds": 2, "memory": 2**30} for n in
            range(1, steps + 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"step": 0, "stage": "encoding videos", "seconds": 90, "memory": 2**31}]
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stages))
    (folder / "train.log").write_text(f"{WHEN}0,289 INFO Steps: {flags['max_train_steps']}, 4 an epoch\n{log}")
    if lora:
        (folder / report.LORA_FILE).write_bytes(b"lora")
    for step in videos:
        clip = tiny.moving_square(9, 64, 96, (20 * step, 40, 40))
        tiny.write_clip(folder / "validation" / f"validation_step-{step:06d}_prompt-0_video-0.mp4", clip)
    return folder


def page_of(*folders: Path) -> str:
    """The page without plotly's code."""
    path = folders[0].parent / "page.html"
    report.main([*map(str, folders), "--page", str(path)])
    return re.sub(r"<script>/\*\*\n\* plotly.*?</script>", "", path.read_text(), flags=re.DOTALL)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def open_page(chromium):
    """Open a page in a window of this width; requests beyond the page itself and complaints fail the test."""
    asked, said, contexts = [], [], []

    def open_file(path: Path, width: int = 1280):
        contexts.append(context := chromium.new_context(viewport={"width": width, "height": 800}))
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        context.route(re.compile("^(?!file:|data:|blob:)"), lambda route: route.abort())
        tab.goto(path.as_uri())
        return tab

    yield open_file
    for context in contexts:
        context.close()
    assert [url for url in asked if not re.match("file:///[^?]*html$|data:|blob:", url)] == []
    assert said == []


CLOCK = "() => [...document.querySelectorAll('video')].map((v) => [v.readyState, v.paused, v.src])"
TOGETHER = """() => { const times = [...document.querySelectorAll('video')].map((v) => v.currentTime);
    return times.every((t) => t > 0.05) && Math.max(...times) - Math.min(...times) < 0.1; }"""
POINTS = """() => Object.fromEntries([...document.querySelectorAll('.plot')].map(
    (plot) => [plot.id, plot.data.map((trace) => trace.x.length)]))"""
IS_DRAWN = "() => [...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.scatterlayer path'))"
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@ONLY_I2V
def test_a_browser_shows_a_finished_run(finished, open_page, tmp_path, capsys):
    page_file = tmp_path / "page.html"
    report.main([str(finished / "output"), "--page", str(page_file)])
    said = capsys.readouterr().out
    for part in ("finished after 4 steps", "Loss over 4 steps", "first fifth", "encoding videos", "sampling",
                 "test_step-000004_prompt-1_video-1.mp4", "Model card", "checkpoint-2", str(page_file)):  # fmt: skip
        assert part in said, part
    assert "validation_step" not in said and not list((finished / "output").glob("*.html"))

    tab = open_page(page_file)
    assert "finished after 4 steps" in tab.inner_text("header") and "trigger word TOK" in tab.inner_text("header")
    assert tab.locator(".start img").count() == 4
    assert tab.locator("video").count() == 8  # two prompts, two videos, before training and now
    for _ in range(2):
        tab.wait_for_function(TOGETHER)
        tab.wait_for_function("() => document.querySelector('video').currentTime < 0.05")  # and again from the start
    tab.wait_for_function(TOGETHER)  # at the start itself, a video that seeks has no frame yet
    before = tab.evaluate(CLOCK)
    assert all(state >= 2 for state, _, _ in before)
    tab.click(".play")
    assert all(paused for _, paused, _ in tab.evaluate(CLOCK)) and tab.inner_text(".play") == "Play"
    assert tab.inner_text("#step") == "step 4"
    tab.locator("#slider").fill("1")
    changed = [now[2] != then[2] for now, then in zip(tab.evaluate(CLOCK), before, strict=True)]
    assert changed == [False, True] * 4 and tab.inner_text("#step") == "step 2"
    assert tab.evaluate(POINTS) == {
        "plot-loss": [4, 4], "plot-lr": [4], "plot-grad_norm": [4], "plot-seconds": [4]
    }  # fmt: skip
    assert tab.evaluate(IS_DRAWN)
    tab.click("#log")
    assert tab.evaluate("document.getElementById('plot-loss').layout.yaxis.type") == "log"

    phone = open_page(page_file, 390)
    phone.click("summary")
    assert phone.evaluate(OVERFLOW) == 0
    assert phone.evaluate("document.querySelector('#plot-loss').getBoundingClientRect().width") <= 390


@ONLY_I2V
def test_commands_of_a_finished_run_work(finished):
    """The Python samples a video; the share command names files that exist."""
    run, names = report.read_run(finished / "output", "output"), {}
    code = report.use_command(run)
    assert "\npipe.enable_model_cpu_offload()\npipe.vae.enable_tiling()\n" in code and ".to(" not in code
    code = code.replace("pipe.enable_model_cpu_offload()\n", "")  # it needs a GPU
    exec(code.replace("dtype=torch.bfloat16)", "dtype=torch.float32)"), names)
    assert Path("video.mp4").stat().st_size and len(names["video"]) == 9
    words = shlex.split(report.share_command(run))
    included = {word.removeprefix("--include=") for word in words if word.startswith("--include=")}
    assert words[:4] == ["hf", "upload", "output", str(finished / "output")]
    assert included >= {report.LORA_FILE, "README.md", "final_video_3.mp4", "first_frame.png"}
    assert all((finished / "output" / name).is_file() for name in included)


def test_a_run_that_is_going(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=4, log=f"{WHEN}1,000 INFO Training: 4 of 6\n", videos=(0, 2))
    (folder / "checkpoint-3").mkdir()
    page = page_of(folder)
    assert "going: step 4 of 6, about 4 s of training left" in page and "Training: 4 of 6</pre>" in page
    newest = folder / "checkpoint-3"
    assert f'pipe.load_lora_weights("{newest}")' in report.use_command(report.read_run(folder, "run"))
    assert "hf upload" not in page and "Steps: 6" not in page and "No warning and no error." in page
    assert "encoding videos 2 min, training 8 s" in capsys.readouterr().out
    old = time.time() - 10_000
    for path in folder.iterdir():
        os.utime(path, (old, old))
    assert "silent since step 4 of 6" in page_of(folder)
    for path in folder.iterdir():
        os.utime(path, (time.time() - 100,) * 2)
    assert "going: step 4 of 6" in page_of(folder)
    (folder / ".lock").touch()  # which nobody holds
    assert "silent since step 4 of 6" in page_of(folder)


def test_a_run_that_was_stopped(script, tmp_path, capsys):
    """It is not an error, though older versions of the scripts log it as one."""
    stop = "stopped by SIGTERM after step 4.\n  - a second line"
    lines = f"{WHEN}1,000 WARNING twice\n{WHEN}2,000 WARNING twice\n{WHEN}3,000 ERROR {stop}\n"
    folder = make_run(tmp_path / "run", steps=4, log=lines)
    (folder / "state.json").write_text(json.dumps({"state": "stopped", "message": stop}))
    page = page_of(folder)
    assert page.count(f"{stop}</pre>") == 1 and "stopped at step 4 of 6" in page  # in the head, not in the log
    assert f"{WHEN}2 WARNING, 2 times</small><pre>twice</pre>" in page and 'class="error"' not in page
    said = capsys.readouterr().out
    assert "Log           2 WARNING\n" in said and "  stopped by SIGTERM after step 4.\n" in said
    with (folder / "train.log").open("a") as log:
        log.write(f"{WHEN}3,000 ERROR Validation failed\n")
    assert '<li class="error">' in page_of(folder) and "2 WARNING, 1 ERROR" in capsys.readouterr().out
    command = report.resume_command(report.read_run(folder, ""))
    assert command.startswith("accelerate launch --num_processes 2 train_cogvideox_lora.py ")
    words = shlex.split(command)[5:]
    args = script.get_args(["--pretrained_model_name_or_path", "x", *words])
    assert (args.resume_from_checkpoint, args.output_dir) == ("latest", str(folder))
    (folder / "state.json").write_text('{"state": "stopped", "message": "SystemExit: 143"}')
    assert '<pre class="why">stopped by SIGTERM</pre>' in page_of(folder)
    # The log alone ends nothing: errors that the training does not depend on are in it, too.
    (folder / "state.json").write_text('{"state": "going"}')
    assert "going: step 4 of 6" in page_of(folder)
    (folder / "state.json").write_text('{"state": "failed", "message": "KeyError: x"}')
    assert "failed at step 4 of 6" in (page := page_of(folder)) and "KeyError: x</pre>" in page
    (folder / "state.json").write_text('{"state": "finished", "step": 4}')
    assert "finished after 4 steps" in page_of(folder)


def test_videos_of_other_prompts_before_a_resume_stand_under_their_own(tmp_path):
    """Prompt 0 was another one until step 2, and was prompt 1 at step 4."""
    folder = make_run(tmp_path / "run", videos=(0, 2, 4, 6), validation_prompt="new")
    (folder / "validation/validation_step-000004_prompt-0_video-0.mp4").rename(
        folder / "validation/validation_step-000004_prompt-1_video-0.mp4"
    )
    texts = {(0, 0): "old", (2, 0): "old", (4, 1): "new", (6, 0): "new"}
    rows = [
        {"step": step, "prompt": text, "files": [f"validation_step-{step:06d}_prompt-{index}_video-0.mp4"]}
        for (step, index), text in texts.items()
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = report.read_run(folder, "run")
    under = {}
    for step, index, _ in run.videos:
        under.setdefault(run.prompts[index][0], []).append(step)
    assert {text: sorted(steps) for text, steps in under.items() if steps} == {"old": [0, 2], "new": [4, 6]}
    page = page_of(folder)
    assert "“old”" in page and "“new”" in page and "“prompt 2”" not in page


@ONLY_I2V
def test_a_run_says_which_prompt_each_video_shows(finished):
    rows = report.read_rows(finished / "output" / "samples.jsonl")
    shown = {name: row["prompt"] for row in rows for name in row["files"]}
    assert shown.keys() == {path.name for path in (finished / "output" / "validation").glob("*.mp4")}
    assert {name.split("prompt-")[1][0]: text for name, text in shown.items()} == {
        "0": "TOK a red square", "1": "TOK a blue square"
    }  # fmt: skip


def test_half_written_lines_and_losses_that_are_not_finite(tmp_path):
    folder = make_run(tmp_path / "run", videos=(0, 3))
    for name, rest in (("metrics.jsonl", '{"step": 7, "lo'), ("stages.jsonl", '{"step"'), ("train.log", "2026-1")):
        with (folder / name).open("a") as file:
            file.write(rest)
    rows = (folder / "metrics.jsonl").read_text()
    extra = '{"step": 7, "loss": null, "lr": 0.1, "grad_norm": null, "seconds": 1, "memory": null}\n7\n\xff\n'
    (folder / "metrics.jsonl").write_text(extra + rows, encoding="latin-1")
    (folder / "validation" / "validation_step-000006_prompt-0_video-0.mp4").write_bytes(b"ftyp, and no moo")
    data = data_of(page_of(folder))
    assert list(data["videos"]) == ["0/0/0/0", "0/3/0/0"]
    points = {plot["name"]: [len(trace["x"]) for trace in plot["traces"]] for plot in data["plots"]}
    assert points == {"loss": [6, 6], "lr": [7], "grad_norm": [6], "seconds": [7]}
    (folder / "run.json").write_text('{"kind": "text-')
    assert "step 7" in page_of(folder)


def test_runs_of_older_versions(tmp_path):
    folder = make_run(tmp_path / "run", lora=True, videos=(2,))
    for name in ("run.json", "stages.jsonl", "train.log"):
        (folder / name).unlink()
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "training_state.json").write_text('{"settings": {"optimizer": "adamw"}}')
    card = "---\npipeline_tag: image-to-video\n---\n\nA LoRA for image-to-video with THUDM/CogVideoX-5b-I2V.\n"
    (folder / "README.md").write_text(card)
    page = page_of(folder)
    for part in ("finished after 6 steps", "A LoRA for image-to-video. Base model THUDM/CogVideoX-5b-I2V", "adamw",
                 "CogVideoXImageToVideoPipeline", "“prompt 1”", "training"):  # fmt: skip
        assert part in page, part
    assert "--resume_from_checkpoint" not in page and page.count("<video") == 1
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty is not the output folder of a run"):
        report.main([str(empty)])
    (empty / "train.log").touch()  # a run that has only begun
    report.main([str(empty)])
    assert "going: step 0" in (empty / "report.html").read_text()


def test_runs_compared(tmp_path, capsys, open_page):
    same = {"learning_rate": 1e-3, "buckets": [[9, 64, 96]]}
    first = make_run(tmp_path / "a" / "out", lora=True, videos=(0, 3), rank=4, **same)
    second = make_run(tmp_path / "b" / "out", 3, videos=(0, 2), rank=8, **same)
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "validation/loss": 0.5}\n{"step": 3, "validation/loss": 0.25}\n')
    page = page_of(first, second)
    said = capsys.readouterr().out
    assert "held-out clips: first 0.5000 at step 0, lowest 0.2500 at step 3, last 0.2500 at step 3" in said
    assert f"{second}: going: step 3 of 6" in said
    table = re.search(r"Settings that differ.*?</table>", page, re.DOTALL)[0]
    assert re.findall(r"<th scope=row>(\w+)</th><td>(.*?)</td><td>(.*?)</td>", table) == [("rank", "4", "8")]
    traces = {plot["name"]: [t["name"] for t in plot["traces"]] for plot in data_of(page)["plots"]}
    mean = "mean of 5 steps"
    assert traces["loss"] == ["a/out each step", f"a/out {mean}", "b/out each step", f"b/out {mean}"]
    assert traces["held_out"] == ["a/out held-out clips", "a/out lowest"]
    assert traces["lr"] == ["a/out ", "b/out "]
    tab = open_page(tmp_path / "a" / "page.html", 390)
    captions = [text.strip() for text in tab.locator("figcaption").all_inner_texts()]
    assert captions == ["before training", "a/out step 3", "b/out step 2"]  # both began with the same video
    tab.locator("#slider").fill("1")
    assert tab.locator(".step").all_inner_texts() == ["before training", "step 2"]
    assert tab.evaluate(OVERFLOW) == 0


def test_what_runs_wrote_is_escaped(tmp_path, open_page):
    folder = make_run(tmp_path / "run<b>", log=f"{WHEN}1,000 ERROR {EVIL}\n", videos=(0, 3), validation_prompt=EVIL,
                      id_token=EVIL, pretrained_model_name_or_path=EVIL, validation_images=EVIL)  # fmt: skip
    other = make_run(tmp_path / "other", rank=EVIL)
    evil = dict.fromkeys(("lora", "prompt", "strength", "seed", "image"), EVIL)
    write_samples(folder, [evil | {"file": "'<b>.mp4"}])
    page = page_of(folder, other)
    assert EVIL not in page and "default-src 'none'" in page
    for folders in ([folder], [folder, other]):
        page_of(*folders)
        tab = open_page(tmp_path / "page.html")
        assert tab.evaluate("window.hacked") is None and tab.locator("img").count() == 0
        assert EVIL in tab.inner_text("h3 >> nth=0") and tab.locator("video").count() == 3
    assert "run<b> mean of 5 steps" in tab.text_content("#plot-loss .legend")


def test_videos_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", videos=(0, 1, 2, 3, 4))
    sizes = [path.stat().st_size for path in sorted(folder.glob("validation/*"))]
    monkeypatch.setattr(report, "VIDEO_LIMIT", sizes[0] + sizes[4] + sizes[3])
    page = page_of(folder)
    assert list(data_of(page)["videos"]) == ["0/0/0/0", "0/3/0/0", "0/4/0/0"]
    assert "the videos of 2 steps between 1 and 2" in page


def test_watch_ends_with_the_run(tmp_path, monkeypatch, capsys):
    folder, pages = make_run(tmp_path / "run", steps=5), []

    def train(seconds):
        pages.append((folder / "report.html").read_text())
        assert seconds == 7 and len(pages) < 3
        if len(pages) == 2:
            (folder / report.LORA_FILE).touch()
            with (folder / "metrics.jsonl").open("a") as file, (folder / "train.log").open("a") as log:
                file.write('{"step": 6, "loss": 0.1}\n')
                log.write(f"{WHEN}5,000 INFO Done. {folder} has the LoRA\n")

    monkeypatch.setattr(report.time, "sleep", train)
    report.main([str(folder), "--watch", "7"])
    assert all('http-equiv="refresh" content="7"' in page for page in pages)
    last = (folder / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last and "finished after 6 steps" in last
    assert "run going: step 5 of 6" in (said := capsys.readouterr().out) and "run finished after 6 steps" in said


def test_without_plotly_the_page_has_all_but_the_curves(tmp_path, monkeypatch, capsys, open_page):
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = make_run(tmp_path / "run", lora=True, videos=(0, 6))
    (folder / "state.json").write_text('{"state": "stopped", "message": "stopped by SIGINT"}')
    page = page_of(folder)
    assert capsys.readouterr().err == "The page has no curves: they need plotly (pip install plotly).\n"
    assert f"<h2>Curves</h2><p>{report.NO_PLOTLY}</p>" in page and 'class="plot"' not in page
    tab = open_page(tmp_path / "page.html")
    style = "(part) => getComputedStyle(part)"
    bad = tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--bad')")
    assert bad == "#c23f3f" and tab.locator(".state").evaluate(f"{style}.color") != "rgb(194, 63, 63)"
    assert tab.locator(".why").evaluate(f"{style}.borderLeftWidth") == "0px"  # plain, not the bar of an error
    assert tab.inner_text("#step") == "step 6" and tab.locator("video").count() == 2
    tab.locator("#slider").fill("0")
    assert tab.inner_text("#step") == "before training"


def test_watch_waits_for_a_run_that_has_not_begun(tmp_path, monkeypatch, capsys):
    """Its folder is missing, or has the page of tools/preview_data.py and what a run makes before it writes."""
    missing, waits = tmp_path / "runs" / "missing", []
    (begun := tmp_path / "begun").mkdir()

    def train(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            (begun / "preview.html").touch()
            (begun / ".lock").touch()
            (begun / "logs").mkdir()
        elif len(waits) == 2:
            make_run(missing, lora=True)
        else:
            for name in ("metrics.jsonl", "state.json"):
                (begun / name).write_text('{"state": "failed", "message": "no"}\n')

    monkeypatch.setattr(report.time, "sleep", train)
    with pytest.raises(SystemExit, match="missing is not the output folder of a run"):
        report.main([str(missing)])
    report.main([str(missing), str(begun), "--watch", "7"])
    assert waits == [7, 7, 7]
    said = capsys.readouterr().out
    assert said.startswith(
        f"Waiting for a run to write into {missing} and {begun}\nWaiting for a run to write into {begun}\n"
    )
    assert "missing: finished after 6 steps" in said and "failed at step 0" in (missing / "report.html").read_text()
    (other := tmp_path / "other").mkdir()
    (other / "thesis.pdf").touch()
    with pytest.raises(SystemExit, match="other is not the output folder of a run"):
        report.main([str(other), "--watch"])


RESUMED = "train_cogvideox_lora.py --output_dir 'my lora' --resume_from_checkpoint latest"


@pytest.mark.parametrize(
    "command, resumed",
    {
        "accelerate launch --quiet --config_file a.yaml train_cogvideox_lora.py --output_dir 'my lora'":
            f"accelerate launch --quiet --config_file a.yaml {RESUMED}",
        "python train_cogvideox_lora.py --resume_from_checkpoint checkpoint-2 --output_dir 'my lora'":
            f"python {RESUMED}",
        "python train_cogvideox_lora.py --resume_from_checkpoint=latest --output_dir 'my lora'": f"python {RESUMED}",
        "train_cogvideox_lora.py --output_dir 'my lora'": f"accelerate launch --num_processes 2 {RESUMED}",
        "python train_cogvideox_lora.py --output_dir 'my": "python train_cogvideox_lora.py --output_dir",
    }.items(),
)  # fmt: skip
def test_the_resume_command_is_the_runs_own(tmp_path, command, resumed):
    folder = make_run(tmp_path / "run")
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"command": command}))
    run = report.read_run(folder, "run")
    assert report.resume_command(run).startswith(resumed)
    is_old = command.startswith("train")
    assert ("with the same --config_file" in report.commands_section(run)) == is_old


def test_buckets_are_shown_as_on_the_command_line(tmp_path):
    page = page_of(make_run(tmp_path / "run", buckets=[[17, 96, 144], [9, 64, 96]]))
    assert "<dt>buckets</dt><dd>17x96x144 9x64x96</dd>" in page


def write_losses(folder: Path, losses: dict[int, float]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step, loss in losses.items():
            file.write(json.dumps({"step": step, "validation/loss": loss}) + "\n")


def keep_loras(folder: Path, *steps: int) -> None:
    (folder / "loras").mkdir(exist_ok=True)
    for step in steps:
        (folder / "loras" / f"step-{step:06d}.safetensors").touch()


def test_the_last_and_the_best_lora_are_named(tmp_path, capsys):
    folder = make_run(tmp_path / "run", lora=True)
    write_losses(folder, {0: 1.33, 2: 1.3388, 4: 1.3401, 6: 1.3437})
    best = "Best LoRA: step 2, with the lowest loss of held-out clips, 1.3388"
    best += " (before the training it was lower, 1.3300)"
    last = f'pipe.load_lora_weights("{folder}")'
    page = page_of(folder)
    said = capsys.readouterr().out
    assert f"Last LoRA: step 6: {last}\n{best}. It was not kept\n" in said
    assert f"<h4>{best}. It was not kept</h4></header>" in page
    keep_loras(folder, 2, 6)
    line = f'pipe.load_lora_weights("{folder}/loras/step-000002.safetensors")'
    page = page_of(folder)
    assert f"Last LoRA: step 6: {last}\n{best}: {line}\n" in capsys.readouterr().out
    head = page.split("</header>")[0]
    assert report.escape(line) in head and report.escape(last) in head
    write_losses(folder, {6: 1.2})
    page_of(folder)
    said = capsys.readouterr().out
    assert f"Last and best LoRA: step 6, with the lowest loss of held-out clips, 1.2000: {last}\n" in said
    # A run that is trained further: its finished LoRA is of a step that nobody knows.
    about = json.loads((folder / "run.json").read_text())
    about["args"]["max_train_steps"] = 12
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "state.json").write_text('{"state": "going"}')
    (folder / "checkpoint-6").mkdir()
    keep_loras(folder, 6, 8)
    run = report.read_run(folder, "run")
    assert run.last_lora == (8, folder / "loras" / "step-000008.safetensors")


def test_the_finished_lora_may_be_an_earlier_one(tmp_path):
    """With --final_lora best, the folder has the LoRA of state.json's lora_step, and loras/ has the last one."""
    folder = make_run(tmp_path / "run", lora=True)
    write_losses(folder, {0: 1.33, 2: 1.3, 4: 1.31, 6: 1.32})
    (folder / "state.json").write_text('{"state": "finished", "step": 6, "lora_step": 2}')
    keep_loras(folder, 6)
    run = report.read_run(folder, "run")
    assert run.last_lora == (6, folder / "loras" / "step-000006.safetensors")
    assert run.kept_loras[2] == folder / report.LORA_FILE
    best, line = list(report.last_and_best(run).items())[1]
    assert best.startswith("Best LoRA: step 2, ") and line == report.load_line(folder / report.LORA_FILE)
    assert report.load_line(folder) in report.use_command(run)
    write_samples(folder, [sample("final", 2, 1.0, "a.mp4")])
    assert "<th scope=row>step 2, finished</th>" in page_of(folder)


def write_samples(folder: Path, rows: list[dict]) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    for row in rows:
        if "/" not in row["file"]:
            tiny.write_clip(folder / "samples" / row["file"], tiny.moving_square(9, 64, 96, (90, 40, 40)))
    (folder / "samples" / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"file": "')


def sample(lora: str, step: int, strength: float, file: str, **more) -> dict:
    row = {"lora": lora, "step": step, "strength": strength, "prompt": "a cube", "image": None, "seed": 42}
    return row | {"file": file} | more


GRID = """() => [...document.querySelectorAll('.samples')].map((table) => [...table.rows].map((row) =>
    [...row.cells].map((cell) => cell.innerText.trim()).join(' | ')))"""
TICKS = "(id) => [...document.querySelectorAll(`#plot-${id} .ytick`)].map((tick) => tick.textContent)"


def test_a_browser_shows_curves_loras_and_samples(tmp_path, open_page):
    folder = make_run(tmp_path / "run", videos=(0, 2, 4, 6), lora=True)
    rows = [{"step": n, "loss": 1.3, "lr": n / 60_000, "grad_norm": n, "seconds": 2} for n in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_losses(folder, {0: 1.3437, 2: 1.3388, 4: 1.3401, 6: 1.3412})
    keep_loras(folder, 2)
    write_samples(
        folder,
        [
            sample("final", 6, 1.0, "a.mp4"), sample("final", 6, 0.8, "b.mp4"),
            sample("step-000002", 2, 1.0, "c.mp4"), sample("step-000002", 2, 0.8, "d.mp4", prompt="replaced"),
            sample("step-000002", 2, 0.8, "d.mp4"), sample("final", 6, 1, "e.mp4", seed=7),
            sample("final", 6, 0.25, "f.mp4"), sample("final", 6, 1, "../report.html"),
        ],
    )  # fmt: skip
    page_of(folder)
    tab = open_page(tmp_path / "page.html", 1400)

    low, high = tab.evaluate("document.getElementById('plot-held_out').layout.yaxis.range")
    assert 1.33 < low < 1.3388 and 1.3437 < high < 1.35
    assert "lowest: 1.3388 at step 2" in tab.text_content("#plot-held_out")
    assert tab.evaluate(TICKS, "lr") == ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]
    for box in tab.locator(".plot").all():
        box.hover()
    assert tab.locator(".modebar-btn").count() == 0  # plotly's toolbar, which would cover the title

    lora = tab.locator(".lora")
    assert lora.inner_text().split("\n")[0] == f"LoRA of step 6: {folder}/pytorch_lora_weights.safetensors"
    tab.locator("#slider").fill("2")
    assert lora.inner_text().strip() == "The LoRA of step 4 was not kept."
    tab.locator("#slider").fill("1")
    line = f'pipe.load_lora_weights("{folder}/loras/step-000002.safetensors")'
    assert lora.inner_text().split("\n")[0] == f"LoRA of step 2: {folder}/loras/step-000002.safetensors"
    assert line in lora.inner_text()
    lora.locator(".copy").click()
    assert tab.evaluate("getSelection().toString()") == line

    assert tab.locator("#samples h3").all_inner_texts() == ["“a cube” seed 42", "“a cube” seed 7"]
    words = "step {0}, strength {1}, seed 42"
    assert tab.evaluate(GRID) == [
        [
            " | strength 0.25 | strength 0.8 | strength 1",
            f"step 2 |  | {words.format(2, 0.8)} | {words.format(2, 1)}",
            f"step 6, last | {words.format(6, 0.25)} | {words.format(6, 0.8)} | {words.format(6, 1)}",
        ],
        [" | strength 1", "step 6, last | step 6, strength 1, seed 7"],
    ]
    assert tab.locator("video").count() == 2 + 6
    tab.wait_for_function(TOGETHER)
    tab.click("#samples .play")
    assert all(paused for _, paused, _ in tab.evaluate(CLOCK))

    phone = open_page(tmp_path / "page.html", 390)
    assert phone.evaluate(OVERFLOW) == 0
    box = phone.locator("#samples .wide").first
    assert box.evaluate("(box) => { box.scrollLeft = 50; return box.scrollLeft; }") == 50  # it scrolls by itself


def test_samples_count_into_the_limit_of_the_videos(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", videos=(0, 1, 2))
    write_samples(folder, [sample("final", 6, n, f"{n}.mp4") for n in range(3)])
    sizes = [path.stat().st_size for path in sorted(folder.glob("validation/*"))]
    of_sample = (folder / "samples" / "0.mp4").stat().st_size
    monkeypatch.setattr(report, "VIDEO_LIMIT", sizes[0] + sizes[2] + 2 * of_sample)
    page = page_of(folder)
    data = data_of(page)
    assert list(data["videos"]) == ["0/0/0/0", "0/2/0/0"] and sorted(data["samples"]) == ["0/1.mp4", "0/2.mp4"]
    assert "not in the page: 0.mp4" in page and "1 of the samples are not in the page" in page

"""What the README says is true: its commands and its code run, its scripts launch, its requirements are complete."""

import ast
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import BOTH, ROOT, SCRIPTS, Child, reset_accelerate, run_on_the_cpu
from PIL import Image

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = README + CONTRIBUTING + "".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXTS, flags=re.DOTALL)
BASH = [block for language, block in BLOCKS if language == "bash"]
(CARRY_OVER,) = [block for block in BASH if block.startswith("git diff")]
(TRAIN,) = [block for block in BASH if block.startswith("accelerate launch")]
ROWS = re.findall(
    r"^\| CogVideoX-?(\S+) \| `(THUDM/\S+)` \| (?:`(--[^|]+)`|those of the two rows above)? ?\|$", README, re.M
)
MODELS = {"2b": None} | {name.lower(): (model, more) for name, model, more in ROWS}
assert list(MODELS) == ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
(ON_8_GPUS,) = re.findall(r"^\| `(accelerate launch .*)` \|", README, re.M)
LAUNCHES = {"one GPU": "accelerate launch", "8 GPUs": ON_8_GPUS, "resume": "accelerate launch"}
PROMPTS = {"PROMPTS": "TOK a mouse steers a boat:::TOK a bird sits on a pole", "IMAGES": "mouse.png:::bird.png"}


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def launched(words: list[str]):
    """The launcher's arguments, the script that it starts, and the flags of the script."""
    assert words[:2] == ["accelerate", "launch"]
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[2:]]
    launch = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return launch, importlib.import_module(Path(words[position]).stem), words[position + 1 :]


def with_captions_beside(folder: Path) -> Path:
    """Bring clips of two line files into the README's layout."""
    captions, videos = ((folder / name).read_text().splitlines() for name in ("prompts.txt", "videos.txt"))
    for caption, video in zip(captions, videos, strict=True):
        (folder / video).with_suffix(".txt").write_text(caption)
    for name in ("prompts.txt", "videos.txt"):
        (folder / name).unlink()
    return folder


def readme_command(model: str, launch: str) -> list[str]:
    """The words that `accelerate` gets when the README's command is pasted into a shell, changed as its tables say."""
    lines = ["accelerate() { printf '%s\\0' accelerate \"$@\"; }", TRAIN]
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    if MODELS[model] is not None:
        name, more = MODELS[model]
        both = " ".join(flags for key, (_, flags) in list(MODELS.items())[1:] if key in ("5b-i2v", "1.5-5b"))
        words[4] = name
        words[words.index("fp16")] = "bf16"
        words += (more or (both if model == "1.5-5b-i2v" else "")).split()
        if "i2v" in model:
            words[2] = "train_cogvideox_image_to_video_lora.py"
    if launch == "resume":
        words += ["--resume_from_checkpoint", "latest"]
    return [*LAUNCHES[launch].split(), *words[2:]]


@pytest.mark.parametrize("model", MODELS)
def test_launch_commands_are_valid_and_differ_in_the_launch_only(model, tmp_path):
    (tmp_path / "my_clips").mkdir()
    for name in ("mouse", "bird"):
        Image.new("RGB", (720, 480)).save(tmp_path / f"{name}.png")
    parsed = {}
    for name in LAUNCHES:
        launch, script, flags = launched(readme_command(model, name))
        assert (script.KIND == "image-to-video") == model.endswith("i2v")
        assert launch.num_processes == 8 if name == "8 GPUs" else launch.num_processes in (0, 1)
        parsed[name] = script.get_args(flags)
        script.check_args(parsed[name])
    assert parsed["one GPU"] == parsed["8 GPUs"] and parsed["one GPU"].resume_from_checkpoint is None
    assert vars(parsed["resume"]) == vars(parsed["one GPU"]) | {"resume_from_checkpoint": "latest"}


@pytest.mark.parametrize("model", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_the_train_and_resume_commands_do_what_the_readme_says(model, models, clips, caplog, request):
    """The first one trains for two steps, the second one for two more. Only the model, the sizes and the number of
    steps are replaced, and the dtype: fp16 needs a GPU."""
    # --allow_tf32 changes this for the whole process.
    request.addfinalizer(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    caplog.set_level(logging.INFO)
    with_captions_beside(clips).rename("my_clips")
    for name in ("mouse", "bird"):
        Image.fromarray(tiny.moving_square(1, 64, 96)[0]).save(f"{name}.png")
    tiny_model = models[("i2v" if model.endswith("i2v") else "t2v") + (" 1.5" if model.startswith("1.5") else "")]
    replaced = ["--pretrained_model_name_or_path", str(tiny_model), "--mixed_precision", "no"]
    replaced += "--height 64 --width 96 --max_num_frames 9 --num_inference_steps 1 --max_train_steps".split()
    rows = []
    for launch, steps in (("one GPU", 2), ("resume", 4)):
        _, script, flags = launched(readme_command(model, launch))
        reset_accelerate()
        script.main(script.get_args([*flags, *replaced, str(steps)]))
        rows.append([json.loads(line) for line in Path("my_lora/metrics.jsonl").read_text().splitlines()])
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4] and rows[1][:2] == rows[0]  # with the seconds they took
    load_tool("report").main(["my_lora"])
    assert "finished after 4 steps" in Path("my_lora/report.html").read_text()
    records = [record for record in caplog.records if record.name == script.__name__]
    warnings = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    of_so_few_steps = ("--lr_warmup_steps 200 of", "The number of steps, ")
    assert all(warning.startswith(of_so_few_steps) for warning in warnings), warnings


def test_other_commands_exist():
    others = {line for block in BASH if "=(" not in block for line in block.splitlines()}
    others -= {line for block in [TRAIN, CARRY_OVER] for line in block.splitlines()}
    made = {"make demo", "make demo KIND=i2v", "make smoke", "make test", "make test-slow"}
    made_elsewhere = {"bash scripts/on_gpu.sh results", "python -m pytest -m gpu tests/test_gpu.py"}
    made_elsewhere |= {".venv/bin/ruff check .", ".venv/bin/python -m pytest tests/test_data.py"}
    tools = ["preview_data.py my_clips", "report.py my_lora"]
    prompts = '--prompts "TOK a cat sails" "a cat sails"'
    tools.append(f"sample.py my_lora --steps 1000 2000 --strengths 0.5 0.8 1 1.2 {prompts}")
    assert others == made | made_elsewhere | {f"python tools/{tool}" for tool in tools}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in made)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    for path in re.findall(r"`((?:demo|tools|tests|benchmarks|scripts|accelerate_configs)/[\w./]+)`", TEXTS):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"`python (\S+\.py)", TEXTS):
        assert (ROOT / command).is_file(), command


def test_the_workflow_of_github_runs_the_smoke_test():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "smoke.yml").read_text())
    assert workflow["jobs"]["smoke"]["steps"][-1] == {"run": "make smoke"}


@pytest.mark.slow
def test_smoke(tmp_path):
    """Half a minute on two idle cores."""
    command = [sys.executable, str(ROOT / "demo" / "smoke.py"), str(tmp_path / "smoke")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "their LoRAs load" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["5b", "5b-i2v"])
def test_the_readmes_commands_preview_and_plan_the_run(models, start_images, capsys, name):
    """With a tiny model in place of the published one, and small clips."""
    assert "| `python tools/plan.py --gpu 4090` |" in README and "| `python tools/preview_data.py` |" in README
    words = readme_command(name, "one GPU")
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    with_captions_beside(tiny.make_clips(Path("my_clips")))
    model, images = models["i2v" if "i2v" in name else "t2v"], ":::".join(map(str, start_images[:2]))
    words = [str(model) if "THUDM/" in word else images if word.endswith(".png") else word for word in words]
    sizes = ["--height", "64", "--width", "96", "--max_num_frames", "9", "--num_inference_steps", "1"]
    importlib.import_module("preview_data").main([str(ROOT / words[0]), *words[1:], *sizes])
    assert "clips      4: 4 of 9 x 64 x 96" in capsys.readouterr().out and Path("my_lora/preview.html").is_file()
    load_tool("plan").main(["--gpu", "4090", str(ROOT / words[0]), *words[1:], *sizes])
    said = capsys.readouterr().out
    assert "clips      4 of 9 x 64 x 96" in said and "steps      2000 (4 an epoch)" in said and "fits (4090" in said


def test_flags_in_the_readme_exist():
    sources = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    tools = "".join(path.read_text() for path in (ROOT / "tools").glob("*.py"))
    declared = set(re.findall(r'add\("(--\w+)"', sources)) | set(re.findall(r'add_argument\(\s*"(--\w+)"', tools))
    prose = re.sub(r"```.*?```", "", TEXTS, flags=re.DOTALL)
    elsewhere = {"--help", "--paper", "--config_file", "--num_processes"}
    elsewhere |= {"--max_restarts", "--rdzv_backend", "--requeue", "--counted"}
    assert set(re.findall(r"--\w+", prose)) - elsewhere <= declared


def test_the_code_that_uses_the_lora_runs(finished, model, monkeypatch):
    """The README's lines, with the name and the number of frames of the tiny model."""
    Path("my_lora").symlink_to(finished / "output")
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "pipe.load_lora_weights" in snippet and "set_adapters" not in snippet  # the factor is in the matrices
    snippet = re.sub(r'"THUDM/[^"]*"', repr(str(model)), snippet).replace("num_frames=49", "num_frames=9")
    run_on_the_cpu(snippet, monkeypatch)
    assert Path("video.mp4").stat().st_size > 0


def test_readme_is_short_and_its_pictures_exist():
    assert README.count("\n") <= 250
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))


def test_each_page_of_docs_is_linked_once():
    linked = [link.split("#")[0] for link in re.findall(r"\]\((docs/.*?\.md.*?)\)", README)]
    assert sorted(linked) == [f"docs/{page.name}" for page in PAGES]
    for page in PAGES:
        links = [link for link in re.findall(r"\]\((.*?)\)", page.read_text()) if not link.startswith("http")]
        assert all((page.parent / link).is_file() for link in links), links


def test_contributing_is_linked_once_and_its_links_exist():
    assert README.count("](CONTRIBUTING.md)") == 1
    assert all((ROOT / link).is_file() for link in re.findall(r"\]\((.*?)\)", CONTRIBUTING))


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("patch")), reason="needs git and patch")
def test_a_change_is_carried_over_to_the_other_script(tmp_path):
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    text_to_video, image_to_video = (tmp_path / f"{name}.py" for name in SCRIPTS)
    before = image_to_video.read_text()
    old, new = "def train_step(", "def train_one_step("  # any change to what both have
    for command in ("git init", "git add ."):
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    text_to_video.write_text(text_to_video.read_text().replace(old, new))
    subprocess.run(["bash", "-euo", "pipefail", "-c", CARRY_OVER], cwd=tmp_path, check=True, capture_output=True)
    assert image_to_video.read_text() == before.replace(old, new) != before


CONFIGS = {  # the launcher's flags that accelerate reads from each
    "cpu.yaml": {"num_processes": 1, "mixed_precision": "no"},
    "single_gpu.yaml": {"num_processes": 1},
    "multi_gpu.yaml": {"multi_gpu": True},
    "multi_node.yaml": {"multi_gpu": True, "num_machines": 2, "same_network": False},
    "deepspeed_zero2.yaml": {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "none"},
    "deepspeed_zero2_offload.yaml": {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "cpu"},
}


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_each_configuration(config):
    """Each has a comment that says when to use it. Those of several processes need their number."""
    expected = {"multi_gpu": False, "use_deepspeed": False, "use_fsdp": False, "num_machines": 1}
    expected |= {"mixed_precision": "bf16", "num_processes": 2, "use_cpu": config.name == "cpu.yaml"}
    expected |= CONFIGS[config.name]
    words = ["--config_file", str(config), "train.py"]
    if expected["num_processes"] == 2:
        with pytest.raises(ValueError, match="manually pass in `--num_processes`"):
            _validate_launch_command(launch_command_parser().parse_args(words))
        words[2:2] = ["--num_processes", "2"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    assert {name: getattr(args, name) for name in expected} == expected
    assert config.read_text().startswith("# ")


def test_every_configuration_is_tested():
    assert {path.name for path in (ROOT / "accelerate_configs").iterdir()} == CONFIGS.keys()


NODE = {"DATA": ".", "OUTPUT": "out", "GPUS": "8", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
ZERO2 = {"ENGINE": "deepspeed_zero2"}
LAUNCHERS = [
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c"}),
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "MODEL": "THUDM/CogVideoX-5b", "MIXED_PRECISION": "bf16"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c", "IMAGES": "a b.png:::c.png"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": ".", "ID_TOKEN": ""}),
    ("scripts/train_t2v_multi_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c", "GPUS": "4"}),
    ("scripts/train_t2v_multi_gpu.sh", ZERO2 | {"DATA": ".", "GPUS": "2", "MODEL": "THUDM/CogVideoX-5b"}),
    ("scripts/train_i2v_multi_gpu.sh", {"DATA": ".", "PROMPTS": "a", "IMAGES": "a b.png", "GPUS": "2"}),
    ("scripts/train_multi_node.sh", NODE | {"PROMPTS": "a b:::c"}),
    ("scripts/train_multi_node.sh", NODE | {"KIND": "i2v", "PROMPTS": "a", "IMAGES": "a.png"} | ZERO2),
    ("demo/demo.sh", {"DEMO": ".demo"}),
    ("demo/demo.sh", {"DEMO": ".demo", "KIND": "i2v"}),
]
SAY = 'printf "%s\\n" accelerate "$@"'  # an accelerate that prints its arguments
SAY_STORE = 'echo "store $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >&2; ' + SAY


def stand_in(folder: Path, name: str, does: str, shell: str = "/usr/bin/env bash") -> None:
    """A program of this name that does only this."""
    (folder / name).write_text(f"#!{shell}\n{does}\n")
    (folder / name).chmod(0o755)


def run_shell_script(path: str, folder: Path, *flags: str, **settings: str):
    """Run it with the programs in `folder` before the others of their names."""
    return subprocess.run(
        ["bash", str(ROOT / path), *flags], capture_output=True, text=True,
        cwd=folder if path.startswith("scripts") else ROOT,
        env=os.environ | settings | {"PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip


@pytest.mark.parametrize(("path", "settings"), LAUNCHERS)
def test_shell_scripts_launch_the_training(path, settings, tmp_path):
    stand_in(tmp_path, "accelerate", SAY_STORE)
    stand_in(tmp_path, "python", "exit 1")  # demo/demo.sh asks it for a GPU
    done = run_shell_script(path, tmp_path, "--seed", "7", **settings)
    assert done.returncode == 0, done.stderr
    launch, script, flags = launched(done.stdout.splitlines())
    args = script.get_args(flags)
    nodes = int(settings.get("NODES", 1))
    assert (launch.num_processes, launch.num_machines) == (nodes * int(settings.get("GPUS", 1)), nodes)
    if nodes > 1:
        assert (launch.machine_rank, launch.main_process_ip, launch.main_process_port) == (1, "10.0.0.1", 29500)
    if "GPUS" in settings:  # restarts work with this rendezvous and a store for each attempt only
        assert (launch.max_restarts, launch.rdzv_backend, args.resume_from_checkpoint) == (3, "c10d", "latest")
        assert launch.rdzv_conf == ("store_type=file" if nodes == 1 else "") and "store 1" in done.stderr
    if path.startswith("scripts"):
        assert args.seed == 7
        default = "THUDM/CogVideoX-5b-I2V" if script.KIND == "image-to-video" else "THUDM/CogVideoX-2b"
        if nodes > 1 and script.KIND == "text-to-video":
            default = "THUDM/CogVideoX-5b"
        assert args.pretrained_model_name_or_path == settings.get("MODEL", default)
        assert args.validation_prompt == settings.get("PROMPTS")
        assert getattr(args, "validation_images", None) == settings.get("IMAGES")
        assert args.id_token == (settings.get("ID_TOKEN", "TOK") or None)


@pytest.mark.parametrize("model", MODELS)
def test_shell_scripts_have_the_settings_of_the_readme(model, tmp_path):
    stand_in(tmp_path, "accelerate", SAY)
    _, script, flags = launched(readme_command(model, "one GPU"))
    expected = vars(script.get_args(flags))
    settings = {"DATA": "my_clips", "OUTPUT": "my_lora", "MIXED_PRECISION": expected["mixed_precision"], **PROMPTS}
    settings["MODEL"] = expected["pretrained_model_name_or_path"]
    kind = "i2v" if model.endswith("i2v") else "t2v"
    text = (ROOT / f"scripts/train_{kind}_single_gpu.sh").read_text()
    more = re.search(r"^# CogVideoX 1.5 .*: (--.*)$", text, re.M)[1].split() if model.startswith("1.5") else []
    done = run_shell_script(f"scripts/train_{kind}_single_gpu.sh", tmp_path, *more, **settings)
    assert vars(script.get_args(launched(done.stdout.splitlines())[2])) == expected


TRAINER = """import os, signal, sys, time
def save(number, _frame):
    time.sleep(0.3)  # longer than the launcher lives
    os.write(1, b"saved after %d\\n" % number)  # print may be interrupted within print
    os._exit(128 + number)
signal.signal(signal.SIGTERM, save), signal.signal(signal.SIGINT, save)
print("training", flush=True)
time.sleep(float(os.environ["SECONDS_TO_TRAIN"]))
sys.exit(7)
"""
LAUNCHER = f"""import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-SE", "-c", {TRAINER!r}]).wait())
"""


@pytest.mark.parametrize("script", ["scripts/train_t2v_single_gpu.sh", "scripts/train_i2v_multi_gpu.sh"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_shell_scripts_pass_signals_on_and_wait_for_the_trainer(script, number, tmp_path):
    """accelerate's launcher, which this stand-in is like, ends at a signal and leaves its child running. Its traceback
    is not shown."""
    stand_in(tmp_path, "accelerate", LAUNCHER, shell=f"{sys.executable} -SE")
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"DATA": ".", "GPUS": "1", "PATH": path, "SECONDS_TO_TRAIN": "60"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["bash", ROOT / script], **streams, env=environment) as shell:
        assert shell.stdout.readline() == "training\n"
        shell.send_signal(number)
        received = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        assert shell.stdout.read() == f"saved after {received.value}\n"
    assert shell.returncode == 128 + received


@pytest.mark.parametrize(("attribute", "code", "lines"), [("sigval", 143, 0), ("number", 1, 1)])
def test_only_a_signal_has_no_traceback(attribute, code, lines, tmp_path):
    """The launcher of several processes raises an exception of torch, which has the signal as its `sigval`."""
    does = f"error = ValueError('it has ended')\nerror.{attribute} = 15\nraise error"
    stand_in(tmp_path, "accelerate", does, shell=f"{sys.executable} -SE")
    done = run_shell_script("scripts/train_t2v_single_gpu.sh", tmp_path, DATA=".")
    assert (done.returncode, done.stderr.count("ValueError: it has ended")) == (code, lines)


def test_shell_scripts_end_with_the_exit_code_of_the_launcher(tmp_path):
    stand_in(tmp_path, "accelerate", LAUNCHER, shell=f"{sys.executable} -SE")
    started = time.monotonic()
    done = run_shell_script("scripts/train_t2v_single_gpu.sh", tmp_path, DATA=".", SECONDS_TO_TRAIN="0")
    assert (done.returncode, done.stdout) == (7, "training\n") and time.monotonic() - started < 30


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("train_*.sh")), ids=lambda path: path.name)
def test_shell_scripts_ask_for_the_data(path):
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "set DATA to the folder" in done.stderr
    assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)


def test_the_slurm_file_starts_each_machine_with_its_rank(tmp_path):
    """With Slurm's variables, and stand-ins for its commands."""
    stand_in(tmp_path, "accelerate", SAY)
    stand_in(tmp_path, "scontrol", 'printf "node7\\nnode8\\n"')
    stand_in(tmp_path, "srun", 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run_shell_script("scripts/train_multi_node.sbatch", tmp_path, **slurm)
    assert done.returncode == 0, done.stderr
    launches = [["accelerate", *text.splitlines()] for text in done.stdout.split("accelerate\n")[1:]]
    for rank, words in enumerate(launches):
        launch, script, flags = launched(words)
        args = script.get_args(flags)
        assert (launch.machine_rank, launch.num_machines, launch.num_processes) == (rank, 2, 16)
        assert launch.main_process_ip == "node7"
        assert (args.output_dir, args.resume_from_checkpoint) == ("/shared/my_lora", "latest")
    assert len(launches) == 2
    assert "#SBATCH --requeue\n" in (ROOT / "scripts" / "train_multi_node.sbatch").read_text()


def test_check_of_machines(tmp_path):
    """Two processes that reach each other, and one whose peer does not start."""
    tool = load_tool("check_machines")
    tool.SECONDS, tool.MEGABYTES = 2, 1
    program = SimpleNamespace(__name__="check_machines", command_line=tool.main)
    address = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    first_port = 20000 + os.getpid() % 10000
    started = [
        Child(program, [], tmp_path / f"log-{port}-{rank}", address | {"RANK": rank, "MASTER_PORT": str(port)})
        for port, rank in ((first_port, "0"), (first_port, "1"), (first_port + 1, "0"))
    ]
    assert [one.wait(60) for one in started] == [0, 0, 1]
    first, second, alone = (one.said() for one in started)
    assert "process 1 of 2 on" in second and "2 processes on 1 machines reach each other" in first
    assert "1 MB added up over all of them, cpu" in first
    assert f"connecting to the others at 127.0.0.1:{first_port + 1}" in alone
    assert "MASTER_ADDR and MASTER_PORT are the same" in alone and "Traceback" not in alone


def test_the_check_is_launched_like_the_training(tmp_path):
    stand_in(tmp_path, "accelerate", SAY)
    done = run_shell_script("scripts/train_multi_node.sh", tmp_path, CHECK="1", **NODE)
    words = done.stdout.splitlines()
    assert done.returncode == 0 and words[-1] == str(ROOT / "tools" / "check_machines.py")
    launch = launch_command_parser().parse_args(words[2:])
    assert (launch.main_process_ip, launch.machine_rank, launch.max_restarts) == ("10.0.0.1", 1, 0)
    assert "machine 1 of 2" in done.stderr


PACKAGE_OF = {"PIL": "pillow"}
NOT_REQUIRED = {"deepspeed"}  # only some configurations need it
NOT_IMPORTED = {  # other packages use them, for the reasons that requirements.txt gives
    "peft", "sentencepiece", "protobuf", "imageio", "imageio-ffmpeg", "tensorboard",
}  # fmt: skip
FOR_SINGLE_FLAGS = ["bitsandbytes", "prodigyopt", "datasets", "tensorboard", "wandb", "comet_ml", "deepspeed"]


def imported_packages(nodes) -> set[str]:
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    return imported


def test_requirements_are_what_the_scripts_import():
    trees = [ast.parse((ROOT / f"{name}.py").read_text()) for name in SCRIPTS]
    imported = set().union(*(imported_packages(ast.walk(tree)) for tree in trees)) - sys.stdlib_module_names
    third_party = {PACKAGE_OF.get(name, name) for name in imported}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    assert required == third_party - NOT_REQUIRED | NOT_IMPORTED
    assert all(re.search(r">=[\d.]+(,<\d)?$", line) for line in lines if line and not line.startswith("#"))


@BOTH
def test_the_scripts_tell_uv_their_requirements(script):
    """PEP 723: the same lines as requirements.txt."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.M)  # a simpler pattern than the PEP's
    lines = [line[2:] for line in block.splitlines()]
    assert lines[0] == 'requires-python = ">=3.10"' and lines[0] in (ROOT / "pyproject.toml").read_text()
    dependencies = ast.literal_eval("\n".join(lines[1:]).removeprefix("dependencies = "))
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert dependencies == [line for line in required if line and not line.startswith("#")]


def test_packages_that_single_flags_need_are_imported_for_these_flags_only(script, run, monkeypatch):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    assert not imported_packages(tree.body) & set(FOR_SINGLE_FLAGS)
    for package in FOR_SINGLE_FLAGS:
        monkeypatch.setitem(sys.modules, package, None)  # then an import of it fails
    assert (run(max_train_steps=1) / "pytorch_lora_weights.safetensors").is_file()


def test_the_demo_shows_the_progress_of_its_base_model(capsys, monkeypatch):
    steps = tiny.show_progress(3, "Training", seconds=0)
    assert list(steps) == [0, 1, 2]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"Training: step {step} of 3" for step in (1, 2, 3)
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(tiny.show_progress(3, "Training")) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


@BOTH
def test_args_are_never_changed(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            assert not (isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "args"), node.lineno

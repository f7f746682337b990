"""What the README says is so: its commands parse, its snippet runs, its scripts launch, its requirements are right."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, SCRIPTS, SHARED
from PIL import Image

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    shlex.split(command)
    for language, block in BLOCKS
    if language == "bash"
    for command in block.replace("\\\n", " ").strip().splitlines()
]


def launched_script(words: list[str]):
    """The script that a launch command names, and the flags it hands over."""
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return importlib.import_module(Path(words[position]).stem), words[position + 1 :]


LAUNCHES = ["2b", "5b", "5b-i2v", "resume", "8 GPUs"]


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "accelerate"], ids=LAUNCHES)
def test_launch_commands_parse(words, tmp_path, request):
    assert words[:4] == ["accelerate", "launch", "--quiet", "--config_file"] and (ROOT / words[4]).is_file()
    script, flags = launched_script(words)
    args = script.get_args(flags)
    assert ("i2v" in request.node.callspec.id) == (script.KIND == "image-to-video")
    (tmp_path / "my_clips").mkdir()
    if script.KIND == "image-to-video":
        for path in script.validation_images(args):
            Image.new("RGB", (720, 480)).save(tmp_path / path)
    script.check_args(args)


def test_other_commands_are_real():
    others = {" ".join(c) for c in COMMANDS if c[0] != "accelerate"}
    made = {"make demo", "make demo KIND=i2v", "make test", "make test-slow"}
    assert others == made | {"pip install -r requirements.txt", "uv run train_cogvideox_lora.py --help"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in made)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    for path in re.findall(r"`((?:tools|tests|benchmarks|scripts|accelerate_configs)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"`python (\S+\.py)", README):
        assert (ROOT / command).is_file(), command


def test_flags_in_the_readme_exist():
    sources = "".join((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    declared = set(re.findall(r'add\("(--\w+)"', sources))
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    elsewhere = {"--help", "--quiet", "--paper", "--config_file", "--num_processes"}
    assert set(re.findall(r"--\w+", prose)) - elsewhere <= declared


@SHARED
def test_snippet_runs(run, model, tmp_path):
    """The README's own lines, with the tiny model's name and frames in place of the real one's."""
    run(output_dir=tmp_path / "my_lora")
    (snippet,) = (block for language, block in BLOCKS if language == "python")
    assert "pipe.load_lora_weights" in snippet and "set_adapters" not in snippet
    snippet = re.sub(r'"THUDM/[^"]*"', repr(str(model)), snippet).replace("num_frames=49", "num_frames=9")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_command_for_a_clip_that_cannot_be_decoded(tmp_path):
    """decord, which crashes on AV1, reads what the README's command makes of it."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    source = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=8:duration=1", "-c:v", "libaom-av1", "clip.webm"]
    subprocess.run([ffmpeg, "-loglevel", "error", *source], check=True, cwd=tmp_path)
    read = "import decord, sys; print(len(decord.VideoReader(sys.argv[1])))"
    done = [subprocess.run([sys.executable, "-c", read, tmp_path / "clip.webm"], capture_output=True, text=True)]
    (command,) = re.findall(r"`ffmpeg (-i .*?)`", README)
    subprocess.run([ffmpeg, "-loglevel", "error", *shlex.split(command)], check=True, cwd=tmp_path)
    done.append(subprocess.run([sys.executable, "-c", read, tmp_path / "clip.mp4"], capture_output=True, text=True))
    assert done[0].returncode != 0 and done[1].stdout == "8\n"


def test_readme_is_short_and_its_pictures_are_there():
    assert README.count("\n") < 300
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))


CONFIGS = {  # what accelerate makes of each: its launcher's flags
    "cpu.yaml": {"num_processes": 1, "mixed_precision": "no"},
    "single_gpu.yaml": {"num_processes": 1},
    "multi_gpu.yaml": {"multi_gpu": True},
    "multi_node.yaml": {"multi_gpu": True, "num_machines": 2},
    "deepspeed_zero2.yaml": {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "none"},
    "deepspeed_zero2_offload.yaml": {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "cpu"},
    "deepspeed_zero3.yaml": {"use_deepspeed": True, "zero_stage": 3},
    "fsdp2.yaml": {"use_fsdp": True, "fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "CogVideoXBlock"},
}


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_configs_parse(config):
    """And each says when to choose it. Those of many processes want to be told how many."""
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


def test_every_configuration_is_there():
    assert {path.name for path in (ROOT / "accelerate_configs").iterdir()} == CONFIGS.keys()


NODE = {"DATA": ".", "OUTPUT": "out", "GPUS": "8", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
LAUNCHERS = [
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c"}),
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "MODEL": "THUDM/CogVideoX-5b", "MIXED_PRECISION": "bf16"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c", "IMAGES": "a b.png:::c.png"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": "."}),
    ("scripts/train_t2v_multi_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c", "GPUS": "4"}),
    ("scripts/train_t2v_multi_gpu.sh", {"DATA": ".", "GPUS": "2", "ENGINE": "fsdp2", "MODEL": "THUDM/CogVideoX-5b"}),
    ("scripts/train_i2v_multi_gpu.sh", {"DATA": ".", "PROMPTS": "a", "IMAGES": "a b.png", "GPUS": "2"}),
    ("scripts/train_multi_node.sh", NODE | {"PROMPTS": "a b:::c"}),
    ("scripts/train_multi_node.sh", NODE | {"KIND": "i2v", "PROMPTS": "a", "IMAGES": "a.png", "ENGINE": "fsdp2"}),
    ("tools/demo.sh", {"DEMO": ".demo"}),
    ("tools/demo.sh", {"DEMO": ".demo", "KIND": "i2v"}),
]


SAY = 'printf "%s\\n" accelerate "$@"'


def stand_in(folder: Path, name: str, says: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{says}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("launcher", "settings"), LAUNCHERS)
def test_shell_scripts_launch(launcher, settings, tmp_path):
    """With an accelerate that only says what it was given."""
    stand_in(tmp_path, "accelerate", SAY)
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / launcher), "--seed", "7"], capture_output=True, text=True,
        cwd=tmp_path if launcher.startswith("scripts") else ROOT,
        env=os.environ | settings | {"PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:4] == ["accelerate", "launch", "--quiet", "--config_file"] and (ROOT / words[4]).is_file()
    words[4] = str(ROOT / words[4])
    launch = _validate_launch_command(launch_command_parser().parse_args(words[2:]))[0]
    nodes = int(settings.get("NODES", 1))
    assert (launch.num_processes, launch.num_machines) == (nodes * int(settings.get("GPUS", 1)), nodes)
    if nodes > 1:
        assert (launch.machine_rank, launch.main_process_ip, launch.main_process_port) == (1, "10.0.0.1", 29500)
    script, flags = launched_script(words)
    args = script.get_args(flags)
    if launcher.startswith("scripts"):
        assert args.seed == 7
        default = "THUDM/CogVideoX-5b-I2V" if script.KIND == "image-to-video" else "THUDM/CogVideoX-2b"
        if nodes > 1 and script.KIND == "text-to-video":
            default = "THUDM/CogVideoX-5b"
        assert args.pretrained_model_name_or_path == settings.get("MODEL", default)
        assert args.validation_prompt == settings.get("PROMPTS")
        assert getattr(args, "validation_images", None) == settings.get("IMAGES")
        assert (args.height, args.width, args.max_num_frames, args.gradient_checkpointing) == (480, 720, 49, True)


@pytest.mark.parametrize("launcher", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_asks_for_data(launcher):
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(["bash", str(launcher)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "set DATA to the folder" in done.stderr
    assert "set -euo pipefail" in launcher.read_text() and os.access(launcher, os.X_OK)


def test_slurm_batch_file(tmp_path):
    """Under Slurm's variables, with stand-ins for its commands: each machine launches with its own rank."""
    stand_in(tmp_path, "accelerate", SAY)
    stand_in(tmp_path, "scontrol", 'printf "node7\\nnode8\\n"')
    stand_in(tmp_path, "srun", 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "train_multi_node.sbatch")], capture_output=True, text=True,
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launches = [["accelerate", *text.splitlines()] for text in done.stdout.split("accelerate\n")[1:]]
    for rank, words in enumerate(launches):
        launch = _validate_launch_command(launch_command_parser().parse_args(words[2:]))[0]
        assert (launch.machine_rank, launch.num_machines, launch.num_processes) == (rank, 2, 16)
        assert launch.main_process_ip == "node7"
        script, flags = launched_script(words)
        args = script.get_args(flags)
        assert (args.output_dir, args.resume_from_checkpoint) == ("/shared/my_lora", "latest")
    assert len(launches) == 2


def test_check_of_machines(tmp_path):
    """Two processes that find each other, and one that waits in vain."""
    command = [sys.executable, str(ROOT / "tools" / "check_machines.py")]
    address = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29871"}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | address | {"RANK": rank})
        for rank in "01"
    ]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert "process 1 of 2 on" in said[1] and "2 processes on 1 machines reach each other" in said[0]
    assert "256 MB added up over all of them, cpu" in said[0]
    impatient = (ROOT / "tools" / "check_machines.py").read_text().replace("SECONDS = 60", "SECONDS = 2")
    (tmp_path / "check.py").write_text(impatient)
    alone = subprocess.run(
        [sys.executable, str(tmp_path / "check.py")], capture_output=True, text=True,
        env=os.environ | address | {"RANK": "0", "MASTER_PORT": "29872"},
    )  # fmt: skip
    assert alone.returncode == 1 and "looking for the others at 127.0.0.1:29872" in alone.stdout
    assert "the same MASTER_ADDR" in alone.stderr and "Traceback" not in alone.stderr


def test_check_is_launched_as_the_training_is(tmp_path):
    stand_in(tmp_path, "accelerate", SAY)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "train_multi_node.sh")], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | NODE | {"CHECK": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(ROOT / "tools" / "check_machines.py")
    assert "machine 1 of 2" in done.stderr and "--main_process_ip\n10.0.0.1" in done.stdout


PACKAGE_OF = {"PIL": "pillow"}
OPTIONAL = {"deepspeed"}  # for the configurations that name it
BROUGHT_ALONG = {  # used through another package, each for the reason that requirements.txt gives
    "sentencepiece", "protobuf", "imageio", "imageio-ffmpeg",
}  # fmt: skip


def test_requirements_are_what_the_script_imports(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    third_party = {PACKAGE_OF.get(name, name) for name in imported - sys.stdlib_module_names}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    assert required == third_party - OPTIONAL | BROUGHT_ALONG
    assert all(re.search(r">=[\d.]+$", line) for line in lines if line and not line.startswith("#"))


def test_a_script_tells_uv_its_requirements(script):
    """PEP 723: the same lines as requirements.txt."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.M)  # the pattern of the PEP, in short
    lines = [line[2:] for line in block.splitlines()]
    assert lines[0] == 'requires-python = ">=3.10"' and lines[0] in (ROOT / "pyproject.toml").read_text()
    dependencies = ast.literal_eval("\n".join(lines[1:]).removeprefix("dependencies = "))
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert dependencies == [line for line in required if line and not line.startswith("#")]


def test_optional_packages_are_asked_for_in_one_version(script):
    lines = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    assert dict(re.findall(r"^(\w+)>=([\d.]+)$", lines, re.M)).items() >= script.OPTIONAL.items()


@SHARED
def test_scripts_run_without_the_packages_that_single_flags_need(script, flags, tmp_path):
    """As after `pip install` of the others alone."""
    packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    (tmp_path / "packages").mkdir()
    for path in packages.iterdir():
        if path.name.split("-")[0].lower() not in script.OPTIONAL:
            (tmp_path / "packages" / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / f"{script.__name__}.py"), *flags(max_train_steps=1)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "INFO Done." in done.stderr, done.stderr[-3000:]


def test_show_run(run, tmp_path):
    output = run(max_train_steps=6, validation_prompt="a red square", num_inference_steps=1, checkpointing_steps=3)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "show_run.py"), str(output), "--picture", str(tmp_path / "all.png")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Loss over 6 steps" in done.stdout and "first fifth" in done.stdout
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors", "video-0.mp4", "video-0.png", "checkpoint-6"):
        assert name in done.stdout, name
    assert (output / "validation" / "test_step-000006_prompt-0_video-0.png").is_file()
    assert Image.open(tmp_path / "all.png").width == 960
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "show_run.py"), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "no metrics.jsonl" in done.stderr


def test_nothing_is_defined_inside_a_function_of_the_script(script):
    """The style of the project: a function is found at the top level, or it is not there."""
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        inside = [node for node in ast.walk(function) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert inside == [function], function.name


def test_args_are_never_written_to(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            assert not (isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "args"), node.lineno

"""What the README says is so: its commands parse, its snippet runs, its scripts launch, its requirements are right."""

import ast
import importlib
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPTS
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


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "accelerate"], ids=["2b", "5b", "5b-i2v", "resume"])
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
    assert others == made | {"pip install -r requirements.txt"}
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
    elsewhere = {"--help", "--quiet"}
    assert set(re.findall(r"--\w+", prose)) - elsewhere <= declared


def test_snippet_runs(run, kind, models, tmp_path):
    """The README's own lines, with the tiny model's name and frames in place of the real one's."""
    run(output_dir=tmp_path / "my_lora")
    text_to_video, changed = (block for language, block in BLOCKS if language == "python")
    assert "pipe.load_lora_weights" in text_to_video and "set_adapters" not in text_to_video
    snippet = {"t2v": text_to_video, "i2v": changed}[kind]
    Image.new("RGB", (720, 480)).save(tmp_path / "start.png")
    snippet = re.sub(r'"THUDM/[^"]*"', repr(str(models[kind])), snippet).replace("num_frames=49", "num_frames=9")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_configs_parse(config):
    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == 1
    assert loaded.use_cpu == (config.name == "cpu.yaml")


LAUNCHERS = [
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c"}),
    ("scripts/train_t2v_single_gpu.sh", {"DATA": ".", "MODEL": "THUDM/CogVideoX-5b", "MIXED_PRECISION": "bf16"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": ".", "PROMPTS": "a b:::c", "IMAGES": "a b.png:::c.png"}),
    ("scripts/train_i2v_single_gpu.sh", {"DATA": "."}),
    ("tools/demo.sh", {"DEMO": ".demo"}),
    ("tools/demo.sh", {"DEMO": ".demo", "KIND": "i2v"}),
]


@pytest.mark.parametrize(("launcher", "settings"), LAUNCHERS)
def test_shell_scripts_launch(launcher, settings, tmp_path):
    """With an accelerate that only says what it was given."""
    fake = tmp_path / "accelerate"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" accelerate "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / launcher), "--seed", "7"], capture_output=True, text=True,
        cwd=tmp_path if launcher.startswith("scripts") else ROOT,
        env=os.environ | settings | {"PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:4] == ["accelerate", "launch", "--quiet", "--config_file"] and (ROOT / words[4]).is_file()
    script, flags = launched_script(words)
    args = script.get_args(flags)
    if launcher.startswith("scripts"):
        assert args.seed == 7
        default = {"train_cogvideox_lora": "THUDM/CogVideoX-2b"}.get(script.__name__, "THUDM/CogVideoX-5b-I2V")
        assert args.pretrained_model_name_or_path == settings.get("MODEL", default)
        assert args.validation_prompt == settings.get("PROMPTS")
        assert getattr(args, "validation_images", None) == settings.get("IMAGES")
        assert (args.height, args.width, args.max_num_frames, args.gradient_checkpointing) == (480, 720, 49, True)


@pytest.mark.parametrize("launcher", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_asks_for_data(launcher):
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    done = subprocess.run(["bash", str(launcher)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "set DATA to the folder" in done.stderr


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


def test_show_run(run):
    output = run(max_train_steps=6, validation_prompt="a red square", num_inference_steps=1, checkpointing_steps=3)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "show_run.py"), str(output)], capture_output=True, text=True, check=True
    )
    assert "Loss over 6 steps" in done.stdout and "first fifth" in done.stdout
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors", "video-0.mp4", "video-0.png", "checkpoint-6"):
        assert name in done.stdout, name
    assert (output / "validation" / "test_step-000006_prompt-0_video-0.png").is_file()
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

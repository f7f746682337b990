"""scripts/on_gpu.sh on the CPU, with tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_project import stand_in

TABLE = "\n==== table, at "
PHASES = "facts prepare step run card image text".split()  # those of a call that names none


@pytest.fixture
def on_gpu(tmp_path):
    """`on_gpu(*phases, **environment)` runs the script, as on a machine without a GPU; returns what it printed."""
    stand_in(tmp_path, "nvidia-smi", "exit 1")
    settings = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*phases: str, **environment: str) -> str:
        command = ["bash", str(ROOT / "scripts" / "on_gpu.sh"), "results", *phases]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path,
            env=os.environ | settings | environment,
        )  # fmt: skip
        return done.stdout

    return run


def exit_codes(said: str) -> dict[str, str]:
    """Of the phases in the table, which is printed last."""
    table = said.split(TABLE)[1]
    return dict(re.findall(r"^\| phase (\w+) \|.* (\S+) \|$", table, re.M))


def check_files(folder: Path, said: str, json_files: list[str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*json_files, "log.txt", "table.txt"])
    assert len(json_files) <= 5
    log, table = said.split(TABLE)
    assert (folder / "log.txt").read_text() == log and (folder / "table.txt").read_text() == table.split("\n", 1)[1]


STANDS_IN_FOR_PYTHON = """case $1 in
*/device_facts.py) echo "| path | $PYTHONPATH |" ;;
*/make_model.py) echo 'no space left' >&2; exit 3 ;;
*) trap '' TERM; sleep 60 ;;
esac"""


def test_a_phase_that_fails_or_lasts_too_long_ends_alone(on_gpu, tmp_path):
    """A program that ignores SIGTERM ends with its phase, too: it would hold the GPU, and keep the table waiting."""
    stand_in(tmp_path, "python", STANDS_IN_FOR_PYTHON)
    settings = {"PYTHON": str(tmp_path / "python"), "PYTHONPATH": "/of/the/caller", "LIMIT": "9"}
    said = on_gpu("facts", "prepare", "text", "card", "none", **settings)
    codes = {"facts": "0", "prepare": "3", "text": "137", "card": "time", "none": "phase"}  # 137: it was killed
    assert exit_codes(said) == codes
    log, table = said.split(TABLE)
    assert "no space left" in log and "\n| path | /of/the/caller |\n" in table
    assert int(table.split(" s\n")[0]) < 30
    check_files(tmp_path / "results", said, [])


@pytest.mark.long
def test_facts_and_models(on_gpu, tmp_path):
    said = on_gpu("facts", "prepare")
    assert exit_codes(said) == {"facts": "0", "prepare": "0"}
    check_files(tmp_path / "results", said, ["facts.json"])
    facts = json.loads((tmp_path / "results" / "facts.json").read_text())
    assert facts["attention, FLASH_ATTENTION"] > 0 and "No viable backend" in facts["attention, CUDNN_ATTENTION"]
    assert facts["its largest error (0.5: rounded once)"] == pytest.approx(0.5, abs=0.01)
    models = tmp_path / "on_gpu" / "tiny"
    assert (models / "tiny-5b-i2v" / "model_index.json").is_file() and (models / "clips" / "videos.txt").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_phases(on_gpu, tmp_path):
    """Those that run unless some are named, and the two others."""
    said = on_gpu(LIMIT="900")
    assert exit_codes(said) == dict.fromkeys(PHASES, "0")
    check_files(tmp_path / "results", said, ["facts.json", "step.json", "card.json"])
    said = on_gpu("more", "long")
    assert exit_codes(said) == dict.fromkeys([*PHASES, "more", "long"], "0")
    assert len(list((tmp_path / "results").iterdir())) == 7
    found = json.loads((tmp_path / "results" / "step.json").read_text())["settings"]
    assert [name for name in found if "error" in found[name]] == ["cuDNN attention"]
    assert "| exit code after SIGTERM (143 is right) | 143 |" in said
    assert len(re.findall(r"^\| sampling, step [02] ", said, re.M)) == 2  # of the phase image

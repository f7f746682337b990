"""The benchmarks on tiny models. Their times are of no meaning here."""

import json

import pytest
import torch
import train_step
import whole_run
from conftest import ROOT
from diffusers import CogVideoXTransformer3DModel


def test_settings_compute_the_loss_of_diffusers_example(tmp_path):
    """In fp32 to 1e-5. Each setting is measured for as many steps as asked, after two."""
    torch.manual_seed(0)
    CogVideoXTransformer3DModel.from_config(train_step.config_of("tiny")).save_pretrained(tmp_path / "transformer")
    settings = ["diffusers' example", "no recomputation", "attention kept", "offloaded"]
    found = {setting: train_step.measure("tiny", setting, 8, 2, str(tmp_path)) for setting in settings}
    for measured in found.values():
        assert measured["loss"] == pytest.approx(found["diffusers' example"]["loss"], rel=1e-5)
        assert len(measured["seconds"]) == 2 and min(measured["seconds"]) > 0 and measured["peak"] is None
    flop = {setting: train_step.counted("tiny", setting, 8).flop for setting in settings[1:]}
    assert flop["no recomputation"] < flop["attention kept"] < flop["offloaded"]


@pytest.mark.long
def test_table_and_json_of_a_benchmark(tmp_path, capsys):
    words = ["tiny", "--settings", "recomputed", "--steps", "3", "--rank", "8", "--results", str(tmp_path)]
    train_step.main(words)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| recomputed |")]
    (file,) = tmp_path.glob("*-tiny-CPU.json")
    results = json.loads(file.read_text())
    seconds = sorted(results["settings"]["recomputed"]["seconds"])
    assert len(seconds) == 3 and row.split(" | ")[1:4] == [f"{seconds[i]:.3f}" for i in (1, 0, 2)]
    assert results["versions"]["torch"] == torch.__version__.split("+")[0] and results["peak_flop_per_second"] > 0


@pytest.mark.slow
def test_whole_runs_alternate(capsys):
    """With this project's own script as the other trainer."""
    other = str(ROOT / "train_cogvideox_lora.py")
    words = [other, "--rounds", "2", "--steps", "3", "--layers", "1", "--clips", "2", "--size", "9", "64", "96"]
    whole_run.main(words)
    lines = capsys.readouterr().out.splitlines()
    names = ["the other", "this project", "this project, attention kept"]
    orders = {1: [*names[1:], names[0]], 2: [names[2], *names[:2]]}  # each round begins with another one
    rounds = [line.split(":")[0] for line in lines if line.startswith("round")]
    assert rounds == [f"round {n}, {name}" for n in orders for name in orders[n]]
    assert [line.split(" | ")[0] for line in lines[-3:]] == [f"| {name}" for name in names]


@pytest.mark.slow
def test_a_trainer_that_fails_ends_the_benchmark(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("print('no such flag'); raise SystemExit(2)")
    with pytest.raises(SystemExit, match=r"(?s)other.py failed:.*no such flag"):
        whole_run.main([str(other), "--rounds", "1", "--layers", "1", "--clips", "1", "--size", "9", "64", "96"])

"""The benchmarks on tiny models. Their times are of no meaning here."""

import json
import multiprocessing
import os
import signal

import inference
import make_model
import pytest
import torch
import train_step
import whole_run
from conftest import ROOT


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_model.write_model("tiny-5b", *(tmp_path_factory.mktemp("tiny") / name for name in ("model", "shared")))


def test_settings_compute_the_loss_of_diffusers_example(tiny_model):
    """In fp32 to 1e-5, as the gradients and the loss after steps. Each setting is measured for as many steps as asked,
    after two."""
    settings = ["diffusers' example", "library's blocks", "no recomputation", "attention kept", "offloaded"]
    found = {setting: train_step.measure("tiny-5b", setting, 8, 2, str(tiny_model)) for setting in settings}
    for measured in found.values():
        for key in ("loss", "norm", "last_loss"):
            assert measured[key] == pytest.approx(found["diffusers' example"][key], rel=1e-5)
        assert measured["last_loss"] < measured["loss"]
        assert len(measured["seconds"]) == 2 and min(measured["seconds"]) > 0 and measured["peak"] is None
    flop = {setting: train_step.counted("tiny-5b", setting, 8).flop for setting in settings[2:]}
    assert flop["no recomputation"] < flop["attention kept"] < flop["offloaded"]


def test_memory_of_sampling_is_what_the_readme_says(capsys, monkeypatch):
    monkeypatch.setattr(inference.models, "TRANSFORMERS", {"2b": inference.models.TRANSFORMERS["2b"]})
    inference.main([])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| 2b | 18.2 | 10.8 | 3.8 |" and row in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("setting", ["library's blocks", "recomputed"])
def test_whose_blocks_compute(tiny_model, setting):
    script, _, transformer, lora = train_step.load("tiny-5b", setting, 8, str(tiny_model))
    own = script.CogVideoXBlock
    blocks = {type(block) for block in transformer.transformer_blocks}
    assert blocks == {own if setting == "recomputed" else own.__base__}
    assert len(lora) == 3 * 4 * 2 and isinstance(transformer.transformer_blocks[0].attn1.to_q, script.LoraLinear)


@pytest.fixture
def forked(monkeypatch):
    """Processes that measure have the libraries loaded already, and use no threads of this one."""
    monkeypatch.setattr(train_step, "PROCESSES", multiprocessing.get_context("fork"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(said: str) -> dict[str, list[str]]:
    """The rows of the table, by their settings."""
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    return {columns[0]: columns[1:] for columns in rows}


@pytest.mark.usefixtures("forked")
def test_table_and_json_of_a_benchmark(tiny_model, tmp_path, capsys):
    """A kernel that a CPU does not have is an error in its row, and the table goes on. Results are of all rows."""
    settings = ["recomputed", "cuDNN attention", "flash attention"]
    words = ["tiny-5b", "--steps", "3", "--rank", "8", "--model_folder", str(tiny_model), "--settings", *settings]
    train_step.main([*words, "--results", str(tmp_path / "step.json")])
    rows = rows_of(capsys.readouterr().out)
    results = json.loads((tmp_path / "step.json").read_text())
    found = results["settings"]
    assert list(found) == settings and list(rows) == ["setting", *settings]
    seconds = sorted(found["recomputed"]["seconds"])
    assert len(seconds) == 3 and rows["recomputed"][:3] == [f"{seconds[i]:.3f}" for i in (1, 0, 2)]
    assert "No viable backend" in rows["cuDNN attention"][0]
    assert "No viable backend" in found["cuDNN attention"]["error"]
    assert found["flash attention"]["loss"] == pytest.approx(found["recomputed"]["loss"])
    assert found["recomputed"]["counted"] == train_step.counted("tiny-5b", "recomputed", 8).peak
    assert results["versions"]["torch"] == torch.__version__.split("+")[0] and results["peak_flop_per_second"] > 0


def measure_until_killed(_args, settings, sender):
    """In place of `measure_all`: the first setting is measured, and the second one kills the process."""
    sender.send({"device": "CPU", "peak_flop_per_second": 1e9})
    for setting in settings:
        if setting == "attention kept":
            os.kill(os.getpid(), signal.SIGKILL)
        times = {"seconds": [1.0], "peak": 2**30, "taken": 2**31}
        sender.send(times | {"loss": 2.0, "norm": 0.5, "last_loss": 1.0})


@pytest.mark.usefixtures("forked")
def test_another_process_goes_on_when_one_dies(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "measure_all", measure_until_killed)
    settings = ["recomputed", "attention kept", "offloaded"]
    words = ["tiny-5b", "--rank", "8", "--model_folder", str(tiny_model), "--settings", *settings]
    train_step.main([*words, "--results", str(tmp_path / "step.json")])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["setting", *settings]
    assert rows["attention kept"][0] == "the process that measures ended with exit code -9"
    assert rows["offloaded"][:3] == ["1.000"] * 3 and rows["offloaded"][5:8:2] == ["1.0", "2.0"]
    assert rows["offloaded"][8:] == ["2 (+0.000%)", "0.5 (+0.000%)", "1 (+0.000%)"]
    assert list(json.loads((tmp_path / "step.json").read_text())["settings"]) == settings


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

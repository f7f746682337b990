"""What the tools share that are given a training script and the flags of a run."""

import contextlib
import importlib.util
import inspect
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script
    spec.loader.exec_module(script)
    return script


@contextlib.contextmanager
def ending_as(script: ModuleType, tool: str) -> Iterator[None]:
    """The script's RunError, or Ctrl-C, ends the tool as it ends a run: with a message and an exit code."""
    try:
        yield
    except script.RunError as error:
        print(f"{tool}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{tool}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def open_run(script: ModuleType, args: Namespace):
    """Check the flags as a run does; returns the transformer's config, the VAE's, and the dataset. Raises the script's
    RunError for flags, data or a model that cannot work."""
    script.check_args(args)
    configs = [script.read_config(args, name)[0] for name in ("transformer", "vae")]
    script.check_model(args, *configs)
    return *configs, open_dataset(script, args)


def open_dataset(script: ModuleType, args: Namespace):
    """Return the clips and captions of a run. Raises the script's RunError for data that cannot work."""
    names = inspect.signature(script.VideoDataset).parameters
    return script.VideoDataset(**{name: getattr(args, name) for name in names})

"""The docstring of a script lists its sections."""

from conftest import BOTH, ROOT

SECTIONS = [
    "Command line", "Training", "Objective", "Model", "Data", "Precompute", "Batches", "Optimizer", "Checkpoints",
    "Validation", "Card and Hub", "Processes",
]  # fmt: skip
pytestmark = BOTH


def source_of(script) -> str:
    return (ROOT / f"{script.__name__}.py").read_text()


def sections_of(source: str) -> dict[str, int]:
    """Section title: its first line."""
    lines = enumerate(source.splitlines(), start=1)
    return {line[7:].split(":")[0].rstrip(" -"): number for number, line in lines if line.startswith("# ---- ")}


def test_sections_stand_in_the_listed_order(script):
    assert list(sections_of(source_of(script))) == SECTIONS
    listed = script.__doc__.split("Sections, the story first: ")[1].replace("\n", " ")
    assert [title.strip() for title in listed.split("·")] == SECTIONS

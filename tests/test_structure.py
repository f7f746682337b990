"""The scripts read from top to bottom: sections in the order in which data flows, short signatures."""

import ast

from conftest import BOTH, ROOT

SECTIONS = [
    "Command line", "Data", "Processes", "Model", "Objective", "Precompute", "Batches", "Optimizer", "Checkpoints",
    "Validation and publishing", "Training",
]  # fmt: skip
# Their signatures are the originals'.
ORIGINAL = {"VideoDataset.__init__", "encode_prompt", "compute_prompt_embeddings", "log_validation", "save_model_card"}
ORIGINAL |= {"prepare_rotary_positional_embeddings"}

pytestmark = BOTH


def source_of(script) -> str:
    return (ROOT / f"{script.__name__}.py").read_text()


def sections_of(source: str) -> dict[str, int]:
    """Section title: its first line."""
    lines = enumerate(source.splitlines(), start=1)
    return {line[7:].split(":")[0].rstrip(" -"): number for number, line in lines if line.startswith("# ---- ")}


def test_sections_stand_in_the_order_of_the_data_flow(script):
    assert list(sections_of(source_of(script))) == SECTIONS
    listed = script.__doc__.split("Sections, as data flows: ")[1].replace("\n", " ")
    assert [title.strip() for title in listed.split("·")] == SECTIONS


def test_no_section_uses_a_later_one(script):
    """A function may use what its own section and earlier ones define."""
    source = source_of(script)
    starts = sorted(sections_of(source).values())
    defined, later = {}, []
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = sum(start < node.lineno for start in starts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in defined:
            section = sum(start < node.lineno for start in starts)
            if defined[node.id] > section:
                later.append(f"line {node.lineno} uses {node.id}")
    assert later == []


def test_functions_have_six_parameters_at_most(script):
    tree = ast.parse(source_of(script))
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef):
                is_method = isinstance(parent, ast.ClassDef)
                name = f"{parent.name}.{node.name}" if is_method else node.name
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert name in ORIGINAL or len(arguments) - is_method <= 6, name

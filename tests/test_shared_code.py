"""The two scripts are one text: what has the same name has the same source, but for the lines tagged `# I2V:`."""

import ast
import difflib

import pytest
from conftest import ROOT

TEXT_TO_VIDEO = (ROOT / "train_cogvideox_lora.py").read_text()
IMAGE_TO_VIDEO = (ROOT / "train_cogvideox_image_to_video_lora.py").read_text()
TAG = "# I2V:"

# What has the same name and not the same source, and why.
EXCEPTIONS = {
    "KIND": "what the script trains",
    "OUTPUT_TYPE": "what log_validation returns",
    "VideoDataset": "each original has its own order of parameters",
    "PIPELINE": "what samples with it",
    "DEFAULT_OUTPUT_DIR": "each original has its own",
    "add_validation_args": "flags about images",
    "validation_inputs": "each prompt has a start image",
    "encode_clip": "the first frame is encoded apart",
    "prepare_batch": "image latents are sampled each step",
    "diffusion_loss": "the transformer takes image latents beside the noisy ones",
}


def definitions(source: str) -> dict[str, str]:
    """Source of each top-level function, class and constant, decorators and comments within it included."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names, first = [node.name], min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            first = node.lineno
        else:
            continue
        for name in names:
            assert name not in found, f"{name} is defined twice"
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def differing(text_to_video: str, image_to_video: str) -> set[str]:
    t2v, i2v = definitions(text_to_video), definitions(image_to_video)
    return {name for name in t2v.keys() & i2v.keys() if t2v[name] != i2v[name]}


def changes(text_to_video: str, image_to_video: str) -> list[tuple[str, range, range]]:
    """How one becomes the other: (replace, delete or insert, lines of the first, lines of the second), from 1."""
    matcher = difflib.SequenceMatcher(None, text_to_video.splitlines(), image_to_video.splitlines(), autojunk=False)
    return [
        (tag, range(a + 1, b + 1), range(c + 1, d + 1))
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal"
    ]


def lines_of_strings(source: str) -> set[int]:
    """Lines in a string of several lines (docstrings, the card), where a comment would be text."""
    strings = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Constant, ast.JoinedStr))]
    return {line for n in strings if n.end_lineno > n.lineno for line in range(n.lineno, n.end_lineno + 1)}


def tagged_lines(source: str) -> set[int]:
    """Lines of whatever carries the tag: a line, a comment line and the line below it, a simple statement, or, where
    the tag is on the line of a `def`, a whole top-level function."""
    lines, tree = source.splitlines(), ast.parse(source)
    tagged = {number for number, line in enumerate(lines, start=1) if TAG in line}
    tagged |= {number + 1 for number in tagged if lines[number - 1].strip().startswith("#")}
    for node in ast.walk(tree):
        simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
        if (simple and tagged & set(range(node.lineno, node.end_lineno + 1))) or (
            node in tree.body and isinstance(node, ast.FunctionDef) and node.lineno in tagged
        ):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            tagged |= set(range(first, node.end_lineno + 1))
    return tagged


def untagged(text_to_video: str, image_to_video: str) -> list[str]:
    """Differences that no tag accounts for."""
    in_strings, tagged = lines_of_strings(image_to_video), tagged_lines(image_to_video)
    lost = lines_of_strings(text_to_video)
    t2v, i2v = text_to_video.splitlines(), image_to_video.splitlines()
    found = []
    for tag, before, after in changes(text_to_video, image_to_video):
        found += [i2v[n - 1] for n in after if i2v[n - 1].strip() and n not in in_strings | tagged]
        if tag == "delete":  # a line of the text-to-video script that nothing has taken the place of
            found += [t2v[n - 1] for n in before if t2v[n - 1].strip() and n not in lost]
    return found


def count_differing_lines(text_to_video: str, image_to_video: str) -> int:
    return sum(len(before) + len(after) for _, before, after in changes(text_to_video, image_to_video))


def test_same_name_same_source():
    found = differing(TEXT_TO_VIDEO, IMAGE_TO_VIDEO)
    assert not found - EXCEPTIONS.keys(), "these have drifted apart"
    assert not EXCEPTIONS.keys() - found, "these are no exceptions any more"


def test_every_other_difference_is_tagged():
    """In the exceptions too: what differs there is a tagged statement, or text."""
    assert untagged(TEXT_TO_VIDEO, IMAGE_TO_VIDEO) == []


def test_what_one_script_has_alone_is_about_images():
    t2v, i2v = definitions(TEXT_TO_VIDEO), definitions(IMAGE_TO_VIDEO)
    assert t2v.keys() <= i2v.keys()
    assert all(TAG in i2v[name] for name in i2v.keys() - t2v.keys())
    assert TAG not in TEXT_TO_VIDEO


def test_files_differ_in_fewer_than_200_lines():
    assert 50 < count_differing_lines(TEXT_TO_VIDEO, IMAGE_TO_VIDEO) < 200


DRIFTS = {
    "a shared function": ("    run.optimizer.zero_grad()\n", "    run.optimizer.zero_grad(False)\n"),
    "a shared constant": ('"to_out.0"]', '"to_out.0", "proj"]'),
    "a comment in a shared function": ("# Nothing waits for the GPU before the step is complete", "# Nothing waits"),
    "a decorator": ("@functools.cache\ndef waiting_group", "def waiting_group"),
    "an exception, beside its tagged lines": ("noise = torch.randn_like(latents)", "noise = torch.rand_like(latents)"),
    "a statement of an exception": ("    x0_pred = noise_scheduler", "    noise_scheduler"),
    "a line added to an exception": ("    if timesteps is None:\n", "    if timesteps is None:\n        print()\n"),
    "an import": ("import diffusers\n", "import diffusers as diffusers\n"),
}


@pytest.mark.parametrize("old, new", DRIFTS.values(), ids=DRIFTS)
def test_the_guard_sees_drift(old, new):
    assert old in IMAGE_TO_VIDEO
    drifted = IMAGE_TO_VIDEO.replace(old, new)
    found = differing(TEXT_TO_VIDEO, drifted) - EXCEPTIONS.keys()
    assert found or untagged(TEXT_TO_VIDEO, drifted)


def test_the_guard_sees_an_exception_that_is_none():
    t2v, i2v = (definitions(source)["encode_clip"] for source in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO))
    found = differing(TEXT_TO_VIDEO, IMAGE_TO_VIDEO.replace(i2v, t2v))
    assert EXCEPTIONS.keys() - found == {"encode_clip"}

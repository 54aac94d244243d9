"""The rooms of the house: who stands on whom, and how much fits on a page.

* A file imports only what lies on a floor beneath it, inside functions too: plumbing <
  frozen < model < tokenizer < loading < adapters < lora, logprob < reward_model < run <
  sample < evaluate < grpo < methods. There is no circle, in any folder.
* World, subjects and rubric import nothing but each other; plumbing/ and results/
  nothing but themselves.
* A function fits a screen; of `grpo.py` at least three lines in ten are words.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("plumbing", "methods", "data", "results", "benchmarks", "exercises")
FLOORS = (
    ("plumbing",), ("frozen",), ("model",), ("tokenizer",), ("loading",), ("adapters",),
    ("logprob_triton",), ("lora", "logprob"), ("reward_model",), ("run",), ("sample",),
    ("evaluate",), ("grpo",), ("methods",))
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
WORLD = {"data.world", "data.subjects", "data.rubric"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__")


MODULES = {module_name(path): path for path in sorted(
    [*ROOT.glob("*.py"), *(p for folder in FOLDERS
                           for p in (ROOT / folder).rglob("*.py"))])}


def imports(name: str, text: str) -> set[str]:
    """Modules of the project that a module imports, wherever in its text."""
    named = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports are not used here"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = members & MODULES.keys()
            named |= modules | ({node.module} if members - modules else set())
    # data/rubric.py also runs as a program: then `world` lies beside it.
    folder = name.rpartition(".")[0]
    beside = {f"{folder}.{other}" for other in named - MODULES.keys()}
    return (named | (beside if folder == "data" else set())) & MODULES.keys()


GRAPH = {name: imports(name, path.read_text()) for name, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name):]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (visit(other, [*path, name])
                                  for other in sorted(graph.get(name, ())))), [])

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def lower(name: str, other: str) -> bool:
    """Whether a module may import another: it lies beneath, or in the same folder."""
    room, beneath = name.partition(".")[0], other.partition(".")[0]
    if beneath == "data":
        return other in WORLD and FLOOR[room] >= FLOOR["run"]
    if beneath == "results":
        return room == "methods"
    return beneath in FLOOR and (
        FLOOR[beneath] < FLOOR[room] or (room == beneath and room in FOLDERS))


def test_every_top_level_module_has_a_floor():
    rooms = {name for name in MODULES if "." not in name and name not in FOLDERS}
    assert rooms | {"plumbing", "methods"} == FLOOR.keys()


@pytest.mark.parametrize("name", [
    name for name in MODULES if name.partition(".")[0] in FLOOR])
def test_a_module_imports_only_what_lies_beneath(name):
    assert [other for other in sorted(GRAPH[name]) if not lower(name, other)] == []


def test_there_is_no_circle():
    assert circle(GRAPH) == []


def test_the_world_imports_nothing_but_itself():
    for name in WORLD:
        assert GRAPH[name] <= WORLD, name


@pytest.mark.parametrize("folder", ["plumbing", "results"])
def test_a_folder_imports_nothing_but_itself(folder):
    for name, others in GRAPH.items():
        if name.partition(".")[0] == folder:
            assert {other.partition(".")[0] for other in others} <= {folder}, name


def test_imports_and_circles_are_seen():
    text = ("import os\nimport lora\nfrom data import rubric, world\n"
            "from plumbing.files import require\nfrom run import Run as Other\n"
            "def f():\n    from methods import ppo\n    import grpo as g\n")
    assert imports("x", text) == {"lora", "data.rubric", "data.world",
                                  "plumbing.files", "run", "methods.ppo", "grpo"}
    assert imports("data.rubric", "import world") == {"data.world"}
    assert "logprob_triton" in GRAPH["logprob"]  # inside a function
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    for name, other in (("lora", "logprob"), ("run", "sample"), ("grpo", "methods.ppo"),
                        ("run", "data.make_tiny"), ("model", "data.rubric"),
                        ("sample", "results.tables"), ("grpo", "benchmarks.plan"),
                        ("model", "model")):
        assert not lower(name, other), (name, other)


# -------------------------------------------------------------------------- proportions


@pytest.mark.parametrize("path", [
    path for name, path in MODULES.items()
    if "." not in name or name.startswith(("methods.", "plumbing."))],
    ids=lambda path: str(path.relative_to(ROOT)))
def test_a_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 62, (node.name, length)


def share_of_words(text: str) -> float:
    """Lines of docstrings and comments, as a share of all that are not blank."""
    lines = text.splitlines()
    words = {number for number, line in enumerate(lines, 1)
             if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                ast.get_docstring(node)):
            words |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    filled = {number for number, line in enumerate(lines, 1) if line.strip()}
    return len(words & filled) / len(filled)


def test_three_lines_in_ten_of_the_method_are_words():
    assert share_of_words('"""One.\n\nTwo."""\n\nx = 1  # no\n# three\n') == 3 / 4
    assert share_of_words((ROOT / "grpo.py").read_text()) >= 0.3

"""Imports run one way: models and losses at the bottom, utils, data, the scripts, benchmarks, tests."""

import ast
import sys
from collections.abc import Iterator

from conftest import REPOSITORY

LOWEST = {"torch", "models", "losses", "utils.distributed"}     # and Python's own modules, no others
SCRIPTS = {"models", "losses", "data", "utils"}
HELPERS = {path.stem for path in (REPOSITORY / "tests").glob("*.py")}
ROOMS = {                                                       # what a room imports of the project
    "models": LOWEST, "losses": LOWEST, "utils": {"utils"}, "data": {"data", "utils"},
    "train.py": SCRIPTS, "test.py": SCRIPTS, "benchmarks": SCRIPTS | {"train", "benchmarks"},
    "tests": SCRIPTS | {"train", "benchmarks"} | HELPERS,
}
PROJECT = {room.removesuffix(".py") for room in ROOMS} | HELPERS
# The files of utils in which networks are read, converted, exported or run.
WITH_MODELS = {f"utils/{name}.py" for name in ("checkpoint", "convert_official", "evaluation", "export_onnx",
                                               "photographs")}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from ((node.lineno, start + alias.name) for alias in node.names)


def wrong_imports(name: str, source: str) -> list[str]:
    """What a file of the repository imports against the rule, a line each."""
    allowed = ROOMS[name.partition("/")[0]] | ({"models"} if name in WITH_MODELS else set())
    wrong = []
    for line, module in imported(source):
        top = module.partition(".")[0]
        asked = top not in sys.stdlib_module_names if "torch" in allowed else top in PROJECT
        if asked and not any(f"{module}.".startswith(f"{prefix}.") for prefix in allowed):
            wrong.append(f"{name}:{line} imports {module}")
    return wrong


def test_imports_run_one_way():
    files = [path for room in ROOMS for path in
             ([REPOSITORY / room] if room.endswith(".py") else sorted((REPOSITORY / room).rglob("*.py")))]
    wrong = [line for path in files
             for line in wrong_imports(str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8"))]
    assert len(files) > 60 and not wrong, "\n".join(["", *wrong])
    for name, wrong, right in (
        ("models/baryir.py", "from utils.errors import InputError", "from utils.distributed import gather"),
        ("losses/residual.py", "import numpy as np", "import math, torch.nn.functional as F"),
        ("utils/runs.py", "def late():\n    import models.baryir", "import numpy"),
    ):
        assert len(wrong_imports(name, wrong)) == 1 and not wrong_imports(name, right), name

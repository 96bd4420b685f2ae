"""The shape of the package: imports point one way, and house limits hold."""

import ast
from pathlib import Path

import slimlmm

PACKAGE = Path(slimlmm.__file__).parent


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("slimlmm"):
            if node.module == "slimlmm":
                found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
            else:
                found.add(node.module.split(".")[1])
    return found


def test_imports_have_no_cycle():
    graph = {path.stem: imports_of(path) & {p.stem for p in PACKAGE.glob("*.py")} for path in PACKAGE.glob("*.py")}
    order: list[str] = []
    while graph:
        free = sorted(name for name, needs in graph.items() if not needs - set(order) - {name})
        assert free, f"import cycle among {sorted(graph)}"
        order += free
        for name in free:
            del graph[name]


def test_files_and_functions_stay_within_the_house_limits():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path.name} has more than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"

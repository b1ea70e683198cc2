"""Imports point down: a stranger may read any file knowing that nothing above it matters."""

import ast
from pathlib import Path

# From the bottom. A module may import from its own layer and from those below, never from those above.
LAYERS = [
    ["errors", "escaping", "randomness", "machine", "durable"],
    ["config", "losses", "models", "processes"],
    ["data", "training"],
    ["runs"],
    ["weights", "report"],
    ["methods"],
    ["evaluation"],
    ["pretraining", "finetuning", "analysis"],
    ["exporting"],
    ["benchmark", "study"],
    ["api"],
    ["commands"],
    ["cli"],
    ["__main__"],
    ["tools"],
]
OUTSIDE_WINGS = {"errors", "escaping", "randomness", "machine", "durable", "api", "cli", "__main__"}  # the only ones
HEAVY = {"torch", "timm", "torchvision", "deepspeed", "webdataset", "numpy"}

# Of `config`, what holds no setting: the batch plan.
PLAIN = {"maedistill.config.plan", "maedistill.config.plan.BatchPlan"}


def modules(root: Path) -> dict[str, Path]:
    files = {".".join(p.relative_to(root).with_suffix("").parts): p for p in (root / "maedistill").rglob("*.py")}
    files |= {f"tools.{p.stem}": p for p in (root / "tools").glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(module: str) -> int:
    name = "tools" if module.startswith("tools.") else module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_imports_point_down(root: Path):
    files = modules(root)
    for module, path in files.items():
        for target in imports(path) & files.keys():
            if module != "maedistill" and target != "maedistill":
                assert layer(target) <= layer(module), f"{module} imports {target}, which stands above it"


def test_every_module_lives_in_a_wing(root: Path):
    alone = {path.stem for path in (root / "maedistill").glob("*.py")} - {"__init__"}
    assert alone == OUTSIDE_WINGS


def test_there_are_no_circles(root: Path):
    files = modules(root)
    files.pop("maedistill")  # it imports its public names when they are first used
    graph = {module: imports(path) & files.keys() - {module} for module, path in files.items()}
    while graph:
        free = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in free}


def test_only_the_engine_imports_deepspeed_and_config_nothing_heavy(root: Path):
    for module, path in modules(root).items():
        roots = {target.split(".")[0] for target in imports(path)}
        if module != "maedistill.training.engine":
            assert "deepspeed" not in roots, module
        if module.startswith("maedistill.config") or module in ("maedistill", "maedistill.errors"):
            assert not roots & HEAVY, module


def test_leaves_never_see_the_config(root: Path):
    """Only what assembles a run unpacks its config; everything below takes plain arguments."""
    leaves = ("losses", "methods", "data", "models", "randomness")
    for module, path in modules(root).items():
        if module.split(".")[1:2] and module.split(".")[1] in leaves:
            seen = {target for target in imports(path) if target.startswith("maedistill.config")}
            assert seen <= PLAIN, module


def test_names_say_something(root: Path):
    vague = {"utils", "misc", "common", "helpers"}
    assert not [module for module in modules(root) if module.rpartition(".")[2] in vague]

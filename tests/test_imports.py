"""Who may import what: rooms point one way, and heavy libraries stay where they belong."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("actors", "reward", "learner", "cluster")  # a room may import itself and those before it
HEAVY = ("torch", "ray", "deepspeed", "transformers")
TORCH_ALONE = (  # what must run where only torch is installed: no pydantic at run time
    "actors/sampling.py", "actors/slots.py", "actors/torch_engine.py",
    "learner/advantages.py", "learner/losses.py", "learner/kl.py", "learner/shaping.py", "learner/batch.py",
    "learner/local.py", "learner/off_policy.py", "learner/value_learning.py",
)  # fmt: skip


def _imports(source, *, at_run_time_only=False):
    """Return the top-level names, dotted, that a file imports, wherever in it."""
    tree = ast.parse(source)
    skipped = set()
    if at_run_time_only:
        guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_type_checking(node.test)]
        skipped = {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module)
    return found


def _is_type_checking(test):
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _violations(room, name, source):
    """Return what a file of a room imports against the rules."""
    tops = {module.partition(".")[0] for module in _imports(source)}
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = sorted((tops & {*ROOMS, "examples", "tests", "benchmarks"}) - set(allowed))
    if "ray" in tops and room != "cluster":
        wrong.append("ray")
    if "deepspeed" in tops and (room, name) != ("learner", "zero.py"):
        wrong.append("deepspeed")
    return wrong


def _files(room):
    return sorted(path.relative_to(ROOT / room).as_posix() for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    wrong = {name: _violations(room, name, (ROOT / room / name).read_text()) for name in _files(room)}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_rules_catch_what_they_forbid():
    """Planted bugs: a room that looks ahead, late imports of ray and deepspeed in the wrong place."""
    assert _violations("actors", "x.py", "from learner.losses import ppo") == ["learner"]
    assert _violations("reward", "x.py", "import cluster.run") == ["cluster"]
    assert _violations("learner", "learner.py", "def f():\n    import ray\n    import deepspeed.comm") == [
        "ray",
        "deepspeed",
    ]
    assert _violations("cluster", "x.py", "from deepspeed import comm\nimport ray") == ["deepspeed"]
    assert _violations("cluster", "x.py", "from examples.randomwalks import graph") == ["examples"]
    assert _violations("learner", "zero.py", "import deepspeed\nfrom actors.rows import GroupRow") == []


def test_room_packages_are_empty():
    """Importing one module of a room imports no other."""
    assert [(ROOT / room / "__init__.py").read_text() for room in ROOMS] == [""] * 4


@pytest.mark.parametrize("path", TORCH_ALONE)
def test_what_runs_with_torch_alone_imports_no_config_at_run_time(path):
    modules = _imports((ROOT / path).read_text(), at_run_time_only=True)
    assert not [module for module in modules if module.endswith(".config") or module.startswith("pydantic")]


def test_type_checking_imports_do_not_count_as_run_time():
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from actors.config import PolicyConfig\nimport torch"
    )
    assert _imports(source, at_run_time_only=True) == ["typing", "torch"]
    assert "actors.config" in _imports(source)


def _loaded(code):
    """Return which heavy libraries a fresh process has loaded after running some code."""
    report = f"import sys; print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return ast.literal_eval(run.stdout.rpartition("LOADED ")[2])


def _command(*arguments):
    start = f"import sys, cluster.cli as cli\nsys.argv = ['concord', *{arguments}]"
    return f"{start}\ntry: cli.main()\nexcept SystemExit: pass"


@pytest.mark.parametrize("code", ["import cluster.config", _command("--help"), _command("train", "--help")])
def test_configuration_and_help_load_nothing_heavy(code):
    assert _loaded(code) == []


@pytest.mark.parametrize(
    "arguments", [("plan", "examples/randomwalks.yaml"), ("train", "examples/randomwalks.yaml", "run.x=1")]
)
def test_plan_and_a_mistake_come_before_the_model_libraries(arguments):
    assert set(_loaded(_command(*arguments))) <= {"ray"}


def test_a_heavy_import_is_noticed():
    """Planted bug: what the check above looks for is found when it is there."""
    assert _loaded("import cluster.config, torch") == ["torch"]

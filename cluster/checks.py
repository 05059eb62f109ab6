"""Checks of a valid configuration against the world: files, import paths, the machine.  Nothing heavy is imported."""

import ast
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from actors.config import PolicyConfig, PromptsConfig
from cluster.config import ConfigError, RunConfig
from cluster.object_store import is_url, package_of, without_credentials
from cluster.start import start_config
from learner.algorithm_config import AlgorithmConfig
from learner.config import DataConfig
from learner.parts import is_plugin
from reward.config import RewardConfig

_PATHS = "paths and modules start at the working directory"


def check_run(config: RunConfig, *, is_submitted: bool = False) -> None:
    """Check everything a run names before any process starts.

    Args:
        config: the run.
        is_submitted: it will be a job on a cluster, where alone absolute paths can be checked.

    Raises:
        ConfigError: with one line for each problem.
    """
    problems = [
        *_directory(config, is_submitted=is_submitted),
        *_trackers(config),
        *check_policy(config.policy, elsewhere=is_submitted),
        *check_data(config.prompts, where="prompts", elsewhere=is_submitted),
        *check_reward(config.reward, elsewhere=is_submitted),
        *_algorithm(config.algorithm),
    ]
    if config.evaluation.prompts:
        problems += check_data(config.evaluation.prompts, where="evaluation.prompts", elsewhere=is_submitted)
    sft = start_config(config.policy)
    if sft is not None:
        problems += check_data(sft.data, where="policy.start, data", elsewhere=is_submitted)
    if problems:
        ignored = ["(of the working directory, a Ray job gets what .gitignore does not name)"] if _is_job() else []
        raise ConfigError("\n".join([*problems, *ignored]))


def check_model(where: str, model: str, *, elsewhere: bool = False) -> list[str]:
    """Return what is wrong with a model's name: neither a model directory nor like a hub name.

    Args:
        where: the setting.
        model: its value.
        elsewhere: an absolute path is another machine's, and not looked at.
    """
    if elsewhere and os.path.isabs(model):
        return []
    if os.path.isdir(model):
        return (
            []
            if os.path.isfile(os.path.join(model, "config.json"))
            else [f"{where} must be a model directory with a config.json, got {model!r}"]
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not os.path.isdir(os.path.dirname(model)):
        return []
    return [f"{where} must be an existing model directory or a hub name like owner/name, got {model!r}; {_PATHS}"]


def _is_job() -> bool:
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def _directory(config: RunConfig, *, is_submitted: bool) -> Iterator[str]:
    directory, in_job = config.run.dir, is_submitted or _is_job()
    if is_url(directory):
        yield from check_store(directory, elsewhere=is_submitted)
    elif in_job and not os.path.isabs(directory):
        yield (
            f"run.dir must be absolute in a Ray job, whose working directory is temporary, got {directory!r}; name a "
            "directory that all nodes mount, or the URL of an object store"
        )
    elif not is_submitted and os.path.exists(directory) and not os.path.isdir(directory):
        yield f"run.dir must be a directory, and {directory!r} is a file"


def check_store(url: str, *, where: str = "run.dir", elsewhere: bool = False) -> Iterator[str]:
    """Yield why a run cannot be in an object store of this kind; nothing is asked of the store.

    Args:
        url: of the run directory.
        where: the setting.
        elsewhere: it is another machine that needs the store's package.
    """
    scheme, package = package_of(url)
    shown = without_credentials(url)
    if url.partition("://")[2].partition("/")[0].rpartition("@")[0].count(":"):
        yield (
            f"{where} must hold no password, which would be written down with the settings, got one for {shown!r}; put "
            "it where the store's own tools look for it"
        )
    elif not package:
        yield f"{where} must be a path or a URL that fsspec knows, such as s3://bucket/runs/x, got {shown!r}"
    elif scheme == "memory":
        yield f"{where} must be where all processes see it, and {shown!r} is the memory of one; use file:// to try"
    elif not elsewhere and importlib.util.find_spec(package.partition(".")[0]) is None:
        name = package.partition(".")[0]
        extra = f"'concord-rlhf[{scheme}]'" if scheme == "s3" else name
        yield f"{where} must be in a store whose package is installed, and {shown!r} needs {name}; pip install {extra}"


def _trackers(config: RunConfig) -> Iterator[str]:
    """Yield the packages that are not there; without importing them, which takes seconds."""
    for name in config.run.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a directory of that name, which W&B leaves behind
            yield (
                f"run.trackers must name installed packages, and {name} is not one; install it with "
                f"`pip install 'concord-rlhf[{name}]'`, or leave it out"
            )


def check_policy(policy: PolicyConfig, *, where: str = "policy.model", elsewhere: bool = False) -> Iterator[str]:
    """Yield what is wrong with the model that is named."""
    if isinstance(policy.model, str):
        yield from check_model(where, policy.model, elsewhere=elsewhere)
    elif "model_type" not in policy.model.architecture:
        yield "policy.model.architecture.model_type must be set, for instance gpt2 or llama"


def check_data(data: PromptsConfig | DataConfig, *, where: str = "data", elsewhere: bool = False) -> Iterator[str]:
    """Yield what is wrong with the file or function that rows come from."""
    is_there = elsewhere and os.path.isabs(data.path or "")
    if data.make:
        yield from _function(f"{where}.make.function", data.make.function, data.make.arguments)
    elif data.path and not is_url(data.path) and not (is_there or os.path.exists(data.path)):
        yield f"{where}.path must be an existing file or directory, got {data.path!r}; {_PATHS}"


def check_reward(reward: RewardConfig, *, where: str = "reward", elsewhere: bool = False) -> Iterator[str]:
    """Yield what is wrong with the judges that are named."""
    for name, component in reward.components.items():
        path = f"{where}.components.{name}"
        models = [*([component.model] if component.model else []), *component.ensemble]
        for model in models:
            yield from check_model(f"{path}.model", model, elsewhere=elsewhere)
        if component.function:
            yield from _function(f"{path}.function", component.function, component.arguments)


def _algorithm(algorithm: AlgorithmConfig) -> Iterator[str]:
    for name, path in (("advantage", algorithm.advantage), ("policy_loss", algorithm.policy_loss)):
        if is_plugin(path):
            yield from _function(f"algorithm.{name}", path, {})


def _function(where: str, path: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Check a function by reading its module's source: importing it could load anything, torch for instance."""
    module, _, name = path.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None:
        yield f"{where} must name an importable module, and there is no {module!r} (in {path!r}); {_PATHS}"
        return
    if found.origin is None or not found.origin.endswith(".py"):
        return
    try:
        with open(found.origin, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except SyntaxError as error:
        yield f"{where} must name a module that Python can read, and {found.origin}:{error.lineno} has: {error.msg}"
        return
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name in functions:
        yield from _arguments(where, functions[name], arguments)
    elif not _binds(tree, name):
        near = difflib.get_close_matches(name, functions, n=1) or sorted(functions)
        yield f"{where} must name a function of {module}, and there is no {name!r}; it has {', '.join(near) or 'none'}"


def _arguments(where: str, function: ast.FunctionDef, arguments: Mapping[str, Any]) -> Iterator[str]:
    if function.args.kwarg:
        return
    known = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    for name in arguments:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=1) or known)
            yield f"{where.rpartition('.')[0]}.arguments.{name} is not an argument; {function.name} has {near}"


def _binds(tree: ast.Module, name: str) -> bool:
    """Return whether a module may bind a name in another way than by a plain function: import, class, `if`, ..."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {bound for alias in node.names for bound in (alias.asname, alias.name)}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names = {node.name}
        else:
            names = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
        if names & {name, "*"}:
            return True
    return False

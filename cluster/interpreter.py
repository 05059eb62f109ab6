"""The Python that a Ray job's command runs with: the one that Ray was started with.

`ray job submit -- python -m cluster.cli ...` gives its command to a shell.  Where Ray was started by its path
(`/opt/env/bin/ray start`), nobody activated its environment, and what that shell finds as `python` may lack Ray and
Concord's packages, or have others than the workers.  So this runs before anything else is imported: it needs the
standard library only, and older Pythons than Concord's can read it.
"""

import json
import os
import shlex
import sys

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets a variable of this very name for a job's command
_IS_CHOSEN = "CONCORD_PYTHON_IS_CHOSEN"
_OWN_PYTHON = ("pip", "uv", "conda", "container", "image_uri", "py_executable")
"""Parts of a runtime environment that bring a Python of their own, which Ray has put first on the PATH."""


def use_rays_python(module: str) -> None:
    """Inside a Ray job, go on in the Python that Ray was started with, unless this is it.

    Elsewhere, and where that Python cannot be found out (there is no /proc), do nothing.

    Args:
        module: what runs; it is started again as `python -m module` with the same arguments.
    """
    if os.environ.pop(_IS_CHOSEN, "") or not os.environ.get(_JOB):
        return
    runtime_env = json.loads(os.environ[_JOB]).get("runtime_env") or {}
    if any(runtime_env.get(name) for name in _OWN_PYTHON):
        return
    python = rays_python(os.getppid())
    # Compared by directory: `python` and `python3` beside each other are one environment.
    if os.path.isabs(python) and os.path.dirname(python) != os.path.dirname(sys.executable):
        os.environ[_IS_CHOSEN] = "1"
        os.execv(python, [python, "-m", module, *sys.argv[1:]])


def rays_python(pid: int) -> str:
    """Return the Python that the raylet among a process's ancestors starts its workers with; "" where there is none.

    A raylet's command line has `--python_worker_command=/opt/env/bin/python /opt/.../default_worker.py ...`.

    Args:
        pid: the process, itself looked at first.
    """
    while pid > 1:
        for word in _read(pid, "cmdline").split("\0"):
            name, _, value = word.partition("=")
            if name == "--python_worker_command":
                return shlex.split(value)[0]
        # The name in parentheses may itself have spaces and parentheses; the parent's id is the second word after it.
        words = _read(pid, "stat").rpartition(")")[2].split()
        pid = int(words[1]) if len(words) > 1 else 0
    return ""


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # gone meanwhile, or no /proc
        return ""

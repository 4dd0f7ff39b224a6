"""Build the wheel, install it without extras in a fresh environment, and try it there.

`import fullrank` and `fullrank --help` must take under a second of CPU time and not import torch;
a command that needs an extra must name it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a command, the better of two: the first one compiles byte code."""
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append(used)
    return min(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/bin/python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)

        code = (
            "import sys, fullrank; assert 'torch' not in sys.modules; print(fullrank.__version__)"
        )
        importing = cpu_seconds([python, "-c", code])
        helping = cpu_seconds([f"{folder}/venv/bin/fullrank", "--help"])
        print(f"import fullrank: {importing:.2f} s CPU; fullrank --help: {helping:.2f} s CPU")
        if max(importing, helping) > 1:
            sys.exit("importing fullrank, or its help, takes more than a second")
        listed = subprocess.run(
            [f"{folder}/venv/bin/fullrank", "methods", "shrink"], capture_output=True, text=True
        )
        if listed.returncode or "lord" not in listed.stdout:
            sys.exit(f"fullrank methods does not work without extras: {listed.stderr}")
        missing = subprocess.run(
            [f"{folder}/venv/bin/fullrank", "order", "search", folder, "query"],
            capture_output=True,
            text=True,
        )
        if missing.returncode != 2 or "Traceback" in missing.stderr or not missing.stderr.strip():
            sys.exit(f"a command without its extra gives no clear error: {missing.stderr}")


if __name__ == "__main__":
    main()

"""Install the pinned torch, but not gigabytes of CUDA libraries where there is no GPU.

    python scripts/install_torch.py [EXTRA_INDEX_URL]

pip is asked first what it would install. If that includes CUDA libraries and this machine has no
NVIDIA GPU, nothing is installed and the way out is printed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pin is None:
        sys.exit("constraints.txt does not pin torch")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    index = ["--extra-index-url", sys.argv[1]] if sys.argv[1:] else []
    if not Path("/proc/driver/nvidia").exists():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            asked = ["--dry-run", "--ignore-installed", "--report", str(report)]
            subprocess.run([*pip, *asked, *index, pin[0]], check=True)
            planned = json.loads(report.read_text())["install"]
        names = [item["metadata"]["name"] for item in planned]
        if cuda := [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]:
            sys.exit(
                f"This would install {len(cuda)} CUDA packages (several gigabytes), and there is "
                "no NVIDIA GPU here.\nGive the address of PyTorch's index of CPU wheels (see the "
                "installation page of pytorch.org):\n    make TORCH_INDEX=ADDRESS ..."
            )
    subprocess.run([*pip, *index, pin[0]], check=True)


if __name__ == "__main__":
    main()

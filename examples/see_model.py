"""Look into a model: the rank of every matrix, what is dead, and how much rank each needs."""

import sys
from pathlib import Path

from transformers import AutoModel

from fullrank.core import DEFAULT_ENCODER, resolve_model
from fullrank.spectra import xray

page = Path(sys.argv[1] if len(sys.argv) > 1 else "xray.html")
found = xray(AutoModel.from_pretrained(resolve_model(DEFAULT_ENCODER)))
found.to_html(page)
plan = found.plan(purpose="factor")
print(f"{page}: open it in a browser")
print(f"a plan by these spectra keeps {plan.savings().kept:.0%} of the linear parameters")

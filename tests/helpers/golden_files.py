"""Files that 0.1.0 wrote, the digests that have to come out of them, and where those are exact."""

import json
import platform
from pathlib import Path

import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"
KNOWN = json.loads((GOLDEN / "digests.json").read_text())


def exact():
    """Whether the last bits can be those of the machine that wrote the files."""
    here = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return all(KNOWN["environment"][key] == value for key, value in here.items())

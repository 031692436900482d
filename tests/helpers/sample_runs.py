"""Run directories in the format that runs write, made without training: what the reporting tests read."""

import json
import math
import random
from pathlib import Path

RECIPE = '''"""Two moons: a small recipe for tests.

Run it with ``steploop run two_moons.py``.
"""

import attrs
import torch

# a comment with <angle> & "quotes"
@attrs.frozen
class Config:
    lr: float = 0.1  # learning rate
    epochs: int = 4


def objective(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
'''


def make_run(
    path: Path,
    *,
    lr: float = 0.1,
    batch_size: int = 64,
    steps: int = 240,
    every: int = 1,
    epochs: int = 4,
    skipped: tuple[int, ...] = (17, 18, 120),
    state: str = "finished",
    precision: str = "fp16",
    layers: bool = False,
    prefix: str = "",
    seed: int = 0,
    bad_loss_at: tuple[int, ...] = (),
) -> Path:
    """A finished fp16 classification run, with its losses, evaluations, skipped steps and files."""
    noise = random.Random(f"{seed} {lr} {batch_size}")
    path.mkdir(parents=True)
    (path / "recipe.py").write_text(RECIPE)
    config = {
        "steploop": "0.1.0",
        "recipe": {"path": "recipes/two_moons.py", "name": "two_moons", "sha256": "ab" * 32},
        "config": {"lr": lr, "batch_size": batch_size, "epochs": epochs, "seed": seed},
        "device": "cpu",
        "precision": precision,
        "data": "two moons, 1,000 points drawn from the seed",
        "versions": {"python": "3.11.7", "torch": "2.14.1+cpu", "steploop": "0.1.0"},
        "environment": {"torch": "2.14.1", "threads": 2},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "command": [
            "/usr/local/bin/steploop",
            "run",
            "recipes/two_moons.py",
            "--set",
            f"lr={lr}",
            "--set",
            f"batch_size={batch_size}",
        ],
        "tuning": {"threads": 2},
        "compile": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    lines, applied, scale, total, clock, best = [], 0, 65536.0, 0, 0.0, math.inf
    per_epoch = steps // epochs
    for n in range(steps):
        epoch, batch = divmod(n, per_epoch)
        clock += 0.011
        if n in skipped:
            total, scale = total + 1, scale / 2
            lines.append(
                {
                    "kind": "event",
                    "event": "skipped",
                    "step": applied,
                    "attempted": n,
                    "epoch": epoch,
                    "batch": batch,
                }
            )
        else:
            applied += 1
        decay = math.exp(-3 * lr * 10 * n / steps)
        loss = 0.25 + 1.6 * decay + noise.gauss(0, 0.06) * (0.3 + decay)
        norm = 0.4 + 2.5 * decay + abs(noise.gauss(0, 0.3))
        if n % every == 0:
            values = {
                "loss": None if n in bad_loss_at else loss,
                "learning_rate": lr * (1 + math.cos(math.pi * applied / steps)) / 2,
                "grad_norm": norm,
                "clipped_norm": min(norm, 1.0),
                "loss_scale": scale if precision == "fp16" else None,
            }
            if layers:
                values |= {"layer_norm/features": norm * 0.8, "layer_norm/head": norm * 0.3}
            lines.append(
                {"kind": "train", "step": applied, "attempted": n + 1, "epoch": epoch, "batch": batch + 1}
                | {f"{prefix}{k}": v for k, v in values.items()}
                | {
                    "skipped": total,
                    "samples_per_s": 5800 + noise.gauss(0, 200),
                    "data_wait": 0.06,
                    "time_s": clock,
                }
                | ({"nonfinite": ["loss"]} if n in bad_loss_at else {})
            )
        if batch == per_epoch - 1:
            clock += 0.3
            value = 0.27 + 1.5 * decay
            lines.append(
                {
                    "kind": "eval",
                    "step": applied,
                    "attempted": n + 1,
                    "epoch": epoch,
                    "batch": batch + 1,
                    "eval_s": 0.3,
                    "time_s": clock,
                }
                | {"metrics": {"loss": value, "accuracy": 1 - 0.5 * decay}, "best": value < best}
            )
            best = min(best, value)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"state": state, "pid": 1, "host": "elsewhere", "exit_code": 0, "step": applied, "epoch": epochs}
    status |= {
        "metrics": lines[-1].get("metrics", {}),
        "best": {"metric": "loss", "value": best, "step": applied, "epoch": epochs},
    }
    (path / "status.json").write_text(json.dumps(status))
    return path

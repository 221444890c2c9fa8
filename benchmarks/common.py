"""What the benchmarks share: results in JSON that several processes may fill, and differences with their errors."""

import datetime
import json
from pathlib import Path

import numpy as np
from filelock import FileLock

RESULTS = Path("benchmarks/results")


def read_results(path: Path, field: str) -> dict:
    """What was measured before, or nothing."""
    return json.loads(path.read_text())[field] if path.exists() else {}


def keep(path: Path, about: dict, field: str, keys: list[str], measured: dict) -> dict:
    """Add `measured` below `keys` of the JSON's `field`; several processes may share one file. Returns the field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path("build").mkdir(exist_ok=True)
    with FileLock(f"build/{path.name}.lock"):
        results = read_results(path, field)
        place = results
        for key in keys:
            place = place.setdefault(key, {})
        place.update(measured)
        whole = {**about, "date": datetime.date.today().isoformat(), field: results}
        path.with_suffix(".part").write_text(json.dumps(whole, indent=1) + "\n")
        path.with_suffix(".part").replace(path)
    return results


def standard_error(values) -> float:
    """Of the mean; 0 for a single value."""
    values = np.asarray(values, dtype=float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0

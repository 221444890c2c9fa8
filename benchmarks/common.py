"""What the benchmarks share: measurements in several processes, results in JSON that these may fill, standard errors."""

import datetime
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
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


def run_all(measure: Callable, jobs: dict[str, tuple], processes: int) -> None:
    """Call `measure(*arguments)` for every job, one by one or in several processes.

    Args:
        jobs: `{what is printed: arguments}`.

    Raises:
        RuntimeError: naming the jobs that failed, after the others were made.
    """
    start, failed = time.time(), []

    def told(what: str, number: int, error: BaseException | None) -> None:
        print(f"[{number}/{len(jobs)}, {time.time() - start:.0f} s] {what}{f': {error}' if error else ''}", flush=True)
        if error:
            failed.append(what)

    if processes == 1 or len(jobs) < 2:
        for number, (what, arguments) in enumerate(jobs.items(), start=1):
            try:
                measure(*arguments)
                told(what, number, None)
            except Exception as error:
                told(what, number, error)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(measure, *arguments): what for what, arguments in jobs.items()}
            for number, done in enumerate(as_completed(running), start=1):
                told(running[done], number, done.exception())
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} measurements failed: {'; '.join(failed[:5])}")


def standard_error(values) -> float:
    """Of the mean; 0 for a single value."""
    values = np.asarray(values, dtype=float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0

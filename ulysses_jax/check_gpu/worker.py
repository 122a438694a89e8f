"""The process that measures: rows are asked for on stdin, each is told when it is done.

A kernel that hangs or breaks the device takes this process with it, and no other row:
`__main__` starts another for what is left.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any

import jax

from ulysses_jax.check_gpu.errors import error_rows, spot_rows
from ulysses_jax.check_gpu.problems import kernels
from ulysses_jax.check_gpu.rows import QUICK, Row, Sizes, Skip
from ulysses_jax.check_gpu.steps import step_rows
from ulysses_jax.check_gpu.timings import rate_rows, timing_rows
from ulysses_jax.mesh import Device

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "flax",
    "optax",
    "tokamax",
)
# With this code it asks for another process to go on.
RESTART = 75
Say = Callable[[dict[str, Any]], None]


def rows_of(device: Device, sizes: Sizes) -> list[Row]:
    """Every row, in the order in which they are measured."""
    beside = kernels(device)
    return [
        *error_rows(device, beside, sizes),
        *spot_rows(device, beside, sizes),
        *rate_rows(sizes),
        *timing_rows(device, beside, sizes),
        *step_rows(sizes),
    ]


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "card": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "driver": _driver() if device.platform == "gpu" else None,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    return said[0] if said else None


def run(rows: Sequence[Row], request: dict[str, Any], say: Say) -> bool:
    """Measures the rows that are asked for; says each that begins and each that ends.

    Returns:
      Whether a process of its own must go on with what is left.
    """
    done = set(request["done"])
    waiting = [
        i
        for i, row in enumerate(rows)
        if row.table in request["tables"] and i not in done
    ]
    for i in waiting:
        if rows[i].lacks is not None:
            say({"row": i, "status": "skipped", "why": rows[i].lacks})
    waiting = [i for i in waiting if rows[i].lacks is None]
    ran = False
    for table, group in groupby(waiting, key=lambda i: rows[i].table):
        if table == "steps" and ran:
            return True  # the high-water mark is the process's
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            prepared = [(i, pool.submit(rows[i].prepare)) for i in group]
            for i, future in prepared:
                if table == "timings":  # nothing is compiled beside what is timed
                    future.exception()
                    say({"compiled": i})
            for i, future in prepared:
                if time.time() > request["until"][table]:
                    pool.shutdown(wait=False, cancel_futures=True)
                    why = f"no time was left of --minutes {request['minutes']:g}"
                    say({"row": i, "status": "skipped", "why": why})
                    continue
                say({"begin": i})
                result, is_broken = _measured(rows[i], future)
                say({"row": i, **result})
                if is_broken or table == "steps":
                    pool.shutdown(wait=False, cancel_futures=True)
                    return True
                ran = True
    return False


def _measured(row: Row, prepared: Future) -> tuple[dict[str, Any], bool]:
    """The columns of a row, and whether what failed may have broken the device."""
    try:
        program = prepared.result()
        return {"status": "ok"} | row.measure(program), False
    except Skip as skip:
        return {"status": "skipped", "why": str(skip)}, False
    except Exception as error:  # whatever a kernel does wrong is its row's
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
        is_broken = isinstance(error, jax.errors.JaxRuntimeError)
        return {
            "status": "FAIL",
            "why": why,
        }, is_broken and prepared.exception() is None


def main() -> None:
    # What libraries print goes to stderr, and leaves the messages whole.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    request = json.load(sys.stdin)
    here = machine()
    is_quick = request["quick"] or here["platform"] == "cpu"
    device = Device(here["platform"], here["card"])
    rows = rows_of(device, QUICK if is_quick else Sizes())
    names = [{"table": row.table, **row.name} for row in rows]
    say({"machine": here, "quick": is_quick, "rows": names})
    code = RESTART if run(rows, request, say) else 0
    os._exit(code)  # a broken device, or a program being compiled, is not waited for


if __name__ == "__main__":
    main()

"""One step in a process of its own: `python -m bench.gpu.step STEP OUT SETTING`, started by the runner."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.gpu.journal import CANNOT, CannotRun, rows_file, said
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import reason_of
from bench.tables.results import Results, environment


def main(step: Step, out: Path, setting: Setting) -> int:
    """Measures a step's rows into its file; what it said last on stderr is why it failed."""
    try:
        results = Results(rows_file(out, step.name), environment(step.name, vars(setting)))
        work(step, setting, results)
    except CannotRun as error:
        print(said(str(error)), file=sys.stderr, flush=True)
        return CANNOT
    except Exception as error:
        traceback.print_exc()
        print(said(reason_of(error)), file=sys.stderr, flush=True)
        return 1
    if failed := [row for row in results.rows if row.get("failed")]:
        print(said(f"{len(failed)} of {len(results.rows)} rows: {failed[0]['failed']}"), file=sys.stderr, flush=True)
        return 1
    return 0


def work(step: Step, setting: Setting, results: Results) -> None:
    """Measures what the results lack."""
    import torch

    from bench.tables.options import usable

    usable(setting.device)
    with torch.no_grad():
        module: Any = import_module(step.module)
        module.measure(step, setting, results)


def _end_with_the_runner() -> None:
    """The runner holds the other end of stdin; when it is gone, whatever ended it, so is this step."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the process ends
        pass
    if os.getpgid(0) == os.getpid():  # with compilers and workers that the step started
        os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    sys.exit(main(Step(**json.loads(sys.argv[1])), Path(sys.argv[2]), Setting(**json.loads(sys.argv[3]))))

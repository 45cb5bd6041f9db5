"""What this machine has for rs_compile, and what will be slow on it and why."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants
from tabulate import tabulate
from torch.nn.attention import SDPBackend

from rs_compile import hub
from rs_compile.errors import first_line
from rs_compile.schedule_json import our_version
from rs_compile.timing import Say, quiet

PACKAGES = ("torch", "timm", "safetensors", "numpy", "triton", "torchvision")
EXTRAS = {  # a package that tells whether the extra is there
    "visualize": "matplotlib",
    "export": "openvino",
    "executorch": "executorch",
    "embed": "pyarrow",
    "ray": "ray",
    "bench": "open_clip_torch",
}
LEAST_FREE = 2 * 2**30  # bytes for compiled kernels
SLOW_COMPILE = 60.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and advice where something is slow or missing ("" else)."""

    what: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings: `str()` to read, `to_json()` to keep."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        table = tabulate([[f.what, f.found] for f in self.findings], tablefmt="plain", disable_numparse=True)
        advised = [f for f in self.findings if f.advice]
        if not advised:
            return f"{table}\n\nnothing is missing, and nothing known to be slow"
        return "\n".join([table, "", "what is missing, or slow here:", *(f"- {f.what}: {f.advice}" for f in advised)])

    def to_json(self) -> str:
        """A list of findings."""
        return json.dumps({"findings": [asdict(f) for f in self.findings]}, indent=2)


def look(say: Say = quiet) -> Diagnosis:
    """Looks at versions, devices, the compiler (by compiling a line), the cache, attention and the hub."""
    looks: tuple[Callable[[], list[Finding]], ...] = (_versions, _processor, _gpus, _attention, _cache, _compiler, _hub)
    findings = []
    for each in looks:
        say(f"looking at {each.__name__.strip('_')}")
        findings += each()
    return Diagnosis(tuple(findings))


def _versions() -> list[Finding]:
    here = {name: found for name in PACKAGES if (found := _version(name))}
    extras = [name for name, package in EXTRAS.items() if _version(package)]
    return [
        Finding("rs_compile", f"{our_version()}, {Path(__file__).parent}"),
        Finding("Python", f"{platform.python_version()}, {sys.executable}"),
        Finding("packages", ", ".join(f"{name} {found}" for name, found in here.items())),
        Finding("extras", ", ".join(extras) or "none"),
    ]


def _processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    slow = []
    if threads < cores // 2:
        slow.append(f"torch uses {threads} of {cores} cores; unset OMP_NUM_THREADS, or pass --threads")
    if load > cores:
        slow.append(f"other programs run ({load:.1f} processes on {cores} cores), so times are noisy")
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
    matrix = torch.cpu._is_amx_tile_supported()
    about = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores, torch uses {threads}"
    kind = "by matrix units (AMX)" if matrix else "in hardware" if half else "emulated"
    slower = "" if half else "there are no instructions for it here: --dtype float32 is faster"
    return [Finding("processor", about, "; ".join(slow)), Finding("bfloat16 on it", kind, slower)]


def _gpus() -> list[Finding]:
    count = torch.cuda.device_count()
    names = [f"{torch.cuda.get_device_name(i)} (cuda:{i})" for i in range(count)]
    advice = ""
    if not count and shutil.which("nvidia-smi"):
        built = torch.version.cuda
        advice = (
            f"torch, built for CUDA {built}, cannot use the driver here; see nvidia-smi"
            if built
            else "there is an NVIDIA driver, but torch is a build for CPUs; install another from pytorch.org"
        )
    return [Finding("GPUs", ", ".join(names) or "none", advice)]


def _attention() -> list[Finding]:
    cases = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        cases += [("cuda", torch.float16), ("cuda", torch.float32)]
    findings = []
    for device, dtype in cases:
        q = torch.zeros(1, 2, 64, 32, device=device, dtype=dtype)
        flash = torch._fused_sdp_choice(q, q, q) == SDPBackend.FLASH_ATTENTION.value
        name = str(dtype).removeprefix("torch.")
        usual = device == "cuda" and dtype == torch.float32  # the kernel is for half precision
        advice = "" if flash or usual else "torch takes another kernel here, so fewer tokens save less than they could"
        found = "flash" if flash else "another kernel; flash is for half precision" if usual else "another kernel"
        findings.append(Finding(f"attention, {device}, {name}", found, advice))
    return findings


def _cache() -> list[Finding]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    chosen = "TORCHINDUCTOR_CACHE_DIR" in os.environ  # asked before `cache_dir`, which sets it
    folder = Path(cache_dir())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(folder).free
    advice = []
    if not os.access(folder, os.W_OK):
        advice.append("it cannot be written; set TORCHINDUCTOR_CACHE_DIR to a folder that can")
    elif free < LEAST_FREE:
        advice.append(f"only {free / 2**30:.1f} GB are free; compiled kernels need a few")
    if not chosen and folder.is_relative_to("/tmp"):
        advice.append("it is lost when /tmp is emptied, and all is compiled again; set TORCHINDUCTOR_CACHE_DIR")
    return [
        Finding("compiled kernels", f"{folder}, {size / 2**20:.0f} MB, {free / 2**30:.0f} GB free", "; ".join(advice))
    ]


def _compiler() -> list[Finding]:
    from torch._inductor.cpp_builder import get_cpp_compiler

    missing = "install a C++ compiler (Debian, Ubuntu: apt-get install g++); till then --backend eager, which is slower"
    try:
        name = get_cpp_compiler()
        said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    except Exception as error:  # whatever the compiler or the look for one raises
        return [Finding("C++ compiler", f"none: {first_line(error)}", missing)]
    findings = [Finding("C++ compiler", f"{name}: {said.strip().splitlines()[0] if said.strip() else 'no version'}")]
    started = time.perf_counter()
    try:
        new = time.time_ns()  # code that no cache has
        torch.compile(lambda x: (x * 2).sin() + new)(torch.zeros(64))
    except Exception as error:  # Inductor's errors and those of what it runs
        advice = (
            f"it cannot compile, {first_line(error)}; a compiler's headers, or Python's (python3-dev), may be missing"
        )
        return [*findings, Finding("torch.compile", "fails", advice)]
    seconds = time.perf_counter() - started
    slow = f"a line took {seconds:.0f} s; a model has hundreds, expect minutes" if seconds > SLOW_COMPILE else ""
    return [*findings, Finding("torch.compile", f"works; one line took {seconds:.1f} s", slow)]


def _hub() -> list[Finding]:
    kept = Path(constants.HF_HUB_CACHE)
    there = sorted(p.name.removeprefix("models--") for p in kept.glob("models--*")) if kept.is_dir() else []
    found = "answers" if hub.reachable() else "does not answer"
    advice = (
        "" if found == "answers" else "--pretrained finds weights of the cache alone; --checkpoint FILE takes any file"
    )
    return [Finding("hub of weights", f"{constants.ENDPOINT} {found}; {len(there)} models in {kept}", advice)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

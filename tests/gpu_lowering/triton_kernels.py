"""The Triton kernels in Inductor's code: their sources, and compiling them with no GPU."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import torch._inductor.config as inductor_config

from bench.gpu.lowering import Capability, Generated, fake_gpu


class Binary(NamedTuple):
    """A compiled kernel: bytes of machine code, of shared memory, and the architecture."""

    name: str
    code: int
    shared: int
    target: str


def sources(generated: Generated) -> dict[str, str]:
    """The source of each Triton kernel by its name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", generated.code, re.DOTALL))


def nameless(name: str, source: str) -> str:
    """A kernel's source whatever it is called: graphs number theirs."""
    return source.replace(name, "kernel")


def compiled(generated: Generated, capability: Capability, known: Container[str] = ()) -> Iterator[Binary]:
    """Compiles every kernel, in each configuration that Inductor would try.

    Args:
        known: kernels, as `nameless` has them, that need no compiling any more.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        fake_gpu(capability),
        # the static launcher would throw the assembly away
        inductor_config.patch(use_static_triton_launcher=False),
    ):
        for name, source in sources(generated).items():
            if nameless(name, source) in known:
                continue
            path = Path(folder, f"{name}.py")
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kernel = getattr(module, name)
            kernel.precompile(warm_cache_only=True)
            for result in kernel.compile_results:
                assembly, shared = result.kernel.asm, result.kernel.metadata.shared
                target = re.search(r"\.target (\S+)", assembly["ptx"])
                assert target is not None
                yield Binary(name, len(assembly["cubin"]), shared, target.group(1))

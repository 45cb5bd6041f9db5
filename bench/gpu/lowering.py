"""The CUDA code that Inductor generates for a rewritten graph, on a machine without a GPU.

A model is captured on fake CUDA tensors, so that every decision falls as it does on CUDA. Inductor then lowers the
graph for a GPU that only answers questions about itself; nothing is executed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config as aot_config
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
from torch import nn
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import get_code
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from passes.device.name_flash import NameFlash
from rs_compile import Schedule, optimize
from rs_compile.inductor import inductor_options
from rs_compile.planning import plans

CPU = torch.device("cpu")
Capability = tuple[int, int]
AMPERE, HOPPER = (8, 0), (9, 0)
# streaming multiprocessors, shared memory a block, memory: A100 and H100
_GPUS = {AMPERE: (108, 166912, 80 << 30), HOPPER: (132, 232448, 80 << 30)}


@dataclass(frozen=True)
class Generated:
    """Inductor's code for one graph, and whether it would record it as a CUDA graph."""

    code: str
    records_cuda_graph: bool

    @property
    def body(self) -> str:
        """The function that launches the kernels."""
        return self.code[self.code.index("def call(") :]

    @property
    def launches(self) -> list[str]:
        """Triton kernels, library calls and aten ops, in order; views and allocations are none."""
        found = r"(triton_\w+(?=\.run\()|extern_kernels\.\w+(?=\()|(?:torch\.ops\.)?\baten\.[a-z_][\w.]*(?=\())"
        return re.findall(found, self.body)


def on_cuda(
    model: nn.Module,
    args: Any,
    dtype: torch.dtype,
    schedule: Schedule,
    kwargs: Mapping[str, Any] | None = None,
    drop_unread: bool = False,
) -> GraphModule:
    """The rewritten graph of a model on fake CUDA tensors; without a site flash is named all the same.

    Args:
        model: is moved there, and can then be used for nothing else.
        args, kwargs: of the call that it is captured for, see `plan`; only their shapes and dtypes are read.
        dtype: of what is floating-point in model and inputs.
        drop_unread: see `optimize`; off, so that a block is like the others.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to("cuda", dtype)
        given = pytree.tree_map_only(torch.Tensor, lambda t: _moved(mode.from_tensor(t), dtype), (args, kwargs))
    handle = optimize(model, schedule, backend="eager", drop_unread=drop_unread)
    next(plans([handle], *given))
    return NameFlash()(handle.graph_module()).gm


def generate(gm: GraphModule, batch: int, capability: Capability = HOPPER, **options: Any) -> Generated:
    """What `optimize(mode="reduce-overhead")` has Inductor generate for a graph and a batch of that size."""
    mode = FakeTensorMode()
    with mode:
        for module in gm.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                table.update({name: _like(t) for name, t in table.items() if t is not None})
        inputs = [_sized(node, batch) for node in gm.graph.find_nodes(op="placeholder")]
    recorded: list[Callable[..., Any]] = []

    def record(run: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        recorded.append(run)
        return run

    settings = {
        **inductor_options(gm, "reduce-overhead"),
        "force_disable_caches": True,
        "compile_threads": 1,  # others would compile kernels that nothing runs
        "shape_padding": False,  # it times matrix products
        "graph_partition": False,  # else what no CUDA graph can hold is cut out in silence
        **options,
    }
    # fmt: off
    with mode, fake_gpu(capability), torch.no_grad(), inductor_config.patch(settings), \
            aot_config.patch(enable_autograd_cache=False), patch.object(compile_fx, "cudagraphify", record):
        code, *_ = get_code(lambda: compile_fx.compile_fx(gm, inputs))
    # fmt: on
    return Generated(code, bool(recorded))


@contextlib.contextmanager
def fake_gpu(capability: Capability) -> Iterator[None]:
    """torch and Triton see a GPU of this capability, on which nothing can run."""
    count, shared, memory = _GPUS[capability]
    properties = SimpleNamespace(
        name="fake",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=count,
        warp_size=32,
        gcnArchName="",
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=memory,
        shared_memory_per_block_optin=shared,
        L2_cache_size=40 << 20,
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_properties": lambda _=None: properties,
        "get_device_capability": lambda _=None: capability,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "synchronize": lambda _=None: None,
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        get_current_device=lambda: 0,
    )
    folder = joint_graph.UniformValueConstantFolder
    with contextlib.ExitStack() as stack:
        _forget()
        stack.callback(_forget)
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
            if name in vars(device_interface.CudaInterface):
                stack.enter_context(patch.object(device_interface.CudaInterface, name, staticmethod(answer)))
        stack.enter_context(patch.object(driver, "_active", target))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(patch.object(folder, "_deduce_value", _on_cpu(folder._deduce_value)))
        # patterns are traced on real tensors; a later compile on CPU finds them made
        stack.enter_context(patch.object(joint_graph, "lazy_init", lambda _, make=joint_graph.lazy_init: make(CPU)))
        yield


def _forget() -> None:
    """Drops what torch remembers of the GPU that it asked last, or of there being none."""
    DeviceProperties.create.cache_clear()
    for module in (torch.utils._triton, torch._inductor.utils):
        for function in vars(module).values():
            getattr(function, "cache_clear", lambda: None)()


def _on_cpu(deduce: Callable[..., Any]) -> Callable[..., Any]:
    """Constant folding makes real tensors: on the CPU, not on the GPU that is not there."""

    def wrapped(self: Any, node: Node, *rest: Any) -> Any:
        given = node.kwargs
        node.kwargs = {**given, "device": CPU} if given.get("device") else given
        try:
            return deduce(self, node, *rest)
        finally:
            node.kwargs = given

    return wrapped


def _moved(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to("cuda", dtype if tensor.is_floating_point() else tensor.dtype)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """The same metadata in the fake mode that is on."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _sized(node: Node, batch: int) -> torch.Tensor:
    val = node.meta["val"]
    return torch.empty(batch, *val.shape[1:], dtype=val.dtype, device=val.device)

"""The graph that torch.compile is given: one module, the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.capture.capture import capture
from rs_compile.inductor import flattened


class Names(nn.Module):
    """Parameters whose flat names would be one, and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b__c = nn.Parameter(torch.full((3,), 2.0))
        self.a__b = nn.Module()
        self.a__b.c = nn.Parameter(torch.full((3,), 5.0))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a.b__c + self.a__b.c * self.shift + self.a.b__c


def test_every_parameter_stays_itself_under_one_module() -> None:
    model = Names().eval()
    gm = capture(model, (torch.randn(4, 3),), {})
    flat = flattened(gm)
    x = torch.randn(5, 3)
    assert torch.equal(flat(x)[0], gm(x)[0])
    assert not list(flat.children())
    assert {id(p) for p in flat.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        model.a.b__c.fill_(7.0)  # what is trained is what runs
    assert torch.equal(flat(x)[0], model(x))


def test_the_graph_that_was_given_is_left_alone() -> None:
    gm = capture(Names().eval(), (torch.randn(4, 3),), {})
    before = gm.code
    flattened(gm)
    assert gm.code == before and hasattr(gm, "a")

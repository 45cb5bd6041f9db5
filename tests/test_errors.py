"""Bad input: a named error that says what to do, and the model unchanged."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rs_compile


class Block(nn.Module):
    """A token-mixing mean and an MLP, each behind a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.softmax(1).mean(1, keepdim=True)
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    """A class token and ten tokens, two blocks, the class token read."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return self.blocks(x)[:, 0]


def call(model: nn.Module, keep: dict[int, float], x: Tensor | None = None, **options: Any) -> Tensor:
    x = torch.randn(2, 10, 8) if x is None else x
    out: Tensor = rs_compile.optimize(model, keep, backend="eager", **options)(x)
    return out


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(rs_compile.CompileError, match="names block 2, but the model has 2 blocks, 0 to 1"):
        call(Tiny(), {2: 0.5})


def test_fewer_tokens_than_protected() -> None:
    with pytest.raises(rs_compile.CompileError, match="2 of 11 tokens would be left, fewer than the 3 protected"):
        rs_compile.optimize(Tiny(), rs_compile.Schedule({0: 0.15}, protected=(3, 4)), backend="eager")(
            torch.randn(2, 10, 8)
        )


def test_only_protected_tokens_may_be_left() -> None:
    fast = rs_compile.optimize(Tiny(), rs_compile.Schedule({0: 0.25}, protected=(3, 4)), backend="eager")
    fast(torch.randn(2, 10, 8))
    assert [row.tokens_out for row in fast.report().blocks] == [3, 3]


def test_a_protected_token_that_is_not_there() -> None:
    schedule = rs_compile.Schedule({0: 0.5}, protected=(11,))
    with pytest.raises(rs_compile.CompileError, match="protected token 11 does not exist: there are 11 tokens"):
        rs_compile.optimize(Tiny(), schedule, backend="eager")(torch.randn(2, 10, 8))


def test_a_model_without_residual_mlp_names_what_is_nearest() -> None:
    class Convolutional(nn.Module):
        def __init__(self, kind: type[nn.Conv2d | nn.Conv3d] = nn.Conv2d) -> None:
            super().__init__()
            self.conv = kind(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x).relu()

    with pytest.raises(rs_compile.Refusal, match=r"no residual MLP branch.*nearest to one comes this conv branch") as e:
        call(Convolutional(), {0: 0.5}, torch.randn(2, 3, 8, 8))
    assert "test_errors.py" in str(e.value)
    with pytest.raises(
        rs_compile.Refusal, match=r"over 3 dimensions: only \[batch, channels, rows, columns\] can lose"
    ):
        call(Convolutional(nn.Conv3d), {0: 0.5}, torch.randn(2, 3, 4, 8, 8))
    with pytest.raises(
        rs_compile.Refusal,
        match="the model has no residual branch: nothing up to this last layer is x",
    ):
        call(nn.Linear(8, 8), {0: 0.5})


def test_a_model_that_export_cannot_capture() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(rs_compile.CaptureError, match=r"torch\.export cannot capture Branching") as e:
        call(Branching(), {0: 0.5})
    assert "test_errors.py" in str(e.value) and "way out" in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


@pytest.mark.parametrize("wrong", [1, "a picture", None])
def test_no_tensor(wrong: object) -> None:
    with pytest.raises(rs_compile.InputError, match=f"Tiny was called with {type(wrong).__name__}; pass tensors"):
        rs_compile.optimize(Tiny(), {0: 0.5}, backend="eager")(wrong)


def test_wrong_arguments() -> None:
    name: Any = "deit"
    outputs: Any = "short"
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not str"):
        rs_compile.optimize(name, {0: 0.5})
    with pytest.raises(TypeError, match="optimized already"):
        rs_compile.optimize(rs_compile.optimize(Tiny(), {0: 0.5}), {0: 0.5})
    with pytest.raises(ValueError, match='write "restore" or "compact"'):
        rs_compile.optimize(Tiny(), {0: 0.5}, token_outputs=outputs)
    with pytest.raises(rs_compile.ScheduleError, match="above 0 and at most 1"):
        rs_compile.optimize(Tiny(), {0: 1.5})
    with pytest.raises(rs_compile.CompileError, match="call the model once"):
        rs_compile.optimize(Tiny(), {0: 0.5}).report()


def test_a_refusal_leaves_the_handle_usable_and_the_model_unchanged() -> None:
    model = Tiny()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = rs_compile.optimize(model, {0: 0.5, 5: 0.5}, backend="eager")
    for _ in range(2):
        with pytest.raises(rs_compile.CompileError, match="names block 5"):
            fast(torch.randn(2, 10, 8))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert call(model, {0: 0.5}).shape == (2, 8)


def test_a_fixed_batch_is_captured_for_each_size() -> None:
    class Unrolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[i] * (i + 1) for i in range(x.shape[0])])

    model = Unrolled()
    fast = rs_compile.optimize(model, {}, backend="eager")
    for batch in (1, 3, 2, 1):
        x = torch.randn(batch, 4)
        assert torch.equal(fast(x), model(x)), batch


def test_another_package_named_passes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import rs_compile"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "another package named 'passes' shadows rs_compile's own" in done.stderr
    assert str(tmp_path) in done.stderr

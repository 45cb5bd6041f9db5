"""Every help text, by running it; and that a help text waits for no import of torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import get_args

import pytest

import bench.evaluate.__main__ as evaluate
from bench.__main__ import COMMANDS, summary
from bench.__main__ import main as bench
from passes.sites.score import Metric, Operation
from rs_compile import arguments, cli
from rs_compile.parser import parser

Main = Callable[[Sequence[str]], int]

RS_COMPILE = {
    "demo": "What leaving tokens out costs and gains",
    "compare": "How far a pruned timm model's outputs are from the dense one's",
    "doctor": "What this machine has for rs_compile",
    "explain": "Where tokens could leave a timm model",
    "bench": "Time a pruned timm model",
    "run": "Classify images with a timm model",
    "export": "Write a pruned timm model into a file",
    "info": "What a file of export says of itself",
    "search": "Find the schedule that fits a target",
    "embed": "Write features of all pictures of a folder into Parquet files",
    "visualize": "from its lowest score to one that 2% reach.",
}
EVALUATE = {"images": "Top-1 and top-5", "retrieval": "R@1/5/10 of a dual encoder", "vqa": "Accuracy of UMT's answers"}


def shown(main: Main, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a help text says, with its lines joined; nothing that argparse or Python would have filled is left in it."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert not any(rest in text for rest in ("%%", "%(", "{'", "None", "<function", "<class", "0x"))
    return text.replace("- ", "-")  # argparse breaks lines at hyphens


def known(text: str) -> str:
    return text.replace("- ", "-")


@pytest.mark.parametrize("command", RS_COMPILE)
def test_rs_compile(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert RS_COMPILE[command] in shown(cli.main, capsys, "--help")
    text = shown(cli.main, capsys, command, "--help")
    assert RS_COMPILE[command] in text and "--json" in text and "--debug" in text


@pytest.mark.parametrize("command", RS_COMPILE)
def test_two_examples_that_can_be_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 2
    for example in examples:
        name, *argv = shlex.split(example)
        assert name == "rs-compile" and parser().parse_args(argv).command == command


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(cli.main, capsys, "--help")
    assert f"{cli.FAULT} a fault" in text and f"{cli.MENDABLE} something that you can mend" in text
    assert f"{cli.INTERRUPTED} interrupted" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_bench(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = known(" ".join(summary(COMMANDS[command]).split()))
    assert len(first) > 20 and first in shown(bench, capsys, "--help")
    text = shown(bench, capsys, command, "--help")
    assert first in text and ("--out" if command in ("gpu", "graphs") else "--json") in text


@pytest.mark.parametrize("command", EVALUATE)
def test_evaluate(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert EVALUATE[command] in shown(evaluate.main, capsys, "--help")
    assert EVALUATE[command] in shown(evaluate.main, capsys, command, "--help")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(cli.main, capsys, "--version") == f"rs-compile {version('rs-compile')}"


@pytest.mark.parametrize(
    "module, argv",
    [("rs_compile.cli", ["--help"]), ("rs_compile.cli", ["--version"]), ("bench.__main__", ["--help"])]
    + [("rs_compile.cli", [command, "--help"]) for command in RS_COMPILE],
)
def test_torch_is_not_imported(module: str, argv: list[str]) -> None:
    code = f"""
import sys
from {module} import main
try:
    main({argv!r})
finally:
    print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_choices_are_those_of_the_scores() -> None:
    assert get_args(Operation) == arguments.LAYERS_OF_SHIFT and get_args(Metric) == arguments.METRICS

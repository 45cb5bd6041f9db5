"""Tokens leave after one block at a time: accuracy by method and block, for table 8 and figures 3 and 5."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.tables.measure import fill, identity, measurable, results_of
from bench.tables.methods import BASE, Method, dense
from bench.tables.options import Setting, add_arguments
from bench.tables.results import Results, Row
from bench.tables.subjects import Subject, deit, digits, umt_encoder
from rs_compile import Schedule, Score

COLUMNS = ("gflops", "accuracy")
QUICK_BLOCKS = 2

Curves = Mapping[str, Score]  # by method


@dataclass(frozen=True)
class Study:
    """A model, some of whose tokens leave after one block.

    Args:
        subject: the model.
        tokens: in it.
        leave: how many of them leave.
        blocks: after which of its blocks, 0-based, one at a time.
    """

    subject: Subject
    tokens: int
    leave: int
    blocks: Sequence[int]

    def method(self, name: str, block: int, score: Score) -> Method:
        """The method of a curve at a block."""
        # halfway between the ratios at which one token more, or one less, would leave
        keep = {block: 1 - (self.leave + 0.5) / self.tokens}
        return Method(name, Schedule(keep, score=score), at={"block": block})


@dataclass(frozen=True)
class Measured:
    """What a study gave: the row of the dense model, and by method and block the others."""

    study: Study
    base: Row
    rows: Mapping[str, Mapping[int, Row]]

    def everything(self) -> list[Row]:
        """All rows."""
        return [self.base, *(row for of_block in self.rows.values() for row in of_block.values())]


def deit_s(leave: int, blocks: Sequence[int]) -> Study:
    """DeiT-S: 196 patches and a class token."""
    return Study(deit("DeiT-S", (), 1, {}, quick=False), 197, leave, blocks)


def umt_b(leave: int, blocks: Sequence[int]) -> Study:
    """UMT-B on 12 frames: 2352 patches."""
    return Study(umt_encoder("UMT-B", (), 1, {}, quick=False, qa=False), 2352, leave, blocks)


def digits_vit(leave: int, blocks: Sequence[int] = (0, 1, 2, 3, 4)) -> Study:
    """The digits ViT: 100 patches and a class token; after the last block nothing depends on the patches.

    It bears more than the others: with 50 patches left any choice does.
    """
    return Study(digits((), 1), 101, leave, blocks)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of these commands, but for those of the data."""
    add_arguments(parser, COLUMNS)
    parser.add_argument("--blocks", type=_blocks, metavar="N,...", help="counted from 0; the paper's if not given")


def measure(args: argparse.Namespace, study: Study, curves: Curves, setting: Setting, results: Results) -> Measured:
    """Measures the dense model, and every curve at every block.

    Args:
        args: of `add_shared`.
        study: --blocks goes before its blocks; with --quick there are two at most.
        curves: what is pruned how.
        setting, results: as `fill` wants them.
    """
    blocks = (args.blocks or study.blocks)[: QUICK_BLOCKS if args.quick else None]
    methods = {(name, block): study.method(name, block, of) for name, of in curves.items() for block in blocks}
    base = dense(BASE)
    fill(results, study.subject, [base, *methods.values()], setting.columns, setting, args)
    rows: dict[str, dict[int, Row]] = {}
    for (name, block), method in methods.items():
        rows.setdefault(name, {})[block] = results.row(identity(study.subject, method))
    return Measured(study, results.row(identity(study.subject, base)), rows)


def with_data(studies: Sequence[Study], args: argparse.Namespace) -> list[Study]:
    """The studies whose accuracy can be measured: the digits' where no data is given."""
    return [study for study in studies if "accuracy" in measurable(study.subject, args)]


def open_results(args: argparse.Namespace) -> tuple[Setting, Results]:
    """How to measure, and what was measured before."""
    setting = Setting.of(args)
    return setting, results_of(args, setting)


def gflops_line(measured: Measured) -> list[str]:
    """GFLOPs after each block, which are the same whatever chose the tokens."""
    first = next(iter(measured.rows.values()))
    return [f"{row['gflops']:.3f}" for row in first.values()]


def _blocks(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of blocks; write numbers from 0 on, 0,2,4")
    return sorted({int(part) for part in text.split(",")})

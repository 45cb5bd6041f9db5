"""The commands of `rs-compile` and what they take, for argparse.

Torch is not imported: a help text must not wait for it.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from rs_compile.arguments import (
    DTYPES,
    ENGINES,
    EXPORTS,
    FEATURES,
    FLOATS,
    LAYERS,
    LAYERS_OF_SHIFT,
    METRICS,
    add_backend,
    add_html,
    add_json,
    add_model_options,
    add_schedule,
    count,
    positive,
)

BATCHES = (1, 4, 16, 64)
EXIT_CODES = """exit codes:
  0    done
  1    a fault of rs-compile, or of a library below it: please report it with what --debug shows
  2    something that you can mend; the message says how
  130  interrupted"""


class _KeepsLines(argparse.HelpFormatter):
    """Fills paragraphs, and leaves examples and lists, which begin with a line that ends in a colon, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        first = text.partition("\n")[0]
        return text if first.endswith(":") else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """An error is one line, and says where the rest is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says what it takes\n")


def _version() -> str:
    try:
        return version("rs-compile")
    except PackageNotFoundError:
        return "of a checkout that is not installed"


def parser() -> argparse.ArgumentParser:
    """Of all commands. Each has `--json` and `--debug`, and a help with two examples."""
    top = _Parser(
        prog="rs-compile",
        description="Faster pretrained vision models, without training.",
        epilog=f"{EXIT_CODES}",
        formatter_class=_KeepsLines,
    )
    top.add_argument("--version", action="version", version=f"rs-compile {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *examples: str) -> argparse.ArgumentParser:
        listed = "".join(f"\n  rs-compile {name} {example}".rstrip() for example in examples)
        # argparse fills % in a help, and not in a description
        sub = commands.add_parser(
            name,
            help=text.replace("%", "%%"),
            description=text,
            epilog=f"examples:{listed}",
            formatter_class=_KeepsLines,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    text = "What leaving tokens out costs and gains: accuracy and speed on digits on photographs, without a download."
    sub = add("demo", text, "", "--html demo.html --json demo.json")
    add_backend(sub, "inductor")
    sub.add_argument("--quick", action="store_true", help="one budget, few pictures and rounds")
    sub.add_argument("--html", type=Path, metavar="FILE", help="the table and three pictures as a page, too")
    sub.add_argument("--picture", type=Path, metavar="FILE.png", help="the three pictures: scores, and what is left")
    add_json(sub)

    sub = add(
        "explain",
        "Where tokens could leave a timm model, and where not and why.",
        "deit_small_patch16_224",
        "vit_base_patch16_clip_224 --json explain.json",
    )
    _add_model(sub)
    add_model_options(sub)
    sub.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON instead of the table; with FILE, beside it"
    )

    sub = add(
        "bench",
        "Time a pruned timm model against torch.compile(model), interleaved.",
        "deit_small_patch16_224 --batch-size 16",
        "resnet50 --schedule schedule.json --batch-size 1 16 --json bench.json",
    )
    sub.add_argument("model", metavar="MODEL", help="timm's name for it; its weights do not matter here")
    add_model_options(sub)
    add_schedule(sub)
    sub.add_argument(
        "--batch-size", type=positive, nargs="+", metavar="N", default=BATCHES, help="one or more (default 1 4 16 64)"
    )
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    _add_machine(sub)
    sub.add_argument("--rounds", type=positive, default=15, help="of all variants, interleaved")
    add_html(sub)
    add_backend(sub, "inductor")
    add_json(sub)

    sub = add(
        "compare",
        "How far a pruned timm model's outputs are from the dense one's on your pictures, and the speed of both.",
        "deit_small_patch16_224 --images DIR --pretrained",
        "vit_small_patch14_dinov2 --images DIR --checkpoint FILE --schedule schedule.json --json -",
    )
    _add_model(sub)
    sub.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, more say more")
    _add_weights(sub, required=True)
    add_model_options(sub)
    add_schedule(sub)
    sub.add_argument("--limit", type=positive, default=16, help="pictures, all in one call (default 16)")
    _add_machine(sub)
    sub.add_argument("--rounds", type=positive, default=7, help="of timing, both sides in each (default 7)")
    add_html(sub)
    add_backend(sub, "inductor")
    add_json(sub)

    sub = add(
        "run",
        "Classify images with a timm model, dense and pruned side by side.",
        "photo.jpg --model deit_small_patch16_224 --pretrained",
        "*.jpg --model deit_small_patch16_224 --checkpoint FILE --schedule 0:0.7,4:0.7 --json -",
    )
    _add_images(sub)
    add_model_options(sub)
    add_schedule(sub)
    add_backend(sub, "eager")
    add_json(sub)

    sub = add(
        "export",
        "Write a pruned timm model into a file for another runtime.",
        "deit_small_patch16_224 --pretrained -o deit.onnx",
        "deit_small_patch16_224 --checkpoint FILE --schedule schedule.json -o deit.xml --half-weights",
    )
    _add_model(sub)
    _add_weights(sub, required=False)
    add_model_options(sub)
    add_schedule(sub)
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".pt2 (torch.export), .onnx, .xml (OpenVINO) or .pte (ExecuTorch)",
    )
    sub.add_argument("--format", choices=EXPORTS, help="aot-inductor compiles the .pt2; the file's ending if not given")
    sub.add_argument("--half-weights", action="store_true", help="weights as float16 (OpenVINO)")
    add_json(sub)

    sub = add(
        "info",
        "What a file of export says of itself: schedule, model, report, versions.",
        "deit.onnx",
        "deit.xml --json -",
    )
    sub.add_argument("file", metavar="FILE", type=Path)
    add_json(sub)

    sub = add(
        "search",
        "Find the schedule that fits a target on a folder of pictures, without labels.",
        "deit_small_patch16_224 --images DIR --pretrained --speedup 1.5 -o schedule.json",
        "vit_small_patch14_dinov2 --images DIR --checkpoint FILE --drift 0.01 --resume found.json",
    )
    _add_model(sub)
    sub.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, at least 8, better 64")
    _add_weights(sub, required=True)
    add_model_options(sub)
    target = sub.add_mutually_exclusive_group(required=True)
    target.add_argument("--speedup", type=float, help="over torch.compile(model) in measured time, like 1.5")
    target.add_argument("--macs", type=float, metavar="SHARE", help="of the dense model's arithmetic, like 0.65")
    target.add_argument("--drift", type=float, help="at most so much, like 0.01: the fastest below it")
    sub.add_argument("--metric", choices=("cosine", "kl"), help="what drift is; by the model's outputs if not given")
    sub.add_argument("--methods", nargs="+", metavar="NAME", help="to choose among; all if not given")
    sub.add_argument("--limit", type=positive, default=64, help="pictures at most (default 64)")
    sub.add_argument("--batch-size", type=positive, default=16, help="of runs and timing (default 16)")
    _add_machine(sub)
    sub.add_argument("--seed", type=count, default=0)
    sub.add_argument("--resume", type=Path, metavar="FILE", help="keeps what is found; an interrupted search goes on")
    sub.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="the schedule, for --schedule and optimize")
    sub.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .pdf: drift against arithmetic")
    add_html(sub)
    add_backend(sub, "inductor")
    add_json(sub)

    sub = add(
        "embed",
        "Write features of all pictures of a folder into Parquet files; a stopped run goes on.",
        "DIR --model vit_small_patch14_dinov2 --img-size 224 --pretrained -o OUT",
        "clip.mp4 --model deit_small_patch16_224 --checkpoint FILE --every 10 --features pooled -o OUT",
    )
    _add_embed(sub)
    add_json(sub)

    text = (
        "Draw score maps over images beside the attention, and which patches a schedule leaves; images as the model "
        "sees them, resized and cropped, and each map in its own colours, from its lowest score to one that 2% reach."
    )
    sub = add(
        "visualize",
        text,
        "photo.jpg --model deit_base_patch16_224 --pretrained --schedule 0:0.8,3:0.8,6:0.8 -o maps.html",
        "photo.jpg --model deit_base_patch16_224 --checkpoint FILE --layers all -o maps.png",
    )
    _add_images(sub)
    add_model_options(sub)
    sub.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".png for a picture, .html for a page"
    )
    sub.add_argument(
        "--layers",
        metavar="N,N,..",
        help="blocks, or stages of a CNN, counted from 0 as in schedules and in `explain`: 1 is the second; or all "
        f"(default: all on a page; in a picture those that the schedule cuts after, or {LAYERS})",
    )
    sub.add_argument("--schedule", help="show which patches it leaves; as in bench")
    sub.add_argument("--of", choices=LAYERS_OF_SHIFT, help="whose shift, of maps and schedule (default mlp)")
    sub.add_argument("--metric", choices=METRICS, help="the distance (default l2)")
    sub.add_argument("--with-skip", action="store_const", const=True, help="compare x + F(x), not F(x), with x")
    add_backend(sub, "eager")
    add_json(sub)

    text = "What this machine has for rs_compile: versions, devices, compiler, cache, attention; what is slow, and why."
    sub = add("doctor", text, "", "--json doctor.json")
    add_json(sub)

    sub = add(
        "completion",
        "Print what makes a shell complete commands and options.",
        "bash > ~/.local/share/bash-completion/completions/rs-compile",
        'zsh > "${fpath[1]}/_rs-compile"',
    )
    sub.add_argument("shell", choices=("bash", "zsh"))
    return top


def _add_embed(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a folder of pictures, videos (by frames), tars of pictures (webdataset) or Parquet files, or one file",
    )
    sub.add_argument("--model", required=True, help="timm's name for it")
    _add_weights(sub, required=True)
    add_model_options(sub)
    add_schedule(sub)
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="for features/ and skipped/; the same one goes on",
    )
    sub.add_argument(
        "--features",
        choices=FEATURES,
        default="class",
        help="the class token, pooled as for the classifier, every token, or the model's output (default class)",
    )
    sub.add_argument("--store", choices=FLOATS, default="float32", help="floats in the files (default float32)")
    sub.add_argument("--shard-size", type=positive, default=8192, metavar="N", help="pictures a file (default 8192)")
    sub.add_argument("--batch-size", type=positive, default=32, metavar="N", help="pictures a call (default 32)")
    sub.add_argument("--workers", type=count, metavar="N", help="processes that decode; 0 decodes in the model's own")
    sub.add_argument("--every", type=positive, default=1, metavar="N", help="of a video, one frame in N (default 1)")
    sub.add_argument("--column", metavar="NAME", help="of Parquet files, with paths or encoded pictures")
    sub.add_argument("--again", action="store_true", help="do files with skipped pictures once more")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="the model computes in (default float32)")
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0; under torchrun cuda is each process's own")
    sub.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")
    sub.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="this process, or one a device under torchrun; or actors of Ray (default local)",
    )
    sub.add_argument("--actors", type=positive, metavar="N", help="of Ray; one a GPU, or one on CPUs, if not given")
    sub.add_argument("--address", help="of a Ray cluster to join; one is started on this machine if not given")
    add_backend(sub, "inductor")


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="timm's name for it")


def _add_machine(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0")
    sub.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")


def _add_images(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    sub.add_argument("--model", required=True, help="timm's name for it")
    _add_weights(sub, required=True)


def _add_weights(sub: argparse.ArgumentParser, required: bool) -> None:
    weights = sub.add_mutually_exclusive_group(required=required)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="local .safetensors, .pth or .pt weights")
    weights.add_argument("--pretrained", action="store_true", help="weights from timm's hub, or its cache")

"""Text-video retrieval with UMT: a shortlist by similarity, re-ranked by the matching head, in both directions."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evaluate.annotations import check_present
from bench.evaluate.journal import EvaluationError, Journal, as_text, fingerprint, from_text, listing
from bench.evaluate.ranks import Ranks
from bench.evaluate.recall import Found, Recalls, recalls, related
from bench.evaluate.retrieval import RetrievalScores
from bench.evaluate.sweep import Skipped, sweep
from bench.evaluate.umt.datasets import Captions, DataSet, read_captions
from bench.evaluate.umt.features import FeatureFiles
from bench.evaluate.umt.features import Tokens as VideoTokens
from bench.evaluate.umt.pixels import Clips
from bench.evaluate.umt.rerank import OUTSIDE, SHORTLIST, Texts, match, shortlists
from bench.evaluate.umt.tokens import Tokenizer, Tokens
from bench.models.umt_tasks import UmtRetrieval
from passes.sites.restore import TokenOutput

VideoEncoder = Callable[[Tensor], Tensor | TokenOutput]


@dataclass(frozen=True)
class UmtScores(RetrievalScores):
    """What UMT retrieves, re-ranked.

    Args:
        by_similarity: the same without re-ranking.
        pooling: what a video's similarity is made of, "tokens" (the mean of what is left) or "frames" (one by one).
    """

    by_similarity: Found
    pooling: str


@torch.no_grad()
def evaluate_umt_retrieval(
    model: UmtRetrieval,
    encoders: Mapping[str, VideoEncoder],
    tokenizer: Tokenizer,
    dataset: DataSet,
    videos: Path,
    annotations: Path,
    *,
    per_frame: bool = False,
    shortlist: int = SHORTLIST,
    batch_size: int = 4,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, UmtScores]:
    """Runs all vision encoders on the same frames; the texts, projections and fusion layers are the model's.

    Args:
        model: on `device` in `dtype`, in eval mode.
        encoders: by name, in place of `model.vision_encoder.encoder`: a clip [B, 3, T, H, W] -> its tokens, all
            or what is left of them, which the fusion layers read as they are.
        tokenizer: see `read_tokenizer`.
        dataset: how its texts and videos are read.
        videos: the folder of the video files.
        annotations: see `read_captions`.
        shortlist: candidates of each text and of each video that are re-ranked.
        per_frame: pool each frame by itself, as UMT's own retrieval, where an encoder leaves every token.
        batch_size, workers: videos at once, and processes that read them.
        device, dtype: of what the encoders are given, and of the features on disk.
        cache: a folder to go on from; each encoder's features are there until its scores are, which stay. None: a
            temporary one.
        limit: so many videos at most, evenly spaced; fewer are easier to tell apart.
        identity: of each encoder what its scores depend on besides the weights, as its schedule.

    Raises:
        EvaluationError: no such folder, annotations of videos that are not there or that cannot be read, no video that
            can be read.
    """
    captions = read_captions(annotations, dataset, limit)
    check_present(captions.videos, videos, annotations, "captions")
    ranks = Ranks.join()
    device = ranks.device(device)
    tokens = Tokens.of(tokenizer, captions.texts, dataset.tokens)
    common = {
        "evaluation": "umt retrieval",
        "videos": listing((name, videos / name) for name in captions.videos),
        "texts": _digest([tokens.ids.tolist(), captions.pairs]),
        "weights": fingerprint(model),
        "dataset": asdict(dataset),
        "per frame": per_frame,
        "shortlist": shortlist,
        "batch size": batch_size,
        "dtype": str(dtype),
        "device": device.type,
    }
    with _folder(cache, ranks) as root:
        about = {name: {**common, "method": name, "by": (identity or {}).get(name)} for name in encoders}
        folders = {name: root / _digest(about[name]) for name in encoders}
        kept = ranks.broadcast({name: _kept(folder) for name, folder in folders.items()} if ranks.first else None)
        lacking = {name: folders[name] for name in encoders if kept[name] is None}
        if not lacking:
            return {name: _scores(kept[name]) for name in encoders}
        size = model.size
        clips = Clips(videos, tuple(captions.videos), size.frames, size.side, dataset.seconds)
        files = FeatureFiles({n: f / "features" for n, f in lacking.items()}, -(-len(clips.files) // batch_size), ranks)

        def encode(indices: list[int], batch: Tensor) -> dict[str, Any]:
            batch = batch.to(device, dtype)
            files.hold({name: _features(model, encoders[name](batch), per_frame) for name in lacking})
            return {"indices": indices}

        measured, skipped = sweep(
            clips,
            captions.videos,
            encode,
            batch_size=batch_size,
            workers=workers,
            journal=files,
            ranks=ranks,
            title=f"{len(clips.files)} videos",
            found_in=("videos", videos),
        )
        readable = [index for batch in measured for index in batch["indices"]]
        batches = {batch["indices"][0] // batch_size: batch["indices"] for batch in measured}
        left = captions.of_videos(readable)
        texts = Texts.of(model, Tokens.of(tokenizer, left.texts, dataset.tokens), device)
        for name, folder in lacking.items():
            held = VideoTokens(folder / "features", batches)
            note = Journal(folder / "logits", about[name], ranks)
            found, similar = _rank(model, texts, held, left, note, ranks, workers, shortlist, name)
            pooling = "frames" if per_frame and _whole(model, held(0)) else "tokens"
            counts: dict[str, Any] = {"videos": len(readable), "captions": len(left.texts), "skipped": skipped}
            scores = UmtScores(**vars(found), **counts, by_similarity=similar, pooling=pooling)
            kept[name] = asdict(scores)
            ranks.gather(None)  # nobody reads the features any more
            if ranks.first:
                _keep(folder, kept[name])
        return {name: _scores(kept[name]) for name in encoders}


def _rank(
    model: UmtRetrieval,
    texts: Texts,
    tokens: VideoTokens,
    captions: Captions,
    journal: Journal,
    ranks: Ranks,
    workers: int,
    shortlist: int,
    name: str,
) -> tuple[Found, Found]:
    """Recalls re-ranked, and by similarity alone.

    Published are two passes, one a direction; the logit of a pair is the same in both, so here each is computed once,
    all of a video's one after the other.
    """
    similarity = texts.projected @ tokens.pooled().T
    own = related(captions.pairs, *similarity.shape)
    similar = recalls(similarity, own)  # says so where values are not finite
    of_texts, of_videos = shortlists(similarity, shortlist)
    either = of_texts | of_videos
    device = model.itm_head.weight.device

    def fuse(indices: list[int], batch: Tensor) -> dict[str, Any]:
        (video,) = indices
        rows = either[:, video].nonzero().flatten().tolist()
        return {"video": video, "logits": as_text(match(model, texts, rows, batch[0].to(device)))}

    measured, _ = sweep(
        tokens,
        captions.videos,
        fuse,
        batch_size=1,
        workers=workers,
        journal=journal,
        ranks=ranks,
        title=f"{name}: re-ranking the texts of {len(captions.videos)} videos",
    )
    logits = torch.full_like(similarity, OUTSIDE)
    for pairs in measured:
        logits[either[:, pairs["video"]], pairs["video"]] = from_text(pairs["logits"])
    found = recalls(logits.masked_fill(~of_texts, OUTSIDE), own, logits.masked_fill(~of_videos, OUTSIDE))
    return found, similar


def _features(model: UmtRetrieval, output: Tensor | TokenOutput, per_frame: bool) -> tuple[Tensor, Tensor]:
    tokens = output.tokens if isinstance(output, TokenOutput) else output
    frames = model.size.frames if per_frame and _whole(model, tokens[0]) else 1
    return tokens, model.pooled(tokens, frames)


def _whole(model: UmtRetrieval, tokens: Tensor) -> bool:
    """Whether no token of a video [K, C] was left out."""
    return len(tokens) == model.vision_encoder.encoder.pos_embed.shape[1]


@contextmanager
def _folder(cache: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Where to keep things; a temporary folder goes when the first process is through."""
    if cache is not None:
        fault = ""
        if ranks.first:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fault = f"{cache} is no folder and cannot be made one ({error.strerror}); what is kept needs one"
        if fault := ranks.broadcast(fault):
            raise EvaluationError(fault)
        yield cache
        return
    made = tempfile.mkdtemp(prefix="umt-") if ranks.first else None
    try:
        yield Path(ranks.broadcast(made))
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _keep(folder: Path, scores: Any) -> None:
    """Notes a method's scores, and drops what they were made of, gigabytes."""
    fresh = folder / "scores.new"
    fresh.write_text(json.dumps(scores))
    fresh.replace(folder / "scores.json")
    shutil.rmtree(folder / "features")
    for journal in folder.glob("logits*"):
        journal.unlink()


def _kept(folder: Path) -> Any:
    path = folder / "scores.json"
    return json.loads(path.read_text()) if path.exists() else None


def _scores(content: Any) -> UmtScores:
    """From JSON."""
    content = dict(content)
    content["by_similarity"] = Found(**_recalls(content["by_similarity"]))
    content["skipped"] = tuple(Skipped(**skipped) for skipped in content["skipped"])
    return UmtScores(**{**content, **_recalls({k: v for k, v in content.items() if isinstance(v, dict)})})


def _recalls(content: Mapping[str, Any]) -> dict[str, Recalls]:
    return {way: Recalls(**shares) for way, shares in content.items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

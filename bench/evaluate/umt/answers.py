"""Ranking the candidate answers of a question in two stages, as published."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.umt.tokens import CLS, Tokenizer, Tokens
from bench.models.umt_tasks import UmtAnswering
from bench.models.umt_text import AnswerDecoder

CANDIDATES = 128  # ranked in the second stage
QUESTION_TOKENS, ANSWER_TOKENS = 25, 5  # at most, [CLS] counted
_AT_ONCE = 4  # questions; their logits are 4 x 128 x 4 x 30522 numbers
_IGNORED = -100


def answer_tokens(tokenizer: Tokenizer, answers: Sequence[str]) -> Tokens:
    """Answers as the decoder reads them: as they are, [SEP] as the end mark, which a long answer has no room for."""
    return Tokens.of(tokenizer, [f"{answer} [SEP]" for answer in answers], ANSWER_TOKENS)


def rank(decoder: AnswerDecoder, states: Tensor, mask: Tensor, answers: Tokens, most: int) -> tuple[Tensor, Tensor]:
    """The likeliest answers of each question, and their scores.

    First stage: the probability that an answer's first token follows [CLS]. To the log of that the second stage adds,
    for the `most` likeliest answers (among equals the first of the list), the log-likelihood of all their tokens. So
    the first token counts twice, and longer answers are not made up for.

    Args:
        states: [Q, M, C] of the questions, together with their videos.
        mask: bool [Q, M].
        answers: of all candidates, at least `most`, on the device of the states.

    Returns:
        int64 [Q, most], places in the list, and float32 [Q, most], in the order of the first stage.
    """
    start = torch.full((len(states), 1), CLS, device=states.device)
    first = decoder(start, torch.ones_like(start, dtype=torch.bool), states, mask)[:, 0].float().log_softmax(-1)
    of_answers = first[:, answers.ids[:, 1]]
    best = of_answers.argsort(stable=True, dim=1, descending=True)[:, :most]
    ids, read = answers.ids[best].flatten(0, 1), answers.mask[best].flatten(0, 1)
    logits = decoder(ids[:, :-1], read[:, :-1], states, mask).float()
    targets = ids[:, 1:].masked_fill(~read[:, 1:], _IGNORED)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none")
    likelihood = -losses.view(*best.shape, -1).sum(-1)
    return best, of_answers.gather(1, best) + likelihood


def answer(model: UmtAnswering, questions: Tokens, video: Tensor, answers: Tokens, most: int) -> list[int]:
    """The place of the answer to each question on one video.

    Args:
        questions, answers: on the device of the video.
        video: its tokens [K, W] as they were left.
        most: see `rank`.
    """
    found: list[int] = []
    for at in range(0, len(questions.ids), _AT_ONCE):
        ids, mask = questions.ids[at : at + _AT_ONCE], questions.mask[at : at + _AT_ONCE]
        states = model.text_encoder.fuse(model.text_encoder.text(ids, mask), mask, video.unsqueeze(0))
        best, scores = rank(model.text_decoder, states, mask, answers, most)
        found += best.gather(1, scores.argmax(1, keepdim=True)).flatten().tolist()
    return found

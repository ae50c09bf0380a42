"""The acceptance rate that an evaluation predicts is what transformers' assisted decoding accepts."""

import math

import pytest
import torch
from support.tiny_student import VOCAB, tiny_llama
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from student_train.data.batch import SparseTargets
from student_train.results.measures import measure

K = VOCAB // 2


@torch.no_grad()
def test_drafts_are_accepted_as_often_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draft at a time by the student, kept or not by the teacher; each is predicted from what it was drafted on."""
    teacher, student = tiny_llama(0), tiny_llama(1)
    asked: list[Tensor] = []
    contexts: list[Tensor] = []
    accepted: list[int] = []
    draft, count = AssistedCandidateGenerator.get_candidates, AssistedCandidateGenerator.update_candidate_strategy

    def drafts(self: AssistedCandidateGenerator, input_ids: Tensor, *more: object, **named: object) -> object:
        asked.append(input_ids[0].clone())
        return draft(self, input_ids, *more, **named)

    def counts(self: AssistedCandidateGenerator, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        # A draft may be left unjudged, where no more tokens are asked for.
        contexts.append(asked[-1])
        accepted.append(int(num_matches))
        count(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", drafts)
    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", counts)
    student.generation_config.update(
        num_assistant_tokens=1, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    torch.manual_seed(3)
    while len(accepted) < 400:
        teacher.generate(
            torch.tensor([[5, 9]]), assistant_model=student, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=60, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    logits = torch.stack([student(ids[None]).logits[0, -1] for ids in contexts])
    log_p = torch.stack([teacher(ids[None]).logits[0, -1] for ids in contexts]).log_softmax(1)
    stored, ids = log_p.topk(K)
    found = measure(
        logits,
        SparseTargets(
            labels=torch.zeros(len(ids), dtype=torch.int64), ids=ids.int(), logprobs=stored, weights=stored.exp(),
            in_head=torch.ones_like(ids, dtype=torch.bool), tail_logprob=torch.log1p(-stored.exp().sum(1)),
            has_draws=False,
        ),
        temperature=1.0,
    )  # fmt: skip
    share = sum(accepted) / len(accepted)
    noise = 3 * math.sqrt(share * (1 - share) / len(accepted))
    least, most = float(found.overlap_least.mean()), float(found.overlap_most.mean())
    assert least - noise < share < most + noise
    exact = float(torch.minimum(log_p.exp(), logits.softmax(1)).sum(1).mean())
    assert least < exact < most
    assert abs(share - exact) < noise

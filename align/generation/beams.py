"""Beam search on static shapes: transformers' (4.55, generation/utils.py, `_beam_search`) for any number of end tokens.

optimum-habana 1.21.2 has one end token on static shapes and prefers any finished beam to a better one
(generation/utils.py:3175).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEVER = -1e9  # added to the score of what must not be chosen, as in transformers


@dataclass(frozen=True)
class BeamOptions:
    """`early_stopping` as transformers': True, False or "never"."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    num_return_sequences: int = 1


class Beams:
    """The beams of each prompt: those that go on, and the best that have ended."""

    def __init__(self, options: BeamOptions, prompts: int, new_tokens: int, end_tokens: list[int], device):
        import torch

        self.options, self.new_tokens = options, new_tokens
        beams = options.num_beams
        self.ends = torch.tensor(end_tokens, dtype=torch.long, device=device)
        self.candidates = max(2, 1 + len(end_tokens)) * beams  # so that at least `beams` of them go on
        self.running = torch.zeros(prompts, beams, new_tokens, dtype=torch.long, device=device)
        self.scores = torch.zeros(prompts, beams, device=device)
        self.scores[:, 1:] = NEVER  # the beams of a prompt begin alike: only the first one counts
        self.ended = torch.zeros_like(self.running)
        self.ended_scores = torch.full((prompts, beams), NEVER, device=device)
        self.has_ended = torch.zeros(prompts, beams, dtype=torch.bool, device=device)
        self.may_improve = torch.ones(prompts, 1, dtype=torch.bool, device=device)
        self.length = torch.zeros(1, dtype=torch.long, device=device)  # as a tensor, so that all steps are one graph
        self.first_rows = torch.arange(prompts, device=device)[:, None] * beams

    def advance(
        self,
        scores: "torch.FloatTensor",
        find_stopped: "Callable[[torch.LongTensor], torch.BoolTensor] | None" = None,
    ) -> tuple["torch.LongTensor", "torch.LongTensor"]:
        """Takes log-probabilities `[prompts * beams, vocabulary]` of the next tokens.

        `find_stopped` says which texts `[prompts, candidates, new_tokens]` end without an end token. Returns which
        rows go on and with which token, both `[prompts * beams]`.
        """
        import torch

        beams, vocabulary = self.options.num_beams, scores.shape[1]
        scores = (scores.view(len(self.scores), beams, vocabulary) + self.scores[:, :, None]).flatten(1)
        if self.options.do_sample:
            places = torch.multinomial(scores.softmax(1), self.candidates)
            scores = scores.gather(1, places)
        else:
            scores, places = scores.topk(self.candidates)
        parents, tokens = places // vocabulary, places % vocabulary
        texts = _take(self.running, parents).index_copy_(2, self.length, tokens[:, :, None])
        self.length += 1
        ends = torch.isin(tokens, self.ends) | (self.length == self.new_tokens)
        if find_stopped is not None:
            ends = ends | find_stopped(texts)

        going_on = scores + ends.float() * NEVER
        self.scores, chosen = going_on.topk(beams)
        self.running = _take(texts, chosen)
        self._collect(texts, scores, ends)
        rows = (parents.gather(1, chosen) + self.first_rows).flatten()
        return rows, tokens.gather(1, chosen).flatten()

    def _collect(self, texts, scores, ends) -> None:
        """Keeps the best texts that end at this step beside the best that ended before."""
        import torch

        options, beams = self.options, self.options.num_beams
        ends = ends.clone()
        ends[:, beams:] = False  # the others stand by in case all of the best end
        scores = scores / self.length.float() ** options.length_penalty
        if options.early_stopping is True:
            scores = scores + self.has_ended.all(1, keepdim=True).float() * NEVER
        scores = scores + (~self.may_improve).float() * NEVER + (~ends).float() * NEVER
        self.ended_scores, best = torch.cat((self.ended_scores, scores), 1).topk(beams)
        self.ended = _take(torch.cat((self.ended, texts), 1), best)
        self.has_ended = torch.cat((self.has_ended, ends), 1).gather(1, best)

        longest = options.early_stopping == "never" and options.length_penalty > 0
        length = torch.full_like(self.length, self.new_tokens) if longest else self.length
        best_possible = self.scores[:, :1] / length.float() ** options.length_penalty
        worst = self.ended_scores.min(1, keepdim=True)[0].where(self.has_ended, NEVER)
        self.may_improve = self.may_improve & (best_possible > worst).any(1, keepdim=True)

    def is_done(self) -> bool:
        """Whether no further step can change what has ended; waits for the device."""
        is_full = self.options.early_stopping is True and bool(self.has_ended.all())
        return is_full or not bool(self.may_improve.any())

    def best(self) -> "torch.LongTensor":
        """New tokens `[prompts * num_return_sequences, new_tokens]`, best first; behind an end stands anything."""
        return self.ended[:, : self.options.num_return_sequences].flatten(0, 1)


def _take(tensor: "torch.Tensor", places: "torch.LongTensor") -> "torch.Tensor":
    """Of `[prompts, n, tokens]` the texts at `places` `[prompts, m]`."""
    return tensor.gather(1, places[:, :, None].expand(-1, -1, tensor.shape[2]))

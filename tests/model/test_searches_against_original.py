"""Searches with beams and seeded draws, compared with what the original MiniGPT-4 code recorded.

Ids are equal. Scores of beams lie within 1e-4 of the recorded, as logits do. The original ended a search when the best
beam said "###"; the package's own sessions let each beam end by itself, so its rule is given here as the original had
it. The weights are read by the small map of names of `test_against_original`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from tests import golden
from tests.model.test_against_original import first_version, options, picture_values, prompt_ids

pytestmark = pytest.mark.reference
DRAWN = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}  # what the original's chat, and its library, took by themselves
END = 2  # with which the original's library closed a beam that a stop word ended


class FirstRowEnds(StoppingCriteria):
    """Ends every row when the first ends in one of the words: what the original calls `StoppingCriteriaSub`."""

    def __init__(self, words: list[list[int]]) -> None:
        self.words = words

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        first = input_ids[0].tolist()
        ended = any(first[-len(word) :] == word for word in self.words)
        return torch.full((len(input_ids),), ended, dtype=torch.bool)


def turns(start: str) -> list[tuple[str, int]]:
    """Turns of the recorded conversations whose name begins so."""
    return [
        (dialog["name"], number)
        for dialog in golden.content("golden/generation.json")["dialogs"]
        for number in range(len(dialog["turns"]))
        if dialog["name"].startswith(start)
    ]


def asked(name: str, number: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A turn, what the model reads, and how it answers."""
    dialog = next(dialog for dialog in golden.content("golden/generation.json")["dialogs"] if dialog["name"] == name)
    ids, shown = prompt_ids(dialog, number)
    # As embeddings: the original's repetition penalty does not count the words of the prompt.
    embeds = first_version().get_input_embeddings()(torch.tensor([ids]))
    chosen = options(dialog)
    if chosen.pop("stop_strings", None):
        del chosen["tokenizer"]
        words = golden.content("configs/tiny_dims.json")["stop_words_ids"]
        chosen["stopping_criteria"] = StoppingCriteriaList([FirstRowEnds(words)])
    return dialog["turns"][number], {"inputs_embeds": embeds, "pixel_values": picture_values()[shown]}, chosen


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize(("name", "number"), turns("beam"))
def test_search_with_beams_finds_the_originals_ids_and_score(name: str, number: int) -> None:
    turn, inputs, chosen = asked(name, number)
    found = first_version().generate(**inputs, **chosen, output_scores=True, return_dict_in_generate=True)
    ids, recorded = found.sequences[0].tolist(), turn["raw_sequence"][1:]  # there the first is the start token
    stopped = "stopping_criteria" in chosen and recorded[-1] == END
    assert ids == (recorded[:-1] if stopped else recorded)
    penalty = chosen.get("length_penalty", 1.0)
    # A score is a sum divided by a power of a length; the original's library counted the start token, and no end token.
    length = len(ids) + (ids[-1] != chosen.get("eos_token_id"))
    total = float(found.sequences_scores[0]) * len(ids) ** penalty
    assert total == pytest.approx(turn["sequences_scores"][0] * length**penalty, abs=1e-4, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "number"), turns("sample"))
def test_seeded_draw_is_the_originals_word_for_word(name: str, number: int) -> None:
    turn, inputs, chosen = asked(name, number)
    torch.manual_seed(turn["torch_manual_seed"])
    answer = first_version().generate(**inputs, **DRAWN | chosen)[0].tolist()
    assert answer == turn["raw_sequence"][1:]


@torch.no_grad()
@pytest.mark.parametrize(("name", "number"), [*turns("beam"), *turns("sample")])
def test_context_of_searches_and_draws_is_the_originals(name: str, number: int) -> None:
    recorded = golden.tensors("golden/generation.safetensors")
    model, (_, inputs, chosen) = first_version(), asked(name, number)
    given: dict[str, Tensor] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True
    )
    scores = model(**inputs).logits[:, -1] / (DRAWN | chosen)["temperature"]
    hook.remove()
    torch.testing.assert_close(given["inputs_embeds"], recorded[f"{name}/{number}/inputs_embeds"], rtol=0.0, atol=2e-5)
    expected = recorded.get(f"{name}/{number}/first_step_scores", scores)  # of draws alone
    kept = expected > -1e29  # the others were too unlikely to be drawn
    torch.testing.assert_close(scores[kept], expected[kept], rtol=0.0, atol=1e-4)


def test_rule_of_the_first_row_is_the_originals() -> None:
    """So that what ended the original's searches ends those above."""
    compared = 0
    for case in golden.content("golden/chat_units.json")["stopping"]:
        ids, words = case["input_ids"], case["stops"]
        if isinstance(case["result"], str) or any(len(word) > len(ids[0]) for word in words):
            continue  # the original compared a short sequence with a longer word by broadcasting
        ended = FirstRowEnds(words)(torch.tensor(ids), torch.empty(0))
        assert ended.tolist() == [case["result"]] * len(ids), case
        compared += 1
    assert compared >= 8


def test_every_recorded_conversation_is_greedy_searched_or_drawn() -> None:
    names = [dialog["name"] for dialog in golden.content("golden/generation.json")["dialogs"]]
    assert all(name.startswith(("greedy", "beam", "sample")) for name in names)

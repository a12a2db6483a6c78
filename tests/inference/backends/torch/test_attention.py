"""Maps of where the model looked: they leave the model as it was, and need a Q-Former."""

import pytest

from minigpt4.errors import UsageError
from minigpt4.inference.backends.torch.attention import AttentionMaps, check_can_look
from tests import tiny_chat

CONVERSATION = [
    {"role": "user", "content": [{"type": "image", "image": tiny_chat.picture()}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "Red."},
]


def test_a_model_without_a_qformer_says_so() -> None:
    model = tiny_chat.model()
    model.config.qformer_config = None
    with pytest.raises(UsageError, match="no Q-Former"):
        check_can_look(model)


def test_a_map_leaves_the_model_as_it_was() -> None:
    model = tiny_chat.model()
    maps = AttentionMaps(model, tiny_chat.processor())
    maps.look(CONVERSATION)
    assert model.model.qformer.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    shared = zip(model.parameters(), maps.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in shared)


def test_a_map_of_an_answer_where_the_qformer_learns_nothing() -> None:
    """As in every imported original, of which the projection alone learns."""
    model = tiny_chat.model().requires_grad_(False)
    seen = AttentionMaps(model, tiny_chat.processor()).look(CONVERSATION)
    assert max(map(max, seen.values)) == 1

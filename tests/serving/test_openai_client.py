"""The official client of the OpenAI API drives every feature against a real server."""

import asyncio
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from minigpt4.inference.chat import ChatSession
from tests import tiny_chat
from tests.serving.live import HELLO, MODEL, Live, live, picture_file, seeing


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def alone(question: str, *files: bytes, **options: object) -> str:
    chat = ChatSession(tiny_chat.model(), tiny_chat.processor())
    for file in files:
        chat.add_image(file)
    return chat.ask(question, **options)


def test_text_and_pictures_are_answered_as_by_a_session(client: openai.OpenAI) -> None:
    for files in ([], [picture_file(1)], [picture_file(1), picture_file(2)]):
        made = client.chat.completions.create(model=MODEL, messages=[seeing("what?", *files)], max_tokens=10)
        assert made.choices[0].message.content == alone("what?", *files, max_new_tokens=10)
        assert made.object == "chat.completion"
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        assert made.id.startswith("chatcmpl-")


def test_a_large_picture_is_answered_as_by_a_session_though_it_is_reduced_elsewhere(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    tiny_chat.picture(7).resize((700, 500), Image.Resampling.BICUBIC).save(file, "PNG")
    made = client.chat.completions.create(model=MODEL, messages=[seeing("what?", file.getvalue())], max_tokens=10)
    assert made.choices[0].message.content == alone("what?", file.getvalue(), max_new_tokens=10)


def test_several_turns_and_a_system_message(client: openai.OpenAI) -> None:
    chat = ChatSession(tiny_chat.model(), tiny_chat.processor(), system="Be short.")
    chat.add_image(picture_file(3))
    messages = [{"role": "system", "content": "Be short."}, seeing("what?", picture_file(3))]
    for question in ("and why?", "say more"):
        asked = messages[-1]["content"][-1]["text"] if len(messages) == 2 else messages[-1]["content"]
        made = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=6)
        assert made.choices[0].message.content == chat.ask(asked, max_new_tokens=6)
        messages += [{"role": "assistant", "content": made.choices[0].message.content}]
        messages += [{"role": "user", "content": question}]
    made = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=6)
    assert made.usage.prompt_tokens_details.cached_tokens > 0


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    """Whatever form the client gives it: its object, a dictionary with every field, a stream's last state."""
    question = [seeing("what?", picture_file(1))]
    asked = {"model": MODEL, "messages": question, "max_tokens": 12, "stop": alone("what?", picture_file(1))[3:5]}
    message = client.chat.completions.create(**asked).choices[0].message
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    by_hand = {"role": "assistant", "content": message.content}
    forms = [by_hand, message, message.model_dump(), streamed, streamed.model_dump(), {**by_hand, "tool_calls": []}]

    answers = [
        client.chat.completions.create(
            model=MODEL, messages=[*question, form, {"role": "user", "content": "and why?"}], max_tokens=6
        ).choices[0].message.content
        for form in forms
    ]  # fmt: skip

    assert answers == [answers[0]] * len(forms)


def test_what_an_answer_of_ours_never_holds_is_refused(client: openai.OpenAI) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function"}]}
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\]\.tool_calls"):
        client.chat.completions.create(model=MODEL, messages=[seeing("what?"), called, seeing("why?")])


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    messages = [seeing("what?", picture_file(1))]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_streams_bytes_are_those_that_proxies_and_clients_expect(server: Live) -> None:
    reply = server.chat({"messages": [seeing("what?", picture_file(1))], "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in reply.body
    reply.body.decode("utf-8")


def test_the_asynchronous_client_streams_several_at_once(server: Live) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=[seeing("what?", picture_file(number))], max_tokens=8, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(6)))

    assert asyncio.run(ask_all()) == [alone("what?", picture_file(n), max_new_tokens=8) for n in range(6)]


def test_sampling_options_reach_the_model(client: openai.OpenAI) -> None:
    def drawn(**options: object) -> str:
        extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
        made = client.chat.completions.create(
            model=MODEL, messages=[seeing("draw", picture_file(1))], max_tokens=16, extra_body=extra, **options
        )
        return made.choices[0].message.content or ""

    assert drawn(temperature=1.5, seed=5, top_p=0.9) == drawn(temperature=1.5, seed=5, top_p=0.9)
    assert len({drawn(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert drawn(temperature=0) == drawn(temperature=0, seed=9)
    assert drawn(temperature=1.5, seed=-5) == drawn(temperature=1.5, seed=-5)
    assert drawn(temperature=1.5, seed=-1) == drawn(temperature=1.5, seed=2**63 - 1)
    assert len({drawn(temperature=1.5, seed=seed) for seed in range(-4, 0)}) > 1


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_temperature_near_0_is_0(num_beams: int, server: Live) -> None:
    asked = HELLO | {"num_beams": num_beams}
    cold, *colder = (server.chat(asked | {"temperature": given}).json["choices"] for given in (0, 5e-324, 1e-6))
    assert colder == [cold, cold]


def test_beams_are_the_sessions(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL,
        messages=[seeing("what?", picture_file(2))],
        max_tokens=8,
        extra_body={"num_beams": 3, "length_penalty": 0.5},
    )
    expected = alone("what?", picture_file(2), max_new_tokens=8, num_beams=3, length_penalty=0.5)
    assert made.choices[0].message.content == expected


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    messages = [seeing("what?", picture_file(1))]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    made = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, stop=[stop, "zzzz"])
    assert made.choices[0].message.content == whole.partition(stop)[0].rstrip()
    assert made.choices[0].finish_reason == "stop"


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == tiny_chat.CONTEXT
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"temperature": -1}, "temperature", None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None),
        ({"max_tokens": 100_000}, "max_tokens", "answer_too_long"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    options: dict[str, object], param: str, code: str | None, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], **options)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.type == "invalid_request_error"
    assert param in refused.value.message


def test_an_answer_longer_than_the_context_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], max_completion_tokens=tiny_chat.CONTEXT + 1
        )
    assert f"max_completion_tokens is {tiny_chat.CONTEXT + 1}, expected at most " in refused.value.message
    assert f"reads {tiny_chat.CONTEXT} tokens, question and answer together" in refused.value.message


def test_what_changes_no_answer_is_taken(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x", "name": "me"}], max_tokens=2, n=1, logprobs=False,
        user="u", tools=[], response_format={"type": "text"}, presence_penalty=0.0,
    )  # fmt: skip
    assert made.choices[0].index == 0


def test_a_context_overflow_says_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 2000}], max_tokens=10
        )
    assert refused.value.code == "context_length_exceeded"
    assert f"{tiny_chat.CONTEXT}" in refused.value.message and " 10," in refused.value.message


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "model_not_found"


def test_a_wrong_picture_names_its_part(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[seeing("what?", picture_file(1), b"no picture")])
    assert refused.value.param == "messages[0].content[1].image_url.url"
    assert refused.value.code == "invalid_image"

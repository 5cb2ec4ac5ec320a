"""The official openai SDK against a real server."""

import asyncio

import openai
import pytest

MODEL = "mixtral-base"
MESSAGES = [{"role": "user", "content": "What is a router?"}]
PROMPT = "The river carried the boat."
NO_END = {"ignore_eos": True}


def chat(client, **fields):
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "extra_body": NO_END, **fields}
    return client.chat.completions.create(**fields)


def complete(client, **fields):
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "extra_body": NO_END, **fields}
    return client.completions.create(**fields)


def streamed_text(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chat(client):
    answer = chat(client, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_streamed_chat_says_the_same_as_a_whole_one(client):
    whole = chat(client, temperature=0)
    chunks = list(chat(client, temperature=0, stream=True))
    assert streamed_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream(client):
    whole = chat(client, temperature=0)
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_collects_the_answer(client):
    text = chat(client, temperature=0).choices[0].message.content
    stop = text[12:16]  # The helper takes an answer that was cut short for an error.
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stop=stop, extra_body=NO_END
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert events.count("content.delta") > 1 and "content.done" in events
    assert final.choices[0].message.content == text[: text.index(stop)]


def test_completions(client):
    whole = complete(client, temperature=0)
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    chunks = list(complete(client, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    echoed = complete(client, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + whole.choices[0].text
    batch = complete(client, temperature=0, prompt=[PROMPT, "tokens"])
    assert [choice.index for choice in batch.choices] == [0, 1]
    assert batch.choices[0].text == whole.choices[0].text
    ids = complete(client, prompt=[70, 73, 71], max_tokens=2)
    assert ids.usage.prompt_tokens == 3


def test_logprobs(client):
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 24
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob <= 0
    whole = complete(client, temperature=0, logprobs=2, echo=True)
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert logprobs.token_logprobs[0] is None


def test_n_choices(client):
    answer = chat(client, n=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    chunks = list(chat(client, n=3, seed=1, stream=True))
    for choice in answer.choices:
        mine = [chunk for chunk in chunks if chunk.choices[0].index == choice.index]
        assert streamed_text(mine) == choice.message.content


def test_seeds_reproduce(client):
    texts = [chat(client, seed=seed, temperature=1.2).choices[0].message.content for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_stop(client):
    text = chat(client, temperature=0).choices[0].message.content
    stop = text[8:12]
    answer = chat(client, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert streamed_text(chat(client, temperature=0, stop=stop, stream=True)) == text[: text.index(stop)]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moesaic"


def test_bad_requests(client):
    for fields, param, code in [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"max_tokens": 100_000}, "messages", "context_length_exceeded"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, **fields)
        error = refused.value
        assert (error.status_code, error.param, error.code) == (400, param, code)
        assert error.type == "invalid_request_error" and error.body["message"]


def test_unknown_models(client):
    for call in (lambda: chat(client, model="gpt"), lambda: client.models.retrieve("gpt")):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_keys(start):
    server = start("--api-key", "sk-right")
    with pytest.raises(openai.AuthenticationError) as refused:
        server.client("sk-wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert chat(server.client("sk-right"), max_tokens=1).choices


def test_a_full_queue(start):
    server = start("--max-num-seqs", "1", "--max-queue", "1")
    with server.client() as client:
        running = chat(client, stream=True, max_tokens=4000, logprobs=True, top_logprobs=20)
        next(running)
        waiting = chat(client, stream=True, max_tokens=4000)
        with pytest.raises(openai.RateLimitError) as refused:
            chat(client)
        assert refused.value.response.headers["retry-after"] == "1"
        running.close()
        waiting.close()
    server.wait_idle()


def test_closing_a_stream_frees_the_server(client, server):
    aborted = 'finished_reason="abort"'
    before = server.metric("vllm:request_success_total", aborted)
    with chat(client, stream=True, max_tokens=4000, n=2) as stream:
        next(stream)
        server.poll("two running sequences", lambda: server.metric("vllm:num_requests_running") == 2)
    server.wait_idle()
    server.poll(
        "two aborted sequences", lambda: server.metric("vllm:request_success_total", aborted) == before + 2
    )


def test_a_timeout_of_the_client_frees_the_server(client, server):
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.1), max_tokens=4000, n=4, logprobs=True, top_logprobs=20)
    server.wait_idle()


def test_the_async_client(server):
    async def run():
        async with openai.AsyncOpenAI(**server.options()) as client:
            answers = await asyncio.gather(*(chat(client, seed=seed) for seed in range(8)))
            stream = await chat(client, seed=3, stream=True)
            text = streamed_text([chunk async for chunk in stream])
            return [answer.choices[0].message.content for answer in answers], text

    texts, streamed = asyncio.run(run())
    assert streamed == texts[3] and len(set(texts)) == 8


def test_cancelling_an_async_task_frees_the_server(server):
    async def run():
        async with openai.AsyncOpenAI(**server.options()) as client:
            stream = await chat(client, stream=True, max_tokens=4000)
            await anext(stream)
            # One event has arrived, so the task is within the stream when it is cancelled.
            task = asyncio.ensure_future(anext(stream))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await stream.close()

    asyncio.run(run())
    server.wait_idle()

"""Checks a live node with the `openai` Python package, unchanged.

    python openai_client.py http://127.0.0.1:8080/v1 [--modes local,auto,exact,cloud]
"""

import argparse
import asyncio
import json
import os
import sys
import time
import traceback
from typing import Literal

import openai
import pydantic

PROMPT = "What is the capital of Peru?"
MESSAGES = [{"role": "user", "content": PROMPT}]
# Greedy and on the device alone: the same text every time, whatever the network does.
LOCAL = {"model": "tandem:local", "messages": MESSAGES, "temperature": 0}
PATIENCE_S = 20

checks = []


def check(function):
    checks.append(function)
    return function


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def expect_equal(got, wanted, what):
    expect(got == wanted, f"{what}: got {got!r}, wanted {wanted!r}")


def refused(error, param, call):
    """The error of a call that must fail, after checking its class and the field it names."""
    try:
        call()
    except error as refusal:
        expect_equal(refusal.param, param, "param")
        expect_equal(refusal.type, "invalid_request_error", "type")
        expect(refusal.request_id, "an error has a request id")
        return refusal
    raise AssertionError(f"no {error.__name__}")


def collect(stream):
    """Texts and finish reasons by choice, the usage, and the order in which choices spoke."""
    texts, ends, usage, order, done = {}, {}, None, [], False
    for chunk in stream:
        expect(not done, "the usage chunk is the last one")
        if not chunk.choices:
            usage, done = chunk.usage, True
            continue
        choice = chunk.choices[0]
        expect(choice.index not in ends, "nothing follows the end of a choice")
        order.append(choice.index)
        if choice.index not in texts:
            expect_equal(choice.delta.role, "assistant", "role of the first chunk")
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    expect_equal(sorted(ends), sorted(texts), "choices that ended")
    return texts, ends, usage, order


@check
def models(client, args):
    names = [model.id for model in client.models.list()]
    for name in ["tandem", "tandem:local", "tandem:auto", "tandem:exact", "tandem:cloud"]:
        expect(name in names, f"{name} is in {names}")
        expect_equal(client.models.retrieve(name).id, name, "id")


@check
def chat(client, args):
    answer = client.chat.completions.create(**LOCAL)
    choice = answer.choices[0]
    expect(choice.message.content, "text")
    expect_equal((choice.message.role, choice.index), ("assistant", 0), "role and index")
    expect(choice.finish_reason in ("stop", "length"), choice.finish_reason)
    expect_equal(answer.object, "chat.completion", "object")
    usage = answer.usage
    expect(usage.prompt_tokens > 0 and usage.completion_tokens > 0, usage)
    expect_equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total")
    expect_equal(usage.tandem["cloud_tokens"], 0, "cloud tokens in local mode")
    expect_equal(usage.tandem["bytes_up"], 0, "bytes sent in local mode")


@check
def chat_stream_equals_chat(client, args):
    whole = client.chat.completions.create(**LOCAL)
    options = {"include_usage": True}
    texts, ends, usage, _ = collect(client.chat.completions.create(**LOCAL, stream=True, stream_options=options))
    expect_equal(texts, {0: whole.choices[0].message.content}, "text")
    expect_equal(ends, {0: whole.choices[0].finish_reason}, "finish_reason")
    expect_equal(usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")
    expect_equal(usage.prompt_tokens, whole.usage.prompt_tokens, "prompt_tokens")


@check
def stream_without_usage(client, args):
    chunks = list(client.chat.completions.create(**LOCAL, stream=True))
    expect(all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks), "one choice in every chunk")
    expect("edge_tokens" in chunks[-1].tandem, "the last chunk says what the answer took")


@check
def stream_helper(client, args):
    with client.chat.completions.stream(**LOCAL) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**LOCAL)
    expect_equal(final.choices[0].message.content, whole.choices[0].message.content, "text")


@check
def every_mode(client, args):
    texts = {}
    for mode in args.modes:
        raw = client.chat.completions.with_raw_response.create(**{**LOCAL, "model": f"tandem:{mode}"})
        expect_equal(raw.headers["x-tandem-mode"], mode, "mode")
        expect(raw.headers["x-tandem-policy"] is not None and raw.headers["x-request-id"], "headers")
        texts[mode] = raw.parse().choices[0].message.content
        expect(texts[mode], f"text in mode {mode}")
    if "exact" in texts and "cloud" in texts:
        expect_equal(texts["exact"], texts["cloud"], "exact writes what the cloud writes")


@check
def what_clients_send_by_themselves(client, args):
    whole = client.chat.completions.create(**LOCAL).choices[0].message.content
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    named = [{**MESSAGES[0], "name": "ann"}]
    for extra in [
        {"tools": [tool]},
        {"tools": [], "parallel_tool_calls": False},
        {"messages": named, "reasoning_effort": "low", "verbosity": "low", "store": True},
        {"service_tier": "flex", "max_tokens": -1, "functions": [{"name": "f", "parameters": {}}]},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "repeat_penalty": 1.0}},
    ]:
        answer = client.chat.completions.create(**{**LOCAL, **extra}).choices[0]
        expect_equal((answer.message.content, answer.finish_reason), (whole, "stop"), extra)
    echoed = client.completions.create(
        model="tandem:local", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    expect_equal(echoed.text, PROMPT, "the prompt again")
    expect(all(score <= 0 for score in echoed.logprobs.token_logprobs[1:]), "its log probabilities")


@check
def conversation(client, args):
    first = client.chat.completions.create(**LOCAL).choices[0].message
    messages = [*MESSAGES, first, {"role": "user", "content": [{"type": "text", "text": "And of Chile?"}]}]
    expect(client.chat.completions.create(**{**LOCAL, "messages": messages}).choices, "an answer")


@check
def completions(client, args):
    request = {"model": "tandem:local", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**request)
    expect_equal((whole.object, whole.choices[0].index), ("text_completion", 0), "object and index")
    parts = list(client.completions.create(**request, stream=True))
    expect_equal("".join(part.choices[0].text for part in parts), whole.choices[0].text, "text")
    expect_equal(parts[-1].choices[0].finish_reason, whole.choices[0].finish_reason, "finish_reason")
    several = client.completions.create(**{**request, "prompt": [PROMPT, PROMPT]})
    expect_equal([choice.text for choice in several.choices], [whole.choices[0].text] * 2, "two prompts")
    scored = client.completions.create(**request, logprobs=2).choices[0].logprobs
    expect_equal(len(scored.tokens), len(scored.token_logprobs), "a log probability a token")


@check
def logprobs(client, args):
    answer = client.chat.completions.create(**LOCAL, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in content if not token.token.startswith("<|"))
    expect_equal(text.decode(), answer.choices[0].message.content, "bytes of the tokens")
    for token in content:
        expect(token.logprob <= 0, token)
        expect_equal(len(token.top_logprobs), 3, "alternatives")
        values = [other.logprob for other in token.top_logprobs]
        expect_equal(values, sorted(values, reverse=True), "alternatives, best first")
        expect_equal(token.top_logprobs[0].token, token.token, "greedy takes the best")


@check
def stop(client, args):
    text = client.chat.completions.create(**LOCAL).choices[0].message.content
    middle = max(1, len(text) // 2)
    for length in (1, 2, 3):
        mark = text[middle : middle + length]
        if not mark:
            continue
        wanted = text[: text.find(mark)]
        answer = client.chat.completions.create(**LOCAL, stop=[mark, "never \u0007 there"])
        expect_equal((answer.choices[0].message.content, answer.choices[0].finish_reason), (wanted, "stop"), mark)
        texts, ends, _, _ = collect(client.chat.completions.create(**LOCAL, stop=mark, stream=True))
        expect_equal((texts[0], ends[0]), (wanted, "stop"), f"{mark} in a stream")
    if "exact" in args.modes:
        usage = client.chat.completions.create(**{**LOCAL, "model": "tandem:exact"}, stop=text[1]).usage
        expect(usage.tandem["bytes_up"] > 0, "what was sent before the stop is counted")
        tokens = usage.tandem["edge_tokens"] + usage.tandem["accepted"] + usage.tandem["cloud_tokens"]
        expect_equal(tokens, usage.completion_tokens, "tokens by origin")


@check
def length(client, args):
    answer = client.chat.completions.create(**LOCAL, max_completion_tokens=1)
    expect_equal((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 1), "one token")


@check
def several_choices(client, args):
    request = {**LOCAL, "n": 2, "temperature": 1.5, "seed": 5}
    whole = client.chat.completions.create(**request)
    expect_equal([choice.index for choice in whole.choices], [0, 1], "indices")
    texts, _, _, order = collect(client.chat.completions.create(**request, stream=True))
    expect_equal(texts, {choice.index: choice.message.content for choice in whole.choices}, "texts")
    expect(set(order) == {0, 1}, order)


@check
def seeds(client, args):
    def draw(seed, n=1):
        request = {**LOCAL, "temperature": 1.5, "seed": seed, "n": n}
        return [choice.message.content for choice in client.chat.completions.create(**request).choices]

    expect_equal(draw(11), draw(11), "the same seed twice")
    expect_equal(draw(11, n=3)[0], draw(11)[0], "the same seed in a batch")
    expect(len({draw(seed)[0] for seed in range(8)}) > 1, "different seeds differ")


@check
def tokens_and_their_origin(client, args):
    answer = client.chat.completions.create(**LOCAL, extra_body={"tandem": {"tokens": True}})
    choice = answer.choices[0]
    tokens = choice.tandem["tokens"]
    expect_equal("".join(token["text"] for token in tokens), choice.message.content, "text")
    expect_equal([token["index"] for token in tokens], list(range(len(tokens))), "indices")
    expect(all(token["origin"] == "edge" for token in tokens), "local mode writes on the edge")


class Capital(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12)
    kind: Literal["fact", "guess"]
    sure: bool


class Visit(pydantic.BaseModel):
    """Plans a visit."""

    city: str = pydantic.Field(max_length=12)
    by: Literal["train", "ship"]


@check
def structured_outputs(client, args):
    texts = {}
    for mode in args.modes:
        request = {**LOCAL, "model": f"tandem:{mode}", "response_format": Capital}
        choice = client.chat.completions.parse(**request).choices[0]
        expect_equal(choice.finish_reason, "stop", f"finish_reason in mode {mode}")
        expect(isinstance(choice.message.parsed, Capital), choice.message)
        texts[mode] = choice.message.content
        with client.chat.completions.stream(**request) as stream:
            for _ in stream:
                pass
            expect_equal(stream.get_final_completion().choices[0].message.parsed, choice.message.parsed, "stream")
    if "exact" in texts and "cloud" in texts:
        expect_equal(texts["exact"], texts["cloud"], "exact writes what the cloud writes, under a schema too")
    request = {**LOCAL, "response_format": Capital, "temperature": 1.5, "seed": 3, "n": 4}
    for choice in client.chat.completions.parse(**request, logprobs=True, top_logprobs=2).choices:
        expect(isinstance(choice.message.parsed, Capital), choice.message)
        expect(choice.logprobs.content, "log probabilities")


@check
def json_objects(client, args):
    answer = client.chat.completions.create(**LOCAL, response_format={"type": "json_object"}, max_tokens=48)
    text = answer.choices[0].message.content
    expect(text.startswith("{"), text)
    if answer.choices[0].finish_reason == "stop":
        expect(isinstance(json.loads(text), dict), text)


@check
def embeddings(client, args):
    texts = [PROMPT, "Turn the lights off.", PROMPT]
    # The package asks for base64.
    answer = client.embeddings.create(model="tandem", input=texts)
    first, other, again = [entry.embedding for entry in answer.data]
    expect_equal(first, again, "the same text twice")
    expect(first != other, "another text")
    expect(abs(sum(value * value for value in first) - 1) < 1e-4, "length 1")
    as_floats = client.embeddings.create(model="tandem", input=PROMPT, encoding_format="float").data[0].embedding
    expect(all(abs(a - b) < 1e-6 for a, b in zip(first, as_floats, strict=True)), "both encodings")
    expect(answer.usage.prompt_tokens > 0, answer.usage)


@check
def forced_tool_calls(client, args):
    tool = openai.pydantic_function_tool(Visit, name="plan_visit")
    named = {"type": "function", "function": {"name": "plan_visit"}}
    for mode in args.modes:
        for choice in ("required", named):
            request = {**LOCAL, "model": f"tandem:{mode}", "tools": [tool], "tool_choice": choice}
            raw = client.chat.completions.with_raw_response.create(**request)
            expect("not described" in raw.headers["x-tandem-notice"], "the embedded pair knows no tools")
            answer = raw.parse().choices[0]
            expect_equal((answer.finish_reason, answer.message.content), ("tool_calls", None), f"mode {mode}")
            call = answer.message.tool_calls[0]
            expect_equal((call.type, call.function.name), ("function", "plan_visit"), f"mode {mode}")
            Visit.model_validate_json(call.function.arguments)
            with client.chat.completions.stream(**request) as stream:
                for _ in stream:
                    pass
                streamed = stream.get_final_completion().choices[0]
            expect_equal(streamed.finish_reason, "tool_calls", "finish_reason of the stream")
            got = streamed.message.tool_calls[0].function
            expect_equal((got.name, got.arguments), (call.function.name, call.function.arguments), "stream")
            expect(isinstance(got.parsed_arguments, Visit), got)


@check
def errors(client, args):
    create = client.chat.completions.create
    unknown = refused(openai.NotFoundError, "model", lambda: create(**{**LOCAL, "model": "gpt-4o"}))
    expect("tandem" in str(unknown), "the error lists what there is")
    refused(openai.BadRequestError, "response_format", lambda: create(**LOCAL, response_format={"type": "grammar"}))
    spec = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    unique = {"type": "json_schema", "json_schema": spec}
    where = "response_format.json_schema.schema"
    problem = refused(openai.BadRequestError, where, lambda: create(**LOCAL, response_format=unique))
    expect("uniqueItems" in str(problem), problem)
    refused(openai.BadRequestError, "temperature", lambda: create(**{**LOCAL, "temperature": 3}))
    refused(openai.BadRequestError, "typo", lambda: create(**LOCAL, extra_body={"typo": 1}))
    refused(openai.BadRequestError, "messages", lambda: create(**{**LOCAL, "messages": []}))
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    refused(openai.BadRequestError, "messages[0].content[0].type", lambda: create(**{**LOCAL, "messages": image}))
    long = [{"role": "user", "content": "word " * 50_000}]
    refused(openai.BadRequestError, "messages", lambda: create(**{**LOCAL, "messages": long}))


def active_requests(client):
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    return client.get(f"{root}/tandem/status", cast_to=object)["active_requests"]


@check
def leaving_a_stream_stops_the_work(client, args):
    for _ in range(4):
        stream = client.chat.completions.create(**LOCAL, stream=True, n=4)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + PATIENCE_S
    while active_requests(client) > 0:
        expect(time.monotonic() < deadline, "requests end after the client has left")
        time.sleep(0.05)
    expect(client.chat.completions.create(**LOCAL).choices, "the node still answers")


@check
def many_at_once(client, args):
    async def ask():
        # Retries cover the 429 of a node at its limit.
        async with openai.AsyncOpenAI(base_url=args.base_url, max_retries=8) as together:
            return await asyncio.gather(*(together.chat.completions.create(**LOCAL) for _ in range(8)))

    texts = {answer.choices[0].message.content for answer in asyncio.run(ask())}
    expect_equal(len(texts), 1, "different texts in a batch")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_url")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["local", "auto", "exact", "cloud"])
    args = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "x")
    client = openai.OpenAI(base_url=args.base_url, max_retries=0, timeout=120)
    failed = 0
    for function in checks:
        try:
            function(client, args)
            print(f"ok      {function.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

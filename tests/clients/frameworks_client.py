"""Checks a live node with clients of other makers, each in its default form, unchanged.

    python frameworks_client.py http://127.0.0.1:8080/v1 [--only haystack]
"""

import json
import os
from typing import Literal

import pydantic

from checks import check, expect, expect_equal, main

# Nothing is reported to elsewhere.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")

PROMPT = "What is the capital of Peru?"
MODEL = "tandem:local"


class Capital(pydantic.BaseModel):
    """A capital."""

    city: str = pydantic.Field(max_length=12)
    kind: Literal["fact", "guess"]


BY = {
    "type": "object",
    "properties": {"by": {"type": "string", "enum": ["train", "ship"]}},
    "required": ["by"],
    "additionalProperties": False,
}


def expect_visit(name, arguments):
    expect_equal(name, "plan_visit", "tool")
    expect(arguments["by"] in ("train", "ship"), arguments)


# -- Anthropic's package


def anthropic_client(args):
    import anthropic

    return anthropic.Anthropic(base_url=args.base_url.removesuffix("/v1"), api_key=args.key, max_retries=0)


ANTHROPIC = {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": PROMPT}]}


@check
def anthropic_plain_and_streamed(args):
    client = anthropic_client(args)
    whole = client.messages.create(**ANTHROPIC)
    expect_equal((whole.type, whole.role, whole.stop_reason), ("message", "assistant", "end_turn"), "message")
    expect("Lima" in whole.content[0].text, whole.content)
    with client.messages.stream(**ANTHROPIC) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    expect_equal((text, final.content[0].text), (whole.content[0].text,) * 2, "streamed text")
    expect_equal(final.usage.output_tokens, whole.usage.output_tokens, "tokens")
    counted = client.messages.count_tokens(model=MODEL, messages=ANTHROPIC["messages"])
    expect_equal(counted.input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens, "tokens of the prompt")


@check
def anthropic_stops(args):
    client = anthropic_client(args)
    cut = client.messages.create(**{**ANTHROPIC, "max_tokens": 1})
    expect_equal(cut.stop_reason, "max_tokens", "stop_reason")
    text = client.messages.create(**ANTHROPIC).content[0].text
    stopped = client.messages.create(**ANTHROPIC, stop_sequences=[text[2:4]])
    expect_equal((stopped.stop_reason, stopped.stop_sequence), ("stop_sequence", text[2:4]), "stop sequence")


@check
def anthropic_tool(args):
    tool = {"name": "plan_visit", "description": "Plans a visit.", "input_schema": BY}
    request = {**ANTHROPIC, "tools": [tool], "tool_choice": {"type": "any"}}
    whole = anthropic_client(args).messages.create(**request)
    expect_equal(whole.stop_reason, "tool_use", "stop_reason")
    expect_visit(whole.content[0].name, whole.content[0].input)
    with anthropic_client(args).messages.stream(**request) as stream:
        final = stream.get_final_message()
    expect_equal(final.content[0].input, whole.content[0].input, "input in a stream")


@check
def anthropic_errors(args):
    import anthropic

    client = anthropic_client(args)
    for error, change in [
        (anthropic.NotFoundError, {"model": "claude"}),
        (anthropic.BadRequestError, {"messages": []}),
        (anthropic.BadRequestError, {"max_tokens": 0}),
    ]:
        try:
            client.messages.create(**{**ANTHROPIC, **change})
            raise AssertionError("no error")
        except error as refusal:
            expect(refusal.request_id and refusal.body["error"]["message"], refusal.body)


# -- AutoGen


def autogen_client(args):
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True}
    info["family"] = "unknown"
    return OpenAIChatCompletionClient(model=MODEL, base_url=args.base_url, api_key=args.key, model_info=info)


@check
async def autogen_agent(args):
    from autogen_agentchat.agents import AssistantAgent

    for stream in (False, True):
        client = autogen_client(args)
        guide = AssistantAgent("guide", model_client=client, model_client_stream=stream)
        result = await guide.run(task=PROMPT)
        expect("Lima" in result.messages[-1].content, result.messages)
        await client.close()


@check
async def autogen_tool_and_structured_output(args):
    from autogen_core import CancellationToken
    from autogen_core.models import UserMessage
    from autogen_core.tools import FunctionTool

    def plan_visit(by: Literal["train", "ship"]) -> str:
        return "planned"

    client = autogen_client(args)
    messages = [UserMessage(content=PROMPT, source="user")]
    tool = FunctionTool(plan_visit, description="Plans a visit.")
    result = await client.create(messages, tools=[tool], tool_choice="required", cancellation_token=CancellationToken())
    expect_visit(result.content[0].name, json.loads(result.content[0].arguments))
    answer = await client.create(messages, json_output=Capital)
    Capital.model_validate_json(answer.content)
    await client.close()


# -- Haystack


def haystack_generator(args, **more):
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.utils import Secret

    key = Secret.from_token(args.key)
    return OpenAIChatGenerator(model=MODEL, api_base_url=args.base_url, api_key=key, max_retries=0, **more)


@check
def haystack_plain_and_streamed(args):
    from haystack.dataclasses import ChatMessage

    messages = [ChatMessage.from_user(PROMPT)]
    whole = haystack_generator(args).run(messages)["replies"][0].text
    expect("Lima" in whole, whole)
    chunks = []
    streamed = haystack_generator(args, streaming_callback=chunks.append).run(messages)["replies"][0].text
    expect_equal((streamed, "".join(chunk.content for chunk in chunks)), (whole, whole), "streamed text")


@check
def haystack_tool_and_structured_output(args):
    from haystack.dataclasses import ChatMessage
    from haystack.tools import Tool

    messages = [ChatMessage.from_user(PROMPT)]
    tool = Tool(name="plan_visit", description="Plans a visit.", parameters=BY, function=lambda by: "planned")
    generator = haystack_generator(args, tools=[tool], generation_kwargs={"tool_choice": "required"})
    call = generator.run(messages)["replies"][0].tool_calls[0]
    expect_visit(call.tool_name, call.arguments)
    generator = haystack_generator(args, generation_kwargs={"response_format": Capital})
    Capital.model_validate_json(generator.run(messages)["replies"][0].text)


# -- Hugging Face's client


def hf_client(args):
    from huggingface_hub import InferenceClient

    return InferenceClient(base_url=args.base_url, api_key=args.key)


HF = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64}


@check
def hf_plain_and_streamed(args):
    client = hf_client(args)
    whole = client.chat_completion(**HF).choices[0].message.content
    expect("Lima" in whole, whole)
    chunks = client.chat.completions.create(**HF, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expect_equal(text, whole, "streamed text")


@check
def hf_without_a_model(args):
    # The client sends a name that stands for none.
    answer = hf_client(args).chat_completion(messages=HF["messages"])
    expect("Lima" in answer.choices[0].message.content, answer)
    expect_equal(answer.model, "tandem", "model")


@check
def hf_tool_and_structured_output(args):
    tool = {"type": "function", "function": {"name": "plan_visit", "description": "Plans.", "parameters": BY}}
    answer = hf_client(args).chat_completion(**HF, tools=[tool], tool_choice="required")
    call = answer.choices[0].message.tool_calls[0].function
    arguments = call.arguments if isinstance(call.arguments, dict) else json.loads(call.arguments)
    expect_visit(call.name, arguments)
    schema = {**BY, "title": "Visit"}
    form = {"type": "json_schema", "json_schema": {"name": "visit", "schema": schema, "strict": True}}
    answer = hf_client(args).chat_completion(**HF, response_format=form)
    expect(json.loads(answer.choices[0].message.content)["by"] in ("train", "ship"), answer)


# -- Strands


def strands_model(args, **params):
    from strands.models.openai import OpenAIModel

    arguments = {"base_url": args.base_url, "api_key": args.key}
    return OpenAIModel(client_args=arguments, model_id=MODEL, params=params)


@check
def strands_agent(args):
    from strands import Agent

    result = Agent(model=strands_model(args), callback_handler=None)(PROMPT)
    expect("Lima" in str(result), result)


@check
async def strands_tool(args):
    spec = {"name": "plan_visit", "description": "Plans a visit.", "inputSchema": {"json": BY}}
    messages = [{"role": "user", "content": [{"text": PROMPT}]}]
    name, text, stop = None, "", None
    async for event in strands_model(args).stream(messages, tool_specs=[spec], tool_choice={"any": {}}):
        if "contentBlockStart" in event and event["contentBlockStart"]["start"]:
            name = event["contentBlockStart"]["start"]["toolUse"]["name"]
        if "contentBlockDelta" in event:
            text += event["contentBlockDelta"]["delta"].get("toolUse", {}).get("input", "")
        stop = event.get("messageStop", {}).get("stopReason", stop)
    expect_visit(name, json.loads(text))
    expect_equal(stop, "tool_use", "stopReason")


@check
async def strands_structured_output(args):
    messages = [{"role": "user", "content": [{"text": PROMPT}]}]
    output = None
    async for event in strands_model(args).structured_output(Capital, messages):
        output = event.get("output", output)
    expect(isinstance(output, Capital), output)


if __name__ == "__main__":
    main()

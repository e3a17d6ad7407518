"""Checks the Responses API of a live node with the `openai` package and with `openai-agents`, unchanged.

    python responses_client.py http://127.0.0.1:8080/v1
"""

import json
import logging
from typing import Literal

import agents
import openai
import pydantic

from checks import check, expect, expect_equal, main

PROMPT = "What is the capital of Peru?"
# Greedy and on the device alone: the same text every time, whatever the network does.
LOCAL = {"model": "tandem:local", "temperature": 0}

# No traces leave for elsewhere.
agents.set_tracing_disabled(True)
logging.getLogger("openai.agents").setLevel(logging.ERROR)


def client(args):
    return openai.OpenAI(base_url=args.base_url, api_key=args.key, max_retries=0)


class Capital(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12)
    kind: Literal["fact", "guess"]


PLAN_VISIT = {
    "type": "function",
    "name": "plan_visit",
    "description": "Plans a visit.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"by": {"enum": ["train", "ship"]}},
        "required": ["by"],
        "additionalProperties": False,
    },
}


@check
def response(args):
    answer = client(args).responses.create(**LOCAL, input=PROMPT)
    expect_equal((answer.status, answer.object, answer.error), ("completed", "response", None), "status")
    expect("Lima" in answer.output_text, answer.output_text)
    usage = answer.usage
    expect_equal(usage.total_tokens, usage.input_tokens + usage.output_tokens, "total")
    chat = client(args).chat.completions.create(**LOCAL, messages=[{"role": "user", "content": PROMPT}])
    expect_equal(answer.output_text, chat.choices[0].message.content, "the Chat API answers alike")


@check
def stream(args):
    whole = client(args).responses.create(**LOCAL, input=PROMPT)
    events = list(client(args).responses.create(**LOCAL, input=PROMPT, stream=True))
    expect_equal([event.sequence_number for event in events], list(range(len(events))), "numbers")
    expect_equal([events[0].type, events[-1].type], ["response.created", "response.completed"], "first and last")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    expect_equal(text, whole.output_text, "text")
    with client(args).responses.stream(**LOCAL, input=PROMPT) as helper:
        for _ in helper:
            pass
        expect_equal(helper.get_final_response().output_text, whole.output_text, "the helper's text")


@check
def structured_output(args):
    parsed = client(args).responses.parse(**LOCAL, input=PROMPT, text_format=Capital).output_parsed
    expect(isinstance(parsed, Capital), parsed)


@check
def tools(args):
    request = {**LOCAL, "tools": [PLAN_VISIT], "tool_choice": "required"}
    first = client(args).responses.create(**request, input=PROMPT)
    call = first.output[0]
    expect_equal((call.type, call.name), ("function_call", "plan_visit"), "call")
    expect(json.loads(call.arguments)["by"] in ("train", "ship"), call.arguments)
    with client(args).responses.stream(**request, input=PROMPT) as helper:
        for _ in helper:
            pass
        streamed = helper.get_final_response().output[0]
    expect_equal((streamed.name, streamed.arguments), (call.name, call.arguments), "call in a stream")


@check
def state(args):
    api = client(args)
    first = api.responses.create(**LOCAL, input=PROMPT)
    second = api.responses.create(**LOCAL, input="And of Chile?", previous_response_id=first.id)
    again = [{"role": "user", "content": PROMPT}, *first.output, {"role": "user", "content": "And of Chile?"}]
    expect_equal(second.output_text, api.responses.create(**LOCAL, input=again).output_text, "the same conversation")
    expect_equal(api.responses.retrieve(first.id).output_text, first.output_text, "what is kept")
    api.responses.delete(first.id)
    try:
        api.responses.retrieve(first.id)
        raise AssertionError("the response is still there")
    except openai.NotFoundError:
        pass
    unkept = api.responses.create(**LOCAL, input=PROMPT, store=False)
    try:
        api.responses.create(**LOCAL, input=PROMPT, previous_response_id=unkept.id)
        raise AssertionError("no error")
    except openai.BadRequestError as refusal:
        expect_equal(refusal.param, "previous_response_id", "param")


@check
def length(args):
    answer = client(args).responses.create(**LOCAL, input=PROMPT, max_output_tokens=1)
    expect_equal((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"), "end")


def agent(args, **more):
    provider = agents.OpenAIProvider(base_url=args.base_url, api_key=args.key)
    return agents.Agent(name="Guide", instructions="Answer.", model=provider.get_model("tandem:local"), **more)


@check
async def agents_plain_and_streamed(args):
    result = await agents.Runner.run(agent(args), PROMPT)
    expect("Lima" in result.final_output, result.final_output)
    streamed = agents.Runner.run_streamed(agent(args), PROMPT)
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    expect_equal(text, streamed.final_output, "streamed text")


@check
async def agents_tool(args):
    called = []

    @agents.function_tool
    def plan_visit(by: Literal["train", "ship"]) -> str:
        """Plans a visit."""
        called.append(by)
        return "planned"

    settings = agents.ModelSettings(tool_choice="required", temperature=0)
    # The embedded pair knows no results of tools: the run ends with the first one.
    guide = agent(args, tools=[plan_visit], model_settings=settings, tool_use_behavior="stop_on_first_tool")
    result = await agents.Runner.run(guide, PROMPT)
    expect_equal((len(called), result.final_output), (1, "planned"), "the tool's result")


@check
async def agents_structured_output(args):
    result = await agents.Runner.run(agent(args, output_type=Capital), PROMPT)
    expect(isinstance(result.final_output, Capital), result.final_output)


if __name__ == "__main__":
    main()

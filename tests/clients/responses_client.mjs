// Checks the Responses API of a live node with the `openai` npm package, unchanged.
//
//     node responses_client.mjs http://127.0.0.1:8080/v1

import assert from "node:assert/strict";

import OpenAI from "openai";

const baseURL = process.argv[2];
if (!baseURL) {
  console.error("usage: node responses_client.mjs BASE_URL");
  process.exit(2);
}
const client = new OpenAI({ baseURL, apiKey: process.env.OPENAI_API_KEY ?? "x", maxRetries: 0, timeout: 120_000 });

// Greedy and on the device alone: the same text every time, whatever the network does.
const LOCAL = { model: "tandem:local", input: "What is the capital of Peru?", temperature: 0 };
const BY = {
  type: "object",
  properties: { by: { enum: ["train", "ship"] } },
  required: ["by"],
  additionalProperties: false,
};

const checks = {
  async response() {
    const answer = await client.responses.create(LOCAL);
    assert.equal(answer.status, "completed");
    assert.match(answer.output_text, /Lima/);
    assert.equal(answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens);
  },

  async stream() {
    const whole = await client.responses.create(LOCAL);
    let text = "";
    let number = 0;
    for await (const event of await client.responses.create({ ...LOCAL, stream: true })) {
      assert.equal(event.sequence_number, number);
      number += 1;
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, whole.output_text);
    const final = await client.responses.stream(LOCAL).finalResponse();
    assert.equal(final.output_text, whole.output_text);
  },

  async structuredOutput() {
    const format = { type: "json_schema", name: "visit", strict: true, schema: BY };
    const answer = await client.responses.parse({ ...LOCAL, text: { format } });
    assert.ok(["train", "ship"].includes(answer.output_parsed.by));
  },

  async tools() {
    const tools = [{ type: "function", name: "plan_visit", parameters: BY, strict: true }];
    const request = { ...LOCAL, tools, tool_choice: "required" };
    const [call] = (await client.responses.create(request)).output;
    assert.deepEqual([call.type, call.name], ["function_call", "plan_visit"]);
    assert.ok(["train", "ship"].includes(JSON.parse(call.arguments).by));
    const [streamed] = (await client.responses.stream(request).finalResponse()).output;
    assert.equal(streamed.arguments, call.arguments);
  },

  async state() {
    const first = await client.responses.create(LOCAL);
    const second = await client.responses.create({ ...LOCAL, input: "And of Chile?", previous_response_id: first.id });
    const input = [{ role: "user", content: LOCAL.input }, ...first.output, { role: "user", content: "And of Chile?" }];
    assert.equal(second.output_text, (await client.responses.create({ ...LOCAL, input })).output_text);
    assert.equal((await client.responses.retrieve(first.id)).id, first.id);
    await client.responses.delete(first.id);
    await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  },
};

let failed = 0;
for (const [name, run] of Object.entries(checks)) {
  try {
    await run();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.stack}`);
  }
}
console.log(`${Object.keys(checks).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);

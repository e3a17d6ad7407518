// Checks a live node with the `openai` npm package, unchanged.
//
//     node openai_client.mjs http://127.0.0.1:8080/v1 [--modes local,auto,exact,cloud]

import assert from "node:assert/strict";
import { parseArgs } from "node:util";

import OpenAI from "openai";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { modes: { type: "string", default: "local,auto,exact,cloud" } },
});
const baseURL = positionals[0];
if (!baseURL) {
  console.error("usage: node openai_client.mjs BASE_URL [--modes local,auto,exact,cloud]");
  process.exit(2);
}
const modes = values.modes.split(",");
const client = new OpenAI({ baseURL, apiKey: process.env.OPENAI_API_KEY ?? "x", maxRetries: 0, timeout: 120_000 });
const chat = (extra) => client.chat.completions.create({ ...LOCAL, ...extra });

const PROMPT = "What is the capital of Peru?";
// Greedy and on the device alone: the same text every time, whatever the network does.
const LOCAL = { model: "tandem:local", messages: [{ role: "user", content: PROMPT }], temperature: 0 };
const PATIENCE_MS = 20_000;

const checks = {
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    for (const name of ["tandem", "tandem:local", "tandem:auto", "tandem:exact", "tandem:cloud"]) {
      assert.ok(names.includes(name), `${name} is in ${names}`);
      assert.equal((await client.models.retrieve(name)).id, name);
    }
  },

  async chat() {
    const answer = await chat();
    assert.ok(answer.choices[0].message.content);
    assert.equal(answer.choices[0].message.role, "assistant");
    const { usage } = answer;
    assert.ok(usage.prompt_tokens > 0 && usage.completion_tokens > 0);
    assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
    assert.equal(usage.tandem.cloud_tokens, 0);
    assert.equal(usage.tandem.bytes_up, 0);
  },

  async chatStreamEqualsChat() {
    const whole = await chat();
    const got = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(got.texts, { 0: whole.choices[0].message.content });
    assert.deepEqual(got.ends, { 0: whole.choices[0].finish_reason });
    assert.equal(got.usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(got.usage.prompt_tokens, whole.usage.prompt_tokens);
  },

  async streamHelper() {
    const stream = client.chat.completions.stream(LOCAL);
    const whole = await chat();
    assert.equal(await stream.finalContent(), whole.choices[0].message.content);
  },

  async everyMode() {
    const texts = {};
    for (const mode of modes) {
      const { data, response } = await chat({ model: `tandem:${mode}` }).withResponse();
      assert.equal(response.headers.get("x-tandem-mode"), mode);
      assert.ok(response.headers.get("x-request-id"));
      texts[mode] = data.choices[0].message.content;
      assert.ok(texts[mode], mode);
    }
    if (texts.exact && texts.cloud) assert.equal(texts.exact, texts.cloud);
  },

  async conversation() {
    const first = (await chat()).choices[0].message;
    const next = { role: "user", content: [{ type: "text", text: "And of Chile?" }] };
    assert.ok((await chat({ messages: [...LOCAL.messages, first, next] })).choices[0]);
  },

  async completions() {
    const request = { model: "tandem:local", prompt: PROMPT, max_tokens: 8, temperature: 0 };
    const whole = await client.completions.create(request);
    let text = "";
    for await (const part of await client.completions.create({ ...request, stream: true })) text += part.choices[0].text;
    assert.equal(text, whole.choices[0].text);
    const several = await client.completions.create({ ...request, prompt: [PROMPT, PROMPT] });
    assert.deepEqual(several.choices.map((choice) => choice.text), [text, text]);
  },

  async logprobs() {
    const answer = await chat({ logprobs: true, top_logprobs: 3 });
    const { content } = answer.choices[0].logprobs;
    const bytes = content.filter((token) => !token.token.startsWith("<|")).flatMap((token) => token.bytes);
    assert.equal(Buffer.from(bytes).toString("utf8"), answer.choices[0].message.content);
    for (const token of content) {
      assert.equal(token.top_logprobs.length, 3);
      assert.equal(token.top_logprobs[0].token, token.token);
    }
  },

  async stop() {
    const text = (await chat()).choices[0].message.content;
    const middle = Math.max(1, Math.floor(text.length / 2));
    const mark = text.slice(middle, middle + 2);
    const wanted = text.slice(0, text.indexOf(mark));
    const answer = await chat({ stop: [mark] });
    assert.equal(answer.choices[0].message.content, wanted);
    assert.equal(answer.choices[0].finish_reason, "stop");
    const got = await collect(await chat({ stop: mark, stream: true }));
    assert.deepEqual(got.texts, { 0: wanted });
  },

  async severalChoices() {
    const request = { n: 2, temperature: 1.5, seed: 5 };
    const whole = await chat(request);
    assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1]);
    const got = await collect(await chat({ ...request, stream: true }));
    assert.deepEqual(got.texts, Object.fromEntries(whole.choices.map((c) => [c.index, c.message.content])));
  },

  async seeds() {
    const draw = async (seed, n = 1) =>
      (await chat({ temperature: 1.5, seed, n })).choices.map((choice) => choice.message.content);
    assert.deepEqual(await draw(11), await draw(11));
    assert.equal((await draw(11, 3))[0], (await draw(11))[0]);
  },

  async tokensAndTheirOrigin() {
    const [choice] = (await chat({ tandem: { tokens: true } })).choices;
    assert.equal(choice.tandem.tokens.map((token) => token.text).join(""), choice.message.content);
  },

  async structuredOutputs() {
    const schema = {
      type: "object",
      properties: { city: { type: "string", maxLength: 12 }, kind: { enum: ["fact", "guess"] } },
      required: ["city", "kind"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "capital", strict: true, schema } };
    for (const mode of modes) {
      const request = { ...LOCAL, model: `tandem:${mode}`, response_format };
      const { message, finish_reason } = (await client.chat.completions.parse(request)).choices[0];
      assert.equal(finish_reason, "stop");
      assert.deepEqual(Object.keys(message.parsed), ["city", "kind"]);
      assert.ok(["fact", "guess"].includes(message.parsed.kind));
    }
  },

  async forcedToolCalls() {
    const parameters = {
      type: "object",
      properties: { city: { type: "string", maxLength: 12 } },
      required: ["city"],
      additionalProperties: false,
    };
    const tools = [{ type: "function", function: { name: "plan_visit", parameters, strict: true } }];
    for (const mode of modes) {
      const request = { ...LOCAL, model: `tandem:${mode}`, tools, tool_choice: "required" };
      const { message, finish_reason } = (await client.chat.completions.create(request)).choices[0];
      assert.equal(finish_reason, "tool_calls");
      assert.equal(message.tool_calls[0].function.name, "plan_visit");
      assert.deepEqual(Object.keys(JSON.parse(message.tool_calls[0].function.arguments)), ["city"]);
      const streamed = await client.chat.completions.stream(request).finalChatCompletion();
      assert.equal(streamed.choices[0].finish_reason, "tool_calls");
      assert.deepEqual(streamed.choices[0].message.tool_calls[0].function.arguments, message.tool_calls[0].function.arguments);
    }
  },

  async errors() {
    await refused(OpenAI.NotFoundError, "model", { model: "gpt-4o" });
    await refused(OpenAI.BadRequestError, "response_format", { response_format: { type: "grammar" } });
    await refused(OpenAI.BadRequestError, "temperature", { temperature: 3 });
    await refused(OpenAI.BadRequestError, "typo", { typo: 1 });
    await refused(OpenAI.BadRequestError, "tools[0].type", { stream: true, tools: [{}] });
    await refused(OpenAI.BadRequestError, "messages", { messages: [{ role: "user", content: "word ".repeat(50_000) }] });
  },

  async leavingAStreamStopsTheWork() {
    for (let i = 0; i < 4; i += 1) {
      const stream = await chat({ stream: true, n: 4 });
      for await (const _ of stream) break;
      stream.controller.abort();
    }
    const deadline = Date.now() + PATIENCE_MS;
    const status = new URL("/tandem/status", baseURL).href;
    while ((await client.get(status)).active_requests > 0) {
      assert.ok(Date.now() < deadline, "requests end after the client has left");
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    assert.ok((await chat()).choices[0]);
  },
};

/** Texts and finish reasons by choice, and the usage. */
async function collect(stream) {
  const [texts, ends] = [{}, {}];
  let usage = null;
  for await (const chunk of stream) {
    assert.equal(usage, null, "the usage chunk is the last one");
    if (chunk.choices.length === 0) {
      usage = chunk.usage;
      continue;
    }
    const [choice] = chunk.choices;
    assert.ok(!(choice.index in ends), "nothing follows the end of a choice");
    if (!(choice.index in texts)) assert.equal(choice.delta.role, "assistant");
    texts[choice.index] = (texts[choice.index] ?? "") + (choice.delta.content ?? "");
    if (choice.finish_reason) ends[choice.index] = choice.finish_reason;
  }
  assert.deepEqual(Object.keys(ends), Object.keys(texts));
  return { texts, ends, usage };
}

/** Checks that a request is refused with this class of error, and that the error names the field. */
async function refused(error, param, extra) {
  await assert.rejects(chat(extra), (refusal) => {
    assert.ok(refusal instanceof error, `${refusal}`);
    assert.equal(refusal.param, param);
    assert.equal(refusal.type, "invalid_request_error");
    return true;
  });
}

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

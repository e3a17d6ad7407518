#!/usr/bin/env python3
"""Makes chat.json: what transformers renders with the templates in chat/ and the conversations below.

    pip install transformers jinja2
    make_chat.py chat chat.json                # or a folder of other templates (*.jinja), e.g. those of real models

The templates in chat/ are this project's own. Each uses what the templates of one family use, down to the
constructs; smollm2.jinja alone is a model's own (SmolLM2-135M-Instruct, Apache-2.0, from its GGUF)."""
import json, sys
from datetime import datetime, timezone
from pathlib import Path
from transformers.utils import chat_template_utils

NOW = 1_764_030_896  # 2025-11-25 00:34:56 UTC
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a place <now> & \"later\"", "parameters": {
    "type": "object", "properties": {
        "place": {"type": "string", "description": "Ort, z. B. Zürich"},
        "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
        "days": {"type": "array", "items": {"type": "integer"}}, "detail": {"type": "object", "properties": {"wind": {"type": "boolean"}}, "required": ["wind"]},
        "limit": {"type": ["number", "null"], "default": 1.5}}, "required": ["place"]}}}
ZERO = {"type": "function", "function": {"name": "zero", "description": "Nothing", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcd12345", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "東京", "days": [1, 2], "x<y": True}}}
SYSTEM = {"role": "system", "content": " You are terse. <b>é</b> "}
USER = {"role": "user", "content": "Wie ist das Wetter in 東京? 🙂 <|im_end|> it's 5 < 7 && \"quoted\"\n"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "part one "}, {"type": "text", "text": "part <two>"}]}
REPLY = {"role": "assistant", "content": "<think>\nhm, let me see\n</think>\n\nSunny.\n"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcd12345", "name": "get_weather", "content": '{"temp": 21.5, "note": "é"}'}
AGAIN = {"role": "user", "content": "and tomorrow?"}
CASES = {
    "user": {"messages": [USER]},
    "system and turns": {"messages": [SYSTEM, USER, REPLY, AGAIN]},
    "ends with the assistant": {"messages": [USER, REPLY], "add_generation_prompt": False},
    "parts": {"messages": [PARTS]},
    "tools": {"messages": [SYSTEM, USER], "tools": [WEATHER, ZERO]},
    "a tool's turn": {"messages": [USER, CALLS, RESULT, {"role": "assistant", "content": "21.5 °C"}, AGAIN], "tools": [WEATHER]},
    "a tool's answer last": {"messages": [USER, CALLS, RESULT], "tools": [WEATHER]},
    "two answers of tools": {"messages": [USER, {**CALLS, "content": ""}, RESULT, RESULT], "tools": [WEATHER]},
    "two calls": {"messages": [USER, {**CALLS, "tool_calls": [CALL, {**CALL, "id": "abcd12346"}]}, RESULT, RESULT]},
    "reasoning": {"messages": [USER, {"role": "assistant", "content": "Sunny.", "reasoning_content": "thought\n"}, AGAIN]},
    "no thinking": {"messages": [USER], "more": {"enable_thinking": False, "reasoning_effort": "high"}},
    "roles that do not alternate": {"messages": [USER, USER]},
    "documents": {"messages": [USER], "documents": [{"title": "T1", "text": "..."}, {"title": "Ü2", "text": ""}]},
}


def main(folder, out):
    class Fixed(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(NOW, timezone.utc)
    chat_template_utils.datetime = Fixed
    rows = {}
    for path in sorted(folder.glob("*.jinja")):
        template = chat_template_utils._compile_jinja_template.__wrapped__(path.read_text())
        rows[path.name] = {}
        for name, case in CASES.items():
            more = case.get("more", {})
            try:
                text = template.render(
                    messages=case["messages"], tools=case.get("tools"), documents=case.get("documents"),
                    add_generation_prompt=case.get("add_generation_prompt", True), bos_token="<s>", eos_token="</s>", **more)
                rows[path.name][name] = {"text": text}
            except Exception as error:
                rows[path.name][name] = {"error": str(error)}
    Path(out).write_text(json.dumps({"now": NOW, "cases": CASES, "templates": rows}, ensure_ascii=False, indent=0) + "\n")
    for name, cases in rows.items():
        print(name, {k: v["error"] for k, v in cases.items() if "error" in v})


main(Path(sys.argv[1]), sys.argv[2])

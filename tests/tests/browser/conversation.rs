//! A conversation: what goes along, what is kept, how it is shown.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tandem_tests::browser::Browser;

use super::{CAPITAL, SUM, finished, rig, unrig};

/// Keeps what the page asks for in `window.asked` and lets it through.
const OVERHEARD: &str = "(window.asked = JSON.parse(init.body), window.realFetch(url, init))";

async fn sent(browser: &Browser) -> Result<Value> {
    browser.script("return window.asked.messages.map((message) => `${message.role}: ${message.content}`)").await
}

async fn reload(browser: &Browser) -> Result<()> {
    browser.script("window.old = true; location.reload()").await?;
    browser
        .until("the page again", "return !window.old && document.getElementById('pill')?.dataset.link === 'up'")
        .await
}

/// What a model says to itself stands folded above its answer, is kept, and is no part of the answer.
pub(crate) async fn reasoning(browser: &Browser) -> Result<()> {
    let answer = r#"Promise.resolve(new Response('data: {"choices":[{"index":0,"delta":{"reasoning_content":"Peru <b>"}}]}\n\ndata: {"choices":[{"index":0,"delta":{"reasoning_content":"or Chile?"}}]}\n\ndata: {"choices":[{"index":0,"delta":{"content":"Lima."},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'))"#;
    let fold = "const fold = document.querySelector('.turn:last-child details.reasoning');
         return [fold.hidden, fold.open, fold.querySelector('div').textContent]";
    rig(browser, answer).await?;
    let shown = browser.ask(CAPITAL).await?;
    unrig(browser).await?;
    ensure!(shown.state == "done" && shown.text.trim() == "Lima.", "{shown:?}");
    let wanted = json!([false, false, "Peru <b>or Chile?"]);
    ensure!(browser.script(fold).await? == wanted, "{}", browser.script(fold).await?);
    browser.click(".turn:last-child details.reasoning summary").await?;
    ensure!(browser.text(".turn:last-child details.reasoning").await?.contains("or Chile?"));
    reload(browser).await?;
    ensure!(browser.script(fold).await? == wanted, "kept: {}", browser.script(fold).await?);
    // An answer without has no fold.
    finished(&browser.ask(CAPITAL).await?)?;
    ensure!(browser.script(fold).await? == json!([true, false, ""]), "{}", browser.script(fold).await?);
    Ok(())
}

/// All turns go along and outlive the page; a new chat begins without them.
pub(crate) async fn turns(browser: &Browser) -> Result<()> {
    browser.click("#clear").await?;
    browser.click("#follow").await?;
    rig(browser, OVERHEARD).await?;
    let mut wanted = Vec::new();
    for question in [CAPITAL, "And what is its currency?", SUM] {
        let shown = browser.ask(question).await?;
        finished(&shown)?;
        wanted.push(format!("user: {question}"));
        ensure!(sent(browser).await? == json!(wanted), "{}", sent(browser).await?);
        wanted.push(format!("assistant: {}", shown.text.trim()));
    }
    let before = browser.last().await?;

    reload(browser).await?;
    let after = browser.last().await?;
    ensure!(after.text == before.text && after.origins == before.origins, "kept {after:?} of {before:?}");
    ensure!(after.facts == before.facts, "kept {:?} of {:?}", after.facts, before.facts);
    let card = browser.token_card(0, false).await?;
    ensure!(card.contains("token 1 ") && card.contains('%'), "{card}");
    rig(browser, OVERHEARD).await?;
    finished(&browser.ask(CAPITAL).await?)?;
    wanted.push(format!("user: {CAPITAL}"));
    ensure!(sent(browser).await? == json!(wanted), "{}", sent(browser).await?);

    let file = browser
        .script_later(
            "const done = arguments[arguments.length - 1];
             const real = URL.createObjectURL;
             URL.createObjectURL = (blob) => { blob.text().then(done); return real.call(URL, blob); };
             document.getElementById('export').click();
             URL.createObjectURL = real;",
        )
        .await?;
    let file = file.as_str().unwrap_or_default();
    for part in [CAPITAL, SUM, before.text.trim(), "## You", "## Tandem (auto)"] {
        ensure!(file.contains(part), "the file lacks {part:?}: {file}");
    }

    // Too long for the model: asked again without the oldest turns, and said so.
    let refused =
        r#"new Response('{"error":{"message":"too long","code":"context_length_exceeded"}}', { status: 400 })"#;
    let once = format!("window.tries++ === 0 ? Promise.resolve({refused}) : {OVERHEARD}");
    browser.script("window.tries = 0").await?;
    rig(browser, &once).await?;
    let shown = browser.ask(SUM).await?;
    finished(&shown)?;
    ensure!(shown.facts.contains("2 earlier turns left out"), "{shown:?}");
    let kept = sent(browser).await?;
    ensure!(kept.as_array().map(Vec::len) == Some(5) && kept[0] == format!("user: {SUM}"), "{kept}");
    unrig(browser).await?;

    browser.click("#clear").await?;
    reload(browser).await?;
    ensure!(browser.script("return document.querySelectorAll('.turn').length").await? == 0, "the old chat is back");
    ensure!(browser.script("return document.getElementById('export').disabled").await? == true);
    Ok(())
}

/// System prompt, temperature and token limit go along and are remembered; tints can be switched off.
pub(crate) async fn settings(browser: &Browser) -> Result<()> {
    browser.keys_to("#system", "Be brief.").await?;
    browser.keys_to("#temperature", "\u{e010}").await?;
    browser.keys_to("#tokens", "3").await?;
    browser.click("#tints").await?;
    reload(browser).await?;
    rig(browser, OVERHEARD).await?;
    let shown = browser.ask(SUM).await?;
    ensure!(shown.state == "done", "{shown:?}");
    let asked =
        browser.script("const { temperature, max_tokens } = window.asked; return { temperature, max_tokens }").await?;
    ensure!(asked == json!({ "temperature": 2, "max_tokens": 3 }), "{asked}");
    ensure!(sent(browser).await? == json!(["system: Be brief.", format!("user: {SUM}")]), "{}", sent(browser).await?);
    let tint = "return getComputedStyle(document.querySelector('.answer .tok')).backgroundColor";
    let plain = browser.script(tint).await?;
    browser.click("#tints").await?;
    ensure!(browser.script(tint).await? != plain, "the tints stay {plain}");
    unrig(browser).await?;
    browser.script("localStorage.removeItem('tandem-settings')").await?;
    browser.click("#clear").await?;
    reload(browser).await
}

/// The text of an answer with Markdown, markup and token borders anywhere in it.
const MARKDOWN: &str = "# Result\n\nIt is **bold**, `co<b>de` and [a link](https://example.com/).\n\n- one\n- two\n\n\
    ```js\nconst a = 1;\nalert(\"<i>\")\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n\
    <img src=x onerror=\"window.hurt = 1\"><script>window.hurt = 2</script> [bad](javascript:window.hurt=3) 6*7=42 and 3*4=12";

/// Markdown becomes elements, markup stays text, and tokens keep their tints wherever they are cut.
pub(crate) async fn markdown(browser: &Browser) -> Result<()> {
    for size in [1, 3, 7, 500] {
        let chars: Vec<char> = MARKDOWN.chars().collect();
        let mut body = String::new();
        for (index, piece) in chars.chunks(size).enumerate() {
            let text: String = piece.iter().collect();
            let origin = ["edge", "verified", "cloud"][index % 3];
            let token = json!({ "index": index, "id": index, "text": text, "origin": origin, "reason": "risk" });
            let chunk =
                json!({ "choices": [{ "index": 0, "delta": { "content": text }, "tandem": { "tokens": [token] } }] });
            body.extend(["data: ", &chunk.to_string(), "\n\n"]);
        }
        body.push_str(
            "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
        );
        rig(browser, &format!("Promise.resolve(new Response({}))", json!(body))).await?;
        let shown = browser.ask("Markdown?").await?;
        ensure!(shown.state == "done" && shown.origins.len() >= 3_usize.min(chars.len() / size), "{shown:?}");
        let found = browser
            .script(
                "const text = [...document.querySelectorAll('.answer-text')].at(-1);
                 const of = (css) => [...text.querySelectorAll(css)].map((element) => element.textContent);
                 return {
                   heading: of('h3'), strong: of('strong'), code: of('p code'), link: [...text.querySelectorAll('a')].map((a) => a.href),
                   items: of('li'), block: of('pre'), cells: of('td'), hurt: window.hurt ?? null, em: of('em'),
                   foreign: of('img, script, b, i, iframe, style'), untinted: [...text.querySelectorAll('p, li, pre, td, h3')]
                     .filter((element) => !element.querySelector('.tok')).length,
                   seen: new Set([...text.querySelectorAll('.tok')].map((tok) => tok.dataset.origin)).size,
                 }",
            )
            .await?;
        let mut wanted = json!({
            "heading": ["Result"], "strong": ["bold"], "code": ["co<b>de"], "link": ["https://example.com/"],
            "items": ["one", "two"], "block": ["const a = 1;\nalert(\"<i>\")"], "cells": ["1", "2"], "hurt": null, "em": [],
            "foreign": [], "untinted": 0, "seen": 3,
        });
        if size == 500 {
            wanted["seen"] = 1.into();
        }
        ensure!(found == wanted, "pieces of {size}: {found}");
        ensure!(
            shown.text.contains("<img src=x onerror=\"window.hurt = 1\"><script>window.hurt = 2</script>"),
            "{shown:?}"
        );
    }
    unrig(browser).await?;
    browser.click("#clear").await
}

/// The browser's language is the page's, until the reader chooses.
pub(crate) async fn languages(browser: &Browser, page: &str) -> Result<()> {
    let chinese = "return document.documentElement.lang === 'zh-CN' && document.getElementById('mode-text').textContent.includes('云端')";
    let spoken = browser.speak("zh-CN").await?;
    browser.open(page, 1280, 820, false).await?;
    ensure!(browser.script(chinese).await? == true, "{}", browser.text("body").await?);
    let nameless = browser.nameless().await?;
    ensure!(nameless.is_empty(), "controls without a name: {nameless:?}");
    let shown = browser.ask(SUM).await?;
    ensure!(shown.state == "done" && shown.facts.contains("词元"), "{shown:?}");
    browser.click("#language").await?;
    ensure!(browser.script(chinese).await? == false && browser.text("#threshold-card").await?.contains("Threshold"));
    finished(&browser.last().await?)?;
    reload(browser).await?;
    ensure!(browser.text(".legend").await?.contains("confirmed by the cloud"), "the choice is forgotten");
    browser.forget(spoken).await?;
    browser.script("localStorage.removeItem('tandem-language')").await?;
    browser.click("#clear").await
}

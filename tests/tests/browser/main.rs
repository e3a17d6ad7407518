//! The chat page in a headless Chromium, against a live node.

mod conversation;
mod health;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tandem_tests::browser::{Browser, Shown};
use tandem_tests::process::Up;

const CAPITAL: &str = "What is the capital of Peru?";
const SUM: &str = "Calculate 936 + 181.";
const REMINDER: &str = "Remind me to clean the filter at 2:15 PM.";

#[tokio::test(flavor = "multi_thread")]
async fn chat_page() -> Result<()> {
    let Some(browser) = Browser::start().await? else {
        return Ok(());
    };
    // A node of its own: the test cuts the cloud off.
    let up = Up::start(&[]).await?;
    let page = up.page.clone();
    browser.open(&page, 1280, 820, false).await?;

    empty_page(&browser).await.context("empty page")?;
    // Until the conversation's own part, each question stands alone: answers depend on what went before.
    browser.click("#follow").await?;
    stream_reader(&browser).await.context("stream reader")?;
    first_answers(&browser).await.context("first answers")?;
    token_cards(&browser).await.context("token cards")?;
    screenshot(&browser).await.context("screenshot")?;
    modes(&browser).await.context("modes")?;
    threshold(&browser).await.context("threshold")?;
    plug_pulled(&browser).await.context("plug pulled")?;
    trouble(&browser).await.context("trouble")?;
    conversation::reasoning(&browser).await.context("reasoning")?;
    conversation::turns(&browser).await.context("turns")?;
    conversation::settings(&browser).await.context("settings")?;
    conversation::markdown(&browser).await.context("Markdown")?;
    conversation::languages(&browser, &page).await.context("languages")?;
    health::states(&browser).await.context("states of the cloud")?;
    quiet_while_hidden(&browser).await.context("hidden page")?;
    phone(&browser, &page).await.context("phone")?;
    themes(&browser).await.context("themes")?;

    let console = browser.console().await?;
    ensure!(console.is_empty(), "the console holds {console:?}");
    let requests = browser.requests().await?;
    ensure!(requests.iter().any(|url| url.ends_with("/tandem/status")), "the log of requests is empty");
    let foreign: Vec<_> = requests.iter().filter(|url| !url.starts_with(&page)).take(8).collect();
    ensure!(foreign.is_empty(), "the page asked {foreign:?}");
    browser.close().await
}

async fn empty_page(browser: &Browser) -> Result<()> {
    ensure!(browser.text("#empty").await?.contains("One answer, two models"));
    ensure!(browser.text("#chips").await?.contains(CAPITAL));
    ensure!(browser.text(".legend").await?.contains("confirmed by the cloud"));
    ensure!(browser.script("return document.getElementById('send').disabled").await? == true);
    ensure!(browser.script("return document.activeElement.id").await? == "prompt", "the question has not the focus");
    let nameless = browser.nameless().await?;
    ensure!(nameless.is_empty(), "controls without a name: {nameless:?}");
    ensure!(browser.script("return document.getElementById('pill').dataset.link").await? == "up", "no cloud");
    Ok(())
}

/// However the network cuts the stream, the same events come out.
async fn stream_reader(browser: &Browser) -> Result<()> {
    let found = browser
        .script_later(
            r#"const done = arguments[arguments.length - 1];
            const { events } = await import("/assets/js/stream.js");
            const raw = ": hi\n\ndata: {\"a\":1}\r\n\r\ndata:x\ndata: y\n\nevent: z\rdata: grüße 🚲\r\rdata: [DONE]";
            const bytes = new TextEncoder().encode(raw);
            const wanted = JSON.stringify(['{"a":1}', "x\ny", "grüße 🚲", "[DONE]"]);
            const read = async (cuts) => {
              const stream = new ReadableStream({
                start(controller) {
                  for (let at = 0; at < cuts.length - 1; at++) controller.enqueue(bytes.slice(cuts[at], cuts[at + 1]));
                  controller.close();
                },
              });
              const got = [];
              for await (const data of events(stream)) got.push(data);
              return JSON.stringify(got);
            };
            for (let first = 0; first <= bytes.length; first++) {
              const got = await read([0, first, bytes.length]);
              if (got !== wanted) return done(`cut at ${first}: ${got}`);
            }
            const single = await read([...bytes.keys(), bytes.length]);
            done(single === wanted ? "same" : `byte by byte: ${single}`);"#,
        )
        .await?;
    ensure!(found == "same", "{found}");
    Ok(())
}

fn finished(shown: &Shown) -> Result<()> {
    ensure!(shown.state == "done" && !shown.text.trim().is_empty(), "{shown:?}");
    for part in ["token", "round trip", "tok/s", "ttft"] {
        ensure!(shown.facts.contains(part), "the line under the answer lacks {part:?}: {}", shown.facts);
    }
    Ok(())
}

async fn first_answers(browser: &Browser) -> Result<()> {
    browser.set_mode("auto").await?;
    let shown = browser.ask(CAPITAL).await?;
    finished(&shown)?;
    ensure!(shown.text.contains("Lima"), "{shown:?}");
    ensure!(shown.only(&["edge", "verified", "cloud"]) && !shown.degraded, "{shown:?}");
    finished(&browser.ask_example(SUM).await?)?;
    finished(&browser.ask_example(REMINDER).await?)?;
    let answers = "return document.querySelector('[data-figure=trips] small').textContent.startsWith('in 0') === false";
    browser.until("the strip to count the answers", answers).await?;
    let spark = "return document.querySelector('[data-figure=rate] .spark path') !== null";
    ensure!(browser.script(spark).await? == true, "the rate has no line");
    let spoken = "return document.getElementById('say').textContent.startsWith('Answer:')";
    ensure!(browser.script(spoken).await? == true, "screen readers do not hear the answer");
    Ok(())
}

async fn token_cards(browser: &Browser) -> Result<()> {
    let shown = browser.last().await?;
    let whos =
        [("edge", "Decided on this device"), ("verified", "confirmed by the cloud"), ("cloud", "Decided by the cloud")];
    for (index, origin) in shown.origins.iter().enumerate().take(6) {
        let card = browser.token_card(index, false).await?;
        let who = whos.iter().find(|(name, _)| name == origin).map(|(_, who)| *who).context("a known origin")?;
        let number = format!("token {} ", index + 1);
        let mut parts = vec![who, "Probability", "%", &number];
        if origin == "edge" {
            // The cloud may write tokens that the device never scored.
            parts.extend(["Device's best guess", "Risk", "Entropy", "nats"]);
        }
        for part in parts {
            ensure!(card.contains(part), "the card of token {index} ({origin}) lacks {part:?}: {card}");
        }
    }
    // With the keyboard: one stop for the answer, arrows along its tokens, Escape closes.
    browser
        .script("[...document.querySelectorAll('.answer-text')].at(-1).querySelector('[tabindex=\"0\"]').focus()")
        .await?;
    browser.keys("\u{e014}").await?;
    let card = browser.card().await?;
    ensure!(card.contains("token 2 "), "one to the right of the first token: {card:?}");
    browser.keys("\u{e00c}").await?;
    ensure!(browser.script("return document.getElementById('card').hidden").await? == true, "Escape leaves the card");
    Ok(())
}

/// Writes the window to the file that `TANDEM_SCREENSHOT` names.
async fn screenshot(browser: &Browser) -> Result<()> {
    let Some(path) = std::env::var_os("TANDEM_SCREENSHOT") else {
        return Ok(());
    };
    let shown = browser.last().await?;
    let index = shown.origins.iter().position(|origin| origin == "cloud").unwrap_or(0);
    browser.script("document.activeElement.blur(); document.getElementById('chips').scrollLeft = 0").await?;
    browser.token_card(index, false).await?;
    let still = "return document.getAnimations().every((animation) => animation.playState === 'finished')";
    browser.until("the animations to end", still).await?;
    Ok(std::fs::write(path, browser.screenshot().await?)?)
}

async fn modes(browser: &Browser) -> Result<()> {
    let table: [(&str, &[&str]); 3] = [("local", &["edge"]), ("exact", &["verified", "cloud"]), ("cloud", &["cloud"])];
    let mut texts = Vec::new();
    for (mode, origins) in table {
        browser.set_mode(mode).await?;
        ensure!(browser.text("#mode-text").await?.to_lowercase().starts_with(mode));
        let shown = browser.ask(SUM).await?;
        finished(&shown)?;
        ensure!(shown.only(origins) && !shown.degraded, "mode {mode}: {shown:?}");
        ensure!((mode == "local") == shown.facts.contains(" 0 round trips"), "mode {mode}: {shown:?}");
        texts.push(shown.text);
    }
    ensure!(texts[1] == texts[2], "exact wrote {:?}, cloud {:?}", texts[1], texts[2]);
    browser.set_mode("auto").await
}

async fn threshold(browser: &Browser) -> Result<()> {
    browser.set_threshold(true).await?;
    ensure!(browser.text("#threshold-value").await? == "100 %");
    let never = browser.ask(SUM).await?;
    finished(&never)?;
    ensure!(never.only(&["edge"]), "threshold 1: {never:?}");
    browser.set_threshold(false).await?;
    ensure!(browser.text("#threshold-value").await? == "0 %");
    let always = browser.ask(SUM).await?;
    finished(&always)?;
    ensure!(always.origins.iter().any(|origin| origin != "edge"), "threshold 0: {always:?}");
    Ok(())
}

/// The threshold is still 0 here, so that every answer wants the cloud.
async fn plug_pulled(browser: &Browser) -> Result<()> {
    let link = |wanted: &str| format!("return document.getElementById('pill').dataset.link === '{wanted}'");
    browser.click("#cut").await?;
    browser.until("the cut", &link("cut")).await?;
    ensure!(browser.text("#banner").await?.contains("this device alone"));
    ensure!(browser.script("return document.getElementById('cut').getAttribute('aria-checked')").await? == "false");
    let alone = browser.ask(CAPITAL).await?;
    finished(&alone)?;
    ensure!(alone.only(&["edge"]) && alone.degraded, "cut off: {alone:?}");

    browser.click("#cut").await?;
    browser.until("the cloud to come back", &link("up")).await?;
    ensure!(browser.script("return document.getElementById('banner').hidden").await? == true);
    let together = browser.ask(CAPITAL).await?;
    finished(&together)?;
    ensure!(!together.degraded && together.origins.iter().any(|origin| origin != "edge"), "back: {together:?}");
    browser.click("#threshold-reset").await
}

/// Makes the page's next requests for answers end in `outcome`, a JavaScript expression over `init`.
async fn rig(browser: &Browser, outcome: &str) -> Result<()> {
    let script = format!(
        "window.realFetch ??= window.fetch;
         window.fetch = (url, init) => String(url).startsWith('/v1/') ? ({outcome}) : window.realFetch(url, init)"
    );
    browser.script(&script).await.map(drop)
}

async fn unrig(browser: &Browser) -> Result<()> {
    browser.script("window.fetch = window.realFetch").await.map(drop)
}

/// What a live node cannot be made to do on demand: refuse, break off, hang.
async fn trouble(browser: &Browser) -> Result<()> {
    let busy = r#"Promise.resolve(new Response('{"error":{"message":"the node is at its limit"}}', { status: 429, headers: { "retry-after": "2" } }))"#;
    let broken = r#"Promise.resolve(new Response('data: {"choices":[{"index":0,"delta":{"content":"Half"}}]}\n\n'))"#;
    let failed = r#"Promise.resolve(new Response('data: {"error":{"message":"generation failed"}}\n\n'))"#;
    let odd = r#"Promise.resolve(new Response("data: {oops\n\n"))"#;
    let gone = "Promise.reject(new TypeError('Failed to fetch'))";
    let table = [
        (busy, "The node is at its limit (try again in 2 seconds)"),
        (broken, "The connection ended in the middle"),
        (failed, "Generation failed"),
        (odd, "does not understand"),
        (gone, "cannot be reached"),
    ];
    for (outcome, message) in table {
        rig(browser, outcome).await?;
        let shown = browser.ask(CAPITAL).await?;
        ensure!(shown.state == "failed", "{shown:?}");
        let alert = browser.text(".turn:last-child .failure").await?;
        ensure!(alert.contains(message), "{alert:?} lacks {message:?}");
    }
    unrig(browser).await?;
    browser.click(".turn:last-child .failure button").await?;
    let retried = "const turn = [...document.querySelectorAll('.answer')].at(-1); return turn.dataset.state === 'done'";
    browser.until("the retry", retried).await?;
    finished(&browser.last().await?)?;

    // An answer that never comes, until Stop, and until Escape.
    rig(browser, "new Promise((_, reject) => init.signal.addEventListener('abort', () => reject(init.signal.reason)))")
        .await?;
    for escape in [false, true] {
        browser.keys_to("#prompt", CAPITAL).await?;
        browser.click("#send").await?;
        ensure!(browser.last().await?.state == "waiting");
        if escape {
            browser.keys("\u{e00c}").await?;
        } else {
            browser.click("#stop").await?;
        }
        let stopped = "return [...document.querySelectorAll('.answer')].at(-1).dataset.state === 'stopped'";
        browser.until("the stop", stopped).await?;
        ensure!(browser.script("return document.activeElement.id").await? == "prompt", "the focus is lost");
    }
    unrig(browser).await
}

/// A hidden page sends no requests.
async fn quiet_while_hidden(browser: &Browser) -> Result<()> {
    let hide = |hidden: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }});
             document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    let polls = "return performance.getEntriesByType('resource').filter((entry) => entry.name.endsWith('/tandem/status')).length";
    browser.script("performance.clearResourceTimings()").await?;
    browser.until("a poll", &format!("{} > 0", polls.trim_end_matches(';'))).await?;
    browser.script(&hide(true)).await?;
    // A poll may be under way at that moment; let it end.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let before = browser.script(polls).await?;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    ensure!(browser.script(polls).await? == before, "the hidden page goes on asking");
    browser.script(&hide(false)).await?;
    browser.until("the next poll", &format!("{polls} > {before}")).await
}

async fn phone(browser: &Browser, page: &str) -> Result<()> {
    browser.open(page, 360, 740, true).await?;
    let fits = async |what: &str| {
        let wide = browser.overflow().await?;
        ensure!(wide.is_empty(), "{what} at 360 × 740: {wide:?}");
        anyhow::Ok(())
    };
    fits("empty page").await?;
    let sample = "const box = document.querySelector('.sample').getBoundingClientRect();
                  return box.bottom <= document.querySelector('.dock').getBoundingClientRect().top";
    ensure!(browser.script(sample).await? == true, "the explanation does not fit above the examples");
    finished(&browser.ask(REMINDER).await?)?;
    fits("chat").await?;
    browser.token_card(1, true).await?;
    fits("token card").await?;
    browser.click("#panel-toggle").await?;
    ensure!(browser.text("#panel").await?.contains("Threshold"));
    fits("controls").await?;
    browser.keys("\u{e00c}").await?;
    ensure!(browser.text("#panel").await?.is_empty(), "Escape leaves the controls open");
    Ok(())
}

async fn themes(browser: &Browser) -> Result<()> {
    let theme = "return document.documentElement.dataset.theme + ' ' + getComputedStyle(document.body).backgroundColor";
    let first = browser.script(theme).await?;
    browser.click("#theme").await?;
    let second = browser.script(theme).await?;
    ensure!(first != second, "the theme stays {first}");
    browser.script("location.reload()").await?;
    browser.until("the page again", "return document.getElementById('pill')?.dataset.link === 'up'").await?;
    ensure!(browser.script(theme).await? == second, "the theme is forgotten");
    Ok(())
}

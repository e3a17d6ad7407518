//! A headless Chromium on the chat page: what a person can do there, and what the browser noticed.
//!
//! Needs `chromedriver` and Chromium (Debian: `chromium-driver`). [`Browser::start`] gives `None`
//! where they are missing, unless `TANDEM_REQUIRE_BROWSER=1` makes that an error.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fantoccini::actions::{InputSource, MouseActions, PointerAction, TouchActions};
use fantoccini::elements::Element;
use fantoccini::wd::{Capabilities, WebDriverCompatibleCommand};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::process::required;

/// Longest wait for anything the page shows. Far above what is needed: it only ends hung tests.
pub const WAIT_MAX: Duration = Duration::from_secs(60);

/// Between two looks at the page.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A browser of its own, with an empty profile.
#[derive(Debug)]
pub struct Browser {
    client: Client,
    _driver: Child,
    _profile: TempDir,
}

/// An answer as the page shows it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// `done`, `stopped` or `failed`.
    pub state: String,
    /// The answer.
    pub text: String,
    /// Origin of each tinted token, in order.
    pub origins: Vec<String>,
    /// The line under the answer.
    pub facts: String,
    /// True if the page says that the cloud was wanted and away.
    pub degraded: bool,
}

impl Shown {
    /// True if every token has one of `origins`, and there is one.
    #[must_use]
    pub fn only(&self, origins: &[&str]) -> bool {
        !self.origins.is_empty() && self.origins.iter().all(|origin| origins.contains(&origin.as_str()))
    }
}

/// A command of chromedriver outside the WebDriver standard.
#[derive(Debug)]
struct Vendor {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Vendor {
    fn endpoint(&self, base: &url::Url, session: Option<&str>) -> Result<url::Url, url::ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _: &url::Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.body.to_string()))
    }
}

/// First of `names` in `PATH`, unless the variable `given` names a file.
fn find(given: &str, names: &[&str]) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(given) {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|file| file.is_file())
}

impl Browser {
    /// Starts chromedriver on a free port and a browser in it; `None` where either is missing.
    pub async fn start() -> Result<Option<Self>> {
        let driver = find("CHROMEDRIVER", &["chromedriver"]);
        let chromium = find("CHROMIUM", &["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]);
        let (Some(driver), Some(chromium)) = (driver, chromium) else {
            let what = "no chromedriver and Chromium in PATH (Debian: apt-get install chromium chromium-driver)";
            ensure!(!required("TANDEM_REQUIRE_BROWSER"), "{what}");
            println!("SKIPPED: {what}");
            return Ok(None);
        };
        let profile = tempfile::tempdir().context("profile folder")?;
        let mut driver = Command::new(&driver)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", driver.display()))?;
        let port = port_of(&mut driver).await?;
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities(&chromium, &profile)?)
            .connect(&format!("http://127.0.0.1:{port}"))
            .await
            .context("starting the browser")?;
        Ok(Some(Self { client, _driver: driver, _profile: profile }))
    }

    /// Ends the browser.
    pub async fn close(self) -> Result<()> {
        Ok(self.client.close().await?)
    }

    /// Opens the page in a window of `width` × `height` CSS pixels and waits for its first status.
    pub async fn open(&self, page: &str, width: u32, height: u32, phone: bool) -> Result<()> {
        let screen = json!({ "width": width, "height": height, "mobile": phone, "deviceScaleFactor": 1 });
        self.devtools("Emulation.setDeviceMetricsOverride", screen).await?;
        self.devtools("Emulation.setTouchEmulationEnabled", json!({ "enabled": phone })).await?;
        self.client.goto(page).await?;
        self.until("the first status", "return document.getElementById('pill').dataset.link !== 'unknown'").await
    }

    /// Makes the pages opened from now on believe that the reader's language is `language`; returns what
    /// [`Browser::forget`] takes.
    pub async fn speak(&self, language: &str) -> Result<Value> {
        let source = format!("Object.defineProperty(navigator, 'language', {{ get: () => '{language}' }})");
        self.devtools("Page.addScriptToEvaluateOnNewDocument", json!({ "source": source })).await
    }

    /// Undoes [`Browser::speak`].
    pub async fn forget(&self, spoken: Value) -> Result<()> {
        self.devtools("Page.removeScriptToEvaluateOnNewDocument", spoken).await.map(drop)
    }

    async fn vendor(&self, path: &'static str, body: Value) -> Result<Value> {
        Ok(self.client.issue_cmd(Vendor { path, body }).await?)
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Result<Value> {
        self.vendor("goog/cdp/execute", json!({ "cmd": command, "params": parameters })).await
    }

    /// What `script` returns.
    pub async fn script(&self, script: &str) -> Result<Value> {
        Ok(self.client.execute(script, Vec::new()).await?)
    }

    /// What `script` hands to its last argument, a callback.
    pub async fn script_later(&self, script: &str) -> Result<Value> {
        Ok(self.client.execute_async(script, Vec::new()).await?)
    }

    /// Waits until `script` returns true.
    pub async fn until(&self, what: &str, script: &str) -> Result<()> {
        let looks = WAIT_MAX.as_millis() / LOOK_EVERY.as_millis();
        for _ in 0..looks {
            if self.script(script).await? == true {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        bail!("waited {} s for {what}; the page shows: {}", WAIT_MAX.as_secs(), self.text("body").await?)
    }

    async fn element(&self, css: &str) -> Result<Element> {
        self.client.find(Locator::Css(css)).await.with_context(|| format!("no element {css}"))
    }

    /// Visible text of the first element that `css` selects.
    pub async fn text(&self, css: &str) -> Result<String> {
        Ok(self.element(css).await?.text().await?)
    }

    /// Clicks the first element that `css` selects.
    pub async fn click(&self, css: &str) -> Result<()> {
        self.element(css).await?.click().await.with_context(|| format!("clicking {css}"))
    }

    /// Sends keys to whatever has the focus.
    pub async fn keys(&self, keys: &str) -> Result<()> {
        let focused = self.client.active_element().await?;
        Ok(focused.send_keys(keys).await?)
    }

    /// Sends keys to the first element that `css` selects.
    pub async fn keys_to(&self, css: &str, keys: &str) -> Result<()> {
        Ok(self.element(css).await?.send_keys(keys).await?)
    }

    /// Types a question, sends it with Enter, and waits for the end of its answer.
    pub async fn ask(&self, question: &str) -> Result<Shown> {
        let before = self.turns().await?;
        self.keys_to("#prompt", question).await?;
        self.keys_to("#prompt", "\u{e007}").await?;
        self.answered(question, before + 1).await
    }

    /// Clicks the example `question` and waits for the end of its answer.
    pub async fn ask_example(&self, question: &str) -> Result<Shown> {
        let before = self.turns().await?;
        let chips = self.client.find_all(Locator::Css("#chips button")).await?;
        for chip in chips {
            if chip.text().await? == question {
                chip.click().await?;
                return self.answered(question, before + 1).await;
            }
        }
        bail!("no example reads {question:?}")
    }

    async fn turns(&self) -> Result<u64> {
        let count = self.script("return document.querySelectorAll('.turn').length").await?;
        count.as_u64().context("turns")
    }

    async fn answered(&self, question: &str, turns: u64) -> Result<Shown> {
        let ended = format!(
            "const turns = document.querySelectorAll('.turn');
             return turns.length >= {turns} && !['waiting', 'streaming'].includes(turns[turns.length - 1].querySelector('.answer').dataset.state)"
        );
        self.until(&format!("the answer to {question:?}"), &ended).await?;
        self.last().await
    }

    /// The last answer.
    pub async fn last(&self) -> Result<Shown> {
        let found = self
            .script(
                "const answer = [...document.querySelectorAll('.answer')].at(-1);
                 return {
                   state: answer.dataset.state,
                   text: answer.querySelector('.answer-text').textContent,
                   origins: [...answer.querySelectorAll('.tok')].map((tok) => tok.dataset.origin),
                   facts: answer.querySelector('.facts').innerText,
                   degraded: answer.querySelector('.degraded') !== null,
                 }",
            )
            .await?;
        let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
        let origins = found["origins"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        Ok(Shown {
            state: text("state"),
            text: text("text"),
            origins: origins.collect(),
            facts: text("facts"),
            degraded: found["degraded"] == true,
        })
    }

    /// Points at (or taps) token `index` of the last answer and gives the text of its card.
    pub async fn token_card(&self, index: usize, touch: bool) -> Result<String> {
        let at = self
            .script(&format!(
                "const tok = [...document.querySelectorAll('.answer')].at(-1).querySelectorAll('.tok')[{index}];
                 tok.scrollIntoView({{ block: 'center' }});
                 const box = tok.getClientRects()[0];
                 return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)]"
            ))
            .await?;
        let (Some(x), Some(y)) = (at[0].as_f64(), at[1].as_f64()) else { bail!("the answer has no token {index}") };
        let go = PointerAction::MoveTo { duration: None, x, y };
        let button = fantoccini::actions::MOUSE_BUTTON_LEFT;
        if touch {
            let finger = TouchActions::new("finger".into());
            let tap = finger.then(go).then(PointerAction::Down { button }).then(PointerAction::Up { button });
            self.client.perform_actions(tap).await?;
        } else {
            self.client.perform_actions(MouseActions::new("mouse".into()).then(go)).await?;
        }
        let shown = format!(
            "const tok = [...document.querySelectorAll('.answer')].at(-1).querySelectorAll('.tok')[{index}];
             return tok.classList.contains('shown') && !document.getElementById('card').hidden"
        );
        self.until("the token's card", &shown).await?;
        self.card().await
    }

    /// Text of the token card. Not its *visible* text: for WebDriver a card that fades in has none.
    pub async fn card(&self) -> Result<String> {
        let text = self.script("return document.getElementById('card').textContent").await?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Picks a mode: `local`, `auto`, `exact` or `cloud`.
    pub async fn set_mode(&self, mode: &str) -> Result<()> {
        self.click(&format!("input[name=mode][value={mode}]")).await
    }

    /// Moves the threshold to an end of its range with the keyboard.
    pub async fn set_threshold(&self, highest: bool) -> Result<()> {
        let key = if highest { "\u{e010}" } else { "\u{e011}" };
        self.keys_to("#threshold", key).await
    }

    /// Elements that reach past the window's right edge and cannot be scrolled to inside a box of
    /// their own, and whether the page itself scrolls sideways.
    pub async fn overflow(&self) -> Result<Vec<String>> {
        let found = self
            .script(
                "const wide = [...document.querySelectorAll('body *')].filter((element) => {
                   const box = element.getBoundingClientRect();
                   return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5) && !element.closest('.chips, .sr, .skip, .sprite');
                 }).map((element) => element.tagName + '.' + (element.getAttribute('class') ?? ''));
                 if (document.documentElement.scrollWidth > innerWidth) wide.push('the page scrolls sideways');
                 return wide",
            )
            .await?;
        Ok(found.as_array().into_iter().flatten().map(ToString::to_string).collect())
    }

    /// Controls that a screen reader could not name.
    pub async fn nameless(&self) -> Result<Vec<String>> {
        let tree = self.devtools("Accessibility.getFullAXTree", json!({})).await?;
        let controls = ["button", "switch", "slider", "radio", "textbox", "link"];
        let nameless = tree["nodes"].as_array().into_iter().flatten().filter(|node| {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            node["ignored"] != true
                && controls.contains(&role)
                && node["name"]["value"].as_str().unwrap_or_default().is_empty()
        });
        Ok(nameless.map(ToString::to_string).collect())
    }

    /// Warnings and errors in the console since the last call.
    pub async fn console(&self) -> Result<Vec<String>> {
        let lines = self.vendor("se/log", json!({ "type": "browser" })).await?;
        let lines = lines.as_array().into_iter().flatten();
        Ok(lines.filter(|line| line["level"] != "INFO" && line["level"] != "DEBUG").map(ToString::to_string).collect())
    }

    /// Addresses that the page asked for since the last call.
    pub async fn requests(&self) -> Result<Vec<String>> {
        let lines = self.vendor("se/log", json!({ "type": "performance" })).await?;
        let mut addresses = Vec::new();
        for line in lines.as_array().into_iter().flatten() {
            let event: Value = serde_json::from_str(line["message"].as_str().unwrap_or("null"))?;
            let (method, sent) = (&event["message"]["method"], &event["message"]["params"]);
            // The browser's own first tab is not the page.
            let own = sent["documentURL"].as_str().unwrap_or_default().starts_with("chrome");
            if method == "Network.requestWillBeSent" && !own {
                addresses.extend(sent["request"]["url"].as_str().map(str::to_owned));
            }
        }
        Ok(addresses)
    }

    /// The window as a PNG.
    pub async fn screenshot(&self) -> Result<Vec<u8>> {
        Ok(self.client.screenshot().await?)
    }
}

/// The port that chromedriver says it listens on.
async fn port_of(driver: &mut Child) -> Result<u16> {
    let mut lines = BufReader::new(driver.stdout.take().context("chromedriver's output")?).lines();
    let port = async {
        while let Some(line) = lines.next_line().await? {
            let Some((_, port)) = line.split_once("started successfully on port ") else {
                continue;
            };
            return Ok(port.trim_end_matches('.').parse()?);
        }
        bail!("chromedriver ended before it listened")
    };
    let port = tokio::time::timeout(WAIT_MAX, port).await.context("chromedriver did not start")?;
    // Keep its pipe empty, or it blocks once the pipe is full.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    port
}

fn capabilities(chromium: &std::path::Path, profile: &TempDir) -> Result<Capabilities> {
    let args = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ];
    let mut args: Vec<String> = args.map(str::to_owned).into();
    args.push(format!("--user-data-dir={}", profile.path().display()));
    let wanted = json!({
        "goog:chromeOptions": { "args": args, "binary": chromium },
        "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
    });
    match wanted {
        Value::Object(map) => Ok(map),
        _ => bail!("capabilities are an object"),
    }
}

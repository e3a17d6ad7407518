//! A backend that replays tokens. It stands in for the node where only the API's shape is tested.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use serde_json::{Value, json};
use tandem_engine::chat::ChatTemplate;
use tandem_engine::constraint::Constraints;
use tandem_engine::tokenizer::Tokenizer;
use tandem_proto::message::Alternative;
use tokio::sync::{mpsc, oneshot};

use crate::admission::{Admission, Slot, Slots};
use crate::api::{Backend, ControlsError, ModelEntry, Readiness};
use crate::diagnosis::{CloudState, LinkState};
use crate::request::{
    Controls, Done, Event, Events, FinishReason, GenerateError, GenerateRequest, Generation, Mode, NodeStatus, Origin,
    RouteSummary, Scored, TokenEvent,
};

/// How the replay ends.
#[derive(Clone, Debug, Default)]
pub(crate) enum Ending {
    /// As the request asks.
    #[default]
    Proper,
    /// With an error after this many tokens.
    Fails(usize),
    /// The channel closes after this many tokens.
    Vanishes(usize),
    /// The request is refused.
    Refused(GenerateError),
}

/// The backend.
pub(crate) struct Replay {
    tokenizer: Arc<Tokenizer>,
    constraints: Constraints,
    template: ChatTemplate,
    /// Token ids of every greedy answer.
    script: Vec<u32>,
    pub(crate) ending: Ending,
    pub(crate) readiness: Readiness,
    pub(crate) context_tokens: usize,
    /// The model was never taught JSON.
    pub(crate) short_json: bool,
    /// Pause before each token.
    pub(crate) pause: Duration,
    pub(crate) route: RouteSummary,
    /// What an answer took that was cut short, if the replay says so.
    pub(crate) route_when_cut_short: Option<RouteSummary>,
    pub(crate) status: Mutex<NodeStatus>,
    /// What was asked for.
    pub(crate) requests: Mutex<Vec<GenerateRequest>>,
    /// Answers that were cancelled by their client.
    pub(crate) abandoned: Arc<AtomicUsize>,
    pub(crate) admission: Admission,
}

impl Replay {
    /// Replays `text` as the pair's tokenizer splits it.
    pub(crate) fn of(text: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/edge");
        let tokenizer = Arc::new(Tokenizer::from_dir(&folder).unwrap());
        let script = tokenizer.encode(text).unwrap();
        Self {
            template: ChatTemplate::from_dir(&folder).unwrap(),
            constraints: Constraints::new(tokenizer.clone()),
            tokenizer,
            script,
            ending: Ending::Proper,
            readiness: Readiness::Ready,
            context_tokens: 256,
            short_json: false,
            pause: Duration::ZERO,
            route: RouteSummary { round_trips: 2, bytes_up: 120, bytes_down: 80, ..RouteSummary::default() },
            route_when_cut_short: None,
            status: Mutex::new(NodeStatus {
                cloud_connected: true,
                cloud: CloudState::of(LinkState::Connected),
                policy: "calibrated@1".into(),
                threshold: 0.5,
                threshold_unit: "probability".into(),
                threshold_max: 1.0,
                ..NodeStatus::default()
            }),
            requests: Mutex::default(),
            abandoned: Arc::default(),
            admission: Admission::new(32, 100),
        }
    }

    /// With more special tokens in the vocabulary; the text may have them in it.
    pub(crate) fn with_special_tokens(mut self, tokens: &[&str]) -> Self {
        let text = self.tokenizer.decode(&self.script).unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/edge");
        let mut file: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
        for (i, token) in tokens.iter().enumerate() {
            let mut added = file["added_tokens"][0].clone();
            added["id"] = json!(self.tokenizer.vocab_size() + i);
            added["content"] = json!(token);
            file["added_tokens"].as_array_mut().unwrap().push(added);
        }
        self.tokenizer = Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).unwrap());
        self.constraints = Constraints::new(self.tokenizer.clone());
        self.script = self.tokenizer.encode(&text).unwrap();
        self
    }

    /// With another model's chat template.
    pub(crate) fn with_template(mut self, source: &str) -> Self {
        self.template = ChatTemplate::new(source, "<|bos|>", "<|eos|>").unwrap();
        self
    }

    /// Number of tokens of a greedy answer.
    pub(crate) fn script_tokens(&self) -> usize {
        self.script.len()
    }

    /// Token ids of the answer: the script, or draws from the seed.
    fn answer(&self, request: &GenerateRequest) -> Vec<u32> {
        if request.sampling.temperature == 0.0 {
            return self.script.clone();
        }
        let mut state = request.sampling.seed | 1;
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            self.script[(state % self.script.len() as u64) as usize]
        };
        (0..self.script.len()).map(|_| draw()).collect()
    }

    fn events(&self, request: &GenerateRequest) -> Vec<Event> {
        let answer = self.answer(request);
        let finish = if answer.len() > request.tokens_max { FinishReason::Length } else { FinishReason::Stop };
        let answer = &answer[..answer.len().min(request.tokens_max)];
        let mut route = self.route.clone();
        let mut events = Vec::new();
        for (index, id) in answer.iter().enumerate() {
            let origin = [Origin::Edge, Origin::Verified, Origin::Cloud][index % 3];
            match origin {
                Origin::Edge => route.edge_tokens += 1,
                Origin::Verified => route.accepted += 1,
                Origin::Cloud => route.cloud_tokens += 1,
            }
            let alternatives = (0..request.top_logprobs)
                .map(|rank| Alternative { id: if rank == 0 { *id } else { 10 + rank }, logprob: -0.1 - rank as f32 })
                .collect();
            events.push(Event::Token(TokenEvent {
                index: index as u32,
                id: *id,
                origin,
                logprob: -0.1,
                edge_top1: Some(0.9),
                edge_entropy: Some(0.2),
                risk: (request.mode == Mode::Auto).then_some(0.05),
                reason: "sure",
                alternatives,
            }));
        }
        let end = match &self.ending {
            Ending::Fails(tokens) => {
                events.truncate(*tokens);
                vec![Event::Failed(GenerateError::Engine("the weights melted".into()))]
            }
            Ending::Vanishes(tokens) => {
                events.truncate(*tokens);
                Vec::new()
            }
            Ending::Proper | Ending::Refused(_) => vec![Event::Done(Done { finish, route })],
        };
        events.into_iter().chain(end).collect()
    }
}

impl Backend for Replay {
    fn admit(&self, answers: usize) -> BoxFuture<'_, Result<Slots, GenerateError>> {
        Box::pin(self.admission.enter(answers))
    }

    fn submit(&self, request: GenerateRequest, slot: Slot) -> Result<Generation, GenerateError> {
        if let Ending::Refused(error) = &self.ending {
            return Err(error.clone());
        }
        let events = self.events(&request);
        self.requests.lock().unwrap().push(request);
        let (sender, receiver) = mpsc::channel(2);
        let (wound_down, route) = oneshot::channel();
        let cut_short = self.route_when_cut_short.clone();
        let (pause, abandoned) = (self.pause, Arc::clone(&self.abandoned));
        tokio::spawn(async move {
            let _slot = slot;
            for event in events {
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                if sender.send(event).await.is_err() {
                    abandoned.fetch_add(1, Ordering::SeqCst);
                    if let Some(route) = cut_short {
                        let _ = wound_down.send(route);
                    }
                    return;
                }
            }
        });
        Ok(Generation { events: Events::new(receiver, |_| {}), route })
    }

    fn score(
        &self,
        prompt: Vec<u32>,
        alternatives: u32,
    ) -> Result<oneshot::Receiver<Result<Vec<Scored>, GenerateError>>, GenerateError> {
        let (done, scores) = oneshot::channel();
        let alternatives: Vec<_> = (0..alternatives).map(|rank| Alternative { id: 10 + rank, logprob: -1.0 }).collect();
        let score = |_| Scored { logprob: -0.25, alternatives: alternatives.clone() };
        let _ = done.send(Ok((1..prompt.len()).map(score).collect()));
        Ok(scores)
    }

    fn embed(&self, tokens: Vec<u32>) -> BoxFuture<'static, Result<Vec<f32>, GenerateError>> {
        // Stands for what depends on the last token and on how many there are.
        let embedding = match (&self.ending, tokens.last()) {
            (Ending::Refused(error), _) => Err(error.clone()),
            (_, None) => Err(GenerateError::EmptyPrompt),
            (_, Some(last)) => Ok(vec![*last as f32, tokens.len() as f32, -0.5]),
        };
        Box::pin(std::future::ready(embedding))
    }

    fn status(&self) -> NodeStatus {
        self.status.lock().unwrap().clone()
    }

    fn set_controls(&self, controls: Controls) -> Result<NodeStatus, ControlsError> {
        if controls.threshold.is_some_and(|threshold| threshold > 1.0) {
            return Err(ControlsError::Invalid { param: "threshold", message: "past 1".into() });
        }
        let mut status = self.status.lock().unwrap();
        status.cut = controls.cut.unwrap_or(status.cut);
        status.cloud_connected &= !status.cut;
        status.threshold = controls.threshold.unwrap_or(status.threshold);
        status.default_mode = controls.default_mode.unwrap_or(status.default_mode);
        Ok(status.clone())
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn stop_tokens(&self) -> Vec<u32> {
        vec![1]
    }

    fn short_json(&self) -> bool {
        self.short_json
    }

    fn constraints(&self) -> &Constraints {
        &self.constraints
    }

    fn chat_template(&self) -> &ChatTemplate {
        &self.template
    }

    fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    fn models(&self) -> Vec<ModelEntry> {
        let entry =
            |id: &str, mode| ModelEntry { id: id.into(), created: 1_700_000_000, owned_by: "tests".into(), mode };
        vec![entry("demo-edge", Some(Mode::Local)), entry("demo-cloud", Some(Mode::Cloud))]
    }

    fn ready(&self) -> Readiness {
        self.readiness.clone()
    }

    fn explain(&self, id: Option<&str>) -> Option<Value> {
        let requests = self.requests.lock().unwrap();
        let found = match id {
            None => requests.last(),
            Some(id) => requests.iter().find(|request| request.request_id == id),
        };
        found.map(|request| json!({ "request_id": request.request_id }))
    }

    fn render_metrics(&self) -> String {
        "# TYPE tandem_edge_requests_total counter\n".into()
    }
}

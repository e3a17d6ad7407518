//! Both state machines in a virtual network with a virtual clock: frames are delayed, links are
//! cut at any moment, cloud nodes are killed, hang and fall silent; the answer must be the fault-free one, or
//! the edge's own and declared, and no token may take longer than the edge's patience allows.

mod frames;

extern crate std;

use alloc::{collections::VecDeque, string::String, vec, vec::Vec};
use std::println;

use bytes::Bytes;

use super::cloud::{CloudSession, Job, JobTimes, TargetShape};
use super::edge::clock::{Need, Patience, RETRY_US, Timeout};
use super::edge::{Decider, EdgeSession, FrameRule, PathChange};
use super::{Decided, SessionError};
use crate::frame::Message;
use crate::ids::{Epoch, Round, SessionId};
use crate::limits::PROGRESS_MS;
use crate::message::{Draft, Generate, Open, Opened, Progress, Refuse, RefuseCode, SamplingParams, Verdict};

const EOS: u32 = 0;
const CONTEXT: usize = 4096;
const HIDDEN_ROW: usize = 4;
const TARGET: TargetShape = TargetShape { context_tokens: CONTEXT, vocabulary: 100, hidden_row_bytes: HIDDEN_ROW };

/// SplitMix64 (Steele et al. 2014).
struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
fn digest(prefix: &[u32], salt: u64) -> u64 {
    prefix.iter().fold(mix(salt), |h, &t| mix(h ^ u64::from(t).wrapping_add(0x1234_5678)))
}
/// What the target model says after `prefix`.
fn target(prefix: &[u32]) -> u32 {
    let h = digest(prefix, 1);
    if h.is_multiple_of(23) { EOS } else { 1 + (h % 9) as u32 }
}
/// What the edge model says after `prefix`: mostly the same.
fn drafter(prefix: &[u32], agree_percent: u64) -> u32 {
    if digest(prefix, 2) % 100 < agree_percent { target(prefix) } else { (digest(prefix, 3) % 10) as u32 }
}
/// Whether the edge is unsure after `prefix`.
fn unsure(prefix: &[u32]) -> bool {
    digest(prefix, 4).is_multiple_of(4)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Exact,
    Auto,
    Cloud,
}

/// Microseconds of a tick of the world's clock.
const TICK_US: u64 = 1_000;
/// A frame takes less, ticks.
const LONGEST_DELAY: u64 = 7;
/// Most ticks that a round trip takes, told to the edge.
const RTT: u64 = 2 * LONGEST_DELAY;
/// The edge's patience, ticks.
const QUESTION: u64 = 1_500;
const GRACE: u64 = 2_000;
/// How long a node that has failed is left alone, ticks.
const COOL_DOWN: u64 = 2_000;
/// A cloud says so when its engine has got nowhere for so long, ticks.
const STALL: u64 = 1_000;

/// What is wrong with the node.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Its engine hangs; the rest of it lives.
    Hung,
    /// It takes what is sent and says nothing.
    Mute,
    /// It opens sessions and refuses their first work, to be asked again.
    Fickle,
}

struct World {
    rng: Rng,
    mode: Mode,
    agree: u64,
    rule: FrameRule,
    window: usize,
    edge: EdgeSession<()>,
    cloud: Option<CloudSession>,
    job: Option<(Job, Vec<u32>)>,
    up: VecDeque<(u64, Message, Vec<u32>, Bytes)>,
    down: VecDeque<(u64, Message)>,
    /// Frames of streams that were left, still on their way.
    late_up: Vec<(u64, Message, Bytes)>,
    late_down: Vec<(u64, Message)>,
    /// Late frames of an earlier epoch that arrived.
    fenced: usize,
    clock: u64,
    epoch: u64,
    out: Vec<u32>,
    /// Hidden states arrive intact: the row of position p is p.
    hidden: bool,
    /// The cloud's end of the stream exists; what it says without one is lost.
    linked: bool,
    fault: Fault,
    /// When the node is sound again.
    mended_at: u64,
    /// There is another node to go to.
    second: bool,
    /// No link before: the only node has just failed.
    away_until: u64,
    /// When the engine last ended a job or began one after a pause.
    engine_at: u64,
    report_at: u64,
    /// The edge decided a token that was the cloud's.
    degraded: bool,
    /// When the last token came, or the last thing went wrong.
    calm_since: u64,
}

impl World {
    fn now(&self) -> u64 {
        self.clock * TICK_US
    }
    fn later(&mut self) -> u64 {
        // Frames of one stream arrive in order.
        self.clock + 1 + self.rng.below(LONGEST_DELAY - 1)
    }
    fn open(&mut self) {
        self.epoch += u64::from(self.rng.chance(50)) + u64::from(self.epoch == 0);
        let (open, tokens) = self.edge.open(
            self.now(),
            Epoch(self.epoch),
            String::from("m"),
            String::from("r"),
            SamplingParams::default(),
            0,
            false,
            0,
        );
        let at = self.later();
        self.up.push_back((at, Message::Open(open), tokens, Bytes::new()));
    }
    fn drop_stream(&mut self, retry_after_us: Option<u64>) {
        let after = self.clock + self.rng.below(200);
        let up = self.up.drain(..).filter(|(_, m, ..)| !matches!(m, Message::Open(_)));
        self.late_up.extend(up.map(|(at, m, _, payload)| (at.max(after), m, payload)));
        self.late_down.extend(self.down.drain(..).map(|(at, m)| (at.max(after), m)));
        self.linked = false;
        self.degraded |= self.edge.link_lost(self.now(), retry_after_us);
    }
    fn cut(&mut self) {
        self.drop_stream(None);
        if self.rng.chance(50) {
            self.cloud = None;
            self.job = None;
        }
    }
    /// The edge leaves a node that has failed.
    fn suspect(&mut self) {
        self.drop_stream(None);
        if self.second {
            (self.cloud, self.job, self.fault) = (None, None, Fault::None);
        } else {
            self.away_until = self.clock + COOL_DOWN;
        }
    }
    fn stalled_ms(&self) -> u32 {
        let age = if self.job.is_some() { self.clock - self.engine_at } else { 0 };
        if self.fault == Fault::Hung && age >= STALL { age as u32 } else { 0 }
    }
    fn send_up(&mut self, m: Message, payload: Bytes) {
        let at = self.later();
        self.up.push_back((at, m, Vec::new(), payload));
    }
    fn say(&mut self, m: Message) {
        let at = self.later();
        self.down.push_back((at, m));
    }
    /// What still arrives of earlier owners' streams is refused and changes nothing; of the present owner's, QUIC
    /// has discarded it with the stream.
    fn arrive_late(&mut self) {
        let now = self.clock;
        for (_, m) in self.late_down.extract_if(.., |(at, _)| *at <= now) {
            let (epoch, said) = match &m {
                Message::Verdict(v) if v.epoch.0 < self.epoch => (v.epoch, self.edge.on_verdict(v).map(drop)),
                Message::Token(t) if t.epoch.0 < self.epoch => (t.epoch, self.edge.on_token(t).map(drop)),
                Message::End(e) if e.epoch.0 < self.epoch => (e.epoch, self.edge.on_end(e).map(drop)),
                Message::Progress(p) if p.epoch.0 < self.epoch => (p.epoch, self.edge.on_progress(p, 0).map(drop)),
                _ => continue,
            };
            self.fenced += 1;
            assert!(matches!(said, Err(SessionError::StaleEpoch { .. })), "{epoch:?} of {}: {said:?}", self.epoch);
        }
        for (_, m, payload) in self.late_up.extract_if(.., |(at, ..)| *at <= now) {
            let Some(cloud) = &mut self.cloud else { continue };
            let (Message::Draft(Draft { epoch, .. }) | Message::Generate(Generate { epoch, .. })) = &m else {
                continue;
            };
            if *epoch < cloud.epoch() {
                self.fenced += 1;
                let said = cloud.handle(&m, &payload);
                assert!(
                    matches!(said, Err(SessionError::StaleEpoch { .. })),
                    "{epoch:?} of {:?}: {said:?}",
                    cloud.epoch()
                );
            }
        }
    }
    fn hear(&mut self) -> Result<(), SessionError> {
        self.arrive_late();
        while self.down.front().is_some_and(|(at, _)| *at <= self.clock) {
            let (_, m) = self.down.pop_front().unwrap();
            let now = self.now();
            if let Message::Progress(p) = &m {
                if self.edge.on_progress(p, now)? {
                    self.suspect();
                }
                continue;
            }
            self.edge.heard(now);
            match &m {
                Message::Verdict(v) => drop(self.edge.on_verdict(v)?),
                Message::Token(t) => drop(self.edge.on_token(t)?),
                Message::End(e) => drop(self.edge.on_end(e)?),
                Message::Opened(_) => self.edge.opened(),
                Message::Refuse(r) if r.code == RefuseCode::Stalled => self.suspect(),
                Message::Refuse(_) => self.drop_stream(Some(RETRY_US)),
                other => panic!("{other:?}"),
            }
        }
        Ok(())
    }
    /// Each token is what its decider says after the ones before it.
    fn commit(&mut self) {
        while let Some(c) = self.edge.commit() {
            assert_eq!(c.position, 3 + self.out.len(), "indices run 0..n once each");
            let prefix = &self.edge.tokens()[..c.position];
            if c.decider == Decider::Edge {
                assert_eq!(c.token, drafter(prefix, self.agree));
                self.degraded |= self.mode != Mode::Auto || unsure(prefix);
            } else {
                assert_eq!(c.token, target(prefix));
            }
            self.out.push(c.token);
            self.calm_since = self.clock;
        }
    }
    fn edge_turn(&mut self) -> Result<(), SessionError> {
        self.hear()?;
        self.commit();
        let now = self.now();
        let reachable = self.clock >= self.away_until;
        if self.edge.may_open(now) {
            // A link takes its time to come up.
            if !reachable {
                self.degraded |= self.edge.unreachable(now, true);
            } else if self.rng.chance(30) {
                self.open();
            }
        }
        let streams = self.mode == Mode::Cloud;
        if streams && self.edge.is_connected() && !self.edge.is_streaming() && !self.edge.is_finished() {
            let most = 1 + self.rng.below(20) as usize;
            if let Some(g) = self.edge.next_span(most) {
                self.send_up(Message::Generate(g), Bytes::new());
            }
        }
        let holds_back = self.edge.is_streaming() || self.edge.holds_back(now);
        if self.edge.can_draft() && self.edge.pending() < self.window && !holds_back {
            let prefix = self.edge.tokens();
            let wanted = self.mode != Mode::Auto || unsure(prefix);
            let ask = wanted && self.edge.cloud_decides(now, reachable);
            self.edge.draft(drafter(prefix, self.agree), ask, ());
        }
        while let Some(mut d) = self.edge.next_frame(self.rule).filter(|_| !streams) {
            let end = d.start as usize + d.tokens.len();
            let rows: Vec<u8> = if self.hidden {
                (d.hidden_from as usize..end).flat_map(|p| (p as u32).to_le_bytes()).collect()
            } else {
                Vec::new()
            };
            d.hidden_rows = (rows.len() / HIDDEN_ROW) as u32;
            if self.hidden {
                self.edge.hidden_sent(end);
            }
            self.send_up(Message::Draft(d), rows.into());
        }
        if self.edge.poll_timeout(now).is_some_and(|at| at <= now)
            && self.edge.handle_timeout(now) == Some(Timeout::Silent)
        {
            self.suspect();
        }
        Ok(())
    }
    fn cloud_turn(&mut self) -> Result<(), SessionError> {
        if self.clock >= self.mended_at {
            self.fault = Fault::None;
        }
        if self.fault == Fault::Mute {
            return Ok(());
        }
        while self.up.front().is_some_and(|(at, ..)| *at <= self.clock) {
            let (_, m, tokens, payload) = self.up.pop_front().unwrap();
            if let Message::Open(open) = &m {
                self.linked = true;
                if self.stalled_ms() > 0 {
                    let (code, message) = (RefuseCode::Stalled, String::new());
                    self.say(Message::Refuse(Refuse { code, message, retry_after_ms: 0 }));
                    self.up.clear();
                    break;
                }
                let mut fresh = CloudSession::open(open, tokens, TARGET)?;
                if let Some(old) = self.cloud.take() {
                    fresh.adopt(&old);
                }
                self.cloud = Some(fresh);
                self.job = None;
                self.say(Message::Opened(Opened { epoch: open.epoch, held_tokens: 0, trunk_layers: 0 }));
            } else if let Some(cloud) = &mut self.cloud {
                cloud.handle(&m, &payload)?;
            }
        }
        if self.job.is_some() && self.linked && self.clock >= self.report_at {
            self.report_at = self.clock + PROGRESS_MS;
            let (epoch, stalled_ms) = (Epoch(self.epoch), self.stalled_ms());
            self.say(Message::Progress(Progress { epoch, rows_left: 1, working: true, stalled_ms }));
        }
        if self.rng.chance(30) {
            return Ok(());
        }
        let Some(cloud) = &mut self.cloud else { return Ok(()) };
        let mut out = cloud.answer_ready(JobTimes::default())?;
        if self.fault == Fault::Hung && self.job.is_some() {
        } else if let Some((job, sequence)) = self.job.take() {
            // Some targets choose for every position, others for none behind the first that ends the path.
            let stops = self.rng.chance(50);
            let mut picks = Vec::new();
            for p in job.picks_from..=job.end() {
                let id = target(&sequence[..p]);
                picks.push(Decided { id, logprob: -1.0, alternatives: vec![] });
                let differs = sequence.get(p).is_some_and(|&next| next != id);
                if stops && differs && job.judged.iter().any(|judged| judged.contains(&p)) {
                    break;
                }
            }
            out.extend(cloud.complete(picks, JobTimes::default())?);
        } else if let Some(job) = cloud.next_job(1 + self.rng.below(40) as usize) {
            if self.fault == Fault::Fickle {
                (self.cloud, self.job) = (None, None);
                let (code, message) = (RefuseCode::Busy, String::new());
                self.say(Message::Refuse(Refuse { code, message, retry_after_ms: 1 }));
                return Ok(());
            }
            assert_eq!(job.feed_from, cloud.processed(), "KV state is contiguous");
            if let Some(h) = &job.hidden {
                let rows: Vec<u32> = h.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
                let expected: Vec<u32> = (job.feed_from as u32..job.end() as u32).collect();
                assert_eq!(rows, expected, "hidden states belong to the tokens fed");
            }
            let mut sequence = cloud.tokens()[..job.feed_from].to_vec();
            sequence.extend(&job.tokens);
            self.job = Some((job, sequence));
            self.engine_at = self.clock;
            self.report_at = self.clock + PROGRESS_MS;
        }
        for m in out.into_iter().filter(|_| self.linked) {
            let at = self.clock + 1 + self.rng.below(LONGEST_DELAY - 1);
            self.down.push_back((at, m));
        }
        Ok(())
    }
    /// Ticks until something can happen; several at a time while all wait for a clock.
    fn step(&self) -> u64 {
        let busy = |at: Option<u64>| at.is_some_and(|at| at <= self.clock + 10);
        let wire = busy(self.up.front().map(|f| f.0).filter(|_| self.fault != Fault::Mute))
            || busy(self.down.front().map(|f| f.0));
        if self.fault == Fault::None || wire || self.edge.is_finished() { 1 } else { 10 }
    }
}

fn reference(mode: Mode, agree: u64, prompt: &[u32], most: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < prompt.len() + most {
        let next = if mode == Mode::Auto && !unsure(&tokens) { drafter(&tokens, agree) } else { target(&tokens) };
        tokens.push(next);
        if next == EOS {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// Longest time without a token after one, or after a fault, ticks.
fn wait_max(mode: Mode) -> u64 {
    // A silence is noticed after a second and three round trips, a hung engine with the report after that.
    let noticed = STALL + PROGRESS_MS + 4 * RTT;
    match mode {
        // An open question waits for another node as long as a question may take.
        Mode::Auto => noticed + QUESTION + 4 * RTT + 100,
        // The grace counts from when the node failed; what is left of it at least, goes by once more.
        Mode::Exact | Mode::Cloud => noticed + GRACE + 3 * RTT,
    }
}

/// Runs one answer; returns whether the edge had to decide in the cloud's place, and how many late frames arrived.
fn run(seed: u64) -> (bool, usize) {
    let mut rng = Rng(seed);
    let mode = [Mode::Exact, Mode::Auto, Mode::Cloud][rng.below(3) as usize];
    let agree = [0, 50, 80, 95, 100][rng.below(5) as usize];
    let most = 1 + rng.below(40) as usize;
    let prompt = [5, (seed % 97) as u32 + 1, 7];
    let rule = FrameRule {
        chunk_min: 1 + rng.below(4) as usize,
        chunk_max: 4 + rng.below(8) as usize,
        bonus: mode == Mode::Exact && rng.chance(60),
    };
    let rule = if mode == Mode::Auto { FrameRule { chunk_min: 1, ..rule } } else { rule };
    let cuts = if rng.chance(50) { rng.below(8) } else { 0 };
    // The node fails in one of four answers.
    let mut faults_left = if rng.chance(25) { 1 + rng.below(3) } else { 0 };
    let window = 1 + rng.below(20) as usize;
    let hidden = rng.chance(50);
    let need = if mode == Mode::Auto { Need::Advice } else { Need::Decisions };
    let patience = Patience { need, question_us: QUESTION * TICK_US, grace_us: GRACE * TICK_US };
    let mut edge = EdgeSession::new(SessionId([1; 16]), &prompt, most, &[EOS], patience);
    edge.set_rtt(RTT * TICK_US);
    let expected = reference(mode, agree, &prompt, most);
    let window = window.max(rule.chunk_min);
    let second = rng.chance(50);
    let mut w = World {
        rng,
        mode,
        agree,
        rule,
        window,
        edge,
        cloud: None,
        job: None,
        up: VecDeque::new(),
        down: VecDeque::new(),
        late_up: Vec::new(),
        late_down: Vec::new(),
        fenced: 0,
        clock: 0,
        epoch: 0,
        out: Vec::new(),
        hidden,
        linked: false,
        fault: Fault::None,
        mended_at: 0,
        second,
        away_until: 0,
        engine_at: 0,
        report_at: 0,
        degraded: false,
        calm_since: 0,
    };
    let mut cuts_left = 20;
    while !w.edge.is_finished() {
        w.clock += w.step();
        let waited = w.clock - w.calm_since;
        assert!(waited <= wait_max(mode), "seed {seed}: {waited} ms without a token ({mode:?}, {:?})", w.edge.cloud());
        if cuts_left > 0 && w.rng.chance(cuts) {
            cuts_left -= 1;
            w.calm_since = w.clock;
            w.cut();
        }
        if faults_left > 0 && w.fault == Fault::None && w.rng.chance(5) {
            faults_left -= 1;
            w.calm_since = w.clock;
            w.fault = [Fault::Hung, Fault::Mute, Fault::Fickle][w.rng.below(3) as usize];
            w.mended_at = w.clock + w.rng.below(6_000);
        }
        if let Err(e) = w.edge_turn().and_then(|()| w.cloud_turn()) {
            panic!("seed {seed} ({mode:?}): {e}");
        }
    }
    if !w.degraded {
        assert_eq!(w.out, expected, "seed {seed} ({mode:?})");
    }
    (w.degraded, w.fenced)
}

#[test]
fn answers_are_exact_whatever_the_link_does() {
    let first = std::env::var("TANDEM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    println!("seeds {first}..{}", first + 12_000);
    let (mut degraded, mut fenced) = (0, 0);
    for (was_degraded, late) in (first..first + 12_000).map(run) {
        degraded += usize::from(was_degraded);
        fenced += late;
    }
    println!("{degraded} answers were degraded, {fenced} late frames of an earlier epoch were refused");
    assert!(fenced > 1_000, "too few late frames to say anything: {fenced}");
    assert!(degraded < 12_000 / 4, "only an answer whose node fails may be degraded: {degraded}");
}

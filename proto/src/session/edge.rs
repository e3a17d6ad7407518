//! The edge's end of a session: which drafted tokens are final, what to ask the cloud, and what
//! its answers mean for the path.
//!
//! Call order: [`EdgeSession::draft`] and [`EdgeSession::next_frame`] as the generation loop likes,
//! [`EdgeSession::on_verdict`] / [`EdgeSession::on_token`] / [`EdgeSession::on_end`] for what the
//! cloud says, [`EdgeSession::commit`] after each. [`EdgeSession::link_lost`] and
//! [`EdgeSession::open`] may come at any time. How long it waits for what is in [`clock`].

pub mod clock;

use alloc::{collections::VecDeque, format, string::String, vec::Vec};

use self::clock::{CloudSide, Need, Patience, Setbacks};
use super::{SessionError, StreamHash, check_epoch};
use crate::ids::{Epoch, Round, SessionId};
use crate::limits::{DRAFT_TOKENS_MAX, DRAFTS_IN_FLIGHT_MAX};
use crate::message::{Alternative, Draft, End, Generate, Open, SamplingParams, Token, Verdict};

/// Who decided a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decider {
    /// The edge alone.
    Edge,
    /// The cloud judged the edge's draft and agreed.
    Agreed,
    /// The cloud chose it.
    Cloud,
}

/// A token that is final. `info` is what the generation loop said of its draft; absent when the
/// edge had not drafted this token.
#[derive(Clone, Debug, PartialEq)]
pub struct Committed<I> {
    /// Position in the sequence.
    pub position: usize,
    /// Token id.
    pub token: u32,
    /// Who decided.
    pub decider: Decider,
    /// The draft's info. After a correction it is the info of the draft that was replaced.
    pub info: Option<I>,
    /// Log-probability under the cloud model, if the cloud decided.
    pub logprob: Option<f32>,
    /// Alternatives of the cloud model, if asked for.
    pub alternatives: Vec<Alternative>,
}

#[derive(Clone, Debug)]
struct Slot<I> {
    state: SlotState,
    info: Option<I>,
    logprob: Option<f32>,
    alternatives: Vec<Alternative>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    /// No question about it.
    Sure,
    /// The cloud must decide.
    Asked,
    /// Decided.
    Final(Decider),
}

#[derive(Clone, Debug)]
struct Question {
    from: usize,
    /// Last position the verdict decides.
    to: usize,
    /// Tokens the target feeds for it, at least.
    rows: usize,
}

/// What a frame of the cloud did to the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathChange {
    /// It belonged to an older path.
    Stale,
    /// The path stands (and may have grown by the cloud's token).
    Kept,
    /// The path was cut to this many tokens and continues with one token of the cloud; KV state
    /// beyond the cut must go.
    Cut(usize),
}

/// How questions are cut into frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRule {
    /// Least number of asked tokens in a frame, unless the path is at its end.
    pub chunk_min: usize,
    /// Most asked tokens in a frame.
    pub chunk_max: usize,
    /// Ask for the position after the last asked token too (the bonus token).
    pub bonus: bool,
}

/// The state machine; see the module's text. `I` is the generation loop's note on a draft.
#[derive(Debug)]
pub struct EdgeSession<I> {
    id: SessionId,
    epoch: Epoch,
    prompt_len: usize,
    end_max: usize,
    stop_tokens: Vec<u32>,
    tokens: Vec<u32>,
    committed: usize,
    slots: VecDeque<Slot<I>>,
    round: Round,
    cloud: CloudSide,
    patience: Patience,
    rtt_us: u64,
    /// The grace for the cloud is over; reset when it opens a session again.
    alone: bool,
    /// Frames in which the cloud decided something.
    decisions: u64,
    setbacks: Setbacks,
    /// The prompt's state is awaited.
    fetching: bool,
    questions: VecDeque<Question>,
    sent_to: usize,
    asked_to: usize,
    hidden_sent_to: usize,
    span: Option<StreamHash>,
    finished: bool,
    /// Verdicts received and spans asked for.
    pub round_trips: u32,
    /// Drafts thrown away.
    pub rolled_back: u32,
}

impl<I> EdgeSession<I> {
    /// A session over `prompt` (not empty) for an answer of at most `answer_max` tokens.
    #[must_use]
    pub fn new(id: SessionId, prompt: &[u32], answer_max: usize, stop_tokens: &[u32], patience: Patience) -> Self {
        let cloud = match patience.need {
            Need::Nothing => CloudSide::Unused,
            Need::Advice | Need::Decisions => CloudSide::Waiting { lost_at: None, retry_at: None },
        };
        Self {
            cloud,
            patience,
            rtt_us: 0,
            alone: false,
            decisions: 0,
            setbacks: Setbacks::default(),
            fetching: false,
            id,
            epoch: Epoch(0),
            prompt_len: prompt.len(),
            end_max: prompt.len() + answer_max,
            stop_tokens: stop_tokens.to_vec(),
            tokens: prompt.to_vec(),
            committed: prompt.len(),
            slots: VecDeque::new(),
            round: Round(0),
            questions: VecDeque::new(),
            sent_to: 0,
            asked_to: prompt.len(),
            hidden_sent_to: prompt.len(),
            span: None,
            finished: answer_max == 0,
            round_trips: 0,
            rolled_back: 0,
        }
    }

    /// The session.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// The prompt, the final tokens and the path.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// One past the last final token.
    #[must_use]
    pub fn committed(&self) -> usize {
        self.committed
    }

    /// True once the last final token ended the answer.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Questions sent and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.questions.len()
    }

    /// Tokens the target feeds for the question that the next verdict answers; 0 if none is open.
    #[must_use]
    pub fn rows_in_question(&self) -> usize {
        self.questions.front().map_or(0, |q| q.rows)
    }

    /// True while the cloud decodes by itself.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        self.span.is_some()
    }

    /// Tokens of the path that are not final.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.slots.len()
    }

    /// True if some position waits for the cloud.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.slots.iter().any(|s| s.state == SlotState::Asked)
    }

    /// True if the path may grow: it has not reached its end.
    #[must_use]
    pub fn can_draft(&self) -> bool {
        !self.finished
            && self.tokens.len() < self.end_max
            && (self.tokens.len() == self.prompt_len || !self.is_stop(self.tokens[self.tokens.len() - 1]))
    }

    fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }

    /// Adds a drafted token at the end of the path; `ask` makes it wait for the cloud.
    pub fn draft(&mut self, token: u32, ask: bool, info: I) {
        let state = if ask { SlotState::Asked } else { SlotState::Sure };
        self.tokens.push(token);
        self.slots.push_back(Slot { state, info: Some(info), logprob: None, alternatives: Vec::new() });
    }

    /// True if [`Self::commit`] has a token to give.
    #[must_use]
    pub fn can_commit(&self) -> bool {
        !self.finished && self.slots.front().is_some_and(|s| s.state != SlotState::Asked)
    }

    /// Takes the next token that has become final, in order.
    pub fn commit(&mut self) -> Option<Committed<I>> {
        if !self.can_commit() {
            return None;
        }
        let slot = self.slots.pop_front()?;
        let position = self.committed;
        let token = self.tokens[position];
        self.committed += 1;
        self.finished = self.is_stop(token) || self.committed >= self.end_max;
        let decider = match slot.state {
            SlotState::Final(d) => d,
            SlotState::Sure | SlotState::Asked => Decider::Edge,
        };
        Some(Committed {
            position,
            token,
            decider,
            info: slot.info,
            logprob: slot.logprob,
            alternatives: slot.alternatives,
        })
    }

    /// The frame that opens the session at a node, or opens it again after a broken link. Every
    /// open question will be sent again.
    #[allow(clippy::too_many_arguments)]
    pub fn open(
        &mut self,
        now: u64,
        epoch: Epoch,
        model: String,
        request_id: String,
        sampling: SamplingParams,
        trunk_layers: u32,
        want_prompt_state: bool,
        top_logprobs: u32,
    ) -> (Open, Vec<u32>) {
        self.epoch = epoch;
        let lost_at = match self.cloud {
            CloudSide::Waiting { lost_at, .. } | CloudSide::Open { lost_at, .. } => lost_at,
            CloudSide::Unused | CloudSide::Refused => None,
        };
        self.cloud =
            CloudSide::Open { lost_at, since: None, heard_at: now, moved_at: now, rows_left: u32::MAX, behind: false };
        self.fetching = want_prompt_state;
        self.new_round();
        self.sent_to = self.committed;
        self.asked_to = self.committed;
        self.hidden_sent_to = self.committed;
        let open = Open {
            session: self.id,
            epoch,
            model,
            request_id,
            prompt_tokens: self.prompt_len as u32,
            committed_tokens: (self.committed - self.prompt_len) as u32,
            sampling,
            stop_tokens: self.stop_tokens.clone(),
            answer_tokens_max: (self.end_max - self.prompt_len) as u32,
            trunk_layers,
            want_prompt_state,
            top_logprobs,
            grammar: None,
        };
        (open, self.tokens[..self.committed].to_vec())
    }

    fn new_round(&mut self) {
        self.round = self.round.next();
        self.questions.clear();
        self.span = None;
    }

    /// Gives up on the cloud for the path: the edge's own drafts stand. If the cloud is still
    /// connected its view is corrected with the next frame.
    pub fn resolve_locally(&mut self) {
        for slot in &mut self.slots {
            if slot.state == SlotState::Asked {
                slot.state = SlotState::Final(Decider::Edge);
            }
        }
        if !self.questions.is_empty() || self.span.is_some() {
            self.new_round();
            self.sent_to = self.sent_to.min(self.committed);
        }
        self.asked_to = self.tokens.len();
    }

    fn next_asked(&self) -> Option<usize> {
        (self.asked_to.max(self.committed)..self.tokens.len())
            .find(|&p| self.slots[p - self.committed].state == SlotState::Asked)
    }

    /// The next question as a frame, if one is due under `rule`. Hidden states are wanted for the
    /// positions of [`Draft::hidden_from`] on: the caller fills `hidden_rows` and the payload.
    pub fn next_frame(&mut self, rule: FrameRule) -> Option<Draft> {
        if !self.is_connected() || self.questions.len() >= DRAFTS_IN_FLIGHT_MAX || self.span.is_some() {
            return None;
        }
        let from = self.next_asked()?;
        let asked = |p: usize| self.slots[p - self.committed].state == SlotState::Asked;
        let run_end = (from..self.tokens.len()).take_while(|&p| asked(p)).count() + from;
        let chunk_end = run_end.min(from + rule.chunk_max.max(1));
        let at_end = run_end == self.tokens.len() && !self.can_draft();
        if chunk_end - from < rule.chunk_min && !at_end && run_end == self.tokens.len() {
            return None;
        }
        let start = self.sent_to;
        // The last token of the path needs no bonus if nothing may follow it.
        let bonus = rule.bonus && !(at_end && chunk_end == self.tokens.len());
        let to = if bonus { chunk_end } else { chunk_end - 1 };
        let last_fed = to.min(start + DRAFT_TOKENS_MAX);
        if last_fed < from {
            // A tail longer than a frame goes ahead in a frame that asks for its end only.
            return self.tail_frame(start, last_fed);
        }
        let frame = self.frame(start, from, last_fed);
        self.questions.push_back(Question { from, to: last_fed, rows: last_fed + 1 - start });
        self.asked_to = last_fed + 1;
        Some(frame)
    }

    fn tail_frame(&mut self, start: usize, end: usize) -> Option<Draft> {
        (end > start).then(|| {
            let frame = self.frame(start, end, end);
            self.questions.push_back(Question { from: end, to: end, rows: end + 1 - start });
            frame
        })
    }

    fn frame(&mut self, start: usize, judge_from: usize, end: usize) -> Draft {
        let hidden_from = self.hidden_sent_to.min(end);
        self.sent_to = end;
        Draft {
            epoch: self.epoch,
            round: self.round,
            start: start as u32,
            judge_from: judge_from as u32,
            tokens: self.tokens[start..end].to_vec(),
            hidden_from: hidden_from as u32,
            hidden_rows: 0,
        }
    }

    /// Notes that the hidden states of all positions before `position` have been sent.
    pub fn hidden_sent(&mut self, position: usize) {
        self.hidden_sent_to = self.hidden_sent_to.max(position);
    }

    /// Asks the cloud to decode the rest by itself, at most `tokens_max` tokens. The path beyond the
    /// final tokens is dropped.
    pub fn next_span(&mut self, tokens_max: usize) -> Option<Generate> {
        if !self.is_connected() || self.span.is_some() || self.finished {
            return None;
        }
        if !self.slots.is_empty() || !self.questions.is_empty() {
            self.rolled_back += self.slots.len() as u32;
            self.slots.clear();
            self.tokens.truncate(self.committed);
            self.new_round();
            self.sent_to = self.sent_to.min(self.committed);
        }
        let tail_from = self.sent_to.max(self.committed.saturating_sub(DRAFT_TOKENS_MAX));
        let tail = self.tokens[tail_from..].to_vec();
        self.sent_to = self.tokens.len();
        self.round_trips += 1;
        self.span = Some(StreamHash::default());
        Some(Generate {
            epoch: self.epoch,
            round: self.round,
            start: self.tokens.len() as u32,
            tail,
            tokens_max: tokens_max.min(self.end_max - self.committed) as u32,
        })
    }

    /// Takes a verdict.
    pub fn on_verdict(&mut self, v: &Verdict) -> Result<PathChange, SessionError> {
        check_epoch(v.epoch, self.epoch)?;
        if v.round != self.round {
            return Ok(PathChange::Stale);
        }
        let Some(q) = self.questions.front() else {
            return Err(SessionError::OutOfOrder(format!("a verdict at {} and no question is open", v.from)));
        };
        self.decisions += 1;
        let (from, to, accepted) = (q.from, q.to, v.accepted as usize);
        let shape_ok = v.from as usize == from
            && accepted <= to - from
            && v.logprobs.len() == accepted + usize::from(v.next.is_some())
            && (v.alternatives.is_empty() || v.alternatives.len() == v.logprobs.len())
            && v.tail_agreed <= v.tail_tokens
            && match v.next {
                Some(_) => v.rejected == (accepted < to - from),
                None => accepted > 0 && !v.rejected,
            };
        if !shape_ok {
            return Err(SessionError::Malformed(format!(
                "verdict {}+{accepted} (next {:?}, rejected {}) for the question {from}..={to}",
                v.from, v.next, v.rejected
            )));
        }
        self.questions.pop_front();
        self.round_trips += 1;
        let alternatives = |i: usize| v.alternatives.get(i).cloned().unwrap_or_default();
        for i in 0..accepted {
            self.decide(from + i, Decider::Agreed, v.logprobs[i], alternatives(i));
        }
        let Some(next) = v.next else {
            // The last accepted token ends the answer; what was drafted after it is void.
            return Ok(self.cut(from + accepted));
        };
        let position = from + accepted;
        let (logprob, alternatives) = (v.logprobs[accepted], alternatives(accepted));
        if self.tokens.get(position) == Some(&next) {
            self.decide(position, Decider::Agreed, logprob, alternatives);
            self.sent_to = self.sent_to.max(position + 1);
            return Ok(PathChange::Kept);
        }
        if position >= self.end_max {
            return Ok(PathChange::Kept);
        }
        let info = self.slots.get_mut(position.wrapping_sub(self.committed)).and_then(|s| s.info.take());
        let change = if position < self.tokens.len() { self.cut(position) } else { PathChange::Kept };
        self.tokens.push(next);
        self.slots.push_back(Slot {
            state: SlotState::Final(Decider::Cloud),
            info,
            logprob: Some(logprob),
            alternatives,
        });
        self.sent_to = position + 1;
        self.asked_to = self.asked_to.max(position + 1);
        Ok(change)
    }

    fn decide(&mut self, position: usize, decider: Decider, logprob: f32, alternatives: Vec<Alternative>) {
        // A position may be decided twice: as a bonus, then as the head of the next question.
        let Some(slot) = position.checked_sub(self.committed).and_then(|i| self.slots.get_mut(i)) else {
            return;
        };
        if slot.state == SlotState::Asked {
            slot.state = SlotState::Final(decider);
            slot.logprob = Some(logprob);
            slot.alternatives = alternatives;
        }
    }

    /// Cuts the path to `len` tokens and starts a new round.
    fn cut(&mut self, len: usize) -> PathChange {
        if len >= self.tokens.len() {
            return PathChange::Kept;
        }
        self.rolled_back += (self.tokens.len() - len) as u32;
        self.slots.truncate(len.saturating_sub(self.committed));
        self.tokens.truncate(len);
        self.new_round();
        self.sent_to = self.sent_to.min(len);
        self.asked_to = self.asked_to.min(len);
        self.hidden_sent_to = self.hidden_sent_to.min(len);
        PathChange::Cut(len)
    }

    /// Takes a token the cloud decoded by itself.
    pub fn on_token(&mut self, t: &Token) -> Result<PathChange, SessionError> {
        check_epoch(t.epoch, self.epoch)?;
        if t.round != self.round {
            return Ok(PathChange::Stale);
        }
        let Some(span) = &mut self.span else {
            return Err(SessionError::OutOfOrder(format!("a token at {} and none was asked for", t.position)));
        };
        if t.position as usize != self.tokens.len() || self.tokens.len() >= self.end_max {
            return Err(SessionError::OutOfOrder(format!("token at {}, expected {}", t.position, self.tokens.len())));
        }
        self.decisions += 1;
        span.push(t.id);
        self.tokens.push(t.id);
        self.sent_to = self.tokens.len();
        self.slots.push_back(Slot {
            state: SlotState::Final(Decider::Cloud),
            info: None,
            logprob: Some(t.logprob),
            alternatives: t.alternatives.clone(),
        });
        Ok(PathChange::Kept)
    }

    /// Takes the end of a span and checks that nothing of it is missing.
    pub fn on_end(&mut self, e: &End) -> Result<PathChange, SessionError> {
        check_epoch(e.epoch, self.epoch)?;
        if e.round != self.round {
            return Ok(PathChange::Stale);
        }
        let Some(span) = self.span.take() else {
            return Err(SessionError::OutOfOrder("an end and no tokens were asked for".into()));
        };
        if span.count() != e.count || span.digest() != e.hash {
            return Err(SessionError::Damaged(format!(
                "{} tokens arrived, {} were sent, or their hash differs",
                span.count(),
                e.count
            )));
        }
        Ok(PathChange::Kept)
    }
}

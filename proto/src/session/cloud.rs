//! The cloud's end of a session: which tokens to feed to the target model, which choices to ask
//! it for, and what to tell the edge.
//!
//! Call order: [`CloudSession::open`], then any mix of [`CloudSession::handle`] and
//! [`CloudSession::next_job`] → run it → [`CloudSession::complete`]. One job runs at a time.

use alloc::{collections::VecDeque, format, vec::Vec};
use core::ops::Range;

use bytes::Bytes;

use super::{Decided, SessionError, StreamHash, check_epoch, check_limit};
use crate::frame::Message;
use crate::ids::{Epoch, Round};
use crate::limits::{
    DRAFT_TOKENS_MAX, DRAFTS_IN_FLIGHT_MAX, GRAMMAR_BYTES_MAX, LOGIT_BIAS_MAX, NAME_BYTES_MAX, SESSION_TOKENS_MAX,
    STOP_TOKENS_MAX, TOP_LOGPROBS_MAX,
};
use crate::message::{Draft, End, Generate, Open, Token, Verdict};

/// Work for the target model.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Cut the KV state to this many tokens, then feed [`Job::tokens`] from there.
    pub feed_from: usize,
    /// Tokens to feed; never empty.
    pub tokens: Vec<u32>,
    /// Hidden states above the trunk for exactly these tokens, f32 little-endian, if the edge sent
    /// them all.
    pub hidden: Option<Bytes>,
    /// The target's choices are wanted for the positions `picks_from ..= feed_from + tokens.len()`.
    pub picks_from: usize,
    /// Positions of drafts that are judged. Where the choice differs from the sequence at one of them, none after
    /// it is wanted.
    pub judged: Vec<Range<usize>>,
    /// Choices that will be wanted after these if the edge does not intervene: what is left of a span that the
    /// cloud writes by itself. A target may run ahead.
    pub ahead: usize,
}

impl Job {
    /// One past the last token fed; also the last position to choose for.
    #[must_use]
    pub fn end(&self) -> usize {
        self.feed_from + self.tokens.len()
    }

    /// Number of choices wanted.
    #[must_use]
    pub fn picks(&self) -> usize {
        self.end() + 1 - self.picks_from
    }
}

/// What a session must know of the target model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetShape {
    /// Context length, tokens.
    pub context_tokens: usize,
    /// Tokens of the vocabulary: ids are below it.
    pub vocabulary: usize,
    /// Size of one hidden state above the trunk, bytes. 0 if this edge's do not stand in for the
    /// model's own: what it sends of them is dropped.
    pub hidden_row_bytes: usize,
}

/// Time spent on a job, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JobTimes {
    /// In the model.
    pub compute_us: u32,
    /// Waiting for the model.
    pub queue_us: u32,
}

#[derive(Clone, Debug, PartialEq)]
struct Question {
    start: usize,
    judge_from: usize,
    end: usize,
}

#[derive(Clone, Debug)]
struct Span {
    remaining: u32,
    hash: StreamHash,
}

#[derive(Clone, Debug)]
struct Running {
    end: usize,
    picks_from: usize,
    judged: Vec<Range<usize>>,
    /// KV stays valid up to here if a newer round arrived meanwhile.
    valid_to: usize,
}

/// The state machine; see the module's text.
#[derive(Debug)]
pub struct CloudSession {
    epoch: Epoch,
    prompt_len: usize,
    end_max: usize,
    vocabulary: usize,
    hidden_row_bytes: usize,
    stop_tokens: Vec<u32>,
    tokens: Vec<u32>,
    processed: usize,
    /// The target's choices for positions from `picks_from` on, all ≤ `processed`.
    picks: VecDeque<Decided>,
    picks_from: usize,
    round: Round,
    dead: bool,
    hidden_from: usize,
    hidden: Vec<u8>,
    questions: VecDeque<Question>,
    span: Option<Span>,
    prefill: bool,
    running: Option<Running>,
}

impl CloudSession {
    /// Opens a session from its first frame and the tokens of its payload.
    ///
    /// # Errors
    /// The frame contradicts itself, passes a limit, or names tokens the model does not have.
    pub fn open(open: &Open, tokens: Vec<u32>, target: TargetShape) -> Result<Self, SessionError> {
        let TargetShape { context_tokens, vocabulary, hidden_row_bytes } = target;
        let (prompt, committed) = (open.prompt_tokens as usize, open.committed_tokens as usize);
        check_limit("model", open.model.len(), NAME_BYTES_MAX)?;
        check_limit("request_id", open.request_id.len(), NAME_BYTES_MAX)?;
        check_limit("stop_tokens", open.stop_tokens.len(), STOP_TOKENS_MAX)?;
        check_limit("logit_bias", open.sampling.logit_bias.len(), LOGIT_BIAS_MAX)?;
        check_limit("top_logprobs", open.top_logprobs as usize, TOP_LOGPROBS_MAX)?;
        check_limit("grammar", open.grammar.as_ref().map_or(0, |g| g.text.len()), GRAMMAR_BYTES_MAX)?;
        check_limit("tokens", tokens.len(), SESSION_TOKENS_MAX.min(context_tokens))?;
        check_tokens(&tokens, vocabulary)?;
        if prompt == 0 || prompt.checked_add(committed) != Some(tokens.len()) {
            return Err(SessionError::Malformed(format!(
                "{prompt} prompt and {committed} committed tokens announced, {} sent",
                tokens.len()
            )));
        }
        let end_max = (prompt + open.answer_tokens_max as usize).min(context_tokens).min(SESSION_TOKENS_MAX);
        Ok(Self {
            epoch: open.epoch,
            prompt_len: prompt,
            end_max,
            vocabulary,
            hidden_row_bytes,
            stop_tokens: open.stop_tokens.clone(),
            tokens,
            processed: 0,
            picks: VecDeque::new(),
            picks_from: 0,
            round: Round(0),
            dead: false,
            hidden_from: 0,
            hidden: Vec::new(),
            questions: VecDeque::new(),
            span: None,
            prefill: true,
            running: None,
        })
    }

    /// Takes over the KV state that an earlier owner of this session left behind: returns how many
    /// leading tokens are common, which stay valid.
    pub fn adopt(&mut self, earlier: &Self) -> usize {
        let common = self.tokens.iter().zip(&earlier.tokens).take_while(|(a, b)| a == b).count();
        self.processed = common.min(earlier.processed).min(self.tokens.len() - 1);
        self.processed
    }

    /// Tokens of the sequence, the path included.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Epoch of the session.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Tokens whose KV state the model holds.
    #[must_use]
    pub fn processed(&self) -> usize {
        self.processed
    }

    /// Takes a frame of the edge. Frames of an older round are dropped silently: the edge knows.
    pub fn handle(&mut self, message: &Message, payload: &Bytes) -> Result<(), SessionError> {
        match message {
            Message::Draft(d) => self.on_draft(d, payload),
            Message::Generate(g) => self.on_generate(g),
            other => Err(SessionError::OutOfOrder(format!("{} is not for an open session", other.frame_type().name()))),
        }
    }

    fn on_draft(&mut self, d: &Draft, payload: &Bytes) -> Result<(), SessionError> {
        check_epoch(d.epoch, self.epoch)?;
        check_limit("tokens", d.tokens.len(), DRAFT_TOKENS_MAX)?;
        check_tokens(&d.tokens, self.vocabulary)?;
        let (start, judge_from) = (d.start as usize, d.judge_from as usize);
        let end = start + d.tokens.len();
        if judge_from < start || judge_from > end {
            return Err(SessionError::Malformed(format!("judge_from {judge_from} is outside {start}..={end}")));
        }
        // An edge may send hidden states before it has been told that they are not wanted.
        let wanted = self.hidden_row_bytes > 0;
        if wanted && payload.len() != d.hidden_rows as usize * self.hidden_row_bytes {
            return Err(SessionError::Malformed(format!(
                "{} hidden rows of {} bytes announced, {} bytes sent",
                d.hidden_rows,
                self.hidden_row_bytes,
                payload.len()
            )));
        }
        if !self.extend(d.round, start, &d.tokens)? {
            return Ok(());
        }
        if self.span.is_some() {
            return Err(SessionError::OutOfOrder("drafts while the cloud decodes; start a new round first".into()));
        }
        check_limit("drafts in flight", self.questions.len() + 1, DRAFTS_IN_FLIGHT_MAX)?;
        self.store_hidden(d.hidden_from as usize, payload, end);
        self.questions.push_back(Question { start, judge_from, end });
        Ok(())
    }

    fn on_generate(&mut self, g: &Generate) -> Result<(), SessionError> {
        check_epoch(g.epoch, self.epoch)?;
        check_limit("tail", g.tail.len(), DRAFT_TOKENS_MAX)?;
        check_tokens(&g.tail, self.vocabulary)?;
        let start = g.start as usize;
        if start >= self.end_max {
            return Err(SessionError::Full { position: start, max: self.end_max });
        }
        let Some(tail_from) = start.checked_sub(g.tail.len()) else {
            return Err(SessionError::Malformed(format!("a tail of {} tokens before position {start}", g.tail.len())));
        };
        if !self.extend(g.round, tail_from, &g.tail)? {
            return Ok(());
        }
        if start != self.tokens.len() {
            return Err(SessionError::OutOfOrder(format!(
                "asked for position {start}, the sequence has {}",
                self.tokens.len()
            )));
        }
        self.span = Some(Span { remaining: g.tokens_max, hash: StreamHash::default() });
        Ok(())
    }

    /// Brings `tokens` from `start` on into the path; false if the frame belongs to a path that is
    /// over.
    fn extend(&mut self, round: Round, start: usize, tokens: &[u32]) -> Result<bool, SessionError> {
        if round < self.round || (round == self.round && self.dead) {
            return Ok(false);
        }
        if start > self.tokens.len() || start < self.prompt_len {
            return Err(SessionError::OutOfOrder(format!(
                "tokens from position {start}, the answer spans {}..{}",
                self.prompt_len,
                self.tokens.len()
            )));
        }
        check_limit("sequence", start + tokens.len(), self.end_max)?;
        if round > self.round {
            self.round = round;
            self.dead = false;
            self.span = None;
            self.questions.clear();
            self.truncate(start);
        }
        let known = (self.tokens.len() - start).min(tokens.len());
        if self.tokens[start..start + known] != tokens[..known] {
            // The edge has been told of the token that differs; its next round is on the way.
            self.end_path();
            return Ok(false);
        }
        self.tokens.extend_from_slice(&tokens[known..]);
        Ok(true)
    }

    fn end_path(&mut self) {
        self.dead = true;
        self.questions.clear();
        self.span = None;
    }

    /// Drops what lies beyond the first `len` tokens.
    fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.processed = self.processed.min(len);
        if let Some(running) = &mut self.running {
            running.valid_to = running.valid_to.min(len);
        }
        // A choice for position p depends on the tokens before p only.
        let keep = (len + 1).saturating_sub(self.picks_from);
        self.picks.truncate(keep);
        let rows = len.saturating_sub(self.hidden_from);
        self.hidden.truncate(rows * self.hidden_row_bytes);
    }

    fn store_hidden(&mut self, from: usize, rows: &Bytes, end: usize) {
        let count = rows.len().checked_div(self.hidden_row_bytes).unwrap_or(0);
        if count == 0 || from + count > end {
            return;
        }
        let have_to = self.hidden_from + self.hidden.len() / self.hidden_row_bytes;
        if from < self.hidden_from || from > have_to {
            self.hidden.clear();
            self.hidden_from = from;
        }
        self.hidden.truncate((from - self.hidden_from) * self.hidden_row_bytes);
        self.hidden.extend_from_slice(rows);
    }

    fn hidden_for(&self, from: usize, to: usize) -> Option<Bytes> {
        let row = self.hidden_row_bytes;
        let have_to = self.hidden_from + self.hidden.len().checked_div(row)?;
        (from >= self.hidden_from && to <= have_to && from < to).then(|| {
            Bytes::copy_from_slice(&self.hidden[(from - self.hidden_from) * row..(to - self.hidden_from) * row])
        })
    }

    fn pick_at(&self, position: usize) -> Option<&Decided> {
        position.checked_sub(self.picks_from).and_then(|i| self.picks.get(i))
    }

    /// The next work for the model, if any and none is running. All open questions of the path go
    /// into one job, up to `rows_max` tokens. Call [`Self::answer_ready`] first.
    pub fn next_job(&mut self, rows_max: usize) -> Option<Job> {
        if self.running.is_some() {
            return None;
        }
        let (first_needed, end) = if let Some(first) = self.questions.front() {
            let mut end = first.end;
            for q in self.questions.iter().skip(1) {
                if q.end - self.processed.min(first.start) > rows_max {
                    break;
                }
                end = q.end;
            }
            (first.judge_from, end)
        } else if self.span.is_some() || (self.prefill && self.processed < self.tokens.len()) {
            (self.tokens.len(), self.tokens.len())
        } else {
            return None;
        };
        self.prefill = false;
        // A choice that is needed and not at hand means feeding the token before it (again).
        let lacking = (first_needed..=self.processed).find(|&p| self.pick_at(p).is_none());
        let feed_from = lacking.map_or(self.processed, |p| p - 1).min(end.saturating_sub(1));
        self.processed = self.processed.min(feed_from);
        let first_new = self.questions.front().map_or(end, |q| q.start).max(feed_from + 1).min(end);
        let job = Job {
            feed_from,
            tokens: self.tokens[feed_from..end].to_vec(),
            hidden: self.hidden_for(feed_from, end),
            picks_from: first_new.min(first_needed.max(feed_from + 1)),
            judged: self.questions.iter().take_while(|q| q.end <= end).map(|q| q.judge_from..q.end).collect(),
            ahead: self.span.as_ref().map_or(0, |span| (span.remaining as usize).saturating_sub(1)),
        };
        let judged = job.judged.clone();
        self.running = Some(Running { end, picks_from: job.picks_from, judged, valid_to: end });
        Some(job)
    }

    /// Whether the last of a job's choices ends the path that it was made for, so that none after it is wanted.
    fn differs(&self, running: &Running, picks: &[Decided]) -> bool {
        let Some((last, before)) = picks.split_last() else { return false };
        let position = running.picks_from + before.len();
        // What a newer round has cut off cannot be compared any more, and is not used either.
        let ends = position >= running.valid_to || self.tokens.get(position) != Some(&last.id);
        ends && running.judged.iter().any(|judged| judged.contains(&position))
    }

    /// Takes the model's choices for the running job, all of them or those up to the first that ends the path
    /// ([`Job::judged`]), and returns the frames for the edge.
    pub fn complete(&mut self, picks: Vec<Decided>, times: JobTimes) -> Result<Vec<Message>, SessionError> {
        let Some(running) = self.running.take() else {
            return Err(SessionError::OutOfOrder("no job is running".into()));
        };
        let wanted = running.end + 1 - running.picks_from;
        let all = picks.len() == wanted || (picks.len() < wanted && self.differs(&running, &picks));
        if !all {
            return Err(SessionError::Malformed(format!("{} choices for {wanted} positions", picks.len(),)));
        }
        self.processed = running.valid_to;
        let row = self.hidden_row_bytes;
        if self.processed > self.hidden_from && row > 0 {
            let used = ((self.processed - self.hidden_from) * row).min(self.hidden.len());
            self.hidden.drain(..used);
            self.hidden_from = self.processed;
        }
        // A choice depends on the tokens before it only, so a newer round leaves the early ones valid.
        let mut picks = picks;
        picks.truncate((running.valid_to + 1).saturating_sub(running.picks_from));
        // Keep what is still needed of the older choices: those that end where the new ones begin.
        if self.picks_from + self.picks.len() == running.picks_from {
            self.picks.extend(picks);
        } else {
            self.picks = picks.into();
            self.picks_from = running.picks_from;
        }
        let out = self.answer_ready(times)?;
        // Choices before the end of what was fed have been used.
        while self.picks_from < self.processed && self.picks.pop_front().is_some() {
            self.picks_from += 1;
        }
        Ok(out)
    }

    /// Answers every question whose choices are at hand.
    pub fn answer_ready(&mut self, times: JobTimes) -> Result<Vec<Message>, SessionError> {
        let mut out = Vec::new();
        if self.running.is_some() {
            return Ok(out);
        }
        while let Some(q) = self.questions.front().cloned() {
            if !self.decided(&q) {
                return Ok(out);
            }
            self.questions.pop_front();
            out.push(self.judge(&q, times)?);
        }
        if self.span.is_some() {
            self.emit_token(&mut out);
        }
        Ok(out)
    }

    /// Whether all choices are at hand that a question's answer depends on.
    fn decided(&self, q: &Question) -> bool {
        for position in q.judge_from..=q.end {
            let Some(pick) = self.pick_at(position) else { return false };
            if position < q.end && self.tokens[position] != pick.id {
                return true;
            }
        }
        true
    }

    fn judge(&mut self, q: &Question, times: JobTimes) -> Result<Message, SessionError> {
        let mut accepted = 0u32;
        let mut rejected = false;
        let mut ended = false;
        let mut logprobs = Vec::new();
        let mut alternatives = Vec::new();
        let tail = q.start..q.judge_from;
        let tail_tokens = tail.clone().filter(|&p| self.pick_at(p).is_some()).count() as u32;
        let tail_agreed = tail.filter(|&p| self.pick_at(p).is_some_and(|d| d.id == self.tokens[p])).count() as u32;
        let mut position = q.judge_from;
        let mut next = None;
        while position <= q.end {
            let Some(decided) = self.pick_at(position).cloned() else {
                return Err(SessionError::Malformed(format!("no choice for position {position}")));
            };
            logprobs.push(decided.logprob);
            alternatives.push(decided.alternatives);
            if position < q.end && self.tokens[position] == decided.id {
                accepted += 1;
                position += 1;
                if self.stop_tokens.contains(&decided.id) {
                    ended = true;
                    break;
                }
            } else {
                rejected = position < q.end;
                next = Some(decided.id);
                break;
            }
        }
        if ended {
            self.end_path();
            self.truncate(position);
        } else if let Some(id) = next
            && self.tokens.get(position) != Some(&id)
        {
            if position < self.tokens.len() {
                self.end_path();
                self.truncate(position);
            }
            // A choice past the end is told and goes nowhere.
            if position < self.end_max {
                self.tokens.push(id);
            }
        }
        if alternatives.iter().all(Vec::is_empty) {
            alternatives.clear();
        }
        Ok(Message::Verdict(Verdict {
            epoch: self.epoch,
            round: self.round,
            from: q.judge_from as u32,
            accepted,
            next,
            rejected,
            tail_agreed,
            tail_tokens,
            logprobs,
            alternatives,
            compute_us: times.compute_us,
            queue_us: times.queue_us,
        }))
    }

    fn emit_token(&mut self, out: &mut Vec<Message>) {
        let position = self.tokens.len();
        let Some(decided) = self.pick_at(position).cloned() else { return };
        let Some(mut span) = self.span.take() else { return };
        self.tokens.push(decided.id);
        span.hash.push(decided.id);
        span.remaining = span.remaining.saturating_sub(1);
        let over = span.remaining == 0 || self.stop_tokens.contains(&decided.id) || self.tokens.len() >= self.end_max;
        out.push(Message::Token(Token {
            epoch: self.epoch,
            round: self.round,
            position: position as u32,
            id: decided.id,
            logprob: decided.logprob,
            alternatives: decided.alternatives,
        }));
        if over {
            out.push(Message::End(End {
                epoch: self.epoch,
                round: self.round,
                count: span.hash.count(),
                hash: span.hash.digest(),
            }));
        } else {
            self.span = Some(span);
        }
    }
}

fn check_tokens(tokens: &[u32], vocabulary: usize) -> Result<(), SessionError> {
    match tokens.iter().find(|&&token| token as usize >= vocabulary) {
        Some(&token) => Err(SessionError::Vocabulary { token, vocabulary }),
        None => Ok(()),
    }
}

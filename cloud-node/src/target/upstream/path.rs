//! An answer of an engine that is still coming: distributions along a path of tokens. As long as the sequence goes
//! where the path goes, the next position's distribution is taken from it; else it is dropped, which cancels it.

use std::ops::RangeInclusive;

use tandem_upstream::{Ask, Engine, Fault, Row, Rows};

use super::super::Job;
use super::choice::Asked;

/// See the module's text.
pub(super) struct Path {
    rows: Rows,
    /// The next distribution is the one after these tokens.
    tokens: Vec<u32>,
    /// False once a row did not say where the path goes.
    goes_on: bool,
    left: usize,
}

impl Path {
    /// Asks for the distributions at `positions` of the job's sequence and `ahead` more.
    pub(super) async fn begin(
        engine: &Engine,
        job: &Job,
        positions: RangeInclusive<usize>,
        ahead: usize,
        asked: &Asked,
        lane: usize,
    ) -> Result<Self, Fault> {
        let tokens = &job.tokens[..*positions.end()];
        let from = *positions.start();
        let ask = Ask { tokens, from, ahead, top: asked.top, lane };
        let rows = engine.rows(&ask).await?;
        Ok(Self { rows, tokens: tokens[..from].to_vec(), goes_on: true, left: tokens.len() + 1 - from + ahead })
    }

    /// Whether the next distribution is the one after `tokens`.
    pub(super) fn leads_to(&self, tokens: &[u32]) -> bool {
        self.goes_on && self.left > 0 && self.tokens == tokens
    }

    /// The next distribution; none if the engine leaves it out.
    pub(super) async fn next(&mut self) -> Result<Option<Row>, Fault> {
        let Some(row) = self.rows.next().await? else {
            self.goes_on = false;
            return Ok(None);
        };
        self.left -= 1;
        match row.next {
            Some(token) => self.tokens.push(token),
            None => self.goes_on = false,
        }
        Ok(Some(row))
    }
}

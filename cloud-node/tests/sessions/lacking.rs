//! Targets that can do less than the own engine: what they lack is refused by name, or declined where the
//! session does as well without; nothing of it reaches the target.

use super::*;
use tandem_cloud_node::target::{Capabilities, Job, Pending, Submitted, TargetError, TargetLoad, TrunkState, Verify};

/// The own engine as one behind a URL would be: no state of it is handed out or counted.
struct Remote {
    engine: OwnEngine,
    verify: Verify,
    grammar: bool,
    /// How every job ends, if it ends badly.
    fails: Option<TargetError>,
}

impl Remote {
    async fn bed(verify: Verify, grammar: bool, fails: Option<TargetError>) -> Bed {
        // More than there are blocks: admission by blocks would refuse every session.
        let bounds = Bounds { kv_blocks_reserve: 1 << 40, ..Bounds::default() };
        let wrap = |engine| Arc::new(Self { engine, verify, grammar, fails }) as Arc<dyn Target>;
        Bed::over(CloudSettings { bounds, pull_trunk: Exchange::Always, ..settings() }, wrap).await
    }
}

impl Target for Remote {
    fn capabilities(&self) -> Capabilities {
        Capabilities { verify: self.verify, grammar: self.grammar, ..self.engine.capabilities() }
    }

    fn load(&self) -> TargetLoad {
        TargetLoad { kv: None, ..self.engine.load() }
    }

    fn held(&self, _tenant_key: [u8; 32], _tokens: Vec<u32>) -> Pending<usize> {
        Box::pin(std::future::ready(Ok(0)))
    }

    fn submit(&self, job: Job) -> Submitted {
        assert!(job.hidden.is_none() && !job.keep_hidden, "there is no trunk");
        assert!(self.grammar || job.constraint.is_none(), "grammars are not followed");
        assert!(self.verify != Verify::Unable || job.picks_from == job.tokens.len(), "drafts are not judged");
        let submitted = self.engine.submit(job);
        match self.fails.clone() {
            Some(e) => Submitted { done: Box::pin(std::future::ready(Err(e))), ..submitted },
            None => submitted,
        }
    }

    fn forget(&self, session: SessionId) {
        self.engine.forget(session);
    }

    fn trunk(&self) -> Option<&dyn TrunkState> {
        None
    }
}

/// What the own engine says by itself.
async fn expected() -> Vec<u32> {
    let bed = Bed::new(settings()).await;
    bed.session(open(1), &PROMPT).await.write(4).await
}

async fn refused(bed: &Bed, open: Open, what: &str) {
    let refuse = bed.session(open, &PROMPT).await.refused().await;
    assert_eq!((refuse.code, refuse.retry_after_ms), (RefuseCode::Incompatible, 0), "{}", refuse.message);
    assert!(refuse.message.contains(what), "{}", refuse.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_grammars_refuses_them_and_serves_the_rest() {
    let bed = Remote::bed(Verify::Exact, false, None).await;
    let grammar = Grammar { syntax: GrammarSyntax::JsonSchema, text: "{}".into() };
    refused(&bed, Open { grammar: Some(grammar), ..open(1) }, "grammar").await;
    assert_eq!(bed.session(open(2), &PROMPT).await.write(4).await, expected().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_target_refuses_sampling_and_judges_greedy_drafts() {
    let bed = Remote::bed(Verify::Greedy, true, None).await;
    let sampling = SamplingParams { temperature: 0.7, ..SamplingParams::default() };
    refused(&bed, Open { sampling, ..open(1) }, "greedy").await;
    let expected = expected().await;
    let mut session = bed.session(open(2), &PROMPT).await;
    session.opened().await;
    session.send(Message::Draft(question(1, 4, &expected)), Bytes::new()).await;
    let verdict = session.verdict().await;
    assert_eq!((verdict.accepted as usize, verdict.rejected), (expected.len(), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_judge_writes_by_itself_and_refuses_drafts() {
    let bed = Remote::bed(Verify::Unable, true, None).await;
    let expected = expected().await;
    assert_eq!(bed.session(open(1), &PROMPT).await.write(4).await, expected);
    let mut session = bed.session(open(2), &PROMPT).await;
    session.opened().await;
    session.send(Message::Draft(question(1, 4, &expected)), Bytes::new()).await;
    let refuse = session.refused().await;
    assert_eq!(refuse.code, RefuseCode::Incompatible, "{}", refuse.message);
    assert!(refuse.message.contains("judge drafts"), "{}", refuse.message);
}

/// The layers are computed there: an edge loses nothing but the saving, so it is told and not refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_trunk_declines_it_and_takes_no_state() {
    let bed = Remote::bed(Verify::Exact, true, None).await;
    let expected = expected().await;
    let mut session = bed.session(Open { want_prompt_state: true, ..open(1) }, &PROMPT).await;
    let opened = session.opened().await;
    assert_eq!((opened.trunk_layers, opened.held_tokens), (0, 0));
    // Sent before the edge has read that.
    session.accepts_beside_zeros(&expected, bed.trunk.hidden_size).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_target_fails_at_is_refused_with_its_reason() {
    let busy = TargetError::Busy { reason: "three requests wait".into(), retry_after_ms: 700 };
    let table = [
        (busy, RefuseCode::Busy, 700),
        (TargetError::Failed("three requests wait, the engine is gone".into()), RefuseCode::Internal, 0),
    ];
    for (error, code, retry_after_ms) in table {
        let bed = Remote::bed(Verify::Exact, true, Some(error.clone())).await;
        let mut session = bed.session(open(1), &PROMPT).await;
        session.opened().await;
        assert_eq!(session.refused().await, Refuse { code, message: error.to_string(), retry_after_ms });
    }
}

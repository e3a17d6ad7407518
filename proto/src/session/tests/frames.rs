//! Frames that do not fit, and what the edge does without a cloud.

use super::*;

/// Patience that no test outlives.
const PATIENT: Patience = Patience { need: Need::Decisions, question_us: u64::MAX / 4, grace_us: u64::MAX / 4 };

fn opened() -> CloudSession {
    opened_at(TARGET)
}
fn opened_at(target: TargetShape) -> CloudSession {
    let mut edge = EdgeSession::<()>::new(SessionId([1; 16]), &[5, 6, 7], 10, &[EOS], PATIENT);
    let (open, tokens) = edge.open(0, Epoch(3), "m".into(), "r".into(), SamplingParams::default(), 0, false, 0);
    CloudSession::open(&open, tokens, target).unwrap()
}
fn draft(epoch: u64, round: u32, start: u32, judge_from: u32, tokens: &[u32]) -> Message {
    Message::Draft(Draft {
        epoch: Epoch(epoch),
        round: Round(round),
        start,
        judge_from,
        tokens: tokens.to_vec(),
        hidden_from: start,
        hidden_rows: 0,
    })
}

#[test]
fn frames_that_do_not_fit_are_refused_by_name() {
    let none = Bytes::new();
    let mut c = opened();
    assert!(matches!(c.handle(&draft(2, 1, 3, 3, &[1]), &none), Err(SessionError::StaleEpoch { .. })));
    assert!(matches!(c.handle(&draft(4, 1, 3, 3, &[1]), &none), Err(SessionError::UnknownEpoch { .. })));
    assert!(matches!(c.handle(&draft(3, 1, 5, 5, &[1]), &none), Err(SessionError::OutOfOrder(_))));
    assert!(matches!(c.handle(&draft(3, 1, 1, 1, &[1]), &none), Err(SessionError::OutOfOrder(_))));
    assert!(matches!(c.handle(&draft(3, 1, 3, 9, &[1]), &none), Err(SessionError::Malformed(_))));
    assert!(matches!(c.handle(&draft(3, 1, 3, 3, &[1; 2000]), &none), Err(SessionError::Limit { .. })));
    assert!(matches!(c.handle(&draft(3, 1, 3, 3, &[1; 100]), &none), Err(SessionError::Limit { .. })));
    assert!(matches!(
        c.handle(&draft(3, 1, 3, 3, &[1]), &Bytes::from_static(&[0; 8])),
        Err(SessionError::Malformed(_))
    ));
    let generate =
        Message::Generate(Generate { epoch: Epoch(3), round: Round(1), start: 1, tail: vec![1, 2], tokens_max: 4 });
    assert!(matches!(c.handle(&generate, &none), Err(SessionError::Malformed(_))));
}

#[test]
fn the_number_of_frames_in_flight_is_bounded() {
    let mut c = opened();
    let mut refused = false;
    for i in 0..=crate::limits::DRAFTS_IN_FLIGHT_MAX as u32 {
        refused = c.handle(&draft(3, 1, 3, 3, &[1]), &Bytes::new()).is_err();
        assert_eq!(refused, i as usize == crate::limits::DRAFTS_IN_FLIGHT_MAX);
    }
    assert!(refused);
}

#[test]
fn an_open_that_lies_about_its_tokens_is_refused() {
    let open = Open {
        session: SessionId([0; 16]),
        epoch: Epoch(1),
        model: "m".into(),
        request_id: "r".into(),
        prompt_tokens: u32::MAX,
        committed_tokens: 5,
        sampling: SamplingParams::default(),
        stop_tokens: vec![],
        answer_tokens_max: 1,
        trunk_layers: 0,
        want_prompt_state: false,
        top_logprobs: 0,
        grammar: None,
    };
    assert!(matches!(CloudSession::open(&open, vec![1; 4], TARGET), Err(SessionError::Malformed(_))));
    assert!(matches!(CloudSession::open(&open, vec![1; CONTEXT + 1], TARGET), Err(SessionError::Limit { .. })));
}

#[test]
fn token_ids_past_the_vocabulary_are_refused() {
    let none = Bytes::new();
    let past = TARGET.vocabulary as u32;
    let outside = Err(SessionError::Vocabulary { token: past, vocabulary: TARGET.vocabulary });
    let mut c = opened();
    assert_eq!(c.handle(&draft(3, 1, 3, 3, &[1, past]), &none), outside);
    let tail = vec![past];
    let generate = Message::Generate(Generate { epoch: Epoch(3), round: Round(1), start: 4, tail, tokens_max: 4 });
    assert_eq!(c.handle(&generate, &none), outside);
    assert_eq!(c.handle(&draft(3, 1, 3, 3, &[1, past - 1]), &none), Ok(()));
    let mut edge = EdgeSession::<()>::new(SessionId([1; 16]), &[5, past], 10, &[EOS], PATIENT);
    let (open, tokens) = edge.open(0, Epoch(3), "m".into(), "r".into(), SamplingParams::default(), 0, false, 0);
    assert_eq!(CloudSession::open(&open, tokens, TARGET).map(|_| ()), outside);
}

/// The session of [`opened`] ends at 13 tokens.
#[test]
fn nothing_follows_the_end_of_the_sequence() {
    let none = Bytes::new();
    let mut c = opened();
    c.handle(&draft(3, 1, 3, 13, &[1; 10]), &none).unwrap();
    let job = c.next_job(100).unwrap();
    let decided = Decided { id: 1, logprob: 0.0, alternatives: vec![] };
    let out = c.complete(vec![decided; job.picks()], JobTimes::default()).unwrap();
    assert!(matches!(&out[..], [Message::Verdict(v)] if v.from == 13 && v.next == Some(1)), "{out:?}");
    assert_eq!(c.tokens().len(), 13);
    let full = Err(SessionError::Full { position: 13, max: 13 });
    let generate =
        Message::Generate(Generate { epoch: Epoch(3), round: Round(2), start: 13, tail: vec![], tokens_max: 4 });
    assert_eq!(c.handle(&generate, &none), full);
    assert!(matches!(c.handle(&draft(3, 1, 13, 13, &[1]), &none), Err(SessionError::Limit { .. })));
}

/// A target that stops at the first difference is believed where a draft is judged, and nowhere else.
#[test]
fn choices_behind_a_difference_are_not_needed() {
    let none = Bytes::new();
    let pick = |id| Decided { id, logprob: 0.0, alternatives: vec![] };
    let opened_with = |judge_from| {
        let mut c = opened();
        c.handle(&draft(3, 1, 3, judge_from, &[1, 2, 3, 4]), &none).unwrap();
        let job = c.next_job(100).unwrap();
        assert_eq!((job.picks_from, job.end()), (3, 7));
        assert!(job.judged.iter().eq([&(judge_from as usize..7)]), "{:?}", job.judged);
        c
    };
    let mut c = opened_with(4);
    let out = c.complete(vec![pick(1), pick(2), pick(9)], JobTimes::default()).unwrap();
    assert!(matches!(&out[..], [Message::Verdict(v)] if v.accepted == 1 && v.next == Some(9) && v.rejected), "{out:?}");
    assert_eq!(c.tokens(), [5, 6, 7, 1, 2, 9]);
    // A difference in the tail, which is not judged, ends nothing; nor does a choice that agrees.
    for (judge_from, picks) in [(5, vec![pick(9)]), (4, vec![pick(1), pick(2)]), (4, vec![])] {
        let said = opened_with(judge_from).complete(picks, JobTimes::default());
        assert!(matches!(said, Err(SessionError::Malformed(_))), "{said:?}");
    }
}

/// They may be on their way before the edge knows that they are not wanted.
#[test]
fn hidden_states_that_do_not_stand_in_are_dropped() {
    let mut c = opened_at(TargetShape { hidden_row_bytes: 0, ..TARGET });
    let Message::Draft(d) = draft(3, 1, 3, 3, &[1, 2]) else { unreachable!() };
    let with_rows = Message::Draft(Draft { hidden_rows: 2, ..d });
    c.handle(&with_rows, &Bytes::from_static(&[7; 24])).unwrap();
    assert_eq!(c.next_job(100).unwrap().hidden, None);
}

#[test]
fn a_verdict_that_lies_is_refused() {
    let make = || {
        let mut e = EdgeSession::<()>::new(SessionId([1; 16]), &[5, 6, 7], 10, &[EOS], PATIENT);
        e.open(0, Epoch(3), "m".into(), "r".into(), SamplingParams::default(), 0, false, 0);
        for t in [1, 2, 3] {
            e.draft(t, true, ());
        }
        let f = e.next_frame(FrameRule { chunk_min: 3, chunk_max: 8, bonus: true }).unwrap();
        (e, f)
    };
    let (mut e, f) = make();
    assert_eq!((f.start, f.judge_from, f.tokens.len(), e.rows_in_question()), (3, 3, 3, 4));
    let good = Verdict {
        epoch: Epoch(3),
        round: f.round,
        from: 3,
        accepted: 3,
        next: Some(9),
        rejected: false,
        tail_agreed: 0,
        tail_tokens: 0,
        logprobs: vec![0.0; 4],
        alternatives: vec![],
        compute_us: 0,
        queue_us: 0,
    };
    assert_eq!(e.on_verdict(&good), Ok(PathChange::Kept));
    assert_eq!(core::iter::from_fn(|| e.commit()).map(|c| c.token).collect::<Vec<_>>(), [1, 2, 3, 9]);
    for bad in [
        Verdict { from: 4, ..good.clone() },
        Verdict { accepted: 4, ..good.clone() },
        Verdict { accepted: 2, ..good.clone() },
        Verdict { rejected: true, ..good.clone() },
        Verdict { logprobs: vec![], ..good.clone() },
        Verdict { next: None, accepted: 0, logprobs: vec![], ..good.clone() },
        Verdict { tail_agreed: 2, tail_tokens: 1, ..good.clone() },
    ] {
        assert!(matches!(make().0.on_verdict(&bad), Err(SessionError::Malformed(_))), "{bad:?}");
    }
    assert!(matches!(
        make().0.on_verdict(&Verdict { epoch: Epoch(2), ..good.clone() }),
        Err(SessionError::StaleEpoch { .. })
    ));
    assert_eq!(make().0.on_verdict(&Verdict { round: Round(77), ..good }), Ok(PathChange::Stale));
}

#[test]
fn without_the_cloud_the_edge_goes_on_and_can_come_back() {
    let mut e = EdgeSession::<()>::new(SessionId([1; 16]), &[5, 6, 7], 10, &[EOS], PATIENT);
    e.draft(1, true, ());
    e.draft(2, false, ());
    assert!(!e.can_commit() && e.commit().is_none(), "an asked token waits");
    e.resolve_locally();
    assert!(e.can_commit());
    assert_eq!(e.commit().map(|c| (c.token, c.decider)), Some((1, Decider::Edge)));
    assert_eq!(e.commit().map(|c| c.token), Some(2));
    let (open, tokens) = e.open(0, Epoch(1), "m".into(), "r".into(), SamplingParams::default(), 0, false, 0);
    assert_eq!((open.prompt_tokens, open.committed_tokens, tokens.len()), (3, 2, 5));
    e.draft(3, true, ());
    let f = e.next_frame(FrameRule { chunk_min: 1, chunk_max: 1, bonus: false }).unwrap();
    assert_eq!((f.start, f.judge_from, f.tokens.len()), (5, 5, 0));
}

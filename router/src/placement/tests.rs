use proptest::prelude::*;

use super::*;

/// A node of a text table: name region sessions/max queued rate held age flags.
struct Row {
    name: String,
    region: String,
    draining: bool,
    age_ms: u64,
    load: LoadReport,
    models: Vec<ModelCard>,
}

fn hash(block: usize) -> Digest {
    Digest::of(&block.to_le_bytes())
}

fn model(name: &str) -> ModelCard {
    ModelCard { name: name.into(), digest: Digest::of(name.as_bytes()) }
}

/// `held` is how many blocks of the prompt's prefix the node holds.
fn row(line: &str) -> Row {
    let columns: Vec<_> = line.split_whitespace().collect();
    let [name, region, sessions, queued, rate, held, age_ms, flags] = columns[..] else { panic!("row {line:?}") };
    let (taken, max) = sessions.split_once('/').expect("sessions/max");
    // Only the last block held is reported: chained hashes imply the others.
    let held: usize = held.parse().expect("held");
    let mut load = LoadReport {
        sessions: taken.parse().expect("sessions"),
        sessions_max: max.parse().expect("max"),
        queued_tokens: queued.parse().expect("queued"),
        tokens_per_second: rate.parse().expect("rate"),
        stalled_ms: if flags.contains("stalled") { 1_500 } else { 0 },
        prefixes: held.checked_sub(1).map(hash).into_iter().collect(),
        ..LoadReport::default()
    };
    load.prefixes.extend([hash(7_001), hash(7_002), hash(7_003)]);
    Row {
        name: name.into(),
        region: if region == "-" { String::new() } else { region.into() },
        draining: flags.contains("drain"),
        age_ms: age_ms.parse().expect("age"),
        load: load.checked().expect("load"),
        models: vec![model(if flags.contains("other") { "other" } else { "big" })],
    }
}

const NOW_MS: u64 = 1_000_000;

fn candidates(rows: &[Row]) -> impl Iterator<Item = Candidate<'_>> {
    rows.iter().map(|row| Candidate {
        name: &row.name,
        region: &row.region,
        models: &row.models,
        draining: row.draining,
        heartbeat_at_ms: NOW_MS - row.age_ms,
        load: &row.load,
    })
}

struct Case {
    title: &'static str,
    rows: &'static str,
    /// "model blocks region previous avoid latencies(node=us,...)", `-` for none.
    asks: &'static str,
    /// Ranked names, then excluded ones in brackets.
    expects: &'static str,
}

fn placed(case: &Case) -> Ranking {
    let rows: Vec<_> = case.rows.lines().filter(|line| !line.trim().is_empty()).map(row).collect();
    let columns: Vec<_> = case.asks.split_whitespace().collect();
    let [model, blocks, region, previous, avoid, latencies] = columns[..] else { panic!("asks {:?}", case.asks) };
    let some = |text: &'static str| (text != "-").then_some(text);
    let prefix: Vec<_> = (0..blocks.parse().expect("blocks")).map(hash).collect();
    let measured = some(latencies).into_iter().flat_map(|all| all.split(',')).map(|one| {
        let (node, us) = one.split_once('=').expect("node=us");
        (node.to_owned(), us.parse().expect("us"))
    });
    let latencies_us = measured.collect();
    let avoid: Vec<_> = some(avoid).into_iter().map(str::to_owned).collect();
    let query = Query {
        model,
        prefix: &prefix,
        region: some(region).unwrap_or(""),
        latencies_us: &latencies_us,
        avoid: &avoid,
        previous: some(previous),
        now_ms: NOW_MS,
    };
    rank(&PlacementConfig::default(), candidates(&rows), &query)
}

#[test]
fn table() {
    let cases = [
        Case {
            title: "equal nodes: the lower name",
            rows: "b - 0/8 0 0 0 100 -\na - 0/8 0 0 0 100 -",
            asks: "big 0 - - - -",
            expects: "a b",
        },
        Case {
            title: "a node holding the prefix beats an idle one",
            rows: "idle - 0/8 0 0 0 100 -\nwarm - 3/8 0 0 8 100 -",
            asks: "big 8 - - - -",
            expects: "warm idle",
        },
        Case {
            title: "but not when its queue costs more than the prefill saved",
            rows: "idle - 0/8 0 0 0 100 -\nwarm - 3/8 2000 1000 8 100 -",
            asks: "big 8 - - - -",
            expects: "idle warm",
        },
        Case {
            title: "a longer held prefix beats a shorter one",
            rows: "half - 0/8 0 0 4 100 -\nmost - 0/8 0 0 7 100 -",
            asks: "big 8 - - - -",
            expects: "most half",
        },
        Case {
            title: "crowding decides where all else is equal",
            rows: "a - 6/8 0 0 0 100 -\nb - 2/8 0 0 0 100 -",
            asks: "big 0 - - - -",
            expects: "b a",
        },
        Case {
            title: "the same region first, an unknown one before another",
            rows: "far us 0/8 0 0 0 100 -\nnear eu 0/8 0 0 0 100 -\nsome - 0/8 0 0 0 100 -",
            asks: "big 0 eu - - -",
            expects: "near some far",
        },
        Case {
            title: "a measured round trip overrules the region",
            rows: "far us 0/8 0 0 0 100 -\nnear eu 0/8 0 0 0 100 -",
            asks: "big 0 eu - - far=2000,near=90000",
            expects: "far near",
        },
        Case {
            title: "hysteresis: a small gain does not move a device",
            rows: "a - 0/8 0 0 0 100 -\nb - 1/8 0 0 0 100 -",
            asks: "big 0 - b - -",
            expects: "b a",
        },
        Case {
            title: "a large gain does",
            rows: "a - 0/8 0 0 0 100 -\nb - 7/8 0 0 0 100 -",
            asks: "big 0 - b - -",
            expects: "a b",
        },
        Case {
            title: "what cannot take it is excluded with the reason",
            rows: "drained - 0/8 0 0 0 100 drain\nfull - 8/8 0 0 0 100 -\nok - 7/8 0 0 0 5000 -\nhung - 0/8 0 0 0 100 stalled\nother - 0/8 0 0 0 100 other\nstale - 0/8 0 0 0 5001 -",
            asks: "big 0 - - - -",
            expects: "ok [drained full hung other stale]",
        },
        Case {
            title: "a full node keeps the devices it has",
            rows: "full - 8/8 0 0 0 100 -",
            asks: "big 0 - full - -",
            expects: "full",
        },
        Case {
            title: "no limit of sessions is never full",
            rows: "a - 900/0 0 0 0 100 -",
            asks: "big 0 - - - -",
            expects: "a",
        },
        Case {
            title: "a draining node loses even the devices it has",
            rows: "a - 1/8 0 0 0 100 drain\nb - 7/8 0 0 0 100 -",
            asks: "big 0 - a - -",
            expects: "b [a]",
        },
        Case {
            title: "an avoided node comes last, previous or not",
            rows: "a - 0/8 0 0 0 100 -\nb - 7/8 0 0 0 100 -",
            asks: "big 0 - a a -",
            expects: "b a",
        },
        Case { title: "but is better than none", rows: "a - 0/8 0 0 0 100 -", asks: "big 0 - - a -", expects: "a" },
        Case { title: "no nodes", rows: "", asks: "big 0 - - - -", expects: "" },
    ];
    for case in &cases {
        let ranking = placed(case);
        let ranked = ranking.ranked.iter().map(|ranked| ranked.node.as_str()).collect::<Vec<_>>().join(" ");
        let excluded = ranking.excluded.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ");
        let found = if excluded.is_empty() { ranked } else { format!("{ranked} [{excluded}]") };
        assert_eq!(found, case.expects, "{}: {ranking:#?}", case.title);
    }
}

#[test]
fn reasons_say_what_counted() {
    let case = Case {
        title: "",
        rows: "warm eu 3/8 500 1000 6 100 -\nbusy us 8/8 0 0 0 100 -",
        asks: "big 8 eu warm - warm=12000",
        expects: "",
    };
    let ranking = placed(&case);
    let reasons = ranking.ranked[0].reasons.join("; ");
    for words in
        ["expected wait", "12 ms measured", "queue 500 ms", "3 sessions", "holds 6 of 8", "holds the device's ticket"]
    {
        assert!(reasons.contains(words), "{words:?} is missing in {reasons:?}");
    }
    assert_eq!(ranking.excluded[0].1.to_string(), "full with 8 sessions");
}

#[test]
fn a_model_is_found_by_name_or_digest() {
    let card = model("big");
    let upper = card.digest.to_string().to_uppercase();
    assert!(card.answers_to("big") && card.answers_to(&card.digest.to_string()));
    assert!(!card.answers_to("bi") && !card.answers_to("") && !card.answers_to(&upper));
}

#[test]
fn extreme_reports_do_not_overflow() {
    let mut worst = row("a - 0/8 0 0 0 100 -");
    worst.load = LoadReport {
        sessions: u32::MAX,
        queued_tokens: u64::MAX,
        tokens_per_second: 1,
        kv_blocks_used: u32::MAX,
        kv_blocks_max: 1,
        ..LoadReport::default()
    };
    let latencies_us = BTreeMap::from([("a".to_owned(), u32::MAX)]);
    let query = Query {
        model: "big",
        prefix: &[],
        region: "",
        latencies_us: &latencies_us,
        avoid: &[],
        previous: Some("a"),
        now_ms: u64::MAX,
    };
    let config = PlacementConfig { stale_ms: u64::MAX, ..PlacementConfig::default() };
    assert_eq!(rank(&config, candidates(&[worst]), &query).ranked.len(), 1);
}

proptest! {
    /// Whatever the loads: every node is ranked or excluded once, costs rise along the ranking but
    /// for the previous node, and the order of the candidates does not matter.
    #[test]
    fn ranking_is_complete_and_independent_of_order(
        loads in prop::collection::vec((0u32..12, 0u64..5_000, 0u32..3_000, 0usize..9, 0u64..8_000, any::<bool>()), 0..12),
        previous in prop::option::of(0usize..12),
        turn in 0usize..12,
    ) {
        let rows: Vec<_> = loads.iter().enumerate().map(|(at, (sessions, queued, rate, held, age, drain))| {
            let flags = if *drain { "drain" } else { "-" };
            row(&format!("n{at:02} - {sessions}/10 {queued} {rate} {held} {age} {flags}"))
        }).collect();
        let prefix: Vec<_> = (0..8).map(hash).collect();
        let previous = previous.map(|at| format!("n{at:02}"));
        let query = Query {
            model: "big",
            prefix: &prefix,
            region: "",
            latencies_us: &BTreeMap::new(),
            avoid: &[],
            previous: previous.as_deref(),
            now_ms: NOW_MS,
        };
        let config = PlacementConfig::default();
        let ranking = rank(&config, candidates(&rows), &query);
        prop_assert_eq!(ranking.ranked.len() + ranking.excluded.len(), rows.len());
        let others: Vec<_> = ranking.ranked.iter().filter(|ranked| Some(&ranked.node) != previous.as_ref()).collect();
        prop_assert!(others.is_sorted_by_key(|ranked| ranked.cost_us));
        let mut turned: Vec<_> = candidates(&rows).collect();
        let mid = turn.min(turned.len());
        turned.rotate_left(mid);
        prop_assert_eq!(rank(&config, turned, &query), ranking);
    }

    /// More load never improves a node's place.
    #[test]
    fn more_load_costs_more(sessions in 0u32..9, more in 0u32..9, queued in 0u64..9_000, longer in 0u64..9_000) {
        let rows = [
            row(&format!("light - {sessions}/20 {queued} 700 0 100 -")),
            row(&format!("heavy - {}/20 {} 700 0 100 -", sessions + more, queued + longer)),
        ];
        let query = Query {
            model: "big",
            prefix: &[],
            region: "",
            latencies_us: &BTreeMap::new(),
            avoid: &[],
            previous: None,
            now_ms: NOW_MS,
        };
        let ranking = rank(&PlacementConfig::default(), candidates(&rows), &query);
        let cost = |name: &str| ranking.ranked.iter().find(|ranked| ranked.node == name).map(|ranked| ranked.cost_us);
        prop_assert!(cost("light") <= cost("heavy"));
    }
}

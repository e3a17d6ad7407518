use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,20}"
}

fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn any_load() -> impl Strategy<Value = LoadReport> {
    let prefixes = prop::collection::vec(any_digest(), 0..20);
    (any::<[u32; 6]>(), any::<u64>(), prefixes).prop_map(|(n, queued_tokens, prefixes)| LoadReport {
        sessions: n[0],
        sessions_max: n[1],
        queued_tokens,
        tokens_per_second: n[2],
        kv_blocks_used: n[3],
        kv_blocks_max: n[4],
        stalled_ms: n[5],
        prefixes,
    })
}

proptest! {
    #[test]
    fn cards_and_loads_come_back_as_they_went(
        (name, region, boot_epoch) in (name(), name(), any::<u64>()),
        models in prop::collection::vec((name(), any_digest()), 1..MODELS_MAX),
        port in 1u16..,
        report in any_load(),
    ) {
        let models = models.into_iter().map(|(name, digest)| ModelCard { name, digest }).collect();
        let sent = NodeCard {
            address: format!("{name}:{port}"),
            server_name: name.clone(),
            name,
            region,
            models,
            boot_epoch,
        };
        prop_assert_eq!(card(Some(card_to_wire(&sent))), Ok(sent));
        let report = report.checked().unwrap();
        prop_assert_eq!(load(Some(load_to_wire(&report))), Ok(report));
    }

    #[test]
    fn place_requests_come_back_as_they_went(
        device in name(),
        model in name(),
        region in name(),
        prefix in prop::collection::vec(any_digest(), 0..PREFIX_BLOCKS_MAX + 9),
        latencies_us in prop::collection::btree_map(name(), any::<u32>(), 0..LATENCIES_MAX),
        avoid in prop::collection::vec(name(), 0..AVOID_MAX),
        id: [u8; 16],
    ) {
        let sent = PlaceCommand { device, model, prefix, region, latencies_us, avoid };
        let wire = place_to_wire(RequestId(id), &sent);
        prop_assert_eq!(request_id(&wire.request_id), Ok(RequestId(id)));
        let mut expected = sent;
        // Judged by its front, so only the front travels.
        expected.prefix.truncate(PREFIX_BLOCKS_MAX);
        prop_assert_eq!(place(wire), Ok(expected));
    }
}

#[test]
fn what_breaks_a_limit_names_the_field() {
    let says = |error: InvalidField, field: &str| assert_eq!(error.field, field, "{error}");
    says(request_id(&[0; 15]).unwrap_err(), "request_id");
    says(card(None).unwrap_err(), "card");
    let model = rpc::Model { name: "m".into(), digest: bytes::Bytes::from_static(&[0; 31]) };
    let with = |models| rpc::NodeCard { name: "a".into(), models, ..rpc::NodeCard::default() };
    says(card(Some(with(vec![model.clone()]))).unwrap_err(), "models.digest");
    says(card(Some(with(vec![model; MODELS_MAX + 1]))).unwrap_err(), "models");
    let block = bytes::Bytes::from_static(&[7; 32]);
    let prefixes = vec![block.clone(); PREFIXES_PER_NODE_MAX + 1];
    says(load(Some(rpc::LoadReport { prefixes, ..rpc::LoadReport::default() })).unwrap_err(), "prefixes");
    let good = rpc::PlaceRequest::default();
    let prefix = vec![block; PREFIX_BLOCKS_MAX + 1];
    says(place(rpc::PlaceRequest { prefix, ..good.clone() }).unwrap_err(), "prefix");
    let prefix = vec![bytes::Bytes::from_static(&[7; 33])];
    says(place(rpc::PlaceRequest { prefix, ..good.clone() }).unwrap_err(), "prefix");
    let latencies = vec![rpc::Latency::default(); LATENCIES_MAX + 1];
    says(place(rpc::PlaceRequest { latencies, ..good.clone() }).unwrap_err(), "latencies");
    says(place(rpc::PlaceRequest { avoid: vec![String::new(); AVOID_MAX + 1], ..good }).unwrap_err(), "avoid");
}

#[test]
fn refusals_keep_their_kind() {
    for sent in [
        Refusal::UnknownModel { model: "m".into(), known: vec!["a".into(), "b".into()] },
        Refusal::NoNode { model: "m".into(), excluded: vec![("n".into(), "draining".into())] },
        Refusal::Full { message: "full".into() },
        Refusal::Invalid { message: "wrong".into() },
    ] {
        assert_eq!(refusal(refusal_to_wire(&sent), "m"), sent);
    }
    let newer = rpc::Refusal { code: 99, message: "from the future".into(), ..rpc::Refusal::default() };
    assert_eq!(refusal(newer, "m"), Refusal::Invalid { message: "from the future".into() });
}

use super::*;
use crate::{control::log::SingleNode, placement::PlacementConfig};

fn service(requests_max: usize) -> Service<SingleNode> {
    Service::new(Arc::new(SingleNode::in_memory(PlacementConfig::default(), 0)), Clock::start(), requests_max)
}

#[tokio::test]
async fn a_busy_router_says_so() {
    let service = service(1);
    let place = service.enter().unwrap();
    let refused = service.status(Request::new(rpc::StatusRequest {})).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    drop(place);
    let next = service.status(Request::new(rpc::StatusRequest {})).await.unwrap_err();
    assert_eq!(next.code(), tonic::Code::Unauthenticated, "there is room again, and a certificate is needed");
}

#[tokio::test]
async fn nothing_works_without_a_certificate() {
    let service = service(8);
    let codes = [
        service.register(Request::new(rpc::RegisterRequest::default())).await.map(drop),
        service.heartbeat(Request::new(rpc::HeartbeatRequest::default())).await.map(drop),
        service.drain(Request::new(rpc::DrainRequest::default())).await.map(drop),
        service.place(Request::new(rpc::PlaceRequest::default())).await.map(drop),
        service.status(Request::new(rpc::StatusRequest {})).await.map(drop),
    ]
    .map(|reply| reply.unwrap_err().code());
    assert_eq!(codes, [tonic::Code::Unauthenticated; 5]);
}

#[test]
fn a_ticket_never_lasts_longer_than_it_should() {
    let ticket = control::Ticket {
        node: "a".into(),
        address: "10.0.0.1:7443".into(),
        server_name: "a.tandem".into(),
        epoch: tandem_proto::ids::Epoch(3),
        expires_at_ms: 100_000,
        reasons: Vec::new(),
        alternatives: Vec::new(),
    };
    for (now_ms, left) in [(90_000, 10_000), (100_000, 0), (200_000, 0), (0, TICKET_MS)] {
        assert_eq!(ticket_to_wire(ticket.clone(), now_ms).expires_in_ms, left, "at {now_ms}");
    }
}

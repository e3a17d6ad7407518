//! KV exchange: a lender and a borrower on the two ends of a link.

use bytes::Bytes;
use tandem_proto::{
    block::BlockChain,
    exchange::{ExchangeError, StateRun},
    frame::Message,
    ids::{Digest, Epoch, SessionId},
    limits::KV_BLOCK_TOKENS,
    message::{KvBlock, KvOffer, KvPull, KvShape, KvWant},
};
use tandem_transport::{
    Settings,
    bulk::BulkInbox,
    exchange::{Borrowed, Borrower, Lender},
};

use crate::setup::{Pair, pair, pattern, within};

const SESSION: SessionId = SessionId([7; 16]);
const EPOCH: Epoch = Epoch(3);
const SHAPE: KvShape = KvShape { layer_from: 0, layer_to: 4, width: 64, hidden: 32 };
const TOKENS: u32 = 5 * KV_BLOCK_TOKENS as u32 + 9;

fn run(first_token: u32) -> StateRun {
    let tokens: Vec<u32> = (first_token..first_token + TOKENS).collect();
    StateRun::new(BlockChain::new([1; 32], Digest::of(b"layers"), "n", &SHAPE), SHAPE, &tokens).unwrap()
}

fn payloads(run: &StateRun) -> Vec<Bytes> {
    (0..run.ids.len()).map(|i| pattern(run.payload_bytes(i), i as u64)).collect()
}

fn offer(message: Message) -> KvOffer {
    let Message::KvOffer(offer) = message else { panic!("{message:?}") };
    offer
}

fn want(message: Message) -> KvWant {
    let Message::KvWant(want) = message else { panic!("{message:?}") };
    want
}

/// A link, one end of which hands out what arrives.
async fn link() -> (Pair, BulkInbox) {
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let (inbox, link) = (BulkInbox::default(), pair.cloud.clone());
    let reader = inbox.clone();
    tokio::spawn(async move { reader.serve(&link).await });
    (pair, inbox)
}

async fn borrowed(borrower: &mut Borrower) -> (usize, Borrowed) {
    let mut bytes = 0;
    loop {
        let arrived = within(borrower.next()).await.expect("the exchange goes on");
        bytes += arrived.bytes;
        if !matches!(arrived.state, Borrowed::Part) {
            return (bytes, arrived.state);
        }
    }
}

#[tokio::test]
async fn what_is_offered_and_wanted_arrives_whole() {
    let (pair, inbox) = link().await;
    let (run, blocks) = (run(0), payloads(&run(0)));
    let all: usize = blocks.iter().map(Bytes::len).sum();
    let (mut lender, mut borrower) = (Lender::new(SESSION), Borrower::new(&inbox, SESSION));
    let offered = offer(lender.offer(EPOCH, 1, run.clone(), blocks.clone()));
    let (wanted, takes) = borrower.answer(&offered, Some(run));
    assert!(takes);
    let wanted = want(wanted);
    assert_eq!(lender.wanted(&wanted, &pair.edge), Ok(all));
    let (bytes, state) = borrowed(&mut borrower).await;
    let Borrowed::Whole(ack, got) = state else { panic!("{state:?}") };
    assert_eq!((bytes, ack.epoch, ack.exchange, ack.published, ack.refused), (all, EPOCH, 1, 6, 0));
    assert!(got == blocks);
    assert_eq!(lender.wanted(&wanted, &pair.edge), Ok(0), "once");
}

#[tokio::test]
async fn state_of_other_tokens_is_declined_and_a_want_of_something_else_refused() {
    let (pair, inbox) = link().await;
    let (mut lender, mut borrower) = (Lender::new(SESSION), Borrower::new(&inbox, SESSION));
    let pull = KvPull { epoch: EPOCH, exchange: 5, layer_from: 0, layer_to: 4, tokens: TOKENS };
    let theirs = offer(lender.offer(EPOCH, 5, run(1), payloads(&run(1))));
    for (offered, own) in
        [(&theirs, Some(run(0))), (&theirs, None), (&offer(Lender::nothing(&pull, SHAPE)), Some(run(1)))]
    {
        let (wanted, takes) = borrower.answer(offered, own);
        assert!(!takes);
        let wanted = want(wanted);
        assert_eq!((wanted.epoch, wanted.exchange, wanted.indices), (EPOCH, 5, vec![]));
    }
    let table = [
        (KvWant { epoch: EPOCH, exchange: 5, indices: vec![6] }, ExchangeError::Unwanted { index: 6 }),
        (KvWant { epoch: EPOCH, exchange: 5, indices: vec![1, 1] }, ExchangeError::Unwanted { index: 1 }),
        (KvWant { epoch: EPOCH, exchange: 4, indices: vec![0] }, ExchangeError::Foreign),
    ];
    for (wanted, expected) in table {
        lender.offer(EPOCH, 5, run(1), payloads(&run(1)));
        assert_eq!(lender.wanted(&wanted, &pair.edge), Err(expected));
    }
}

/// A lender that lies, block by block: what was not wanted counts for nothing, what does not pass ends the exchange.
#[tokio::test]
async fn a_block_that_does_not_pass_ends_the_exchange_and_none_is_used() {
    type Damage = fn(&mut KvBlock);
    let table: [(&str, Damage, bool); 5] = [
        ("digest", |b| b.payload_digest = Digest::of(b"other"), true),
        ("id", |b| b.id = Digest::of(b"other"), true),
        ("shape", |b| b.shape.layer_to = 3, true),
        ("earlier exchange", |b| b.exchange = 1, false),
        ("no such block", |b| b.index = 6, false),
    ];
    for (name, damage, ends) in table {
        let (pair, inbox) = link().await;
        let (run, blocks) = (run(0), payloads(&run(0)));
        let (mut lender, mut borrower) = (Lender::new(SESSION), Borrower::new(&inbox, SESSION));
        let offered = offer(lender.offer(EPOCH, 2, run.clone(), blocks.clone()));
        assert!(borrower.answer(&offered, Some(run.clone())).1);
        let mut block = KvBlock {
            session: SESSION,
            epoch: EPOCH,
            exchange: 2,
            index: 1,
            id: run.ids[1],
            payload_digest: Digest::of(&blocks[1]),
            tokens: KV_BLOCK_TOKENS as u32,
            shape: SHAPE,
        };
        damage(&mut block);
        within(pair.edge.send_bulk(&Message::KvBlock(block), blocks[1].clone())).await.unwrap();
        let arrived = within(borrower.next()).await.expect("a block");
        if ends {
            let Borrowed::Refused(ack, ExchangeError::Mismatch { index: 1, .. }) = arrived.state else {
                panic!("{name}: {arrived:?}")
            };
            assert_eq!((ack.published, ack.refused), (0, 1), "{name}");
            continue;
        }
        assert!(matches!(arrived.state, Borrowed::Part), "{name}: {arrived:?}");
        let all = want(Message::KvWant(KvWant { epoch: EPOCH, exchange: 2, indices: (0..6).collect() }));
        lender.wanted(&all, &pair.edge).unwrap();
        let (_, state) = borrowed(&mut borrower).await;
        assert!(matches!(&state, Borrowed::Whole(_, got) if *got == blocks), "{name}: {state:?}");
    }
}

#[tokio::test]
async fn who_no_longer_lends_sends_no_more() {
    // Nobody reads: some blocks wait for room.
    let pair = pair(Settings::dev(), Settings::dev()).await;
    let shape = KvShape { width: 4096, ..SHAPE };
    let tokens: Vec<u32> = (0..64 * KV_BLOCK_TOKENS as u32).collect();
    let run = StateRun::new(BlockChain::new([1; 32], Digest::of(b"wide"), "n", &shape), shape, &tokens).unwrap();
    let blocks = vec![pattern(run.payload_bytes(0), 1); run.ids.len()];
    let mut lender = Lender::new(SESSION);
    lender.offer(EPOCH, 1, run, blocks);
    let all = KvWant { epoch: EPOCH, exchange: 1, indices: (0..64).collect() };
    assert!(lender.wanted(&all, &pair.edge).unwrap() > 100 << 20);
    drop(lender);
    // The streams that it had are free for another exchange.
    let small = pattern(100, 2);
    let message = crate::setup::block(0, &small);
    let link = pair.edge.clone();
    let sent = tokio::spawn(async move { link.send_bulk(&message, small).await });
    let mut blocks = 0;
    while within(pair.cloud.accept_bulk()).await.expect("the link stands").payload.len() != 100 {
        blocks += 1;
    }
    assert!(blocks < 64, "all were sent");
    within(sent).await.unwrap().unwrap();
}

//! Golden bytes, round trips, bounds and mutations of frames.

mod reading;
mod samples;

use std::{fs, path::Path};

use proptest::prelude::*;
use samples::Rng;
use tandem_proto::{
    frame::{self, Frame, FrameError, FrameType, Header, Message, SCHEMA_VERSION},
    ids::{Digest, Epoch, Round},
    limits::*,
    message::*,
};

use crate::reading::read;

fn hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(line).collect()
}

/// The bytes of every type are pinned. If this fails because a wire struct was changed on purpose,
/// raise `SCHEMA_VERSION` and run once with `TANDEM_WRITE_GOLDENS=1`.
#[test]
fn golden_bytes_of_every_type() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    for &frame_type in FrameType::ALL {
        let frame = samples::frame(frame_type, &mut Rng::new(frame_type as u64));
        let found = hex(&samples::wire(&frame));
        let path = dir.join(format!("schema-{SCHEMA_VERSION}-{frame_type}.hex"));
        if !path.exists() && std::env::var_os("TANDEM_WRITE_GOLDENS").is_some() {
            fs::write(&path, &found).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(golden, found, "bytes of {frame_type} changed without a new SCHEMA_VERSION");
        let digits: Vec<u8> = golden.bytes().filter(u8::is_ascii_hexdigit).collect();
        let bytes: Vec<u8> =
            digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        assert_eq!(read(&bytes).unwrap(), frame, "{frame_type} no longer reads its golden bytes");
    }
}

#[test]
fn schema_digest_is_pinned() {
    let pinned = include_str!("goldens/schema-4.digest").trim();
    assert_eq!(frame::schema_digest().to_string(), pinned);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_type_round_trips(seed: u64) {
        let mut rng = Rng::new(seed);
        for &frame_type in FrameType::ALL {
            let frame = samples::frame(frame_type, &mut rng);
            prop_assert_eq!(read(&samples::wire(&frame)), Ok(frame));
        }
    }

    /// Any single change of header, meta or payload is noticed (the payload of a KV block by its
    /// own digest, not here).
    #[test]
    fn every_flipped_bit_is_noticed(seed: u64) {
        let mut rng = Rng::new(seed);
        for &frame_type in FrameType::ALL {
            let frame = samples::frame(frame_type, &mut rng);
            let mut bytes = samples::wire(&frame);
            let own_digest = frame_type == FrameType::KvBlock;
            let covered = bytes.len() - if own_digest { frame.payload.len() } else { 0 };
            let at = rng.below(covered);
            bytes[at] ^= 1 << rng.below(8);
            prop_assert!(read(&bytes).is_err(), "bit flip at byte {} of {} unnoticed", at, frame_type);
        }
    }

    #[test]
    fn every_truncation_is_noticed(seed: u64) {
        let mut rng = Rng::new(seed);
        for &frame_type in FrameType::ALL {
            let bytes = samples::wire(&samples::frame(frame_type, &mut rng));
            let cut = rng.below(bytes.len());
            prop_assert!(read(&bytes[..cut]).is_err());
        }
    }
}

/// Past the checksum, the archive's validation is the last line: a peer can compute a checksum.
#[test]
fn malformed_metas_with_a_good_checksum_never_panic() {
    for seed in 0..2_000 {
        let mut rng = Rng::new(seed);
        for &frame_type in FrameType::ALL {
            let mut bytes = samples::wire(&samples::frame(frame_type, &mut rng));
            let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap();
            for _ in 0..=rng.below(4) {
                let at = HEADER_BYTES + rng.below(header.meta_len);
                bytes[at] = rng.u32() as u8;
            }
            reading::seal(&mut bytes);
            match read(&bytes) {
                Ok(_) | Err(FrameError::MalformedMeta { .. } | FrameError::LimitExceeded { .. }) => {}
                Err(other) => panic!("seed {seed}: {frame_type}: unexpected {other}"),
            }
        }
    }
}

fn header(edit: impl FnOnce(&mut [u8; HEADER_BYTES])) -> Result<Header, FrameError> {
    let wire = samples::wire(&samples::frame(FrameType::Verdict, &mut Rng::new(1)));
    let mut bytes: [u8; HEADER_BYTES] = wire[..HEADER_BYTES].try_into().unwrap();
    edit(&mut bytes);
    Header::parse(&bytes)
}

/// Every one of these is decided on the 32 bytes of the header: no buffer exists yet.
#[test]
fn headers_are_refused_before_anything_is_read() {
    assert!(header(|_| ()).is_ok());
    assert_eq!(header(|b| b[..4].copy_from_slice(b"HTTP")), Err(FrameError::BadMagic(0x5054_5448)));
    assert_eq!(header(|b| b[4] = 9), Err(FrameError::UnknownVersion(9)));
    assert_eq!(header(|b| b[5] = 0), Err(FrameError::UnknownType(0)));
    assert_eq!(header(|b| b[5] = 200), Err(FrameError::UnknownType(200)));
    assert_eq!(header(|b| b[7] = 1), Err(FrameError::UnknownFlags(256)));
    assert_eq!(header(|b| b[28] = 1), Err(FrameError::ReservedNotZero(1)));
    let (len, max) = (META_BYTES_MAX + 1, META_BYTES_MAX);
    assert_eq!(
        header(|b| b[8..12].copy_from_slice(&(len as u32).to_le_bytes())),
        Err(FrameError::MetaTooLarge { len, max })
    );
    assert_eq!(header(|b| b[12] = 1), Err(FrameError::PayloadTooLarge { frame: FrameType::Verdict, len: 1, max: 0 }));
    assert_eq!(
        header(|b| {
            b[5] = FrameType::KvBlock as u8;
            b[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        }),
        Err(FrameError::PayloadTooLarge { frame: FrameType::KvBlock, len: u32::MAX as usize, max: PAYLOAD_BYTES_MAX })
    );
}

#[test]
fn lengths_past_their_limit_are_typed_errors() {
    let encode = |message| frame::encode(&Frame { seq: 0, message, payload: Default::default() });
    let draft = Draft {
        epoch: Epoch(1),
        round: Round(0),
        start: 0,
        judge_from: 0,
        tokens: vec![7; DRAFT_TOKENS_MAX + 1],
        hidden_from: 0,
        hidden_rows: 0,
    };
    assert_eq!(
        encode(draft.clone().into()).unwrap_err(),
        FrameError::LimitExceeded { field: "Draft.tokens", value: DRAFT_TOKENS_MAX + 1, max: DRAFT_TOKENS_MAX }
    );
    let within = Draft { tokens: vec![7; DRAFT_TOKENS_MAX], ..draft };
    assert!(encode(within.into()).is_ok());

    let refuse = |len| encode(Refuse { code: RefuseCode::Busy, message: "x".repeat(len), retry_after_ms: 0 }.into());
    assert!(refuse(TEXT_BYTES_MAX).is_ok());
    assert!(matches!(
        refuse(TEXT_BYTES_MAX + 1).unwrap_err(),
        FrameError::LimitExceeded { field: "Refuse.message", .. }
    ));

    let open = |bytes| {
        let mut open = samples::message(FrameType::Open, &mut Rng::new(1));
        if let Message::Open(o) = &mut open {
            o.grammar = Some(Grammar { syntax: GrammarSyntax::JsonSchema, text: "x".repeat(bytes) });
        }
        encode(open)
    };
    assert!(open(GRAMMAR_BYTES_MAX).is_ok());
    assert!(matches!(
        open(GRAMMAR_BYTES_MAX + 1).unwrap_err(),
        FrameError::LimitExceeded { field: "Open.grammar", .. }
    ));

    let offer = |blocks| {
        let shape = KvShape { layer_from: 0, layer_to: 1, width: 1, hidden: 0 };
        let ids = vec![Digest::of(b"block"); blocks];
        encode(KvOffer { epoch: Epoch(1), exchange: 0, shape, ids, tokens: 0 }.into())
    };
    assert!(offer(KV_OFFER_BLOCKS_MAX).is_ok());
    assert!(matches!(offer(KV_OFFER_BLOCKS_MAX + 1), Err(FrameError::LimitExceeded { .. })));
    // Far past the limit, the meta bound speaks first.
    assert!(matches!(offer(4 * KV_OFFER_BLOCKS_MAX), Err(FrameError::MetaTooLarge { .. })));
}

#[test]
fn an_unaligned_meta_buffer_is_an_error_not_undefined_behaviour() {
    let bytes = samples::wire(&samples::frame(FrameType::Opened, &mut Rng::new(3)));
    let header = Header::parse(bytes[..HEADER_BYTES].try_into().unwrap()).unwrap();
    let mut shifted = frame::MetaBuf::new();
    shifted.push(0);
    shifted.extend_from_slice(&bytes[HEADER_BYTES..]);
    assert_eq!(frame::decode_meta(&header, &shifted[1..]), Err(FrameError::Misaligned));
}

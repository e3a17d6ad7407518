//! Reading a request's JSON body within bounds: of bytes and time for each, of bytes for all large ones
//! together, and parsed off the threads that serve connections.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use flate2::read::{MultiGzDecoder, ZlibDecoder};
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use super::error::ApiError;
use super::json_bounds;

/// Largest request body, bytes. The longest context of the engine fits several times.
pub const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Longest time a body may take to arrive, seconds.
pub const BODY_READ_S_MAX: u64 = 30;
/// Longest silence in a body, seconds.
const BODY_SILENCE_S_MAX: u64 = 10;
/// Work on as little as this is done in place, bytes: the worst takes milliseconds.
const INLINE_BYTES_MAX: usize = 4 * 1024;
/// Bodies and texts larger than this share room and turns, bytes.
const SMALL_BYTES_MAX: usize = 16 * 1024;
/// Large bodies under way at once, bytes: two of the largest. What is made of them takes several times
/// as much, until the prompt's tokens are known.
const LARGE_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;
/// Longest wait for room among the large bodies, seconds.
const ROOM_S_MAX: u64 = 20;

/// What large requests share: room for their bodies, and turns for work that keeps a core busy.
pub(crate) struct Heavy {
    room: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

/// A large body's share of the room, as long as something as large as it is around; empty for a small
/// one.
#[derive(Default)]
pub(crate) struct Weight(Option<OwnedSemaphorePermit>);

/// A body in JSON, not parsed.
pub(crate) struct JsonBody {
    bytes: Vec<u8>,
    weight: Weight,
}

impl Default for Heavy {
    fn default() -> Self {
        // One core is left to the engine and one to the connections.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            room: Arc::new(Semaphore::new(LARGE_BYTES_MAX)),
            turns: Arc::new(Semaphore::new(cores.saturating_sub(2).max(1))),
        }
    }
}

impl Heavy {
    /// Does work on text or JSON of this many bytes: in place if it is little, otherwise on a thread that
    /// may be busy, and in turn if it is much.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = match bytes {
            0..=INLINE_BYTES_MAX => return work(),
            bytes if bytes <= SMALL_BYTES_MAX => None,
            _ => Arc::clone(&self.turns).acquire_owned().await.ok(),
        };
        // With the work, which goes on if the request is cancelled.
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        done.await.unwrap_or_else(|error| Err(ApiError::internal(format!("the request could not be read: {error}"))))
    }

    /// Reads the body of a request that says it is JSON.
    ///
    /// Other content types are refused although the body might be JSON: browsers send JSON across sites
    /// only after asking, and this node consents to the origins of its settings only.
    pub(crate) async fn read_json(&self, request: Request) -> Result<JsonBody, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::not_json());
        }
        let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let announced: Option<usize> = announced.and_then(|length| length.parse().ok());
        if announced.is_some_and(|length| length > BODY_BYTES_MAX) {
            return Err(ApiError::body_too_large(BODY_BYTES_MAX));
        }
        let encoding = Encoding::of(request.headers())?;
        // What a packed body becomes is not known before.
        let weight = match announced.filter(|_| encoding == Encoding::Plain).unwrap_or(BODY_BYTES_MAX) {
            0..=SMALL_BYTES_MAX => Weight::default(),
            large => self.weigh(large).await?,
        };
        let bytes = collect(request.into_body(), announced.unwrap_or(0)).await?;
        let bytes = match encoding {
            Encoding::Plain => bytes,
            packed => self.work(BODY_BYTES_MAX, move || unpacked(&bytes, packed)).await?,
        };
        Ok(JsonBody { weight: weight.at_most(bytes.len()), bytes })
    }

    async fn weigh(&self, bytes: usize) -> Result<Weight, ApiError> {
        let room = Arc::clone(&self.room).acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX));
        match timeout(Duration::from_secs(ROOM_S_MAX), room).await {
            Ok(Ok(permit)) => Ok(Weight(Some(permit))),
            _ => Err(ApiError::busy("the node has many large requests under way; retry soon", 1000)),
        }
    }
}

impl Weight {
    /// Gives back what is not needed for `bytes`.
    pub(crate) fn at_most(mut self, bytes: usize) -> Self {
        if let Some(permit) = &mut self.0
            && let Some(excess) = permit.num_permits().checked_sub(bytes)
        {
            drop(permit.split(excess));
        }
        self
    }
}

impl JsonBody {
    /// Parses with `parse`, which finds a body within the bounds of [`json_bounds`].
    pub(crate) async fn parse<T: Send + 'static>(
        self,
        heavy: &Heavy,
        parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<(T, Weight), ApiError> {
        let Self { bytes, weight } = self;
        heavy
            .work(bytes.len(), move || {
                json_bounds::check(&bytes)?;
                Ok((parse(&bytes)?, weight))
            })
            .await
    }
}

/// The bytes of a body.
async fn collect(body: Body, announced: usize) -> Result<Vec<u8>, ApiError> {
    let deadline = Instant::now() + Duration::from_secs(BODY_READ_S_MAX);
    let mut pieces = body.into_data_stream();
    let mut bytes = Vec::with_capacity(announced);
    loop {
        let silence = Instant::now() + Duration::from_secs(BODY_SILENCE_S_MAX);
        let piece: Option<Result<Bytes, axum::Error>> = timeout_at(silence.min(deadline), pieces.next())
            .await
            .map_err(|_| ApiError::body_too_slow(BODY_READ_S_MAX, BODY_SILENCE_S_MAX))?;
        match piece {
            None => return Ok(bytes),
            Some(Ok(piece)) if bytes.len() + piece.len() > BODY_BYTES_MAX => {
                return Err(ApiError::body_too_large(BODY_BYTES_MAX));
            }
            Some(Ok(piece)) => bytes.extend_from_slice(&piece),
            Some(Err(error)) => {
                return Err(ApiError::bad_request("body_unreadable", format!("the body could not be read: {error}")));
            }
        }
    }
}

/// How a body is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Plain,
    Gzip,
    /// A zlib stream, whatever its name says.
    Deflate,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let given = headers.get(header::CONTENT_ENCODING).map_or(Ok("identity"), |value| value.to_str());
        match given.unwrap_or("?").trim().to_ascii_lowercase().as_str() {
            "" | "identity" => Ok(Self::Plain),
            "gzip" | "x-gzip" => Ok(Self::Gzip),
            "deflate" => Ok(Self::Deflate),
            _ => Err(ApiError::encoding_unknown()),
        }
    }
}

/// The body unpacked. The bound holds for what comes out, too: a few bytes can stand for gigabytes.
fn unpacked(body: &[u8], encoding: Encoding) -> Result<Vec<u8>, ApiError> {
    let mut out = Vec::new();
    let most = BODY_BYTES_MAX as u64 + 1;
    let read = match encoding {
        Encoding::Gzip => MultiGzDecoder::new(body).take(most).read_to_end(&mut out),
        Encoding::Deflate | Encoding::Plain => ZlibDecoder::new(body).take(most).read_to_end(&mut out),
    };
    match read {
        Ok(_) if out.len() > BODY_BYTES_MAX => Err(ApiError::body_too_large(BODY_BYTES_MAX)),
        Ok(_) => Ok(out),
        Err(error) => Err(ApiError::bad_request("body_unreadable", format!("the body cannot be unpacked: {error}"))),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

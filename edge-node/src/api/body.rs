//! Reading a request's JSON body within bounds.

use std::io::Read;
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use flate2::read::{MultiGzDecoder, ZlibDecoder};

use super::error::ApiError;

/// Largest request body, bytes. The longest context of the engine fits several times.
pub const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Longest time a body may take to arrive, seconds.
pub const BODY_READ_S_MAX: u64 = 30;

/// The body of a request that says it is JSON.
///
/// Other content types are refused although the body might be JSON: browsers send JSON across
/// sites only after asking, and this node never consents, so no foreign page can use it.
pub(crate) async fn read_json(request: Request) -> Result<Bytes, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::not_json());
    }
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if announced.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > BODY_BYTES_MAX as u64) {
        return Err(ApiError::body_too_large(BODY_BYTES_MAX));
    }
    let encoding = Encoding::of(request.headers())?;
    let read = to_bytes(request.into_body(), BODY_BYTES_MAX);
    match tokio::time::timeout(Duration::from_secs(BODY_READ_S_MAX), read).await {
        Ok(Ok(body)) => decoded(body, encoding).await,
        Ok(Err(error)) if is_length_limit(&error) => Err(ApiError::body_too_large(BODY_BYTES_MAX)),
        Ok(Err(error)) => Err(ApiError::bad_request("body_unreadable", format!("the body could not be read: {error}"))),
        Err(_) => Err(ApiError::body_too_slow(BODY_READ_S_MAX)),
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
async fn decoded(body: Bytes, encoding: Encoding) -> Result<Bytes, ApiError> {
    if encoding == Encoding::Plain {
        return Ok(body);
    }
    let unpack = move || {
        let packed: &mut dyn Read = match encoding {
            Encoding::Gzip => &mut MultiGzDecoder::new(&body[..]),
            Encoding::Deflate | Encoding::Plain => &mut ZlibDecoder::new(&body[..]),
        };
        let mut out = Vec::new();
        packed.take(BODY_BYTES_MAX as u64 + 1).read_to_end(&mut out).map(|_| out)
    };
    match tokio::task::spawn_blocking(unpack).await {
        Ok(Ok(out)) if out.len() > BODY_BYTES_MAX => Err(ApiError::body_too_large(BODY_BYTES_MAX)),
        Ok(Ok(out)) => Ok(out.into()),
        Ok(Err(error)) => {
            Err(ApiError::bad_request("body_unreadable", format!("the body cannot be unpacked: {error}")))
        }
        Err(error) => Err(ApiError::internal(format!("the body could not be unpacked: {error}"))),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

/// `to_bytes` reports its own limit as the source of a general error.
fn is_length_limit(error: &axum::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.to_string().contains("length limit") {
            return true;
        }
        source = error.source();
    }
    false
}

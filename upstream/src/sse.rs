//! Server-sent events as inference servers write them: `data:` lines, comments, blank lines.

/// Puts events together from pieces of a body.
#[derive(Debug)]
pub struct Events {
    bytes_max: usize,
    line: Vec<u8>,
    data: Vec<u8>,
}

/// An event is longer than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {0} bytes")]
pub struct TooLong(usize);

impl Events {
    /// Events of at most `bytes_max` bytes each.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, line: Vec::new(), data: Vec::new() }
    }

    /// Takes the next piece; gives the data of every event that it completes.
    ///
    /// # Errors
    /// [`TooLong`]: nothing of the body can be used any more.
    pub fn push(&mut self, piece: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut events = Vec::new();
        for &byte in piece {
            if byte != b'\n' {
                if self.line.len() + self.data.len() >= self.bytes_max {
                    return Err(TooLong(self.bytes_max));
                }
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            if line.is_empty() {
                if !self.data.is_empty() {
                    events.push(String::from_utf8_lossy(&std::mem::take(&mut self.data)).into_owned());
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            }
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let body =
            b": hello\n\ndata: {\"a\":1}\n\ndata: two\r\ndata: lines \xc3\xa9\r\n\r\nevent: x\n\ndata: [DONE]\n\n";
        let expected = ["{\"a\":1}", "two\nlines é", "[DONE]"];
        for cut in 0..=body.len() {
            let mut events = Events::new(1000);
            let mut seen = events.push(&body[..cut]).unwrap();
            seen.extend(events.push(&body[cut..]).unwrap());
            assert_eq!(seen, expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        assert_eq!(Events::new(1000).push(&[b'x'; 1001]), Err(TooLong(1000)));
    }
}

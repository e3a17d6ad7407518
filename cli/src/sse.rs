//! Server-sent events as the API writes them: `data:` lines, comments, blank lines.

/// Longest event, bytes; a longer one is an error of the server.
pub(crate) const EVENT_BYTES_MAX: usize = 1 << 20;

/// Puts events together from pieces of a body.
#[derive(Debug, Default)]
pub(crate) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
}

/// An event longer than [`EVENT_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node sent an event of more than {EVENT_BYTES_MAX} bytes")]
pub(crate) struct TooLong;

impl Events {
    /// Takes the next piece; gives the data of every event that it completes.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut events = Vec::new();
        for &byte in piece {
            if byte != b'\n' {
                if self.line.len() + self.data.len() >= EVENT_BYTES_MAX {
                    return Err(TooLong);
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
            let mut events = Events::default();
            let mut seen = events.push(&body[..cut]).unwrap();
            seen.extend(events.push(&body[cut..]).unwrap());
            assert_eq!(seen, expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        assert_eq!(Events::default().push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(TooLong));
    }
}

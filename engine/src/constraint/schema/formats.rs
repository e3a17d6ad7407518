//! Formats of strings.

/// A year from 0001: neither Python nor ISO 8601's common use knows a year 0.
const YEAR: &str = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])";
const LEAP_YEAR: &str = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)";
const TIME: &str =
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";

/// Formats that the library holds as their standards say.
pub(super) const LIBRARY: [&str; 7] = ["duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// The pattern of a format that the library holds less strictly: it takes 29 February for a day of every
/// year, and leap seconds for a second of every minute. Forms that parsers refuse are left out (small letters
/// as separators, more than six digits of a second).
pub(super) fn pattern(format: &str) -> Option<String> {
    let day = "(?:0[1-9]|1[0-9]|2[0-8])";
    let date = format!(
        "(?:{YEAR}-(?:(?:0[13578]|1[02])-(?:{day}|29|30|31)|(?:0[469]|11)-(?:{day}|29|30)|02-{day})|{LEAP_YEAR}-02-29)"
    );
    match format {
        "date" => Some(format!("^{date}$")),
        "time" => Some(format!("^{TIME}$")),
        "date-time" => Some(format!("^{date}T{TIME}$")),
        _ => None,
    }
}

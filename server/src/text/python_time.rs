//! `strftime` as Python's naive `datetime` does it in the C locale, for `strftime_now` in chat templates.

use jiff::{Zoned, fmt::strtime};

/// Formats `time`. Errors: a code that neither Python nor this function knows how to fill.
pub(super) fn strftime(format: &str, time: &Zoned) -> Result<String, jiff::Error> {
    let mut pieces = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            pieces.push(char);
            continue;
        }
        match chars.next() {
            // The C locale's own, which jiff leaves to a locale library.
            Some('c') => pieces.push_str("%a %b %e %H:%M:%S %Y"),
            Some('x') => pieces.push_str("%m/%d/%y"),
            Some('X') => pieces.push_str("%H:%M:%S"),
            Some('r') => pieces.push_str("%I:%M:%S %p"),
            Some('h') => pieces.push_str("%b"),
            // Microseconds, always six digits.
            Some('f') => pieces.push_str("%6f"),
            // A naive datetime has no zone.
            Some('z' | 'Z') => {}
            Some(code) => pieces.extend(['%', code]),
            // A lone percent sign at the end stays.
            None => pieces.push_str("%%"),
        }
    }
    strtime::format(pieces, time)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected texts are Python 3.11's.
    #[test]
    fn formats_like_python() {
        let time: Zoned = "2024-07-04T09:05:03.000456[UTC]".parse().expect("a valid time");
        let cases = [
            ("%d %b %Y", "04 Jul 2024"),
            ("%Y-%m-%d", "2024-07-04"),
            ("%A, %B %d, %Y", "Thursday, July 04, 2024"),
            ("%a %-d %e %y %j", "Thu 4  4 24 186"),
            ("%H:%M:%S.%f %I %p", "09:05:03.000456 09 AM"),
            ("%c|%x|%X", "Thu Jul  4 09:05:03 2024|07/04/24|09:05:03"),
            ("%D %F %T %R %h", "07/04/24 2024-07-04 09:05:03 09:05 Jul"),
            ("[%z%Z] 100%%", "[] 100%"),
            ("%U %W %V %G %u %w", "26 27 27 2024 4 4"),
            ("no codes, 50%", "no codes, 50%"),
            ("今日 %Y", "今日 2024"),
        ];
        for (format, expected) in cases {
            assert_eq!(strftime(format, &time).expect(format), expected, "{format}");
        }
    }
}

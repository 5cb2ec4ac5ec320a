//! Stop strings over streamed text: nothing of one is sent before it is known not to be one.

/// How a [`StopMatcher`] treats the stop string it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StopOptions {
    /// Sends the stop string, too.
    pub include_in_output: bool,
}

/// What one piece of text decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutcome {
    /// Text that is safe to send.
    pub text: String,
    /// The index of the stop string that ended the text; all text after it is dropped.
    pub matched: Option<usize>,
}

/// Finds the first of several stop strings, however the text is cut into pieces. The first is the one that is complete
/// earliest; of those complete at the same character, the longest.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    options: StopOptions,
    /// The beginning of at least one stop string, shorter than the longest of them.
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// Empty stop strings match nothing.
    pub fn new(stops: &[String], options: StopOptions) -> Self {
        Self { stops: stops.to_vec(), options, held: String::new(), matched: None }
    }

    /// Adds text. After a match it returns that match again, without text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome { text: String::new(), matched: self.matched };
        }
        self.held.push_str(text);
        if let Some((stop_idx, start, end)) = self.first_match() {
            self.matched = Some(stop_idx);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.options.include_in_output { end } else { start });
            return StopOutcome { text, matched: self.matched };
        }
        let rest = self.held.split_off(self.held.len() - self.num_held_bytes());
        StopOutcome { text: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// The text still held back, when no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// `(stop index, start, end)` in `held`.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        stops
            .filter_map(|(stop_idx, stop)| self.held.find(stop).map(|start| (stop_idx, start, start + stop.len())))
            .min_by_key(|&(_, start, end)| (end, start))
    }

    /// The length of the longest end of `held` that begins a stop string.
    fn num_held_bytes(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        (first..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.starts_with(&self.held[start..])))
            .map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include_in_output: bool, pieces: &[&str]) -> (Vec<String>, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut matcher = StopMatcher::new(&stops, StopOptions { include_in_output });
        let mut sent: Vec<String> = Vec::new();
        let mut matched = None;
        for piece in pieces {
            let outcome = matcher.push(piece);
            sent.push(outcome.text);
            matched = outcome.matched;
        }
        sent.push(matcher.finish());
        (sent, matched)
    }

    /// Stop strings, whether they are sent, the pieces pushed, what each sends, and the stop string found.
    type Case = (&'static [&'static str], bool, &'static [&'static str], &'static [&'static str], Option<usize>);

    #[test]
    fn holds_back_only_what_may_begin_a_stop_string() {
        let cases: [Case; 10] = [
            (&[], false, &["a", "b"], &["a", "b", ""], None),
            (&[""], false, &["a", "b"], &["a", "b", ""], None),
            (&["END"], false, &["xE", "N", "D y", "z"], &["x", "", "", "", ""], Some(0)),
            (&["END"], true, &["xE", "N", "D y", "z"], &["x", "", "END", "", ""], Some(0)),
            (&["END"], false, &["xE", "N", "d"], &["x", "", "ENd", ""], None),
            (&["END"], false, &["xEN"], &["x", "EN"], None),
            (&["aab"], false, &["a", "a", "a", "b"], &["", "", "a", "", ""], Some(0)),
            (&["abc", "b"], false, &["a", "b"], &["", "a", ""], Some(1)),
            (&["b", "ab"], false, &["xa", "b"], &["x", "", ""], Some(1)),
            (&["é\n"], false, &["caf", "é", "\n"], &["caf", "", "", ""], Some(0)),
        ];
        for (stops, include, pieces, sent, matched) in cases {
            let expected = (sent.iter().map(ToString::to_string).collect::<Vec<_>>(), matched);
            assert_eq!(run(stops, include, pieces), expected, "{stops:?} {pieces:?}");
        }
    }

    /// What a matcher must send for the whole text: stop where the first stop string is complete.
    fn oracle(stops: &[String], include_in_output: bool, text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending = (0..stops.len()).filter(|&i| text[..end].ends_with(&stops[i]));
            if let Some(stop_idx) = ending.max_by_key(|&i| (stops[i].len(), std::cmp::Reverse(i))) {
                let start = end - stops[stop_idx].len();
                return (text[..if include_in_output { end } else { start }].to_owned(), Some(stop_idx));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn random_splits_agree_with_the_whole_text() {
        use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
        for seed in 0..4000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let alphabet = ['a', 'b', 'é', '🙂'];
            let mut string = |lengths: std::ops::Range<usize>| -> String {
                let length = rng.random_range(lengths);
                (0..length).map(|_| alphabet[rng.random_range(0..alphabet.len())]).collect()
            };
            let stops: Vec<String> = (0..3).map(|_| string(1..5)).collect();
            let text = string(0..30);
            let include_in_output = rng.random_bool(0.5);
            let (expected, matched) = oracle(&stops, include_in_output, &text);

            let mut matcher = StopMatcher::new(&stops, StopOptions { include_in_output });
            let (mut sent, mut got, mut rest) = (String::new(), None, text.as_str());
            while !rest.is_empty() && got.is_none() {
                let num_chars = rng.random_range(0..4);
                let cut = rest.char_indices().nth(num_chars).map_or(rest.len(), |(at, _)| at);
                let outcome = matcher.push(&rest[..cut]);
                sent.push_str(&outcome.text);
                assert!(expected.starts_with(&sent), "seed {seed}: leaked {sent:?}, expected {expected:?}");
                (got, rest) = (outcome.matched, &rest[cut..]);
            }
            sent.push_str(&matcher.finish());
            assert_eq!((sent, got), (expected, matched), "seed {seed}: {stops:?} in {text:?}");
        }
    }
}

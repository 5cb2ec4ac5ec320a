//! Samples of `/metrics` in the Prometheus text format.

/// One scrape.
pub struct Metrics {
    text: String,
}

impl Metrics {
    pub fn new(text: String) -> Self {
        Self { text }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// The sum of the samples of `name` that carry all of `labels`; `None` where there are none.
    ///
    /// # Panics
    /// A sample is not a number.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let samples = self.text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) || !wanted.iter().all(|label| rest.contains(label.as_str())) {
                return None;
            }
            let (_, value) = rest.rsplit_once(' ')?;
            Some(value.parse::<f64>().unwrap_or_else(|error| panic!("{line}: {error}")))
        });
        samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// The type that `# TYPE` declares for `name`.
    pub fn kind(&self, name: &str) -> Option<&str> {
        let prefix = format!("# TYPE {name} ");
        self.text.lines().find_map(|line| line.strip_prefix(&prefix))
    }

    /// No sequence runs or waits and no KV block is in use.
    pub fn is_idle(&self) -> bool {
        ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
            .iter()
            .all(|name| self.value(name, &[]) == Some(0.0))
    }
}

//! The rows that are left in the step being made.

/// Rows not yet given to a sequence.
#[derive(Debug)]
pub(crate) struct TokenBudget {
    num_left: usize,
}

impl TokenBudget {
    pub(crate) fn new(num_rows: usize) -> Self {
        Self { num_left: num_rows }
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.num_left == 0
    }

    /// True if so many rows are left.
    pub(crate) fn has(&self, wanted: usize) -> bool {
        wanted <= self.num_left
    }

    /// Gives up to `wanted` rows.
    pub(crate) fn take(&mut self, wanted: usize) -> usize {
        let num_rows = wanted.min(self.num_left);
        self.num_left -= num_rows;
        num_rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_what_is_left_and_no_more() {
        let mut budget = TokenBudget::new(5);
        assert_eq!([3, 3, 3].map(|wanted| budget.take(wanted)), [3, 2, 0]);
        assert!(budget.is_spent() && budget.has(0) && !budget.has(1));
    }
}

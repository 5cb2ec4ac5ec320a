//! What happened over all runs, so that the simulation cannot become idle unnoticed.

/// How often the interesting things happened.
#[derive(Debug, Default)]
pub struct Coverage {
    pub finished: u64,
    pub failed: u64,
    pub aborted: u64,
    pub refused: u64,
    pub scarcity_preemptions: u64,
    pub explicit_preemptions: u64,
    pub lost_in_flight: u64,
    pub shrinks_delayed: u64,
    pub windows: u64,
    pub chunked: u64,
    pub encoded: u64,
    pub encoded_over_budget: u64,
    pub without_a_state: u64,
    pub reused: u64,
    pub reused_after_preemption: u64,
    pub resumed: u64,
    pub resumed_after_preemption: u64,
    pub snapshots: u64,
    pub snapshots_given_up: u64,
    pub snapshots_lost_in_flight: u64,
    pub without_a_snapshot: u64,
    pub passed: u64,
    pub passed_for_a_state: u64,
    pub cached_and_full: u64,
    pub reused_windows: u64,
    pub windows_kept: u64,
    pub windows_full: u64,
    pub stored: u64,
    pub loads: u64,
    pub loads_cut: u64,
    pub loads_unwanted: u64,
}

impl Coverage {
    /// Panics unless everything happened often.
    pub fn assert_busy(&self) {
        println!("{self:?}");
        let Coverage { finished, failed, aborted, refused, .. } = self;
        assert!(finished.min(failed).min(aborted).min(refused) > &1000, "{self:?}");
        let Coverage { scarcity_preemptions, explicit_preemptions, lost_in_flight, .. } = self;
        assert!(scarcity_preemptions.min(explicit_preemptions).min(lost_in_flight) > &1000, "{self:?}");
        let Coverage { encoded, encoded_over_budget, without_a_state, .. } = self;
        assert!(encoded.min(encoded_over_budget).min(without_a_state) > &1000, "{self:?}");
        assert!(self.shrinks_delayed.min(self.windows).min(self.chunked) > 1000, "{self:?}");
        let Coverage { reused, reused_after_preemption, passed, cached_and_full, .. } = self;
        assert!(reused.min(reused_after_preemption) > &1000 && passed > &100 && cached_and_full > &10, "{self:?}");
        assert!(self.reused_windows.min(self.windows_kept).min(self.windows_full) > 1000, "{self:?}");
        assert!(self.stored.min(self.loads) > 1000 && self.loads_cut.min(self.loads_unwanted) > 100, "{self:?}");
        let Coverage { resumed, resumed_after_preemption, snapshots, snapshots_given_up, .. } = self;
        assert!(resumed.min(snapshots).min(snapshots_given_up) > &1000, "{self:?}");
        assert!(resumed_after_preemption > &500, "{self:?}");
        let Coverage { snapshots_lost_in_flight, without_a_snapshot, passed_for_a_state, .. } = self;
        assert!(snapshots_lost_in_flight.min(without_a_snapshot).min(passed_for_a_state) > &50, "{self:?}");
    }
}

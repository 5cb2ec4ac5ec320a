//! Which experts are kept in fast memory under a budget of bytes: what goes when another one comes.

use std::collections::BTreeSet;
use std::fmt;

/// One expert of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId {
    /// MoE layer, in the order in which the model asks its routers.
    pub layer: u32,
    /// Within its layer, as the router numbers it.
    pub expert: u32,
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expert {} of MoE layer {}", self.expert, self.layer)
    }
}

/// Who goes first.
///
/// Frequencies are sums over the steps that used an expert, in which a step's part halves every so many steps, so that they
/// follow a drift. Their order changes only when an expert is used, for all halve together (LRFU: Lee et al., "LRFU: A
/// Spectrum of Policies That Subsumes the Least Recently Used and Least Frequently Used Policies", IEEE ToC 2001).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertPolicy {
    /// Used longest ago.
    Lru,
    /// Used least often; a use counts half after 1024 steps.
    Lfu,
    /// Frequency and recency together: as `Lfu`, but a use counts half after 32 steps, so that a few fresh uses
    /// outweigh many old ones. Of equals, used longest ago.
    Lfru,
    /// Some are kept whatever happens (see [`ResidencyConfig::kept`]), the others as in `Lfru`.
    Pinned,
}

impl ExpertPolicy {
    /// Steps after which a use counts half. None: only the last use counts.
    fn half_life_steps(self) -> Option<f64> {
        match self {
            Self::Lru => None,
            Self::Lfu => Some(1024.0),
            Self::Lfru | Self::Pinned => Some(32.0),
        }
    }
}

/// Why an expert comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The running step needs it. It takes the room of whatever is not pinned or kept, of prefetched experts that may still be
    /// used last.
    Demand,
    /// It is expected to be used. It takes no room of other experts that are expected and were not used yet, and is the
    /// first to go when [`Residency::finish_layer`] said that it was not.
    Prefetch,
    /// There is room for it. Takes nobody's, and goes before any expert that was used; those that came first stay longest.
    WarmUp,
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    Resident,
    /// Resident since a prefetch that this is the first use of.
    Prefetched,
    Absent,
}

#[derive(Clone, Debug)]
pub struct ResidencyConfig {
    pub policy: ExpertPolicy,
    /// `[moe layer][expert]`. Experts without bytes are always resident.
    pub expert_bytes: Vec<Vec<u64>>,
    pub capacity_bytes: u64,
    /// What `Pinned` keeps once it came, best first; of these as many as leave `reserve_bytes`. Other policies keep none.
    pub kept: Vec<ExpertId>,
    /// What a step must have besides.
    pub reserve_bytes: u64,
}

/// The set of resident experts. An expert counts from its admission, so a load that fails is followed by [`Self::remove`], and
/// one that runs is pinned. It holds no bytes, and knows neither threads nor time: steps are its clock. Every
/// call takes O(log n) time for each expert that it names or evicts.
#[derive(Debug)]
pub struct Residency {
    policy: ExpertPolicy,
    capacity_bytes: u64,
    used_bytes: u64,
    /// `[moe layer][expert]`.
    entries: Vec<Vec<Entry>>,
    /// Who may go, first the one that does.
    order: BTreeSet<(Rank, ExpertId)>,
    /// Resident ones that were prefetched and neither used nor passed, by layer; with some that are no longer.
    awaited: Vec<Vec<u32>>,
    /// What a use in the present step is worth; grows from step to step, instead of all frequencies shrinking.
    use_weight: f64,
    growth: f64,
    /// Uses so far.
    num_uses: i64,
    num_warmed: i64,
    num_wasted: u64,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    bytes: u64,
    /// In units of which `use_weight` says what they are worth now.
    frequency: f64,
    /// Number of the last use; below zero for what came at a warm-up and was never used.
    last_use: i64,
    num_pins: u32,
    is_resident: bool,
    is_kept: bool,
    prefetch: Prefetch,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Prefetch {
    /// It was used, or came otherwise.
    #[default]
    None,
    Awaited,
    /// Its layer went by without it.
    Passed,
}

/// Smaller goes earlier. Ordered by its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    class: Class,
    /// Bits of a frequency: those of non-negative floats are ordered as they are.
    frequency: u64,
    last_use: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Passed,
    Plain,
    Awaited,
}

/// Beyond this weight all frequencies are scaled down, exactly.
const LARGEST_WEIGHT: f64 = (1u64 << 60) as f64;

impl Residency {
    /// # Panics
    /// An expert of `kept` is not there.
    pub fn new(config: ResidencyConfig) -> Self {
        let entry = |&bytes: &u64| Entry { bytes, is_resident: bytes == 0, ..Entry::default() };
        let entries: Vec<Vec<Entry>> =
            config.expert_bytes.iter().map(|layer| layer.iter().map(entry).collect()).collect();
        let mut residency = Self {
            policy: config.policy,
            capacity_bytes: config.capacity_bytes,
            used_bytes: 0,
            awaited: vec![Vec::new(); entries.len()],
            entries,
            order: BTreeSet::new(),
            use_weight: 1.0,
            growth: config.policy.half_life_steps().map_or(1.0, |steps| steps.recip().exp2()),
            num_uses: 0,
            num_warmed: 0,
            num_wasted: 0,
        };
        if config.policy == ExpertPolicy::Pinned {
            let mut room = config.capacity_bytes.saturating_sub(config.reserve_bytes);
            for id in config.kept {
                let entry = residency.entry_mut(id);
                if entry.bytes <= room && !entry.is_kept {
                    room -= entry.bytes;
                    entry.is_kept = true;
                }
            }
        }
        residency
    }

    pub fn policy(&self) -> ExpertPolicy {
        self.policy
    }

    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Of all resident experts; never above the capacity.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Prefetched experts that were evicted or removed unused.
    pub fn num_wasted(&self) -> u64 {
        self.num_wasted
    }

    pub fn contains(&self, id: ExpertId) -> bool {
        self.entry(id).is_resident
    }

    /// Whether it is resident since a prefetch and was not used since.
    pub fn is_prefetched(&self, id: ExpertId) -> bool {
        self.entry(id).prefetch != Prefetch::None
    }

    /// Whether it stays once it is resident, whatever is used: see [`ResidencyConfig::kept`].
    pub fn is_kept(&self, id: ExpertId) -> bool {
        self.entry(id).is_kept
    }

    /// All that are resident and take room, by layer and number.
    pub fn resident(&self) -> impl Iterator<Item = ExpertId> + '_ {
        self.entries.iter().zip(0..).flat_map(|(layer, layer_idx)| {
            let here = layer.iter().zip(0..).filter(|(entry, _)| entry.is_resident && entry.bytes > 0);
            here.map(move |(_, expert)| ExpertId { layer: layer_idx, expert })
        })
    }

    /// The next step begins.
    pub fn next_step(&mut self) {
        self.use_weight *= self.growth;
        if self.use_weight > LARGEST_WEIGHT {
            self.use_weight /= LARGEST_WEIGHT;
            self.entries.iter_mut().flatten().for_each(|entry| entry.frequency /= LARGEST_WEIGHT);
            let ids: Vec<ExpertId> = self.order.iter().map(|&(_, id)| id).collect();
            self.order = ids.into_iter().map(|id| (self.rank(id), id)).collect();
        }
    }

    /// The running step is done with a layer: what was prefetched for it and not used goes first from now on.
    pub fn finish_layer(&mut self, layer: u32) {
        for expert in std::mem::take(&mut self.awaited[layer as usize]) {
            let id = ExpertId { layer, expert };
            if self.entry(id).prefetch == Prefetch::Awaited {
                self.update(id, |entry| entry.prefetch = Prefetch::Passed);
            }
        }
    }

    /// The running step uses an expert, resident or not, for so many tokens; once for each step.
    pub fn touch(&mut self, id: ExpertId, num_tokens: u32) -> Touch {
        let found = match self.entry(id) {
            Entry { is_resident: false, .. } => Touch::Absent,
            Entry { prefetch: Prefetch::None, .. } => Touch::Resident,
            Entry { .. } => Touch::Prefetched,
        };
        self.num_uses += 1;
        // Many tokens of one step say less than as many steps: they are of few texts.
        let worth = self.use_weight * f64::from(1 + num_tokens.max(1).ilog2());
        let (num_uses, counts) = (self.num_uses, self.policy != ExpertPolicy::Lru);
        self.update(id, |entry| {
            entry.last_use = num_uses;
            entry.frequency += if counts { worth } else { 0.0 };
            entry.prefetch = Prefetch::None;
        });
        found
    }

    /// Makes an expert resident. Gives those that went for it, none where it was there already, or `None`, with nothing
    /// changed, where there is no room that it may take.
    pub fn admit(&mut self, id: ExpertId, why: Admission) -> Option<Vec<ExpertId>> {
        if self.contains(id) {
            return Some(Vec::new());
        }
        let victims = self.victims(self.entry(id).bytes, why)?;
        victims.iter().for_each(|&victim| self.remove(victim));
        self.used_bytes += self.entry(id).bytes;
        self.num_warmed += i64::from(why == Admission::WarmUp);
        let num_warmed = self.num_warmed;
        self.update(id, |entry| {
            entry.is_resident = true;
            match why {
                Admission::Demand => {}
                Admission::Prefetch => entry.prefetch = Prefetch::Awaited,
                Admission::WarmUp if entry.last_use > 0 => {}
                Admission::WarmUp => entry.last_use = -num_warmed,
            }
        });
        if why == Admission::Prefetch {
            let awaited = &mut self.awaited[id.layer as usize];
            awaited.push(id.expert);
            // Of a layer that never finishes, those that went meanwhile must not pile up.
            if awaited.len() > self.entries[id.layer as usize].len() {
                let layer = &self.entries[id.layer as usize];
                awaited.retain(|&expert| layer[expert as usize].prefetch == Prefetch::Awaited);
                awaited.sort_unstable();
                awaited.dedup();
            }
        }
        Some(victims)
    }

    /// Whose bytes go, in their order; `None` where all that may go are not enough.
    fn victims(&self, bytes: u64, why: Admission) -> Option<Vec<ExpertId>> {
        let mut free = self.capacity_bytes - self.used_bytes;
        let mut victims = Vec::new();
        let mut order = self.order.iter().take_while(|(rank, _)| match why {
            Admission::Demand => true,
            Admission::Prefetch => rank.class < Class::Awaited,
            Admission::WarmUp => false,
        });
        while free < bytes {
            let &(_, victim) = order.next()?;
            free += self.entry(victim).bytes;
            victims.push(victim);
        }
        Some(victims)
    }

    /// It is no longer there: its load failed, or its bytes are not to be used again. What was counted of it stays known.
    ///
    /// # Panics
    /// It is pinned.
    pub fn remove(&mut self, id: ExpertId) {
        let &Entry { bytes, num_pins, is_resident, prefetch, .. } = self.entry(id);
        if !is_resident || bytes == 0 {
            return;
        }
        assert_eq!(num_pins, 0, "{id} goes while it is used");
        self.num_wasted += u64::from(prefetch != Prefetch::None);
        self.used_bytes -= bytes;
        self.update(id, |entry| {
            entry.is_resident = false;
            entry.prefetch = Prefetch::None;
        });
    }

    /// Holds a resident expert until as many [`Self::unpin`]: it is being loaded, or computed with.
    ///
    /// # Panics
    /// It is not resident.
    pub fn pin(&mut self, id: ExpertId) {
        assert!(self.contains(id), "{id} is pinned and not there");
        self.update(id, |entry| entry.num_pins += 1);
    }

    /// # Panics
    /// It is not pinned.
    pub fn unpin(&mut self, id: ExpertId) {
        assert!(self.entry(id).num_pins > 0, "{id} is not pinned");
        self.update(id, |entry| entry.num_pins -= 1);
    }

    fn entry(&self, id: ExpertId) -> &Entry {
        &self.entries[id.layer as usize][id.expert as usize]
    }

    fn entry_mut(&mut self, id: ExpertId) -> &mut Entry {
        &mut self.entries[id.layer as usize][id.expert as usize]
    }

    /// Changes an expert and its place in the order.
    fn update(&mut self, id: ExpertId, change: impl FnOnce(&mut Entry)) {
        if self.may_go(id) {
            self.order.remove(&(self.rank(id), id));
        }
        change(self.entry_mut(id));
        if self.may_go(id) {
            self.order.insert((self.rank(id), id));
        }
    }

    fn may_go(&self, id: ExpertId) -> bool {
        let entry = self.entry(id);
        entry.is_resident && entry.bytes > 0 && entry.num_pins == 0 && !entry.is_kept
    }

    fn rank(&self, id: ExpertId) -> Rank {
        let entry = self.entry(id);
        let class = match entry.prefetch {
            Prefetch::None => Class::Plain,
            Prefetch::Awaited => Class::Awaited,
            Prefetch::Passed => Class::Passed,
        };
        Rank { class, frequency: entry.frequency.to_bits(), last_use: entry.last_use }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many experts of one layer, a byte each.
    fn residency(policy: ExpertPolicy, num_experts: usize, capacity_bytes: u64) -> Residency {
        let expert_bytes = vec![vec![1; num_experts]];
        Residency::new(ResidencyConfig { policy, expert_bytes, capacity_bytes, kept: Vec::new(), reserve_bytes: 0 })
    }

    fn id(expert: u32) -> ExpertId {
        ExpertId { layer: 0, expert }
    }

    /// Every step uses one expert; gives the experts that are resident then.
    fn after(residency: &mut Residency, uses: &[u32]) -> Vec<u32> {
        for &expert in uses {
            residency.next_step();
            residency.touch(id(expert), 1);
            residency.admit(id(expert), Admission::Demand).expect("nothing is pinned");
        }
        residency.resident().map(|id| id.expert).collect()
    }

    #[test]
    fn each_policy_has_its_victim() {
        let many = |expert, times| std::iter::repeat_n(expert, times);
        let check = |policy, uses: &[u32], expected: &[u32]| {
            assert_eq!(after(&mut residency(policy, 5, 2), uses), expected, "{policy:?}");
        };
        let uses: Vec<u32> = many(0, 500).chain(many(1, 130)).chain([2]).collect();
        check(ExpertPolicy::Lru, &uses, &[1, 2]);
        check(ExpertPolicy::Lfu, &uses, &[0, 2]);
        check(ExpertPolicy::Lfru, &uses, &[1, 2]);
        check(ExpertPolicy::Lfru, &[0, 0, 1, 2], &[0, 2]);
        check(ExpertPolicy::Lru, &[0, 0, 1, 2], &[1, 2]);
        // Equals: the one that was used longest ago, in the LRU sense.
        check(ExpertPolicy::Lfu, &[0, 1, 2], &[1, 2]);
    }

    #[test]
    fn frequencies_stay_finite_and_in_order() {
        let mut residency = residency(ExpertPolicy::Lfru, 4, 3);
        after(&mut residency, &[3, 0, 0, 1]);
        (0..100_000).for_each(|_| residency.next_step());
        assert!(residency.use_weight.is_finite() && residency.use_weight <= LARGEST_WEIGHT);
        assert_eq!(after(&mut residency, &[1, 2, 2, 3]), [1, 2, 3]);
    }

    #[test]
    fn pinned_ones_stay_and_nothing_changes_without_room() {
        let mut residency = residency(ExpertPolicy::Lru, 5, 2);
        after(&mut residency, &[0, 1]);
        residency.pin(id(0));
        assert_eq!(residency.admit(id(2), Admission::Demand), Some(vec![id(1)]));
        residency.pin(id(2));
        assert_eq!(residency.admit(id(3), Admission::Demand), None);
        assert_eq!((residency.used_bytes(), residency.contains(id(3))), (2, false));
        residency.unpin(id(0));
        assert_eq!(residency.admit(id(0), Admission::Demand), Some(Vec::new()));
        assert_eq!(residency.admit(id(3), Admission::Demand), Some(vec![id(0)]));
    }

    #[test]
    fn what_was_prefetched_goes_first_once_it_was_not_used() {
        let mut residency = residency(ExpertPolicy::Lru, 8, 3);
        after(&mut residency, &[0]);
        assert_eq!(residency.admit(id(1), Admission::Prefetch), Some(Vec::new()));
        assert_eq!(residency.admit(id(2), Admission::Prefetch), Some(Vec::new()));
        assert_eq!(residency.admit(id(3), Admission::Prefetch), Some(vec![id(0)]));
        assert_eq!(residency.admit(id(4), Admission::Prefetch), None, "others are expected too");
        assert_eq!(residency.touch(id(2), 1), Touch::Prefetched);
        assert_eq!(residency.touch(id(2), 1), Touch::Resident);
        assert_eq!(residency.touch(id(4), 1), Touch::Absent);
        residency.finish_layer(0);
        assert_eq!(residency.admit(id(5), Admission::Demand), Some(vec![id(1)]));
        assert_eq!(residency.admit(id(6), Admission::Prefetch), Some(vec![id(3)]));
        assert_eq!((residency.num_wasted(), residency.is_prefetched(id(6))), (2, true));
        assert_eq!(residency.admit(id(7), Admission::WarmUp), None);
    }

    #[test]
    fn a_warm_up_loses_its_last_ones_first() {
        let mut residency = residency(ExpertPolicy::Lfru, 5, 4);
        for expert in 0..3 {
            assert_eq!(residency.admit(id(expert), Admission::WarmUp), Some(Vec::new()));
        }
        assert_eq!(after(&mut residency, &[4, 3]), [0, 1, 3, 4]);
    }

    #[test]
    fn a_profile_is_kept_as_far_as_a_step_can_do_without() {
        let config = ResidencyConfig {
            policy: ExpertPolicy::Pinned,
            expert_bytes: vec![vec![2; 5], vec![0; 2]],
            capacity_bytes: 7,
            kept: vec![id(4), id(0), id(1)],
            reserve_bytes: 3,
        };
        let mut residency = Residency::new(config);
        assert_eq!([4, 0, 1].map(|expert| residency.is_kept(id(expert))), [true, true, false]);
        let used = after(&mut residency, &[4, 0, 1, 2, 3, 2]);
        assert_eq!(used, [0, 2, 4]);
        assert!(residency.contains(ExpertId { layer: 1, expert: 1 }), "an expert without bytes");
        residency.remove(id(4));
        assert_eq!((residency.used_bytes(), residency.contains(id(4))), (4, false));
    }
}

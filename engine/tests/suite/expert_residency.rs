//! Policies of expert residency against traces, with Belady's optimum as the yardstick, and against random operations.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use engine::{Admission, ExpertId, ExpertPolicy, Residency, ResidencyConfig, Touch};
use proptest::prelude::*;

use crate::expert_traces::{Trace, Uses, Zipf};

const POLICIES: [ExpertPolicy; 3] = [ExpertPolicy::Lru, ExpertPolicy::Lfu, ExpertPolicy::Lfru];

/// Share of the uses that found their expert resident, each expert of one size, nothing prefetched.
fn hit_rate(trace: &Trace, policy: ExpertPolicy, capacity: usize) -> f64 {
    let mut residency = Residency::new(ResidencyConfig {
        policy,
        expert_bytes: vec![vec![1; trace.num_experts]; trace.num_layers],
        capacity_bytes: capacity as u64,
        kept: Vec::new(),
        reserve_bytes: 0,
    });
    let mut num_hits = 0;
    for step in &trace.steps {
        residency.next_step();
        for (layer, uses) in (0..).zip(step) {
            num_hits += run_layer(&mut residency, layer, uses);
            assert!(residency.used_bytes() <= capacity as u64);
        }
    }
    num_hits as f64 / trace.num_uses() as f64
}

/// What a store does with a layer: what is there is held, what is missing comes, and where there is no room for all of them
/// at once, those that were computed make place.
fn run_layer(residency: &mut Residency, layer: u32, uses: &Uses) -> usize {
    let id = |expert| ExpertId { layer, expert };
    let touched = uses.iter().filter(|&&(expert, num_tokens)| residency.touch(id(expert), num_tokens) != Touch::Absent);
    let num_hits = touched.count();
    let (here, missing): (Vec<_>, Vec<_>) =
        uses.iter().map(|&(expert, _)| id(expert)).partition(|&id| residency.contains(id));
    here.iter().for_each(|&id| residency.pin(id));
    let mut held = std::collections::VecDeque::from(here);
    for id in missing {
        while residency.admit(id, Admission::Demand).is_none() {
            residency.unpin(held.pop_front().expect("the capacity holds one expert"));
        }
        residency.pin(id);
        held.push_back(id);
    }
    held.into_iter().for_each(|id| residency.unpin(id));
    residency.finish_layer(layer);
    num_hits
}

/// The same share where the expert that is used farthest in the future goes (Belady, "A Study of Replacement Algorithms for a
/// Virtual-Storage Computer", 1966): no policy that brings each missing expert can be better.
fn belady_hit_rate(trace: &Trace, capacity: usize) -> f64 {
    let mut accesses = Vec::new();
    for step in &trace.steps {
        for (layer, uses) in step.iter().enumerate() {
            accesses.extend(uses.iter().map(|&(expert, _)| layer * trace.num_experts + expert as usize));
        }
    }
    let mut next_use = vec![usize::MAX; accesses.len()];
    let mut seen = vec![usize::MAX; trace.total_experts()];
    for (at, &expert) in accesses.iter().enumerate().rev() {
        next_use[at] = std::mem::replace(&mut seen[expert], at);
    }
    let mut resident = vec![None; trace.total_experts()];
    let mut order = BTreeSet::new();
    let mut num_hits = 0;
    for (&expert, next) in accesses.iter().zip(next_use) {
        match resident[expert] {
            Some(expected) => {
                num_hits += 1;
                order.remove(&(expected, expert));
            }
            None if order.len() == capacity => {
                let (_, victim) = order.pop_last().expect("the capacity holds one expert");
                resident[victim] = None;
            }
            None => {}
        }
        resident[expert] = Some(next);
        order.insert((next, expert));
    }
    num_hits as f64 / accesses.len() as f64
}

/// The decoding of four texts by the demo model: a trained dense model's hidden states before random routers.
fn recorded() -> Trace {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/demo-routing.txt");
    Trace::recorded(&path, (8, 2))
}

fn traces() -> Vec<(&'static str, Trace)> {
    let topics = Zipf { num_topics: 4, topic_steps: 200, drift_steps: 20, ..Zipf::OLMOE };
    let drawn = [
        ("one topic", Zipf::OLMOE),
        ("4 topics, 200 steps each, drift", topics.clone()),
        ("8 topics, 50 steps each, drift", Zipf { num_topics: 8, topic_steps: 50, ..topics.clone() }),
        ("4 topics, 4 sequences at once", Zipf { num_rows: 4, ..topics.clone() }),
        ("4 topics, prompts of 64 tokens", Zipf { prompt_len: 64, ..topics.clone() }),
        ("4 topics, 128 experts a layer", Zipf { num_experts: 128, ..topics.clone() }),
        ("4 topics, s = 1.5", Zipf { s: 1.5, ..topics }),
    ];
    let drawn = drawn.into_iter().map(|(name, zipf)| (name, zipf.trace(1500, 7)));
    drawn.chain([("recorded: the demo model decodes 4 texts", recorded())]).collect()
}

#[test]
fn hit_rates_beside_beladys() {
    let mut table = String::from(
        "Hits of uses; in brackets the share of Belady's. Capacity in % of all experts.\n\
         trace                                     capacity  belady  lru            lfu            lfru\n",
    );
    for (name, trace) in traces() {
        for percent in [13, 25, 50, 75, 100] {
            let capacity = trace.total_experts() * percent / 100;
            let best = belady_hit_rate(&trace, capacity);
            write!(table, "{name:<41} {percent:>7}%  {best:.4}").expect("writing to a string");
            for policy in POLICIES {
                let found = hit_rate(&trace, policy, capacity);
                assert!(found <= best, "{name}, {policy:?} at {percent} %: {found} is better than the optimum {best}");
                write!(table, "  {found:.4} ({:.3})", found / best).expect("writing to a string");
                if policy == ExpertPolicy::Lfru && percent >= 50 {
                    assert!(found >= 0.8 * best, "{name} at {percent} %: {found} of {best}");
                }
            }
            table.push('\n');
        }
    }
    println!("{table}");
}

#[test]
fn a_skew_that_stays_is_learned() {
    let trace = Zipf::OLMOE.trace(1500, 11);
    let capacity = trace.total_experts() / 2;
    let best = belady_hit_rate(&trace, capacity);
    let [lru, _, lfru] = POLICIES.map(|policy| hit_rate(&trace, policy, capacity) / best);
    assert!(lfru >= 0.85 && lfru > lru, "{lfru} of Belady's, lru {lru}");
}

#[test]
fn with_room_for_all_each_expert_misses_once() {
    let trace = Zipf { num_topics: 2, topic_steps: 9, num_rows: 3, ..Zipf::OLMOE }.trace(40, 3);
    let used: BTreeSet<(usize, u32)> = (trace.steps.iter())
        .flat_map(|step| step.iter().enumerate().flat_map(|(layer, uses)| uses.iter().map(move |use_| (layer, use_.0))))
        .collect();
    let expected = 1.0 - used.len() as f64 / trace.num_uses() as f64;
    for policy in POLICIES {
        assert_eq!(hit_rate(&trace, policy, trace.total_experts()), expected, "{policy:?}");
    }
    assert_eq!(belady_hit_rate(&trace, trace.total_experts()), expected);
}

#[test]
fn the_smallest_capacity_ends_too() {
    let trace = Zipf { num_rows: 4, ..Zipf::OLMOE }.trace(20, 5);
    for capacity in [1, 8] {
        let best = belady_hit_rate(&trace, capacity);
        POLICIES.iter().for_each(|&policy| assert!(hit_rate(&trace, policy, capacity) <= best));
    }
}

const NUM_LAYERS: u32 = 3;
const NUM_EXPERTS: u32 = 6;
const CAPACITY: u64 = 20;

#[derive(Clone, Debug)]
enum Op {
    Step,
    Finish(u32),
    Touch(ExpertId, u32),
    Admit(ExpertId, Admission),
    Pin(ExpertId),
    Unpin(ExpertId),
    Remove(ExpertId),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let id = (0..NUM_LAYERS, 0..NUM_EXPERTS).prop_map(|(layer, expert)| ExpertId { layer, expert });
    let why = prop_oneof![Just(Admission::Demand), Just(Admission::Prefetch), Just(Admission::WarmUp)];
    let op = prop_oneof![
        1 => Just(Op::Step),
        1 => (0..NUM_LAYERS).prop_map(Op::Finish),
        4 => (id.clone(), 0u32..500).prop_map(|(id, num_tokens)| Op::Touch(id, num_tokens)),
        6 => (id.clone(), why).prop_map(|(id, why)| Op::Admit(id, why)),
        2 => id.clone().prop_map(Op::Pin),
        2 => id.clone().prop_map(Op::Unpin),
        1 => id.prop_map(Op::Remove),
    ];
    prop::collection::vec(op, 0..300)
}

fn policies() -> impl Strategy<Value = ExpertPolicy> {
    prop_oneof![Just(ExpertPolicy::Lru), Just(ExpertPolicy::Lfu), Just(ExpertPolicy::Lfru), Just(ExpertPolicy::Pinned)]
}

/// What must be true of a residency whatever is done to it: the model keeps sets where it keeps orders.
struct Checked {
    residency: Residency,
    bytes: Vec<Vec<u64>>,
    resident: BTreeSet<ExpertId>,
    prefetched: BTreeSet<ExpertId>,
    pins: Vec<ExpertId>,
}

impl Checked {
    fn new(config: ResidencyConfig) -> Self {
        Self {
            bytes: config.expert_bytes.clone(),
            residency: Residency::new(config),
            resident: BTreeSet::new(),
            prefetched: BTreeSet::new(),
            pins: Vec::new(),
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Step => self.residency.next_step(),
            Op::Finish(layer) => self.residency.finish_layer(layer),
            Op::Touch(id, num_tokens) => {
                let expected = match (self.residency.contains(id), self.prefetched.remove(&id)) {
                    (false, _) => Touch::Absent,
                    (true, false) => Touch::Resident,
                    (true, true) => Touch::Prefetched,
                };
                assert_eq!(self.residency.touch(id, num_tokens), expected);
            }
            Op::Admit(id, why) => self.admit(id, why),
            Op::Pin(id) if self.residency.contains(id) => {
                self.residency.pin(id);
                self.pins.push(id);
            }
            Op::Unpin(id) => {
                if let Some(at) = self.pins.iter().position(|pinned| *pinned == id) {
                    self.residency.unpin(id);
                    self.pins.remove(at);
                }
            }
            Op::Remove(id) if !self.pins.contains(&id) => {
                self.residency.remove(id);
                self.resident.remove(&id);
                self.prefetched.remove(&id);
            }
            Op::Pin(_) | Op::Remove(_) => {}
        }
    }

    fn admit(&mut self, id: ExpertId, why: Admission) {
        let was_here = self.residency.contains(id);
        let Some(victims) = self.residency.admit(id, why) else {
            assert!(!was_here);
            return;
        };
        let size = self.size(id);
        let free = CAPACITY - self.used();
        let freed: u64 = victims.iter().map(|&victim| self.size(victim)).sum();
        for victim in &victims {
            assert!(!self.pins.contains(victim) && !self.residency.is_kept(*victim), "{victim} was held");
            assert!(self.resident.remove(victim), "{victim} was not there");
            self.prefetched.remove(victim);
        }
        assert!(why != Admission::WarmUp || victims.is_empty());
        match victims.last() {
            Some(&last) => assert!(!was_here && free + freed - self.size(last) < size, "{last} went for nothing"),
            None => assert!(was_here || size <= free),
        }
        if size > 0 && !was_here {
            self.resident.insert(id);
            if why == Admission::Prefetch {
                self.prefetched.insert(id);
            }
        }
    }

    fn size(&self, id: ExpertId) -> u64 {
        self.bytes[id.layer as usize][id.expert as usize]
    }

    fn used(&self) -> u64 {
        self.resident.iter().map(|&id| self.size(id)).sum()
    }

    fn check(&self) {
        assert!(self.residency.resident().eq(self.resident.iter().copied()));
        assert_eq!(self.residency.used_bytes(), self.used());
        assert!(self.used() <= CAPACITY);
        let is_prefetched = |id: &ExpertId| self.residency.is_prefetched(*id);
        assert!(self.resident.iter().copied().filter(is_prefetched).eq(self.prefetched.iter().copied()));
    }
}

proptest! {
    #[test]
    fn the_budget_holds_and_nothing_held_goes(
        policy in policies(),
        ops in ops(),
        bytes in prop::collection::vec(prop::collection::vec(0u64..8, NUM_EXPERTS as usize), NUM_LAYERS as usize),
    ) {
        let kept = vec![ExpertId { layer: 2, expert: 1 }, ExpertId { layer: 0, expert: 3 }];
        let new = || Checked::new(ResidencyConfig {
            policy, expert_bytes: bytes.clone(), capacity_bytes: CAPACITY, kept: kept.clone(), reserve_bytes: 8,
        });
        let (mut checked, mut again) = (new(), new());
        for op in &ops {
            checked.apply(op);
            checked.check();
            again.apply(op);
            prop_assert_eq!(&checked.resident, &again.resident, "the same operations end alike");
        }
    }
}

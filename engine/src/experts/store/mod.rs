//! Experts of a packed folder under a budget of bytes: they lie on disk, and those that are used, or will be, in memory.
//!
//! `catalog` notes where experts lie, `source` reads one, `reader` has threads that do, `prediction` asks routers ahead,
//! `supply` brings a layer's experts to its tokens, `meter` counts. Which experts stay is decided by [`Residency`]: the bytes
//! here follow it. Loads in flight count as resident, so that nothing ever takes more than the budget.

mod catalog;
mod meter;
mod prediction;
mod reader;
mod source;
mod supply;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use candle_core::Tensor;
use kernels::{ExpertSlots, ExpertWeights, ReadMode, TopK};

pub use catalog::{ExpertCatalog, RouterParts};
use meter::Meter;
use prediction::Predictor;
use reader::{Arrival, ExpertReader};
use source::{ExpertSource, Unread};

use super::residency::{Admission, ExpertId, ExpertPolicy, Residency, ResidencyConfig};
use crate::error::EngineError;
use crate::pulse::Pulse;
use crate::weights::loader::{LoadProgress, LoadStage};

/// Experts that may be on their way at once while no step waits for one.
const MAX_AHEAD: usize = 64;

/// That is few enough for what is predicted better, a layer later, to come soon.
const LEAST_AHEAD: usize = 2;

/// What of the budget they may take.
const AHEAD_SHARE: u64 = 4;

/// How a store works.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub capacity_bytes: u64,
    pub policy: ExpertPolicy,
    /// What [`ExpertPolicy::Pinned`] keeps, best first.
    pub kept: Vec<ExpertId>,
    /// Experts are read ahead of their use.
    pub prefetch: bool,
    /// `None`: past the page cache where the file system can.
    pub read_mode: Option<ReadMode>,
}

/// Why an expert is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertFault {
    pub id: ExpertId,
    pub reason: String,
}

/// The experts of a model, for its step loop.
#[derive(Debug)]
pub struct ExpertStore {
    residency: Residency,
    /// `[moe layer][expert]`.
    expert_bytes: Vec<Vec<u64>>,
    /// `[moe layer][expert]`.
    places: Vec<Vec<Place>>,
    slots: Vec<Arc<ExpertSlots>>,
    reader: ExpertReader,
    /// None where nothing is read ahead.
    predictor: Option<Predictor>,
    /// What the present layer says that the next ones will choose.
    predicted: VecDeque<ExpertId>,
    /// What the blocks of a step are known to take.
    announced: VecDeque<ExpertId>,
    /// As many as are read in the time of a layer.
    max_ahead: usize,
    ahead_bytes: u64,
    num_ahead: usize,
    /// Of the layer that was computed last, the experts that were not there when it began, with their bytes.
    missed: BTreeMap<u32, u64>,
    /// Of the present step, by row.
    faults: BTreeMap<usize, Arc<ExpertFault>>,
    /// These could not be read lately: nobody tries before a step needs them.
    unreadable: BTreeSet<ExpertId>,
    meter: Meter,
    pulse: Arc<Pulse>,
}

/// What the store has of an expert.
#[derive(Debug, Default)]
enum Place {
    #[default]
    Absent,
    /// On its way; read ahead or not.
    Coming {
        is_ahead: bool,
    },
    Here(ExpertWeights),
}

impl ExpertStore {
    /// # Errors
    /// A budget below what one token needs in one layer, a file that cannot be opened, a thread that cannot be started.
    pub fn new(catalog: ExpertCatalog, config: StoreConfig) -> Result<Self, EngineError> {
        let (least, all, expert_bytes) = (catalog.least_bytes(), catalog.num_bytes(), catalog.bytes());
        if config.capacity_bytes < least {
            return Err(EngineError::ExpertMemory { bytes: config.capacity_bytes, least, all });
        }
        let no_slots = Arc::new(ExpertSlots { formats: Vec::new(), intermediate: 0 });
        let mut slots = vec![no_slots; expert_bytes.len()];
        for (&moe_idx, layer) in &catalog.layers {
            slots[moe_idx] = Arc::new(layer.slots.clone());
        }
        let routers = catalog.layers.iter().map(|(&moe_idx, layer)| (moe_idx, layer.router.clone())).collect();
        let source = ExpertSource::open(catalog, config.read_mode)?;
        let places = expert_bytes.iter().map(|layer| layer.iter().map(|_| Place::Absent).collect()).collect();
        let residency = Residency::new(ResidencyConfig {
            policy: config.policy,
            expert_bytes: expert_bytes.clone(),
            capacity_bytes: config.capacity_bytes,
            kept: config.kept,
            reserve_bytes: least,
        });
        Ok(Self {
            residency,
            expert_bytes,
            places,
            slots,
            reader: ExpertReader::start(source)?,
            predictor: config.prefetch.then(|| Predictor::new(routers)),
            predicted: VecDeque::new(),
            announced: VecDeque::new(),
            max_ahead: LEAST_AHEAD,
            ahead_bytes: 0,
            num_ahead: 0,
            missed: BTreeMap::new(),
            faults: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            meter: Meter::default(),
            pulse: Arc::default(),
        })
    }

    /// Whoever watches `pulse` sees each expert come that a step waits for.
    pub(crate) fn with_pulse(self, pulse: Arc<Pulse>) -> Self {
        Self { pulse, ..self }
    }

    /// Reads these experts, in their order, as long as there is room, and returns when they are there.
    ///
    /// # Errors
    /// One that cannot be read.
    pub fn warm_up(&mut self, experts: &[ExpertId], progress: &mut dyn FnMut(LoadProgress)) -> Result<(), EngineError> {
        let wanted = self.that_fit(experts);
        let total_bytes = wanted.iter().map(|&id| self.bytes(id)).sum();
        let (mut fault, mut done_bytes) = (None, 0);
        let mut await_until = |store: &mut Self, most_in_flight: usize| {
            while store.reader.num_in_flight() > most_in_flight {
                let (bytes, found) = store.await_some();
                done_bytes += bytes;
                fault = fault.take().or(found);
                progress(LoadProgress { stage: LoadStage::Experts, done_bytes, total_bytes });
            }
        };
        for id in wanted {
            let victims = self.residency.admit(id, Admission::WarmUp);
            debug_assert_eq!(victims, Some(Vec::new()), "there is room, and a warm-up takes nobody's");
            self.residency.pin(id);
            *self.place_mut(id) = Place::Coming { is_ahead: false };
            self.reader.demand(id, None);
            // As many as a step may have in flight: what waits in a queue is of no use yet.
            await_until(self, MAX_AHEAD - 1);
        }
        await_until(self, 0);
        self.meter.publish(self.residency.num_wasted(), self.residency.used_bytes());
        metrics::gauge!("moesaic_expert_memory_bytes").set(self.capacity_bytes() as f64);
        fault.map_or(Ok(()), |fault| Err(EngineError::Expert(fault)))
    }

    pub fn capacity_bytes(&self) -> u64 {
        self.residency.capacity_bytes()
    }

    /// What [`StoreConfig::read_mode`] came to.
    pub fn read_mode(&self) -> ReadMode {
        self.reader.mode()
    }

    pub fn begin_step(&mut self) {
        self.residency.next_step();
        self.meter.begin_step();
        self.faults.clear();
    }

    /// Returns the rows that needed an expert which is not to be had.
    pub fn finish_step(&mut self) -> BTreeMap<usize, Arc<ExpertFault>> {
        let recalls = self.predictor.as_ref().map(Predictor::recalls);
        self.meter.finish_step(self.residency.num_wasted(), self.residency.used_bytes(), recalls);
        std::mem::take(&mut self.faults)
    }

    /// These will be used soon, unless they are there already; the first ones first. Replaces what was expected before.
    pub fn expect(&mut self, mut experts: Vec<ExpertId>) {
        if self.predictor.is_some() {
            // Of a router of attention heads too, whose experts are not here.
            let is_here = |id: &ExpertId| (self.expert_bytes.get(id.layer as usize)).is_some_and(|of| !of.is_empty());
            experts.retain(is_here);
            self.announced = experts.into();
            self.read_ahead();
        }
    }

    /// The experts of a layer on all rows of a step, as [`kernels::grouped_swiglu`] computes them.
    /// `x`: `[num_tokens, hidden_size]`, normalised.
    ///
    /// # Errors
    /// Those of the op: an expert that cannot be read spoils the rows that chose it, see [`Self::finish_step`].
    pub fn forward(&mut self, moe_idx: usize, x: &Tensor, topk: &TopK) -> Result<Tensor, EngineError> {
        self.take_arrivals();
        self.missed.clear();
        self.adapt_ahead();
        self.announced.retain(|id| id.layer as usize != moe_idx);
        if let Some(predictor) = &mut self.predictor {
            predictor.compare(moe_idx, topk);
            self.predicted = predictor.predict(moe_idx, x)?.into();
            self.give_up(|id| id.layer as usize == moe_idx && !topk.experts.contains(&id.expert));
        }
        let slots = Arc::clone(&self.slots[moe_idx]);
        let layer = moe_idx as u32;
        let mut faults = Vec::new();
        let out = kernels::grouped_experts(x, &slots, topk, |pass| {
            supply::supply(self, layer, pass).map(|found| faults.extend(found))
        })?;
        self.residency.finish_layer(layer);
        for fault in faults.into_iter().map(Arc::new) {
            self.meter.num_faults += 1;
            tracing::warn!(layer, expert = fault.id.expert, reason = fault.reason, "an expert cannot be read");
            let pairs = topk.experts.iter().enumerate().filter(|(_, expert)| **expert == fault.id.expert);
            for (pair, _) in pairs {
                self.faults.entry(pair / topk.k).or_insert_with(|| Arc::clone(&fault));
            }
        }
        Ok(out)
    }

    /// What the last [`Self::forward`] needed and did not find, with its bytes.
    pub fn missed(&self) -> &BTreeMap<u32, u64> {
        &self.missed
    }

    fn place(&self, id: ExpertId) -> &Place {
        &self.places[id.layer as usize][id.expert as usize]
    }

    fn place_mut(&mut self, id: ExpertId) -> &mut Place {
        &mut self.places[id.layer as usize][id.expert as usize]
    }

    fn bytes(&self, id: ExpertId) -> u64 {
        self.expert_bytes[id.layer as usize][id.expert as usize]
    }

    /// Makes room for an expert and has it read; false where there is no room that it may take.
    fn load(&mut self, id: ExpertId, why: Admission) -> bool {
        let Some(victims) = self.residency.admit(id, why) else { return false };
        self.residency.pin(id);
        self.meter.num_evictions += victims.len() as u64;
        let mut reuse = None;
        for victim in victims {
            if let Place::Here(weights) = std::mem::take(self.place_mut(victim)) {
                reuse = Some(weights);
            }
        }
        let is_ahead = why == Admission::Prefetch;
        *self.place_mut(id) = Place::Coming { is_ahead };
        if is_ahead {
            self.num_ahead += 1;
            self.ahead_bytes += self.bytes(id);
            self.meter.num_issued += 1;
            self.reader.expect(id, reuse);
        } else {
            self.reader.demand(id, reuse);
        }
        true
    }

    /// Has expected experts read, as far as there is room for what may not be used: what is likely in a moment before what is
    /// known of later layers.
    fn read_ahead(&mut self) {
        while let Some(&id) = self.predicted.front().or(self.announced.front()) {
            if !self.residency.contains(id) && !self.unreadable.contains(&id) {
                let bytes = self.ahead_bytes + self.bytes(id);
                let is_full = self.num_ahead >= self.max_ahead
                    || bytes > self.residency.capacity_bytes() / AHEAD_SHARE && self.num_ahead > 0;
                if is_full || !self.load(id, Admission::Prefetch) {
                    return;
                }
            }
            if self.predicted.pop_front().is_none() {
                self.announced.pop_front();
            }
        }
    }

    /// More at once where the disk had nothing to do before the next layer came, fewer where it has more than that.
    fn adapt_ahead(&mut self) {
        self.max_ahead = match self.num_ahead {
            0 => (2 * self.max_ahead).min(MAX_AHEAD),
            1 => self.max_ahead,
            _ => (self.max_ahead - 1).max(LEAST_AHEAD),
        };
    }

    /// Lets go of expected experts that are `unwanted`, as long as they are not there; returns whether there were some that made
    /// room at once.
    fn give_up(&mut self, unwanted: impl Fn(ExpertId) -> bool) -> bool {
        let cancelled = self.reader.give_up(unwanted);
        for &id in &cancelled {
            self.residency.unpin(id);
            self.leave_ahead(id);
            *self.place_mut(id) = Place::Absent;
            self.residency.remove(id);
        }
        !cancelled.is_empty()
    }

    /// Puts what came in its place; gives those that did not come, with the reason unless they were given up.
    fn settle(&mut self, arrivals: Vec<Arrival>) -> Vec<(ExpertId, Option<ExpertFault>)> {
        let mut absent = Vec::new();
        for (id, result) in arrivals {
            self.residency.unpin(id);
            self.leave_ahead(id);
            match result {
                Ok(weights) => {
                    self.unreadable.remove(&id);
                    *self.place_mut(id) = Place::Here(weights);
                    continue;
                }
                Err(Unread::GivenUp) => absent.push((id, None)),
                Err(Unread::Fault(reason)) => {
                    self.unreadable.insert(id);
                    absent.push((id, Some(ExpertFault { id, reason })));
                }
            }
            *self.place_mut(id) = Place::Absent;
        }
        absent
    }

    /// It is no longer on its way ahead of its use.
    fn leave_ahead(&mut self, id: ExpertId) {
        if matches!(self.place(id), Place::Coming { is_ahead: true }) {
            self.num_ahead -= 1;
            self.ahead_bytes -= self.bytes(id);
        }
    }

    /// What came while nobody waited for it. Faults of experts that nobody needs harm nobody.
    fn take_arrivals(&mut self) {
        let arrivals = self.reader.take();
        for (id, _) in self.settle(arrivals) {
            self.residency.remove(id);
        }
    }

    /// Of `experts` those that are not there, once each and in their order, up to the first one for which no room is left.
    fn that_fit(&self, experts: &[ExpertId]) -> Vec<ExpertId> {
        let mut seen = BTreeSet::new();
        let mut room = self.capacity_bytes() - self.residency.used_bytes();
        let absent = experts.iter().copied().filter(|&id| !self.residency.contains(id) && seen.insert(id));
        let fits = |&id: &ExpertId| match room.checked_sub(self.bytes(id)) {
            Some(rest) => {
                room = rest;
                true
            }
            None => false,
        };
        absent.take_while(fits).collect()
    }

    /// Waits outside of a step; gives the bytes of what came or will not.
    fn await_some(&mut self) -> (u64, Option<ExpertFault>) {
        let (arrivals, _) = self.reader.wait();
        let bytes = arrivals.iter().map(|&(id, _)| self.bytes(id)).sum();
        let absent = self.settle(arrivals);
        absent.iter().for_each(|&(id, _)| self.residency.remove(id));
        (bytes, absent.into_iter().find_map(|(_, fault)| fault))
    }
}

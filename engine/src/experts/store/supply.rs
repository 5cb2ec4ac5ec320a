//! Brings the experts of a layer to the tokens that chose them: those that are there are computed while others are read, and
//! where the budget has no room for all, they come in groups. Each is read once.

use std::collections::{BTreeSet, VecDeque};

use kernels::{ExpertPass, ExpertWeights};

use super::{ExpertFault, ExpertStore, Place};
use crate::error::EngineError;
use crate::experts::residency::{Admission, ExpertId, Touch};

/// A layer's experts on their way through one part of a step.
struct Supply<'a> {
    store: &'a mut ExpertStore,
    layer: u32,
    /// There, held, and not yet computed.
    here: Vec<u32>,
    /// Held, and on their way.
    coming: BTreeSet<u32>,
    /// No room yet.
    missing: VecDeque<u32>,
    faults: Vec<ExpertFault>,
}

/// Computes all experts that `pass` needs, or gives them up, which are returned. What is expected of other layers is asked for
/// when all that is needed now was.
pub(super) fn supply(
    store: &mut ExpertStore,
    layer: u32,
    pass: &mut ExpertPass<'_>,
) -> Result<Vec<ExpertFault>, EngineError> {
    let (here, coming) = (Vec::new(), BTreeSet::new());
    let mut supply = Supply { store, layer, here, coming, missing: VecDeque::new(), faults: Vec::new() };
    supply.look_up(pass);
    supply.demand();
    if supply.missing.is_empty() {
        supply.store.read_ahead();
    }
    supply.compute(pass)?;
    while !(supply.coming.is_empty() && supply.missing.is_empty()) {
        supply.demand();
        supply.await_some(pass);
        supply.compute(pass)?;
    }
    Ok(supply.faults)
}

impl Supply<'_> {
    fn id(&self, expert: u32) -> ExpertId {
        ExpertId { layer: self.layer, expert }
    }

    /// Holds what is there or on its way, and counts.
    fn look_up(&mut self, pass: &ExpertPass<'_>) {
        for (expert, num_tokens) in pass.needed().map(|(expert, num_tokens)| (expert as u32, num_tokens as u32)) {
            let id = self.id(expert);
            let found = self.store.residency.touch(id, num_tokens);
            let is_here = matches!(self.store.place(id), Place::Here(_));
            if !is_here {
                let bytes = self.store.bytes(id);
                self.store.missed.insert(expert, bytes);
            }
            let meter = &mut self.store.meter;
            *(if is_here { &mut meter.num_hits } else { &mut meter.num_misses }) += 1;
            if found == Touch::Prefetched {
                *(if is_here { &mut meter.num_used } else { &mut meter.num_late }) += 1;
            }
            if found == Touch::Absent {
                self.missing.push_back(expert);
                continue;
            }
            self.store.residency.pin(id);
            if is_here {
                self.here.push(expert);
            } else {
                self.store.reader.hurry(id);
                self.coming.insert(expert);
            }
        }
    }

    /// Has read what there is room for; for the first of the others, what is only expected gives up its place.
    fn demand(&mut self) {
        while let Some(&expert) = self.missing.front() {
            let id = self.id(expert);
            if !self.store.load(id, Admission::Demand) {
                if self.store.give_up(|_| true) {
                    continue;
                }
                return;
            }
            self.store.residency.pin(id);
            self.missing.pop_front();
            self.coming.insert(expert);
        }
    }

    /// Computes what is there and lets go of it.
    fn compute(&mut self, pass: &mut ExpertPass<'_>) -> Result<(), EngineError> {
        let experts = std::mem::take(&mut self.here);
        if experts.is_empty() {
            return Ok(());
        }
        let weights: Vec<(usize, &ExpertWeights)> = experts
            .iter()
            .map(|&expert| match self.store.place(self.id(expert)) {
                Place::Here(weights) => (expert as usize, weights),
                Place::Absent | Place::Coming { .. } => unreachable!("what is held stays"),
            })
            .collect();
        pass.compute(&weights)?;
        for expert in experts {
            let id = self.id(expert);
            self.store.residency.unpin(id);
        }
        Ok(())
    }

    fn await_some(&mut self, pass: &mut ExpertPass<'_>) {
        let (arrivals, waited) = self.store.reader.wait();
        self.store.meter.waited += waited;
        self.store.pulse.beat();
        for (id, fault) in self.store.settle(arrivals) {
            if id.layer == self.layer && self.coming.remove(&id.expert) {
                self.store.residency.unpin(id);
                match fault {
                    // It was given up in the moment in which it became wanted.
                    None => self.missing.push_front(id.expert),
                    Some(fault) => {
                        pass.fail(id.expert as usize);
                        self.faults.push(fault);
                    }
                }
            }
            self.store.residency.remove(id);
        }
        let store = &*self.store;
        let layer = self.layer;
        let is_here = |expert: &u32| matches!(store.place(ExpertId { layer, expert: *expert }), Place::Here(_));
        let came: Vec<u32> = self.coming.iter().copied().filter(is_here).collect();
        for expert in came {
            self.coming.remove(&expert);
            self.here.push(expert);
        }
    }
}

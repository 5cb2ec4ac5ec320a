//! A few threads that read experts: those that a step waits for before those that are expected. Who reads ahead rests while
//! something that is waited for is read: they share one disk. Two read the two matrices of an expert side by side where they can,
//! which a disk serves faster, so that one expert is there sooner instead of two later.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kernels::{ExpertWeights, PackedWeight, ReadMode};

use super::source::{ExpertSource, Part, Unread};
use crate::error::EngineError;
use crate::experts::ExpertId;

/// Two for an expert that is read ahead, and two that need not wait for them.
const NUM_THREADS: usize = 4;

/// Hands experts to the threads and takes what they read. Each expert that is asked for comes back once, as long as it is not
/// asked for again before; how many are asked for at once is the caller's to bound.
#[derive(Debug)]
pub(super) struct ExpertReader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    num_in_flight: usize,
}

/// An expert that came, or why it did not.
pub(super) type Arrival = (ExpertId, Result<ExpertWeights, Unread>);

#[derive(Debug)]
struct Shared {
    source: ExpertSource,
    state: Mutex<State>,
    has_work: Condvar,
    has_arrivals: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// A step waits for them.
    demanded: VecDeque<Job>,
    expected: VecDeque<Job>,
    /// Being read and waited for.
    num_demanded: usize,
    /// Being read while nobody waits for it.
    ahead: Option<Ahead>,
    /// Second matrices of experts that are being read, for whoever has time.
    halves: VecDeque<Half>,
    /// Those that somebody took and read.
    read_halves: Vec<(ExpertId, Result<PackedWeight, Unread>)>,
    arrivals: Vec<Arrival>,
    is_closed: bool,
}

#[derive(Debug)]
struct Ahead {
    id: ExpertId,
    /// Nobody will wait for it.
    is_given_up: bool,
}

#[derive(Debug)]
struct Job {
    id: ExpertId,
    /// What went for it, whose memory it takes.
    reuse: Option<ExpertWeights>,
}

/// The second matrix of an expert.
#[derive(Debug)]
struct Half {
    id: ExpertId,
    reuse: Option<PackedWeight>,
}

#[derive(Debug)]
enum Work {
    Expert(Job),
    Half(Half),
}

impl ExpertReader {
    /// # Errors
    /// A thread that cannot be started.
    pub(super) fn start(source: ExpertSource) -> Result<Self, EngineError> {
        let shared = Arc::new(Shared {
            source,
            state: Mutex::default(),
            has_work: Condvar::new(),
            has_arrivals: Condvar::new(),
        });
        let mut reader = Self { shared, threads: Vec::new(), num_in_flight: 0 };
        for idx in 0..NUM_THREADS {
            let shared = Arc::clone(&reader.shared);
            let thread = std::thread::Builder::new().name(format!("experts-{idx}"));
            reader.threads.push(thread.spawn(move || shared.work()).map_err(EngineError::Thread)?);
        }
        Ok(reader)
    }

    pub(super) fn mode(&self) -> ReadMode {
        self.shared.source.mode()
    }

    /// Asked for and not yet taken.
    pub(super) fn num_in_flight(&self) -> usize {
        self.num_in_flight
    }

    /// Has an expert read before all that are only expected.
    pub(super) fn demand(&mut self, id: ExpertId, reuse: Option<ExpertWeights>) {
        self.num_in_flight += 1;
        self.shared.lock().demanded.push_back(Job { id, reuse });
        self.shared.has_work.notify_all();
    }

    /// Has an expert read when no other is demanded.
    pub(super) fn expect(&mut self, id: ExpertId, reuse: Option<ExpertWeights>) {
        self.num_in_flight += 1;
        self.shared.lock().expected.push_back(Job { id, reuse });
        self.shared.has_work.notify_all();
    }

    /// An expected expert is waited for now.
    pub(super) fn hurry(&mut self, id: ExpertId) {
        let mut state = self.shared.lock();
        if state.ahead.take_if(|ahead| ahead.id == id).is_some() {
            state.num_demanded += 1;
        } else if let Some(idx) = state.expected.iter().position(|job| job.id == id) {
            let job = state.expected.remove(idx).expect("it was found there");
            state.demanded.push_back(job);
        }
        self.shared.has_work.notify_all();
    }

    /// Expected experts that are `unwanted` are not read: those that nobody reads yet are given back, those that are
    /// being read arrive as given up, unless they are hurried or there before.
    pub(super) fn give_up(&mut self, unwanted: impl Fn(ExpertId) -> bool) -> Vec<ExpertId> {
        let mut state = self.shared.lock();
        state.ahead.iter_mut().for_each(|ahead| ahead.is_given_up |= unwanted(ahead.id));
        let (cancelled, wanted): (VecDeque<Job>, VecDeque<Job>) =
            std::mem::take(&mut state.expected).into_iter().partition(|job| unwanted(job.id));
        state.expected = wanted;
        drop(state);
        self.shared.has_work.notify_all();
        self.num_in_flight -= cancelled.len();
        cancelled.into_iter().map(|job| job.id).collect()
    }

    /// What came since the last time.
    pub(super) fn take(&mut self) -> Vec<Arrival> {
        let arrivals = std::mem::take(&mut self.shared.lock().arrivals);
        self.num_in_flight -= arrivals.len();
        arrivals
    }

    /// The same, but waits for one at least; with the time that took.
    ///
    /// # Panics
    /// Nothing is in flight.
    pub(super) fn wait(&mut self) -> (Vec<Arrival>, Duration) {
        assert!(self.num_in_flight > 0, "nobody reads what is waited for");
        let waiting = Instant::now();
        let state = self.shared.lock();
        let mut state = self
            .shared
            .has_arrivals
            .wait_while(state, |state| state.arrivals.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let arrivals = std::mem::take(&mut state.arrivals);
        drop(state);
        self.num_in_flight -= arrivals.len();
        (arrivals, waiting.elapsed())
    }
}

impl Drop for ExpertReader {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.has_work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked said so already.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(work) = self.next_work() {
            match work {
                Work::Expert(job) => self.read_expert(job),
                Work::Half(Half { id, reuse }) => {
                    let result = self.read((id, Part::Down), reuse);
                    self.lock().read_halves.push((id, result));
                }
            }
            self.has_work.notify_all();
        }
    }

    fn read_expert(&self, Job { id, reuse }: Job) {
        let reading = Instant::now();
        let (gate_up, down) = reuse.map(|weights| (weights.gate_up, weights.down)).unzip();
        self.lock().halves.push_back(Half { id, reuse: down });
        self.has_work.notify_all();
        let gate_up = self.read((id, Part::GateUp), gate_up);
        let down = self.second_half(id);
        let result = gate_up.and_then(|gate_up| Ok(self.source.expert(id, [gate_up, down?])));
        metrics::histogram!("moesaic_expert_load_seconds").record(reading.elapsed());
        if let Ok(weights) = &result {
            let num_bytes = weights.gate_up.num_bytes() + weights.down.num_bytes();
            metrics::counter!("moesaic_expert_read_bytes_total").increment(num_bytes as u64);
        }
        let mut state = self.lock();
        if state.ahead.take_if(|ahead| ahead.id == id).is_none() {
            state.num_demanded -= 1;
        }
        state.arrivals.push((id, result));
        self.has_arrivals.notify_one();
    }

    /// A panic is a fault like others: who waits must not wait for ever.
    fn read(&self, matrix: (ExpertId, Part), reuse: Option<PackedWeight>) -> Result<PackedWeight, Unread> {
        let read = AssertUnwindSafe(|| self.source.read(matrix, reuse, &mut || self.give_way(matrix.0)));
        catch_unwind(read).unwrap_or_else(|_| Err(Unread::Fault("a reader failed, the log says how".to_owned())))
    }

    /// What somebody else read meanwhile, or reads it where nobody did.
    fn second_half(&self, id: ExpertId) -> Result<PackedWeight, Unread> {
        let mut state = self.lock();
        if let Some(idx) = state.halves.iter().position(|half| half.id == id) {
            let Half { reuse, .. } = state.halves.remove(idx).expect("it was found there");
            drop(state);
            return self.read((id, Part::Down), reuse);
        }
        loop {
            if let Some(idx) = state.read_halves.iter().position(|(half, _)| *half == id) {
                return state.read_halves.swap_remove(idx).1;
            }
            state = self.has_work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Who reads ahead waits while others read what is waited for, and stops when nobody wants it any more.
    fn give_way(&self, id: ExpertId) -> ControlFlow<()> {
        let must_wait = |state: &mut State| {
            let is_ahead = state.ahead.as_ref().is_some_and(|ahead| ahead.id == id && !ahead.is_given_up);
            is_ahead && state.has_demands() && !state.is_closed
        };
        let state = self.has_work.wait_while(self.lock(), must_wait).unwrap_or_else(PoisonError::into_inner);
        match state.is_closed || state.ahead.as_ref().is_some_and(|ahead| ahead.id == id && ahead.is_given_up) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// None when the reader is gone.
    fn next_work(&self) -> Option<Work> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(work) = state.next_work() {
                return Some(work);
            }
            state = self.has_work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl State {
    /// Whether somebody waits for an expert.
    fn has_demands(&self) -> bool {
        self.num_demanded > 0 || !self.demanded.is_empty()
    }

    fn next_work(&mut self) -> Option<Work> {
        if let Some(job) = self.demanded.pop_front() {
            self.num_demanded += 1;
            return Some(Work::Expert(job));
        }
        let has_demands = self.has_demands();
        let ahead = self.ahead.as_ref().map(|ahead| ahead.id);
        if let Some(idx) = self.halves.iter().position(|half| !has_demands || ahead != Some(half.id)) {
            return self.halves.remove(idx).map(Work::Half);
        }
        if has_demands || ahead.is_some() {
            return None;
        }
        let job = self.expected.pop_front()?;
        self.ahead = Some(Ahead { id: job.id, is_given_up: false });
        Some(Work::Expert(job))
    }
}

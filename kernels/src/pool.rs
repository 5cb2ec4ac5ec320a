//! The one compute pool: the caller is worker 0, the others spin for a moment and then park.
//!
//! Each worker begins with its own contiguous part of a job's tasks, the same one in each job of the same size, so that it
//! meets the same weights on the same CPU every time. Who is done takes half of what the fullest of the others has left.

use std::any::Any;
use std::cell::Cell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::affinity;

/// How long an idle worker spins before it parks: longer than the gap between two ops of a step, short enough to cost
/// an idle server nothing.
const SPIN_LIMIT: Duration = Duration::from_micros(50);
/// Spins between two looks at the clock.
const SPINS_PER_CLOCK: usize = 64;

/// Work (multiplications, or as long) below which waking the pool costs more than it saves.
const MIN_PARALLEL_WORK: usize = 1 << 16;

/// `state` of the pool: number of the job, whether it takes no more workers, and how many joined it.
const JOINED_MASK: u64 = 0xffff;
const CLOSED: u64 = 1 << 16;
const NEXT_JOB: u64 = 1 << 17;

/// A part of the tasks packs two of these numbers in one word.
const MAX_TASKS: usize = u32::MAX as usize;

static POOL: OnceLock<&'static Pool> = OnceLock::new();

thread_local! {
    /// Whether this thread runs tasks of a job, so that a nested call must not wait for the pool.
    static IN_JOB: Cell<bool> = const { Cell::new(false) };
}

/// Starts the pool with this many threads, the caller's included; `None` takes as many as the process may run on.
/// The first call wins. Returns the number of threads in use.
pub fn init(threads: Option<usize>) -> usize {
    POOL.get_or_init(|| Pool::start(threads.unwrap_or_else(default_threads))).num_threads()
}

/// Ties the calling thread to the CPU of worker 0. For the one thread that drives the pool while the process lives: later
/// calls do nothing, as does a call where the process may not run on as many CPUs as the pool has threads.
pub fn pin_caller() {
    static PINNED: OnceLock<()> = OnceLock::new();
    let num_threads = num_threads();
    PINNED.get_or_init(|| {
        if let Some(&cpu) = POOL.get().and_then(|pool| pool.cpus.first())
            && num_threads > 1
        {
            affinity::pin_thread(cpu);
        }
    });
}

/// Threads in use; starts the pool if nobody did.
pub fn num_threads() -> usize {
    init(None)
}

/// What `task` makes of 0 to `num_tasks - 1`, in that order; computed as by [`parallel_for`].
pub fn parallel_map<T: Send + Sync>(num_tasks: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let made: Vec<OnceLock<T>> = (0..num_tasks).map(|_| OnceLock::new()).collect();
    parallel_for(num_tasks, |idx| assert!(made[idx].set(task(idx)).is_ok(), "every task runs once"));
    made.into_iter().map(|one| one.into_inner().expect("every task ran")).collect()
}

/// Runs `task(0)` to `task(num_tasks - 1)`, each once, on the pool and the calling thread, and returns when all are
/// done. A call from inside a task, or while another thread uses the pool, runs on the calling thread alone.
/// A panic in a task is passed on to the caller after every running task has ended; tasks not yet begun are dropped.
pub fn parallel_for(num_tasks: usize, task: impl Fn(usize) + Sync) {
    if num_tasks <= 1 || num_threads() == 1 || IN_JOB.get() || num_tasks > MAX_TASKS {
        return (0..num_tasks).for_each(task);
    }
    let pool = POOL.get().expect("num_threads started the pool");
    let claim = match pool.claim.try_lock() {
        Ok(claim) => claim,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return (0..num_tasks).for_each(task),
    };
    let job = Job { task: &task, parts: &pool.parts, failed: AtomicBool::new(false), panic: Mutex::new(None) };
    pool.run(&job, num_tasks);
    drop(claim);
    if let Some(payload) = job.take_panic() {
        resume_unwind(payload);
    }
}

/// [`parallel_for`] if there is enough work in all, else a plain loop.
pub(crate) fn parallel_if(work: usize, num_tasks: usize, task: impl Fn(usize) + Sync) {
    if work >= MIN_PARALLEL_WORK { parallel_for(num_tasks, task) } else { (0..num_tasks).for_each(task) }
}

fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

struct Pool {
    workers: Vec<Worker>,
    /// What is left of each worker's part of the tasks, worker 0 first.
    parts: Vec<Part>,
    /// CPUs of the workers, worker 0 first; none if there are fewer CPUs than workers.
    cpus: Vec<usize>,
    /// Held by the thread whose job is running.
    claim: Mutex<()>,
    /// Job number, [`CLOSED`] and joined workers; see [`JOINED_MASK`].
    state: AtomicU64,
    job: AtomicPtr<Job<'static>>,
}

struct Worker {
    thread: OnceLock<Thread>,
    parked: AtomicBool,
}

/// Tasks `first..end`, `first` in the upper half of the word; on a cache line of its own. Its worker takes from the
/// front, others take from the back. A word that comes back after others means what it meant before: these tasks have
/// not begun.
#[repr(align(64))]
struct Part(AtomicU64);

impl Part {
    fn set(&self, first: usize, end: usize) {
        self.0.store((first as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    fn bounds(word: u64) -> (usize, usize) {
        ((word >> 32) as usize, (word & u64::from(u32::MAX)) as usize)
    }

    fn len(&self) -> usize {
        let (first, end) = Self::bounds(self.0.load(Ordering::Relaxed));
        end.saturating_sub(first)
    }

    /// The first task, for the worker whose part it is.
    fn take_first(&self) -> Option<usize> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let (first, end) = Self::bounds(word);
            (first < end).then(|| word + (1 << 32))
        });
        taken.ok().map(|word| Self::bounds(word).0)
    }

    /// The later half of the tasks (the longer one if it is odd), for another worker.
    fn take_half(&self) -> Option<(usize, usize)> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let (first, end) = Self::bounds(word);
            (first < end).then(|| word - (end - first).div_ceil(2) as u64)
        });
        taken.ok().map(|word| {
            let (first, end) = Self::bounds(word);
            (end - (end - first).div_ceil(2), end)
        })
    }
}

struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    parts: &'a [Part],
    failed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Takes tasks until none is left. Never unwinds.
    fn work(&self, worker_idx: usize) {
        IN_JOB.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while let Some(task_idx) = self.next_task(worker_idx) {
                (self.task)(task_idx);
            }
        }));
        IN_JOB.set(false);
        if let Err(payload) = outcome {
            self.failed.store(true, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    /// The worker's own next task, else one of those it can take from the others.
    fn next_task(&self, worker_idx: usize) -> Option<usize> {
        let own = &self.parts[worker_idx];
        loop {
            if self.failed.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(task_idx) = own.take_first() {
                return Some(task_idx);
            }
            let fullest = self.parts.iter().max_by_key(|part| part.len())?;
            match fullest.take_half() {
                Some((first, end)) => own.set(first, end),
                None if fullest.len() == 0 => return None,
                None => {}
            }
        }
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Pool {
    /// Starts the workers. The pool lives as long as the process; fewer threads than asked for is not an error.
    fn start(threads: usize) -> &'static Self {
        let threads = threads.clamp(1, JOINED_MASK as usize);
        let workers =
            (1..threads).map(|_| Worker { thread: OnceLock::new(), parked: AtomicBool::new(false) }).collect();
        let mut cpus = affinity::allowed_cpus();
        // Fewer threads than CPUs share the machine with others, who may have chosen the same.
        if cpus.len() != threads {
            cpus.clear();
        }
        let pool: &'static Self = Box::leak(Box::new(Self {
            workers,
            parts: (0..threads).map(|_| Part(AtomicU64::new(0))).collect(),
            cpus,
            claim: Mutex::new(()),
            state: AtomicU64::new(CLOSED),
            job: AtomicPtr::new(ptr::null_mut()),
        }));
        for (worker_idx, worker) in pool.workers.iter().enumerate() {
            let worker_idx = worker_idx + 1;
            let serve = move || pool.serve(worker, worker_idx);
            let Ok(handle) = thread::Builder::new().name(format!("compute-{worker_idx}")).spawn(serve) else { break };
            worker.thread.get_or_init(|| handle.thread().clone());
        }
        pool
    }

    fn num_threads(&self) -> usize {
        1 + self.workers.iter().filter(|worker| worker.thread.get().is_some()).count()
    }

    /// Publishes the job, works on it, and returns when no worker is inside. The caller holds `claim`.
    fn run(&self, job: &Job<'_>, num_tasks: usize) {
        let num_parts = self.parts.len().min(num_tasks);
        for (part_idx, part) in self.parts.iter().enumerate() {
            let bound = |idx: usize| idx.min(num_parts) * num_tasks / num_parts;
            part.set(bound(part_idx), bound(part_idx + 1));
        }
        self.job.store(ptr::from_ref(job).cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        let job_number = self.state.load(Ordering::Relaxed) & !(JOINED_MASK | CLOSED);
        self.state.store(job_number.wrapping_add(NEXT_JOB), Ordering::SeqCst);
        for worker in self.workers.iter().take(num_tasks - 1) {
            if worker.parked.swap(false, Ordering::SeqCst)
                && let Some(thread) = worker.thread.get()
            {
                thread.unpark();
            }
        }
        job.work(0);
        let mut state = self.state.fetch_or(CLOSED, Ordering::Acquire);
        let mut wait = Wait::new();
        while state & JOINED_MASK != 0 {
            if wait.is_over() {
                thread::yield_now();
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    /// Joins each open job once, for ever.
    fn serve(&self, worker: &Worker, worker_idx: usize) {
        if let Some(&cpu) = self.cpus.get(worker_idx) {
            affinity::pin_thread(cpu);
        }
        let mut last_job = 0;
        let mut wait = Wait::new();
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & CLOSED == 0 && state / NEXT_JOB != last_job {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    last_job = state / NEXT_JOB;
                    let job = self.job.load(Ordering::Relaxed);
                    // SAFETY: this worker is counted in `state`, and `run` keeps the job alive until the count is 0.
                    let job = unsafe { &*job };
                    job.work(worker_idx);
                    self.state.fetch_sub(1, Ordering::Release);
                    wait = Wait::new();
                }
            } else if wait.is_over() {
                worker.parked.store(true, Ordering::SeqCst);
                // A job published before the flag was set would not unpark this thread: look again.
                if self.state.load(Ordering::SeqCst) == state {
                    thread::park();
                }
                worker.parked.store(false, Ordering::SeqCst);
                wait = Wait::new();
            }
        }
    }
}

/// A bounded spin.
struct Wait {
    spins: usize,
    since: Option<Instant>,
}

impl Wait {
    fn new() -> Self {
        Self { spins: 0, since: None }
    }

    /// Spins once; true when the time is over.
    fn is_over(&mut self) -> bool {
        spin_loop();
        self.spins += 1;
        if !self.spins.is_multiple_of(SPINS_PER_CLOCK) {
            return false;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() >= SPIN_LIMIT
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        init(Some(4));
        for num_tasks in [0, 1, 2, 3, 17, 1000] {
            let counts: Vec<_> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
            parallel_for(num_tasks, |task_idx| {
                counts[task_idx].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{num_tasks} tasks");
        }
    }

    /// The first task waits for the last one of its worker's part, which only another worker can then begin. On a pool of
    /// its own: the common one may be in use, and the tasks would run one after the other.
    #[test]
    fn tasks_of_a_busy_worker_are_taken_by_others() {
        const PART: usize = 8;
        let pool = Pool::start(4);
        let num_tasks = PART * pool.num_threads();
        let (begun, is_last_done) = (AtomicUsize::new(0), AtomicBool::new(false));
        let task = |task_idx| {
            begun.fetch_add(1, Ordering::Relaxed);
            while task_idx == 0 && !is_last_done.load(Ordering::Acquire) {
                thread::yield_now();
            }
            is_last_done.fetch_or(task_idx == PART - 1, Ordering::Release);
        };
        let job = Job { task: &task, parts: &pool.parts, failed: AtomicBool::new(false), panic: Mutex::new(None) };
        pool.run(&job, num_tasks);
        assert!(job.take_panic().is_none());
        assert_eq!(begun.into_inner(), num_tasks);
    }

    #[test]
    fn parts_are_taken_from_both_ends() {
        let part = Part(AtomicU64::new(0));
        assert_eq!((part.take_first(), part.take_half(), part.len()), (None, None, 0));
        part.set(3, 10);
        assert_eq!(part.take_first(), Some(3));
        assert_eq!(part.take_half(), Some((7, 10)));
        assert_eq!(part.take_half(), Some((5, 7)));
        assert_eq!((part.take_first(), part.take_half(), part.len()), (Some(4), None, 0));
        part.set(8, 9);
        assert_eq!((part.take_half(), part.take_first()), (Some((8, 9)), None));
        part.set(MAX_TASKS - 1, MAX_TASKS);
        assert_eq!((part.take_first(), part.take_first()), (Some(MAX_TASKS - 1), None));
    }

    #[test]
    fn tasks_of_uneven_length_run_once() {
        init(Some(4));
        for round in 0..200 {
            let counts: Vec<_> = (0..97).map(|_| AtomicUsize::new(0)).collect();
            parallel_for(counts.len(), |task_idx| {
                for _ in 0..(task_idx * 7919 + round) % 13 * 40 {
                    spin_loop();
                }
                counts[task_idx].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
        }
    }

    #[test]
    fn first_init_wins() {
        let threads = init(Some(4));
        assert_eq!(init(Some(threads + 1)), threads);
        assert_eq!(num_threads(), threads);
    }

    #[test]
    fn nested_calls_run() {
        init(Some(4));
        let sum = AtomicUsize::new(0);
        parallel_for(8, |outer| {
            parallel_for(8, |inner| {
                sum.fetch_add(outer * 8 + inner, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), (0..64).sum::<usize>());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        init(Some(4));
        for bad in [0, 5, 63] {
            let outcome = catch_unwind(|| parallel_for(64, |task_idx| assert_ne!(task_idx, bad, "planted")));
            assert!(outcome.is_err());
        }
        let count = AtomicUsize::new(0);
        parallel_for(64, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 64);
    }

    #[test]
    fn callers_from_many_threads_do_not_mix() {
        init(Some(4));
        thread::scope(|scope| {
            for caller in 0..4usize {
                scope.spawn(move || {
                    for round in 0..200 {
                        let sum = AtomicUsize::new(0);
                        parallel_for(caller + round % 7, |task_idx| {
                            sum.fetch_add(task_idx + 1, Ordering::Relaxed);
                        });
                        let num_tasks = caller + round % 7;
                        assert_eq!(sum.into_inner(), num_tasks * (num_tasks + 1) / 2);
                    }
                });
            }
        });
    }
}

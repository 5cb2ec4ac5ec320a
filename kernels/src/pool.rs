//! The one compute pool: the caller is worker 0, the others spin for a moment and then park.

use std::any::Any;
use std::cell::Cell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

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

/// Threads in use; starts the pool if nobody did.
pub fn num_threads() -> usize {
    init(None)
}

/// Runs `task(0)` to `task(num_tasks - 1)`, each once, on the pool and the calling thread, and returns when all are
/// done. A call from inside a task, or while another thread uses the pool, runs on the calling thread alone.
/// A panic in a task is passed on to the caller after every running task has ended; tasks not yet begun are dropped.
pub fn parallel_for(num_tasks: usize, task: impl Fn(usize) + Sync) {
    if num_tasks <= 1 || num_threads() == 1 || IN_JOB.get() {
        return (0..num_tasks).for_each(task);
    }
    let pool = POOL.get().expect("num_threads started the pool");
    let claim = match pool.claim.try_lock() {
        Ok(claim) => claim,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return (0..num_tasks).for_each(task),
    };
    let job = Job::new(num_tasks, &task);
    pool.run(&job);
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

struct Job<'a> {
    num_tasks: usize,
    next_task: AtomicUsize,
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Job<'a> {
    fn new(num_tasks: usize, task: &'a (dyn Fn(usize) + Sync)) -> Self {
        Self { num_tasks, next_task: AtomicUsize::new(0), task, panic: Mutex::new(None) }
    }

    /// Takes tasks until none is left. Never unwinds.
    fn work(&self) {
        IN_JOB.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task_idx = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task_idx >= self.num_tasks {
                    break;
                }
                (self.task)(task_idx);
            }
        }));
        IN_JOB.set(false);
        if let Err(payload) = outcome {
            self.next_task.store(self.num_tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Pool {
    /// Starts the workers. The pool lives as long as the process; fewer threads than asked for is not an error.
    fn start(threads: usize) -> &'static Self {
        let workers = (1..threads.clamp(1, JOINED_MASK as usize))
            .map(|_| Worker { thread: OnceLock::new(), parked: AtomicBool::new(false) })
            .collect();
        let pool: &'static Self = Box::leak(Box::new(Self {
            workers,
            claim: Mutex::new(()),
            state: AtomicU64::new(CLOSED),
            job: AtomicPtr::new(ptr::null_mut()),
        }));
        for (worker_idx, worker) in pool.workers.iter().enumerate() {
            let name = format!("compute-{}", worker_idx + 1);
            let Ok(handle) = thread::Builder::new().name(name).spawn(move || pool.serve(worker)) else { break };
            worker.thread.get_or_init(|| handle.thread().clone());
        }
        pool
    }

    fn num_threads(&self) -> usize {
        1 + self.workers.iter().filter(|worker| worker.thread.get().is_some()).count()
    }

    /// Publishes the job, works on it, and returns when no worker is inside. The caller holds `claim`.
    fn run(&self, job: &Job<'_>) {
        self.job.store(ptr::from_ref(job).cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        let job_number = self.state.load(Ordering::Relaxed) & !(JOINED_MASK | CLOSED);
        self.state.store(job_number.wrapping_add(NEXT_JOB), Ordering::SeqCst);
        for worker in self.workers.iter().take(job.num_tasks - 1) {
            if worker.parked.swap(false, Ordering::SeqCst)
                && let Some(thread) = worker.thread.get()
            {
                thread.unpark();
            }
        }
        job.work();
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
    fn serve(&self, worker: &Worker) {
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
                    job.work();
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

//! A child process with captured output: killed when dropped, its output shown when a test fails.

use std::io::{BufRead as _, BufReader, ErrorKind, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::poll;

/// Time in which a program that is being written can be started.
const SPAWN_PATIENCE: Duration = Duration::from_secs(5);

/// A running child process.
pub struct Process {
    child: Mutex<Child>,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts `command` with stdout and stderr captured.
    ///
    /// # Panics
    /// The program cannot be started.
    pub fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A script that this process has just written may still be open in a child that another thread is about to start.
        let is_busy = |error: &std::io::Error| error.kind() == ErrorKind::ExecutableFileBusy;
        let start = Instant::now();
        let spawned = loop {
            match command.spawn() {
                Err(error) if is_busy(&error) && start.elapsed() < SPAWN_PATIENCE => std::thread::yield_now(),
                spawned => break spawned,
            }
        };
        let mut child = spawned.expect("the program can be started");
        let output = Arc::new(Mutex::new(String::new()));
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let readers = vec![capture(stdout, Arc::clone(&output)), capture(stderr, Arc::clone(&output))];
        Self { child: Mutex::new(child), output, readers }
    }

    pub fn id(&self) -> u32 {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// Both output streams so far, line by line.
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn has_ended(&self) -> bool {
        self.status().is_some()
    }

    /// Sends a signal by name, such as `TERM`.
    ///
    /// # Panics
    /// The signal cannot be sent.
    pub fn signal(&self, name: &str) {
        // The shell's own `kill`: sending a signal from here would need unsafe code.
        let line = format!("kill -{name} {}", self.id());
        let status = Command::new("sh").args(["-c", &line]).status().expect("there is a shell");
        assert!(status.success(), "`{line}` failed");
    }

    /// Sets the soft limit on the size of files that it writes: `0` is a full disk, `unlimited` makes room. See
    /// [`crate::server::on_full_disks`].
    ///
    /// # Panics
    /// There is no `prlimit`, or the process has ended.
    pub fn limit_files(&self, bytes: &str) {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &self.id().to_string(), &format!("--fsize={bytes}:")]);
        assert!(prlimit.status().expect("there is prlimit").success());
    }

    /// Kills it, stopped or not, and waits for its end. One that has ended is left as it is.
    pub fn kill(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Fails only where the process has ended already, which is what is wanted.
        drop(child.kill());
        drop(child.wait());
    }

    /// Waits for the end of the process and of its output.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let status = poll("the end of the process", within, || self.status());
        for reader in self.readers.drain(..) {
            reader.join().expect("the reader of the output does not panic");
        }
        status
    }

    /// Resident memory in bytes.
    ///
    /// # Panics
    /// The process has ended.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most address space in bytes that it had.
    ///
    /// # Panics
    /// The process has ended.
    pub fn peak_virtual_bytes(&self) -> u64 {
        self.memory("VmPeak:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a process has this line");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("it is a number of kB");
        kib * 1024
    }

    /// Open file descriptors: sockets, files, pipes.
    ///
    /// # Panics
    /// The process has ended.
    pub fn num_open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).expect("the process lives").count()
    }

    /// Threads alive.
    ///
    /// # Panics
    /// The process has ended.
    pub fn num_threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.id())).expect("the process lives").count()
    }

    fn status(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().expect("the child can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        for reader in self.readers.drain(..) {
            drop(reader.join());
        }
        if std::thread::panicking() {
            eprintln!("--- output of process {} ---\n{}--- end of output ---", self.id(), self.output());
        }
    }
}

fn capture(stream: impl Read + Send + 'static, output: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    })
}

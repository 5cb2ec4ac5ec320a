//! Which CPUs the process may run on, in the order in which workers should fill them, and tying a thread to one.

/// The CPUs that the calling thread may run on: one hardware thread of every core first, memory node by memory node, then
/// the cores' other threads. Empty where the system does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let Some(allowed) = linux::thread_cpus() else { return Vec::new() };
    let nodes: Vec<Vec<usize>> = (0..)
        .map_while(|node| std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok())
        .map(|list| parse_list(&list))
        .collect();
    let siblings = |cpu: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).map_or_else(|_| Vec::new(), |list| parse_list(&list))
    };
    fill_order(&allowed, &nodes, siblings)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

/// Ties the calling thread to a CPU of [`allowed_cpus`]. A system that refuses leaves it free, which costs speed only.
#[cfg(target_os = "linux")]
pub(crate) fn pin_thread(cpu: usize) {
    linux::set_thread_cpu(cpu);
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin_thread(_cpu: usize) {}

/// Sorted by place among the allowed threads of the core, then by node, then by number.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only Linux tells"))]
fn fill_order(allowed: &[usize], nodes: &[Vec<usize>], siblings: impl Fn(usize) -> Vec<usize>) -> Vec<usize> {
    let mut ranked: Vec<_> = allowed
        .iter()
        .map(|&cpu| {
            let place = siblings(cpu).iter().filter(|&&other| other < cpu && allowed.contains(&other)).count();
            let node = nodes.iter().position(|cpus| cpus.contains(&cpu)).unwrap_or(nodes.len());
            (place, node, cpu)
        })
        .collect();
    ranked.sort_unstable();
    ranked.into_iter().map(|(.., cpu)| cpu).collect()
}

/// Numbers of a list such as `0-3,8`. What is no number or no range is left out.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only Linux tells"))]
fn parse_list(list: &str) -> Vec<usize> {
    /// More than any system has; a broken file must not fill the memory.
    const MAX_CPU: usize = 1 << 16;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?.min(MAX_CPU))
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(target_os = "linux")]
mod linux {
    use std::mem::size_of;

    /// 0: the calling thread.
    const SELF: libc::pid_t = 0;

    fn empty_set() -> libc::cpu_set_t {
        // SAFETY: a `cpu_set_t` is an array of integers, for which zeros are valid: the empty set.
        unsafe { std::mem::zeroed() }
    }

    /// The calling thread's affinity; `None` if the system does not tell, as with more CPUs than the set holds.
    pub(super) fn thread_cpus() -> Option<Vec<usize>> {
        let mut set = empty_set();
        // SAFETY: the pointer is to a set of the size that is told, which the call fills.
        let status = unsafe { libc::sched_getaffinity(SELF, size_of::<libc::cpu_set_t>(), &raw mut set) };
        let is_in = |&cpu: &usize| {
            // SAFETY: the range below ends with the set.
            unsafe { libc::CPU_ISSET(cpu, &set) }
        };
        (status == 0).then(|| (0..libc::CPU_SETSIZE as usize).filter(is_in).collect())
    }

    pub(super) fn set_thread_cpu(cpu: usize) {
        let mut set = empty_set();
        // SAFETY: `cpu` was found in a set of this size by `thread_cpus`.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        // SAFETY: the pointer is to a set of the size that is told, which the call only reads.
        let _refused = unsafe { libc::sched_setaffinity(SELF, size_of::<libc::cpu_set_t>(), &raw const set) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_come_before_their_other_threads_and_nodes_in_order() {
        let nodes = [parse_list("0-1,4-5\n"), parse_list("2-3,6-7\n")];
        let siblings = |cpu: usize| vec![cpu % 4, cpu % 4 + 4];
        let all: Vec<usize> = (0..8).collect();
        assert_eq!(fill_order(&all, &nodes, siblings), [0, 1, 2, 3, 4, 5, 6, 7]);
        let swapped = [nodes[1].clone(), nodes[0].clone()];
        assert_eq!(fill_order(&all, &swapped, siblings), [2, 3, 0, 1, 6, 7, 4, 5]);
        // A core whose first thread is not allowed is represented by the other.
        assert_eq!(fill_order(&[0, 4, 5, 6], &nodes, siblings), [0, 5, 6, 4]);
        assert_eq!(fill_order(&[3, 1], &[], |_| Vec::new()), [1, 3]);
    }

    #[test]
    fn lists_are_read_and_nonsense_is_not() {
        assert_eq!(parse_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert!(parse_list("").is_empty());
        assert_eq!(parse_list("x,3-,5-4,7"), [7]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pinned_thread_runs_where_it_was_pinned() {
        let cpus = allowed_cpus();
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        assert!(cpus.len() >= available, "{cpus:?}");
        let last = cpus[cpus.len() - 1];
        let seen = std::thread::spawn(move || {
            pin_thread(last);
            allowed_cpus()
        });
        assert_eq!(seen.join().expect("the thread lives"), [last]);
    }
}

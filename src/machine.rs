//! What this machine has: memory, and how much of it a program may take; processors, and which of them are worth a thread.
//!
//! Read from where Linux tells of it (`/proc`, `/sys`); elsewhere only the processors are known.

use rustix::thread::CpuSet;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;

/// The machine, as this process sees it. Bytes; `None` where the system does not tell.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// All memory.
    pub memory: Option<u64>,
    /// What can be had without swapping, the page cache counted, the control group's limit respected.
    pub available: Option<u64>,
    /// The control group's limit, where there is one below all memory.
    pub limit: Option<u64>,
    /// Free swap.
    pub swap: u64,
    /// Processors that this process may use.
    pub processors: usize,
    /// Cores that these are on.
    pub cores: Option<usize>,
    /// Processors as fast as the fastest, where they differ.
    pub fast_processors: Option<usize>,
    /// Memory nodes.
    pub nodes: usize,
    /// What the system does about huge pages: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
}

/// What the system calls the processor; where it does not tell, its instruction set.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().into())
}

impl Machine {
    /// The machine that this runs on.
    pub fn here() -> Machine {
        // Where the system does not say which processors may be used, all may.
        let allowed = rustix::thread::sched_getaffinity(None).ok();
        Machine::under(Path::new("/"), |i| allowed.is_none_or(|a| i >= CpuSet::MAX_CPU || a.is_set(i)))
    }

    /// As the files below `root` tell it, of the processors that are allowed.
    fn under(root: &Path, allowed: impl Fn(usize) -> bool) -> Machine {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
        let info = read("proc/meminfo").unwrap_or_default();
        let kib = |key: &str| {
            let line = info.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
        };
        let memory = kib("MemTotal");
        // One that all memory is less than is none.
        let groups: Vec<Group> = Group::all(&read).into_iter().filter(|g| memory.is_none_or(|m| g.limit < m)).collect();
        let limit = groups.iter().map(|g| g.limit).min();
        let free = groups.iter().map(|g| g.limit.saturating_sub(g.used)).min();
        let available = match (kib("MemAvailable"), free) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cpu = |i: usize, name: &str| format!("sys/devices/system/cpu/cpu{i}/{name}");
        // One that is switched off has no topology.
        let cpus: Vec<usize> = (0..4096).filter(|&i| allowed(i) && root.join(cpu(i, "topology")).exists()).collect();
        let cores: BTreeSet<(u64, u64)> = cpus
            .iter()
            .filter_map(|&i| {
                Some((number(&cpu(i, "topology/physical_package_id"))?, number(&cpu(i, "topology/core_id"))?))
            })
            .collect();
        let speeds: Vec<u64> = cpus.iter().filter_map(|&i| number(&cpu(i, "cpufreq/cpuinfo_max_freq"))).collect();
        let fastest = speeds.iter().max().copied().unwrap_or(0);
        // Cores of one kind differ by a few percent in what they are allowed; efficiency cores by a third.
        let fast = speeds.iter().filter(|&&s| s * 10 >= fastest * 8).count();
        let pages = read("sys/kernel/mm/transparent_hugepage/enabled");
        Machine {
            memory,
            available,
            limit,
            swap: kib("SwapFree").unwrap_or(0),
            processors,
            cores: (!cores.is_empty()).then(|| cores.len().min(processors)),
            fast_processors: (fast < speeds.len()).then(|| fast.min(processors)),
            nodes: Node::under(root).len().max(1),
            huge_pages: pages.and_then(|p| Some(p.split_once('[')?.1.split_once(']')?.0.to_string())),
        }
    }

    /// What would cost speed, and what to do about it.
    pub fn advice(&self, threads: usize) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(cores) = self.cores.filter(|&c| c < threads) {
            lines.push(format!(
                "{threads} threads on {cores} cores: decoding is bound by memory, -t {cores} is as fast or faster"
            ));
        }
        if let Some(fast) = self.fast_processors.filter(|&f| f < threads) {
            lines.push(format!("{fast} of the processors are faster than the rest: try -t {fast} for decoding"));
        }
        if self.huge_pages.as_deref() == Some("never") {
            lines.push(
                "huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled helps prefill".into(),
            );
        }
        if self.nodes > 1 {
            lines.push(format!(
                "{} memory nodes: a file's pages lie on the node that read them first; --numa distribute on a cold page \
                 cache spreads them",
                self.nodes
            ));
        }
        lines
    }
}

/// A memory node: memory, and the processors that are near to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: usize,
    /// Its processors; none where it is memory only.
    pub processors: Vec<usize>,
}

impl Node {
    /// Those of this machine; none where the system does not tell.
    pub fn all() -> Vec<Node> {
        Node::under(Path::new("/"))
    }

    /// As the files below `root` tell it.
    fn under(root: &Path) -> Vec<Node> {
        let node = |number: usize| {
            let folder = root.join(format!("sys/devices/system/node/node{number}"));
            let list = std::fs::read_to_string(folder.join("cpulist")).unwrap_or_default();
            folder.exists().then(|| Node { number, processors: cpu_list(&list) })
        };
        (0..1024).filter_map(node).collect()
    }
}

/// The numbers of a list as Linux writes it: `0-3,8,10-11`. What is no number is left out.
fn cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (lo, hi) = part.split_once('-').unwrap_or((part, part));
        let number = |s: &str| s.trim().parse::<usize>().ok().filter(|&n| n < 1 << 16);
        Some(number(lo)?..=number(hi)?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// A memory control group.
struct Group {
    limit: u64,
    used: u64, // without the page cache, which gives way
}

impl Group {
    /// The group of this process and those that it is in (version 2 or 1), as far as they have a limit.
    fn all(read: &impl Fn(&str) -> Option<String>) -> Vec<Group> {
        let number = |path: String| read(&path)?.trim().parse::<u64>().ok();
        let field = |path: String, key: &str| {
            let stat = read(&path)?;
            stat.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
        };
        let group = |folder: &str, path: &Path, [limit, used, cache, shared]: [&str; 4]| {
            let at = Path::new(folder).join(path).display().to_string();
            let limit = number(format!("{at}/{limit}"))?;
            // What lies in memory alone is counted as cache, too.
            let [cache, shared] = [cache, shared].map(|key| field(format!("{at}/memory.stat"), key).unwrap_or(0));
            let gives_way = cache.saturating_sub(shared);
            Some(Group { limit, used: number(format!("{at}/{used}"))?.saturating_sub(gives_way) })
        };
        let mut found = Vec::new();
        for line in read("proc/self/cgroup").unwrap_or_default().lines() {
            let Some((kind, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':')) else { continue };
            let (folder, names) = match kind {
                "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "file", "shmem"]),
                k if k.split(',').any(|k| k == "memory") => {
                    let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"];
                    ("sys/fs/cgroup/memory", names)
                }
                _ => continue,
            };
            // The last of them is the root, which a container sees its own group as.
            let groups = Path::new(path.trim_matches('/')).ancestors();
            found.extend(groups.filter_map(|path| group(folder, path, names)));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with files in it.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\nSwapFree: 50 kB\n");

    /// A name, files, and the limit and what is available by them.
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Option<u64>, Option<u64>);

    #[test]
    fn limits_of_control_groups_count() {
        let cases: &[Case<'_>] = &[
            ("no group", &[], None, Some(800 << 10)),
            (
                "version 2",
                &[
                    ("proc/self/cgroup", "0::/a/b\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "512000\n"),
                    ("sys/fs/cgroup/a/b/memory.current", "300000\n"),
                    ("sys/fs/cgroup/a/b/memory.stat", "anon 1\nfile 250000\nshmem 50000\n"),
                ],
                Some(512_000),
                Some(412_000),
            ),
            (
                "version 2 without a limit",
                &[
                    ("proc/self/cgroup", "0::/a\n"),
                    ("sys/fs/cgroup/a/memory.max", "max\n"),
                    ("sys/fs/cgroup/a/memory.current", "300000\n"),
                ],
                None,
                Some(800 << 10),
            ),
            (
                "version 1, a container",
                &[
                    ("proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/x\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "400000\n"),
                    ("sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n"),
                ],
                Some(400_000),
                Some(300_000),
            ),
            (
                "a limit above all memory",
                &[
                    ("proc/self/cgroup", "4:memory:/\n"),
                    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
                    ("sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n"),
                ],
                None,
                Some(800 << 10),
            ),
            (
                "the limit of a group above",
                &[
                    ("proc/self/cgroup", "0::/a/b/c\n"),
                    ("sys/fs/cgroup/a/memory.max", "512000\n"),
                    ("sys/fs/cgroup/a/memory.current", "400000\n"),
                    ("sys/fs/cgroup/a/b/memory.max", "max\n"),
                    ("sys/fs/cgroup/a/b/c/memory.max", "600000\n"),
                    ("sys/fs/cgroup/a/b/c/memory.current", "1000\n"),
                ],
                Some(512_000),
                Some(112_000),
            ),
            ("rubbish", &[("proc/self/cgroup", "::::\n\n7\n")], None, Some(800 << 10)),
        ];
        for (name, files, limit, available) in cases {
            let files: Vec<_> = files.iter().copied().chain([MEMINFO]).collect();
            let m = Machine::under(root(&files).path(), |_| true);
            assert_eq!(
                (m.limit, m.available, m.memory, m.swap),
                (*limit, *available, Some(1000 << 10), 50 << 10),
                "{name}"
            );
        }
        let nothing = Machine::under(root(&[]).path(), |_| true);
        assert_eq!((nothing.memory, nothing.available, nothing.nodes), (None, None, 1));
    }

    #[test]
    fn nodes_have_their_processors() {
        let files = [
            ("sys/devices/system/node/node0/cpulist", "0-2,8\n"),
            ("sys/devices/system/node/node1/cpulist", "3-5,9-10\n"),
            ("sys/devices/system/node/node4/cpulist", "\n"),
            ("sys/devices/system/node/node5/meminfo", "x"),
            ("sys/devices/system/node/has_memory", "0-1,4\n"),
        ];
        let root = root(&files);
        let node = |number, processors: &[usize]| Node { number, processors: processors.to_vec() };
        let want = [node(0, &[0, 1, 2, 8]), node(1, &[3, 4, 5, 9, 10]), node(4, &[]), node(5, &[])];
        assert_eq!(Node::under(root.path()), want);
        assert_eq!(Machine::under(root.path(), |_| true).nodes, 4);
        for (text, want) in [("7", vec![7]), ("x,2-1,3,-,99999999999", vec![3]), ("", vec![])] {
            assert_eq!(cpu_list(text), want, "{text:?}");
        }
    }

    #[test]
    fn cores_are_those_that_may_be_used() {
        // Eight processors, two a core; the third is switched off, the last core's are slower.
        let mut files = Vec::new();
        for i in (0..8).filter(|&i| i != 2) {
            let at = |name: &str| format!("sys/devices/system/cpu/cpu{i}/{name}");
            files.push((at("topology/physical_package_id"), "0".to_string()));
            files.push((at("topology/core_id"), (i / 2).to_string()));
            files.push((at("cpufreq/cpuinfo_max_freq"), (if i < 6 { 5000 } else { 3000 }).to_string()));
        }
        let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let root = root(&files);
        let processors = std::thread::available_parallelism().unwrap().get();
        let cores = |allowed: &dyn Fn(usize) -> bool| Machine::under(root.path(), allowed).cores;
        assert_eq!(cores(&|_| true), Some(4.min(processors)));
        assert_eq!(cores(&|i| i < 2), Some(1), "two processors of one core");
        assert_eq!(Machine::under(root.path(), |i| i < 6).fast_processors, None, "all as fast");
    }

    #[test]
    fn advice_follows_the_processors() {
        let m = Machine { cores: Some(8), fast_processors: Some(6), nodes: 2, ..Machine::default() };
        assert_eq!(m.advice(16).len(), 3);
        assert_eq!(Machine { nodes: 1, ..Machine::default() }.advice(16), Vec::<String>::new());
        let off = Machine { huge_pages: Some("never".into()), nodes: 1, ..Machine::default() };
        assert!(off.advice(1)[0].contains("huge pages"));
    }
}

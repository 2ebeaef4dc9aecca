//! On which processors the workers run, and on which memory nodes the weights lie.
//!
//! By itself nothing is pinned: the system moves threads as it likes, which is best on a machine with one memory node and
//! other work to do. The flags are llama.cpp's, and so is what they mean.
//!
//! Spreading workers over nodes (`--numa`) has been tried on an emulated machine with two: workers alternate, `--no-mmap` puts
//! half of the weights on each, `isolate` keeps workers and pages on one. How fast it is has not been measured.

use crate::machine::Node;
#[cfg(target_os = "linux")]
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use std::io;

/// Processors that Linux's masks have room for.
const MOST: usize = 1024;

/// What to do about several memory nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numa {
    /// Workers are spread evenly over the nodes, and so are the pages of the weights.
    Distribute,
    /// All workers stay on the node where the program started.
    Isolate,
    /// Workers and pages stay where `numactl` put them.
    Numactl,
}

/// Where workers run.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Processors to choose from; `None`: those that this process may use, which are not pinned to unless `strict` or `numa`
    /// says so.
    pub processors: Option<Vec<usize>>,
    /// Each worker gets one processor of its own, as long as there are enough, instead of all of them.
    pub strict: bool,
    /// What to do about several memory nodes.
    pub numa: Option<Numa>,
}

/// Where this process may run, and does.
#[derive(Debug)]
pub struct Here {
    allowed: Vec<usize>,
    current: usize,
    nodes: Vec<Node>,
}

impl Here {
    /// As the system tells it.
    pub fn find() -> io::Result<Here> {
        #[cfg(target_os = "linux")]
        {
            let set = sched_getaffinity(None)?;
            let allowed = (0..MOST).filter(|&i| set.is_set(i)).collect();
            Ok(Here { allowed, current: sched_getcpu(), nodes: Node::all() })
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The nodes with processors that may be used, and no other processors; one node where the system tells of none.
    fn nodes(&self) -> Vec<Node> {
        let usable = |n: &Node| {
            let processors: Vec<usize> = n.processors.iter().copied().filter(|p| self.allowed.contains(p)).collect();
            Node { number: n.number, processors }
        };
        let nodes: Vec<Node> = self.nodes.iter().map(usable).filter(|n| !n.processors.is_empty()).collect();
        match nodes.is_empty() {
            true => vec![Node { number: 0, processors: self.allowed.clone() }],
            false => nodes,
        }
    }

    /// The processors of the node on which this thread runs.
    fn home(&self) -> Vec<usize> {
        let node = self.nodes().into_iter().find(|n| n.processors.contains(&self.current));
        node.map_or_else(|| self.allowed.clone(), |n| n.processors)
    }
}

impl Placement {
    /// Whether it says anything.
    pub fn is_some(&self) -> bool {
        self.processors.is_some() || self.strict || self.numa.is_some()
    }

    /// The processors of each node, or of all, that workers may be on.
    fn groups(&self, here: &Here) -> io::Result<Vec<Vec<usize>>> {
        Ok(match (self.numa, &self.processors) {
            (Some(Numa::Distribute), _) => here.nodes().into_iter().map(|n| n.processors).collect(),
            (Some(Numa::Isolate), _) => vec![here.home()],
            (_, Some(chosen)) => {
                if let Some(p) = chosen.iter().find(|p| !here.allowed.contains(p)) {
                    let problem = format!("processor {p}, of those that may be used: {}", ranges(&here.allowed));
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
                }
                vec![chosen.clone()]
            }
            _ => vec![here.allowed.clone()],
        })
    }

    /// How many processors workers may be on.
    pub fn n_processors(&self, here: &Here) -> io::Result<usize> {
        Ok(self.groups(here)?.iter().map(Vec::len).sum::<usize>().max(1))
    }

    /// The processors of each of so many workers; `None` where they are not pinned.
    pub fn of_workers(&self, workers: usize, here: &Here) -> io::Result<Option<Vec<Vec<usize>>>> {
        let groups = self.groups(here)?;
        let free = self.processors.is_none() && matches!(self.numa, None | Some(Numa::Numactl));
        if free && !self.strict {
            return Ok(None);
        }
        // As ggml counts: neighbours are on different nodes.
        let of = |worker: usize| {
            let group = &groups[worker % groups.len()];
            match self.strict {
                true => vec![group[worker / groups.len() % group.len()]],
                false => group.clone(),
            }
        };
        Ok(Some((0..workers).map(of).collect()))
    }

    /// The processors that the thread which starts the workers keeps to, if it is pinned: whatever it reads comes to their
    /// node.
    pub fn of_caller(&self, here: &Here) -> Option<Vec<usize>> {
        (self.numa == Some(Numa::Isolate)).then(|| here.home())
    }

    /// The nodes that pages shall be spread over, if they shall be.
    pub fn spread_over(&self, here: &Here) -> Option<Vec<usize>> {
        (self.numa == Some(Numa::Distribute)).then(|| here.nodes().iter().map(|n| n.number).collect())
    }
}

/// Pins the calling thread.
pub fn pin(processors: &[usize]) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let mut set = CpuSet::new();
        processors.iter().filter(|&&p| p < MOST).for_each(|&p| set.set(p));
        Ok(sched_setaffinity(None, &set)?)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = processors;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Processors as people write them: `0-3,8`.
fn ranges(processors: &[usize]) -> String {
    let runs = processors.chunk_by(|a, b| a + 1 == *b);
    let text = |r: &[usize]| match r {
        [one] => one.to_string(),
        _ => format!("{}-{}", r[0], r[r.len() - 1]),
    };
    runs.map(text).collect::<Vec<_>>().join(",")
}

/// The processors of a mask of hexadecimal digits, the last one for the processors 0 to 3, with or without `0x`.
pub fn parse_mask(text: &str) -> Result<Vec<usize>, String> {
    let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
    let bad = || format!("expected hexadecimal digits with at most {} bits, one of them set", MOST);
    let mut processors = Vec::new();
    for (i, c) in digits.chars().rev().enumerate() {
        let digit = c.to_digit(16).ok_or_else(bad)?;
        processors.extend((0..4).filter(|bit| digit >> bit & 1 == 1).map(|bit| 4 * i + bit));
    }
    match processors.last() {
        Some(&last) if last < MOST => Ok(processors),
        _ => Err(bad()),
    }
}

/// The processors of `LO-HI`.
pub fn parse_range(text: &str) -> Result<Vec<usize>, String> {
    let bad = || format!("expected LO-HI, numbers of processors below {}", MOST);
    let (lo, hi) = text.split_once('-').ok_or_else(bad)?;
    let number = |s: &str| s.parse::<usize>().ok().filter(|&n| n < MOST).ok_or_else(bad);
    match (number(lo)?, number(hi)?) {
        (lo, hi) if lo <= hi => Ok((lo..=hi).collect()),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two nodes of four processors; 3 may not be used. Node 2 has memory only.
    fn here() -> Here {
        let node = |number, processors: &[usize]| Node { number, processors: processors.to_vec() };
        Here {
            allowed: vec![0, 1, 2, 4, 5, 6, 7],
            current: 5,
            nodes: vec![node(0, &[0, 1, 2, 3]), node(1, &[4, 5, 6, 7]), node(2, &[])],
        }
    }

    #[test]
    fn workers_get_their_processors() {
        let (low, high) = (vec![0, 1, 2], vec![4, 5, 6, 7]);
        let some = |p: &[usize]| Some(p.to_vec());
        let cases = [
            (None, false, None, None),
            (None, false, Some(Numa::Numactl), None),
            (None, true, None, Some(vec![vec![0], vec![1], vec![2], vec![4]])),
            (some(&[5, 6]), false, None, Some(vec![vec![5, 6]; 4])),
            (some(&[5, 6]), true, None, Some(vec![vec![5], vec![6], vec![5], vec![6]])),
            (None, false, Some(Numa::Distribute), Some(vec![low.clone(), high.clone(), low, high.clone()])),
            (None, true, Some(Numa::Distribute), Some(vec![vec![0], vec![4], vec![1], vec![5]])),
            (None, false, Some(Numa::Isolate), Some(vec![high; 4])),
            (None, true, Some(Numa::Isolate), Some(vec![vec![4], vec![5], vec![6], vec![7]])),
        ];
        for (processors, strict, numa, want) in cases {
            let p = Placement { processors, strict, numa };
            assert_eq!(p.of_workers(4, &here()).unwrap(), want, "{p:?}");
        }
    }

    #[test]
    fn processors_and_nodes_are_counted() {
        let isolate = Placement { numa: Some(Numa::Isolate), ..Placement::default() };
        let distribute = Placement { numa: Some(Numa::Distribute), ..Placement::default() };
        let count = |p: &Placement| p.n_processors(&here()).unwrap();
        assert_eq!((count(&isolate), count(&distribute), count(&Placement::default())), (4, 7, 7));
        assert_eq!(distribute.spread_over(&here()), Some(vec![0, 1]));
        assert_eq!(isolate.spread_over(&here()), None);
        assert_eq!(isolate.of_caller(&here()), Some(vec![4, 5, 6, 7]));
        assert_eq!(distribute.of_caller(&here()), None);
        // Where the system tells of no nodes, all is one.
        let flat = Here { nodes: Vec::new(), ..here() };
        assert_eq!(distribute.of_workers(1, &flat).unwrap(), Some(vec![flat.allowed.clone()]));
        assert_eq!(isolate.n_processors(&flat).unwrap(), 7);
        let absent = Placement { processors: Some(vec![2, 3]), ..Placement::default() };
        let e = absent.of_workers(1, &here()).unwrap_err().to_string();
        assert_eq!(e, "processor 3, of those that may be used: 0-2,4-7");
    }

    #[test]
    fn masks_and_ranges() {
        let masks =
            [("1", vec![0]), ("0xF0", vec![4, 5, 6, 7]), ("80000000000000001", vec![0, 67]), ("0a", vec![1, 3])];
        for (text, want) in masks {
            assert_eq!(parse_mask(text), Ok(want), "{text}");
        }
        for text in ["", "0", "0x", "xyz", "-1", "1 ", &"f".repeat(300)] {
            assert!(parse_mask(text).is_err(), "{text}");
        }
        assert_eq!(parse_range("2-4"), Ok(vec![2, 3, 4]));
        assert_eq!(parse_range("7-7"), Ok(vec![7]));
        for text in ["", "3", "4-2", "0-9999", "a-b", "-1", "1-", "1-2-3"] {
            assert!(parse_range(text).is_err(), "{text}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pinned_thread_stays() {
        let here = Here::find().unwrap();
        let last = here.allowed[here.allowed.len() - 1];
        std::thread::spawn(move || {
            pin(&[last]).unwrap();
            let now = Here::find().unwrap();
            assert_eq!((now.allowed, now.current), (vec![last], last));
        })
        .join()
        .unwrap();
    }
}

//! Weights that are read in beforehand, locked or copied, and workers that are pinned, with the real SmolLM2: the same bits
//! as from a mapped file.

use oxcart::engine::{Engine, EngineError, EngineOptions, SessionOptions};
use oxcart::load::Residence;
use oxcart::model::Batch;
use oxcart::placement::{Numa, Placement};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

fn model() -> PathBuf {
    oxcart::catalog::default_model().expect("the default model can be fetched")
}

fn open(path: &Path, o: EngineOptions) -> Result<Arc<Engine>, EngineError> {
    Engine::open(path, &EngineOptions { threads: 2, ..o }).map(Arc::new)
}

/// The logits after a few tokens.
fn logits(e: &Arc<Engine>) -> Vec<f32> {
    let mut s = e.session(&SessionOptions { context: 64, ..SessionOptions::default() }).unwrap();
    assert!(e.stream().is_none());
    s.forward(&Batch::of(&[300, 4000, 17, 9000, 21], 0, 0)).unwrap()
}

const COPY: Residence = Residence { copy: true, lock: false, prefault: false };
const LOCK: Residence = Residence { copy: false, lock: true, prefault: false };
const PREFAULT: Residence = Residence { copy: false, lock: false, prefault: true };

#[test]
fn weights_give_the_same_bits_however_they_come() {
    let want = logits(&open(&model(), EngineOptions::default()).unwrap());
    let whole = fs::read(model()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // A cut goes through a tensor.
    let parts = [dir.path().join("m.gguf.a"), dir.path().join("m.gguf.b")];
    fs::write(&parts[0], &whole[..50_000_001]).unwrap();
    fs::write(&parts[1], &whole[50_000_001..]).unwrap();
    for path in [&model(), &parts[0]] {
        for residence in [COPY, LOCK, PREFAULT, Residence { copy: true, lock: true, prefault: true }] {
            let e = open(path, EngineOptions { residence, ..EngineOptions::default() }).unwrap();
            assert_eq!(e.model.weights.matrices().iter().any(|m| m.is_mapped()), !residence.copy);
            if e.wants_prefault() {
                e.prefault(false, &|_, _| ControlFlow::Continue(())).unwrap();
            }
            assert!(logits(&e) == want, "{residence:?}");
        }
    }
}

#[test]
fn copies_do_not_need_the_file_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("m.gguf");
    fs::copy(model(), &copy).unwrap();
    let e = open(&copy, EngineOptions { residence: COPY, ..EngineOptions::default() }).unwrap();
    let want = logits(&e);
    fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(1000).unwrap();
    assert!(logits(&e) == want);
}

#[test]
fn reading_is_watched_and_stopped() {
    let told = AtomicU64::new(0);
    let o = EngineOptions { threads: 2, residence: COPY, ..EngineOptions::default() };
    let most = AtomicU64::new(0);
    let e = Engine::open_watched(&model(), &o, &|done, of| {
        assert!(done <= of);
        most.fetch_max(done, Ordering::SeqCst);
        ControlFlow::Continue(())
    });
    let n = e.unwrap().model.weights.matrices().iter().map(|m| m.len() as u64).sum::<u64>();
    assert_eq!(most.into_inner(), n);
    let stopped = Engine::open_watched(&model(), &o, &|_, _| {
        told.fetch_add(1, Ordering::SeqCst);
        ControlFlow::Break(())
    });
    assert!(matches!(stopped.err(), Some(EngineError::Stopped)));
    assert!(told.into_inner() <= 2, "one for each worker");
    let e = open(&model(), EngineOptions::default()).unwrap();
    let stopped = e.prefault(true, &|_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(EngineError::Stopped)), "{stopped:?}");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    for (residence, flag) in [(COPY, "--no-mmap"), (LOCK, "--mlock"), (PREFAULT, "--prefault")] {
        let o = EngineOptions { residence, resident: Some(50 << 20), ..EngineOptions::default() };
        let e = open(&model(), o).err().expect("more than 50 MiB").to_string();
        assert!(e.starts_with(&format!("{flag}: ")) && e.contains("52428800 bytes of memory for them"), "{e}");
    }
}

/// The processors of each worker, as the system has them.
#[cfg(target_os = "linux")]
#[test]
fn workers_are_where_they_shall_be() {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let allowed = || {
        let set = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|&i| set.is_set(i)).collect::<Vec<_>>()
    };
    let all = allowed();
    let want = logits(&open(&model(), EngineOptions::default()).unwrap());
    let one = |i: usize| vec![all[i % all.len()]];
    let some = |numa| Placement { numa: Some(numa), ..Placement::default() };
    let cases = [
        (Placement::default(), vec![all.clone(), all.clone()]),
        (Placement { processors: Some(one(1)), ..Placement::default() }, vec![one(1), one(1)]),
        (Placement { strict: true, ..Placement::default() }, vec![one(0), one(1)]),
        (some(Numa::Numactl), vec![all.clone(), all.clone()]),
    ];
    for (placement, places) in cases {
        let e = open(&model(), EngineOptions { placement: placement.clone(), ..EngineOptions::default() }).unwrap();
        let found = Mutex::new(vec![Vec::new(); 2]);
        e.team().run(|w| found.lock().unwrap()[w.index()] = allowed());
        assert_eq!(found.into_inner().unwrap(), places, "{placement:?}");
        assert!(logits(&e) == want, "{placement:?}");
    }
    assert_eq!(allowed(), all, "the caller is pinned nowhere");
    let none = EngineOptions {
        threads: 0,
        placement: Placement { strict: true, ..Placement::default() },
        ..EngineOptions::default()
    };
    assert_eq!(Engine::open(&model(), &none).unwrap().threads(), 1, "no workers are one");
    let absent = Placement { processors: Some(vec![1023]), ..Placement::default() };
    let e = open(&model(), EngineOptions { placement: absent, ..EngineOptions::default() }).err().unwrap().to_string();
    assert!(e.starts_with("--cpu-mask, --cpu-range: processor 1023, of those that may be used: "), "{e}");
}

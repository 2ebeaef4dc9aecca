//! Weights beyond memory, with the real SmolLM2 and a small mixture of experts: the same results from the disk as from memory.

#[path = "common/checkpoint.rs"]
#[allow(dead_code)] // what only conversions need
mod checkpoint;

use assert_cmd::Command;
use oxcart::engine::{Engine, EngineError, EngineOptions, Session, SessionOptions};
use oxcart::gguf::Gguf;
use oxcart::machine::Machine;
use oxcart::model::Batch;
use oxcart::plan::{Active, Fit, Geometry, Needs};
use std::fs;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

fn model() -> PathBuf {
    oxcart::catalog::default_model().expect("the default model can be fetched")
}

fn session(path: &Path, resident: Option<u64>) -> Session {
    let o = EngineOptions { threads: 2, resident, ..EngineOptions::default() };
    let e = Arc::new(Engine::open(path, &o).unwrap());
    e.session(&SessionOptions { context: 640, ubatch: 64, ..SessionOptions::default() }).unwrap()
}

/// A Mixtral of 19 MB, of which 16 are experts: 5 layers of 4, 2 for a token.
fn mixture(dir: &Path) -> PathBuf {
    let (from, to) = (dir.join("m"), dir.join("m.gguf"));
    checkpoint::model("MixtralForCausalLM", "F32", 5).write(&from, 1);
    Command::cargo_bin("oxcart").unwrap().arg("quantize").args([&from, &to]).arg("F32").assert().success();
    to
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 300 + i * 7919 % 40_000).collect()
}

/// The logits of some tokens of a prompt, and of those that follow it one by one.
fn logits(s: &mut Session) -> Vec<Vec<f32>> {
    let tokens = tokens(604);
    let mut batch = Batch::default();
    (0..600).for_each(|i| batch.push(tokens[i as usize], i, 0, i % 97 == 0 || i == 599));
    let mut rows = s.forward_all(&batch).unwrap();
    rows.extend((600..604).map(|i| s.forward(&Batch::of(&tokens[i..=i], i, 0)).unwrap()));
    rows
}

#[test]
fn weights_from_the_disk_give_the_same_bits() {
    let mut whole = session(&model(), None);
    assert!(whole.engine().stream().is_none() && whole.walk() == 64);
    let want = logits(&mut whole);
    for resident in [0, 40 << 20, 80 << 20] {
        let mut s = session(&model(), Some(resident));
        let (stay, go) = s.engine().stream().expect("more than it may keep").bytes();
        assert!(go > 0 && stay <= resident, "{stay} stay of {resident}, {go} go");
        assert_eq!(s.walk(), 640, "a prompt in one walk");
        assert!(logits(&mut s) == want, "{resident}");
    }
    assert!(session(&model(), Some(1 << 30)).engine().stream().is_none());
}

/// What the plan says that the model needs, in a session of which size.
fn planned(g: &Gguf) -> (SessionOptions, Needs) {
    let o = SessionOptions { context: 512, ..SessionOptions::default() };
    let weights = g.tensors().iter().map(|t| t.n_bytes()).sum();
    let n = Needs::of(&Geometry::of(g).unwrap().unwrap(), weights, o.context as u64, &o).unwrap();
    (o, n)
}

/// The engine of a session on this machine.
fn engine_on(m: &Machine, o: &SessionOptions) -> Arc<Engine> {
    let e = Arc::new(Engine::open(&model(), &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap());
    e.session_on(m, o).unwrap();
    e
}

/// Up to what the plan leaves out: norms, and what buffers are more than about.
#[test]
fn a_plan_and_a_session_agree_on_what_fits() {
    let g = Gguf::open(&model()).unwrap();
    let (o, n) = planned(&g);
    let edge = n.total / 15 * 16;
    for (available, fit) in [(edge - edge / 20, Fit::Disk), (edge + edge / 20, Fit::Memory)] {
        let m = Machine { available: Some(available), ..Machine::default() };
        assert_eq!(Fit::of(&n, &m), fit, "{available}");
        assert_eq!(engine_on(&m, &o).stream().is_some(), fit == Fit::Disk, "{available}");
    }
}

/// What a token reads is told before the weights are, though not to the layer.
#[test]
fn a_plan_and_a_session_agree_on_what_comes_from_the_disk() {
    let g = Gguf::open(&model()).unwrap();
    let (o, n) = planned(&g);
    // A thirtieth of the weights is more than a layer: the output is a third of this model.
    for lacks in [30, 8, 3, 2].map(|part| n.weights / part) {
        let available = (n.total - lacks) / 15 * 16;
        let told = Active::of(&g).from_disk(n.beyond(available)) as f64;
        let e = engine_on(&Machine { available: Some(available), ..Machine::default() }, &o);
        let (_, read) = e.stream().expect("more than there is room for").bytes();
        assert!((0.75..1.6).contains(&(told / read as f64)), "{told} bytes, {read} are read; {lacks} lack");
    }
}

#[test]
fn a_pass_is_watched_and_stopped() {
    let mut s = session(&model(), Some(0));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heard = seen.clone();
    s.watch(Some(Arc::new(move |done, of| {
        heard.lock().unwrap().push((done, of));
        if done == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })));
    let tokens = tokens(100);
    let stopped = s.forward(&Batch::of(&tokens, 0, 0));
    assert!(matches!(stopped, Err(EngineError::Stopped)), "{stopped:?}");
    assert_eq!(*seen.lock().unwrap(), [(1, 31), (2, 31), (3, 31)], "30 layers and the output");
    assert_eq!(s.len(0), 0);
    s.watch(None);
    let want = session(&model(), None).forward(&Batch::of(&tokens, 0, 0)).unwrap();
    assert!(s.forward(&Batch::of(&tokens, 0, 0)).unwrap() == want, "after a stop");
}

#[test]
fn a_file_that_is_cut_under_a_pass_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("m.gguf");
    fs::copy(model(), &copy).unwrap();
    let mut s = session(&copy, Some(0));
    let tokens = tokens(10);
    s.forward(&Batch::of(&tokens[..5], 0, 0)).unwrap();
    fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(60 << 20).unwrap();
    let e = s.forward(&Batch::of(&tokens[5..], 5, 0)).unwrap_err().to_string();
    assert!(e.contains("m.gguf: reading weights: 62914560 bytes, expected 9"), "{e}");
}

#[test]
fn a_file_that_is_cut_under_the_program_ends_it_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("m.gguf");
    fs::copy(model(), &copy).unwrap();
    // Also where nobody hears why.
    for (streamed, heard) in [(false, true), (true, true), (false, false)] {
        let mut c = std::process::Command::new(assert_cmd::cargo::cargo_bin("oxcart"));
        c.args(["run", "-t", "2", "-p", "The cart", "--temp", "0", "-c", "4096", "-m"]).arg(&copy);
        if streamed {
            c.args(["--resident-memory", "0"]);
        }
        let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Some of the answer first.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 20]).unwrap();
        if !heard {
            drop(child.stderr.take());
        }
        let len = fs::metadata(&copy).unwrap().len();
        fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(50_000_000).unwrap();
        let out = child.wait_with_output().unwrap();
        let talk = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{talk}");
        let problem = format!("50000000 bytes, expected {len}: it was cut short while in use");
        assert!(!heard || talk.contains("m.gguf: ") && talk.contains(&problem), "{talk}");
        fs::copy(model(), &copy).unwrap();
    }
}

#[test]
fn the_program_says_how_weights_are_divided() {
    let run = |more: &[&str]| {
        let mut c = Command::cargo_bin("oxcart").unwrap();
        let out = c.args(["run", "-t", "2", "-p", "The cart", "-n", "8", "--temp", "0"]).args(more).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (text, _) = run(&[]);
    let (streamed, talk) = run(&["--resident-memory", "50M"]);
    assert_eq!(streamed, text);
    assert!(talk.contains("of weights in memory") && talk.contains("from the disk for every pass"), "{talk}");
}

/// The logits of a prompt, of one token at a time, of a few at once (which still choose their experts), of another prompt, and
/// of one token again.
fn mixed_logits(s: &mut Session) -> Vec<Vec<f32>> {
    let sizes = [300, 1, 1, 1, 2, 3, 1, 7, 100, 1, 1];
    let mut feed = |n: usize| {
        let at = s.len(0);
        let tokens: Vec<u32> = (at..at + n).map(|i| (i * 7919 % 256) as u32).collect();
        s.forward(&Batch::of(&tokens, at, 0)).unwrap()
    };
    sizes.into_iter().map(&mut feed).collect()
}

#[test]
fn experts_from_the_disk_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = mixture(dir.path());
    let mut whole = session(&path, None);
    let want = mixed_logits(&mut whole);
    assert!(whole.engine().stream().is_none() && want.iter().flatten().all(|x| x.is_finite()));
    let all = whole.engine().model.weights.n_bytes();
    for resident in [0, 1 << 20, 3 << 20, 6 << 20, 12 << 20, all - 1] {
        let mut s = session(&path, Some(resident));
        let (stay, go) = s.engine().stream().expect("more than it may keep").bytes();
        // A token uses half of the experts.
        assert!(stay <= resident && go > 0 && go <= all.div_ceil(2) + (3 << 20), "{stay} stay of {resident}, {go} go");
        assert!(mixed_logits(&mut s) == want, "{resident}");
    }
}

#[test]
fn a_mixture_that_is_cut_under_a_pass_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = mixture(dir.path());
    let len = fs::metadata(&path).unwrap().len();
    let whole = fs::read(&path).unwrap();
    // With nothing kept, and with nearly all.
    for resident in [0, len - (2 << 20)] {
        for tokens in [1, 20] {
            let mut s = session(&path, Some(resident));
            assert!(s.engine().stream().is_some());
            for at in 0..8 {
                s.forward(&Batch::of(&[at * 9], at as usize, 0)).unwrap();
            }
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len / 2).unwrap();
            let e = s.forward(&Batch::of(&vec![5; tokens], 8, 0)).unwrap_err().to_string();
            let problem = format!("m.gguf: reading weights: {} bytes, expected {len}", len / 2);
            assert!(e.contains(&problem) && s.len(0) == 8, "{e}");
            drop(s);
            fs::write(&path, &whole).unwrap();
        }
    }
}

#[test]
fn the_program_says_what_a_token_reads_of_a_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let path = mixture(dir.path());
    let run = |more: &[&str]| {
        let mut c = Command::cargo_bin("oxcart").unwrap();
        c.args(["run", "-t", "2", "-p", "The cart", "-n", "8", "--temp", "0", "-m"]).arg(&path).args(more);
        let out = c.output().unwrap();
        assert!(out.status.success(), "{out:?}");
        (out.stdout, String::from_utf8(out.stderr).unwrap())
    };
    let (text, talk) = run(&[]);
    assert!(!talk.contains("from the disk"), "{talk}");
    let (streamed, talk) = run(&["--resident-memory", "6M"]);
    assert_eq!(streamed, text);
    assert!(talk.contains("of weights in memory, up to") && talk.contains("from the disk for every token"), "{talk}");
}

//! The KV cache on disk, with the default model: what is read back is what was computed, and damage is noticed.

use oxcart::engine::{Engine, EngineOptions, Session, SessionOptions};
use oxcart::kv_store::{KvStore, KvStoreError, beside};
use oxcart::model::Batch;
use oxcart_quant::attention::KvType;
use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

const NO_LIMIT: u64 = u64::MAX;

static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(|| engine(&[]));
static TOKENS: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let text: String = (1..40)
        .map(|i| format!("On day {i} the cart carried {} bags of grain along the river road. ", i * 7 % 31))
        .collect();
    ENGINE.tokenizer.encode(text.as_bytes(), true, false).unwrap()
});

fn engine(overrides: &[&str]) -> Arc<Engine> {
    let path = oxcart::catalog::default_model().expect("the default model can be fetched");
    let overrides = overrides.iter().map(|s| s.to_string()).collect();
    let o = EngineOptions { threads: 2, overrides, ..EngineOptions::default() };
    Arc::new(Engine::open(&path, &o).expect("it opens"))
}

fn session_of(e: &Arc<Engine>, k_type: KvType, v_type: KvType) -> Session {
    e.session(&SessionOptions { context: 512, k_type, v_type, ..SessionOptions::default() }).unwrap()
}

fn session() -> Session {
    session_of(&ENGINE, KvType::F16, KvType::F16)
}

/// Feeds tokens after those that the session has.
fn feed(s: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let at = s.len(0);
    s.forward(&Batch::of(tokens, at, 0)).unwrap()
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn open(path: &Path, s: &Session) -> KvStore {
    KvStore::open(path, s, NO_LIMIT).unwrap()
}

/// A file with the first 100 tokens, saved at these lengths.
fn saved(path: &Path, lengths: &[usize]) -> Session {
    let mut s = session();
    let mut store = open(path, &s);
    for &n in lengths {
        let tokens = &TOKENS[s.len(0)..n];
        feed(&mut s, tokens);
        store.save(&s).unwrap();
    }
    s
}

#[test]
fn a_restored_session_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (f16, q8_0, bf16) = (KvType::F16, KvType::Q8_0, KvType::Bf16);
    // Saved at once, turn by turn with ragged ends, at whole blocks, token by token.
    let cases: &[(KvType, KvType, &[usize])] = &[
        (f16, f16, &[100]),
        (f16, f16, &[1, 7, 16, 33, 47, 99, 100]),
        (q8_0, bf16, &[5, 32, 63]),
        (bf16, q8_0, &[16, 32, 96]),
        (f16, q8_0, &[14, 15, 16, 17, 18]),
    ];
    let mut wrong = Vec::new();
    for (no, &(k, v, lengths)) in cases.iter().enumerate() {
        let path = dir.path().join(format!("{no}.kv"));
        let mut s = session_of(&ENGINE, k, v);
        let mut store = open(&path, &s);
        for &n in lengths {
            let tokens = &TOKENS[s.len(0)..n];
            feed(&mut s, tokens);
            store.save(&s).unwrap();
        }
        drop(store);
        let n = s.len(0);
        let bytes = |s: &Session, n: usize| {
            let mut bytes = Vec::new();
            s.copy_positions(0, 0..n / 16 * 16, &mut bytes);
            bytes
        };
        // A beginning of it, and more than the file has.
        for wanted in [1, n - 3, n, n + 20] {
            let mut r = session_of(&ENGINE, k, v);
            let mut store = open(&path, &r);
            let read = store.restore(&mut r, &TOKENS[..wanted]);
            let expected = wanted.min(n);
            let same = bytes(&r, expected) == bytes(&s, expected);
            if read != expected || *r.tokens(0) != TOKENS[..expected] || !same || !store.take_notes().is_empty() {
                wrong.push(format!("{k:?} {v:?} saved at {lengths:?}: {read} of {wanted}, same: {same}"));
            }
            if wanted == n && (0..2).any(|i| feed(&mut r, &[TOKENS[n + i]]) != feed(&mut s, &[TOKENS[n + i]])) {
                wrong.push(format!("{k:?} {v:?} saved at {lengths:?}: logits differ"));
            }
            s.truncate(0, n);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn branches_share_their_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.kv");
    let mut first = saved(&path, &[50, 100]);
    // Another question after 70 tokens, in the middle of a span and of a block.
    let mut s = session();
    let mut store = open(&path, &s);
    let other: Vec<u32> = TOKENS[..70].iter().chain(&TOKENS[200..230]).copied().collect();
    assert_eq!(store.restore(&mut s, &other), 70);
    let logits = feed(&mut s, &other[70..]);
    let before = size(&path);
    store.save(&s).unwrap();
    let per_position = s.span_bytes(&(0..16)) as u64 / 16;
    assert!(size(&path) - before < 50 * per_position, "the branch alone is written");
    // The branch is what a session has that computed it without the detour.
    let mut want = session();
    feed(&mut want, &TOKENS[..50]);
    feed(&mut want, &TOKENS[50..100]);
    want.truncate(0, 70);
    assert!(logits == feed(&mut want, &other[70..]), "the branch differs");
    drop(store);
    // Both are there for the next program; going from one to the other reads what they do not share.
    let mut s = session();
    let mut store = open(&path, &s);
    assert_eq!(store.restore(&mut s, &other), 100);
    assert_eq!(store.restore(&mut s, &TOKENS[..100]), 30);
    assert_eq!(store.restore(&mut s, &TOKENS[..100]), 0);
    assert!(feed(&mut s, &TOKENS[100..101]) == feed(&mut first, &TOKENS[100..101]));
    assert_eq!(store.restore(&mut s, &TOKENS[300..310]), 0);
    assert_eq!(s.len(0), 101, "nothing to read leaves the session as it was");
    // Another path back: the session has more in common with a branch than the file has with the other.
    s.truncate(0, 60);
    assert_eq!(store.restore(&mut s, &other), 40);
    assert!(feed(&mut s, &TOKENS[5..6]) == feed(&mut want, &TOKENS[5..6]));
    assert!(store.take_notes().is_empty());
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_and_the_rest_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.kv");
    let s = saved(&path, &[32, 64, 80]);
    let whole = fs::read(&path).unwrap();
    let mut wrong = Vec::new();
    for (no, at) in (0..80).step_by(3).chain((80..whole.len()).step_by(whole.len() / 20)).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        let mut r = session();
        let mut store = open(&path, &r);
        let read = store.restore(&mut r, &TOKENS[..80]);
        let notes = store.take_notes();
        let [mut got, mut want] = [Vec::new(), Vec::new()];
        r.copy_positions(0, 0..r.len(0), &mut got);
        s.copy_positions(0, 0..read, &mut want);
        if ![0, 32, 64].contains(&read) || r.len(0) != read || got != want || notes.len() != 1 {
            wrong.push(format!("byte {at}: {read} positions, same: {}, {notes:?}", got == want));
        }
        // What is missing is computed and written again, once.
        if no % 8 == 7 {
            feed(&mut r, &TOKENS[read..80]);
            store.save(&r).unwrap();
            drop(store);
            let mut r = session();
            let mut store = open(&path, &r);
            let (read, notes) = (store.restore(&mut r, &TOKENS[..80]), store.take_notes());
            if read != 80 || !notes.is_empty() {
                wrong.push(format!("byte {at}, the second time: {read} {notes:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
}

#[test]
fn a_file_cut_anywhere_is_used_up_to_the_last_whole_span() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.kv");
    saved(&path, &[30, 60]);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 1, 20, 47, 48, 60, 100, 200, whole.len() / 3, whole.len() / 2 + 4096, whole.len() - 1] {
        for zeros in [0, 100] {
            fs::write(&path, [&whole[..cut], &vec![0; zeros]].concat()).unwrap();
            let mut s = session();
            let mut store = open(&path, &s);
            let read = store.restore(&mut s, &TOKENS[..60]);
            let notes = store.take_notes();
            assert_eq!(read, if cut > whole.len() / 2 + 2048 { 30 } else { 0 }, "cut at {cut}: {notes:?}");
            assert_eq!(notes.is_empty(), zeros == 0 && [0, 48].contains(&cut), "cut at {cut}: {notes:?}");
        }
    }
}

#[test]
fn what_another_model_or_type_computed_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.kv");
    let others = [
        session_of(&ENGINE, KvType::Q8_0, KvType::F16),
        session_of(&ENGINE, KvType::F16, KvType::Bf16),
        session_of(&engine(&["llama.rope.freq_base=float:12345"]), KvType::F16, KvType::F16),
    ];
    for mut other in others {
        let _ = fs::remove_file(&path);
        saved(&path, &[40]);
        let mut store = open(&path, &other);
        let notes = store.take_notes();
        assert!(notes.len() == 1 && notes[0].contains("of another model"), "{notes:?}");
        assert_eq!(store.restore(&mut other, &TOKENS[..40]), 0);
    }
    // The same file under another name and time is another file.
    let _ = fs::remove_file(&path);
    saved(&path, &[40]);
    let copy = dir.path().join("copy.gguf");
    fs::copy(oxcart::catalog::default_model().unwrap(), &copy).unwrap();
    let e = Arc::new(Engine::open(&copy, &EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap());
    assert_eq!(open(&path, &session_of(&e, KvType::F16, KvType::F16)).take_notes().len(), 1);
}

#[test]
fn one_program_uses_it_and_the_limit_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| beside(&dir.path().join(name));
    assert_eq!(path("c.txt"), dir.path().join("c.kv"));
    let s = saved(&path("old"), &[60]);
    let one = fs::metadata(path("old")).unwrap().len();
    {
        let _open = open(&path("old"), &s);
        assert!(matches!(KvStore::open(&path("old"), &s, NO_LIMIT), Err(KvStoreError::Busy(_))));
        // In use, it does not make way.
        let mut store = KvStore::open(&path("new"), &s, one + one / 2).unwrap();
        store.save(&s).unwrap();
        assert!(store.take_notes().concat().contains("no more of it is kept"));
        assert!(path("old").exists());
        // Nor is given up what is there, where that would not be enough.
        saved(&path("branch"), &[30]);
        let mut store = KvStore::open(&path("branch"), &s, one + one / 4).unwrap();
        let mut other = session();
        feed(&mut other, &TOKENS[100..150]);
        store.save(&other).unwrap();
        assert!(store.take_notes().concat().contains("no more of it is kept"));
        assert_eq!(store.restore(&mut session(), &TOKENS[..30]), 30);
        fs::remove_file(path("branch")).unwrap();
    }
    let limit = 2 * one + one / 2;
    for name in ["second", "new"] {
        std::thread::sleep(std::time::Duration::from_millis(20)); // times of files have their grain
        let mut store = KvStore::open(&path(name), &s, limit).unwrap();
        store.save(&s).unwrap();
        assert!(store.take_notes().is_empty());
    }
    assert_eq!([path("old").exists(), path("second").exists(), path("new").exists()], [false, true, true]);
    // Where other branches leave no room in its own file, the conversation as it stands has it.
    let mut s = s;
    let mut store = KvStore::open(&path("new"), &s, one + one / 2).unwrap();
    s.truncate(0, 10);
    feed(&mut s, &TOKENS[100..150]);
    store.save(&s).unwrap();
    let all: Vec<u32> = s.tokens(0).to_vec();
    let mut r = session();
    assert_eq!(store.restore(&mut r, &all), 60);
    assert_eq!(store.restore(&mut r, &TOKENS[..60]), 0);
    assert!(size(&path("new")) <= one + one / 2);
    // A limit of nothing keeps nothing.
    let mut store = KvStore::open(&path("none"), &s, 0).unwrap();
    store.save(&s).unwrap();
    assert_eq!(store.take_notes().len(), 1);
    assert!(size(&path("none")) < 100);
}

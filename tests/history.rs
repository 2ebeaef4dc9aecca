//! Conversations on disk: whatever cuts the file off, what was said is there.

use oxcart::chat::history::{Conversation, HistoryError, TurnState, delete, export_json, export_markdown, list};
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What the file would take for its own, and what breaks lines, characters and terminals.
const AWKWARD: &[&str] = &[
    "",
    "\n",
    "% end 1 whole",
    "%\n%%\n%%%\n",
    "text\n% turn 9 user\n% head 1\r\n%",
    "\n\nno line end before\n\n",
    "\r\n\tтекст 中文 العربية 👩‍👩‍👧 e\u{301}\u{fdd0}\u{feff}",
    "\\% \\n \u{1b}[31mred\u{7}",
];

fn written(dir: &Path) -> (PathBuf, Vec<String>) {
    let mut c = Conversation::create(dir, "a model\n% turn 1 user").unwrap();
    let mut parent = None;
    for (i, text) in AWKWARD.iter().enumerate() {
        let role = if i % 2 == 0 { "user" } else { "assistant" };
        parent = Some(c.add(parent, role, text).unwrap());
    }
    // And once more piece by piece, a character at a time, with other marks between.
    for text in AWKWARD {
        let id = c.begin(parent, "assistant").unwrap();
        for (i, ch) in text.chars().enumerate() {
            c.append(id, ch.encode_utf8(&mut [0; 4])).unwrap();
            match i {
                3 => c.rename("% head 1").unwrap(),
                5 => c.set_head(parent.unwrap()).unwrap(),
                _ => (),
            }
        }
        c.end(id, TurnState::Stopped).unwrap();
        parent = Some(id);
    }
    (c.path().to_path_buf(), c.turns().iter().map(|t| t.content.clone()).collect())
}

#[test]
fn what_is_said_comes_back_to_the_letter() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("deep/conversations");
    let (path, said) = written(&dir);
    let twice: Vec<&str> = [AWKWARD, AWKWARD].concat();
    assert_eq!(said, twice);
    for c in [Conversation::read(&path).unwrap(), Conversation::open(&path).unwrap()] {
        assert_eq!(c.turns().iter().map(|t| t.content.as_str()).collect::<Vec<_>>(), twice);
        assert_eq!(c.notes(), [""; 0]);
        assert_eq!((c.title().as_str(), c.model()), ("% head 1", "a model % turn 1 user"));
        let states: Vec<_> = c.turns().iter().map(|t| t.state).collect();
        assert_eq!(states, [[TurnState::Whole; 8], [TurnState::Stopped; 8]].concat());
    }
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&dir)), (0o600, 0o700));
}

#[test]
fn a_file_cut_at_any_byte_opens_with_everything_before_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = written(dir.path());
    let whole = fs::read(&path).unwrap();
    let cut_path = dir.path().join("cut.txt");
    let mut wrong = Vec::new();
    for cut in 0..whole.len() {
        // Every open is synced, so zeros and going on are tried at some cuts only.
        for tail in [&b""[..], &[0; 5]].into_iter().take(if cut % 8 == 3 { 2 } else { 1 }) {
            fs::write(&cut_path, [&whole[..cut], tail].concat()).unwrap();
            let c = match Conversation::open(&cut_path) {
                Ok(c) => c,
                Err(e) => {
                    wrong.push(format!("cut at {cut}: {e}"));
                    continue;
                }
            };
            // Every turn's text is a beginning of what it was; all but the last are whole.
            let got: Vec<String> = c.turns().iter().map(|t| t.content.clone()).collect();
            let full = [AWKWARD, AWKWARD].concat();
            for (i, text) in got.iter().enumerate() {
                let last = i + 1 == got.len();
                // A mark's line end that lost its mark reads as the end of a line.
                let said = text.strip_suffix('\n').filter(|_| last).unwrap_or(text);
                if if last { !full[i].starts_with(said) } else { full[i] != text } {
                    wrong.push(format!("cut at {cut}: turn {i} is {text:?}"));
                }
            }
            // What was mended stays mended, says no more, and can be gone on with.
            let parent = c.head();
            drop(c);
            let mut c = Conversation::open(&cut_path).unwrap();
            if !c.notes().is_empty() || c.turns().iter().map(|t| &t.content).ne(&got) {
                wrong.push(format!("cut at {cut}: again {:?} {:?}", c.notes(), c.turns()));
            }
            if cut % 4 != 3 {
                continue;
            }
            c.add(parent, "user", "on").unwrap();
            drop(c);
            let c = Conversation::read(&cut_path).unwrap();
            if !c.notes().is_empty() || c.turns().len() != got.len() + 1 || c.turns()[got.len()].content != "on" {
                wrong.push(format!("cut at {cut}: after one more {:?} {:?}", c.notes(), c.turns()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong, of which {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
}

#[test]
fn nothing_said_is_missing_when_the_cut_is_in_the_middle_of_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = Conversation::create(dir.path(), "m").unwrap();
    let q = c.add(None, "user", "Why?").unwrap();
    let a = c.begin(Some(q), "assistant").unwrap();
    c.append(a, "Because\n").unwrap();
    c.append(a, "% of").unwrap();
    let copy = dir.path().join("copy.txt");
    fs::copy(c.path(), &copy).unwrap(); // as a kill would leave it
    let mut r = Conversation::open(&copy).unwrap();
    assert_eq!((r.turns()[1].content.as_str(), r.turns()[1].state), ("Because\n% of", TurnState::Partial));
    assert_eq!(r.notes(), ["turn 2 was cut off; what was said of it is here"]);
    // The answer goes on where it stopped.
    let a = r.turns()[1].id;
    r.append(a, " that").unwrap();
    r.end(a, TurnState::Whole).unwrap();
    drop(r);
    let r = Conversation::open(&copy).unwrap();
    assert_eq!((r.turns()[1].content.as_str(), r.turns()[1].state), ("Because\n% of that", TurnState::Whole));
}

#[test]
fn turns_are_a_tree() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = Conversation::create(dir.path(), "m").unwrap();
    let s = c.add(None, "system", "Be brief.").unwrap();
    let q =
        c.add(Some(s), "user", "  \nA question that goes on and on, past what a title has room for, and on").unwrap();
    let a = c.add(Some(q), "assistant", "one").unwrap();
    let b = c.add(Some(q), "assistant", "two").unwrap();
    assert_eq!(c.head(), Some(b));
    c.set_head(a).unwrap();
    let more = c.add(Some(a), "user", "more").unwrap();
    c.set_head(b).unwrap();
    let path = c.path().to_path_buf();
    drop(c);
    let c = Conversation::open(&path).unwrap();
    assert_eq!(c.head(), Some(b));
    let said = |leaf| c.path_to(leaf).iter().map(|t| t.id).collect::<Vec<_>>();
    assert_eq!((said(b), said(more)), (vec![s, q, b], vec![s, q, a, more]));
    assert_eq!(c.title(), "A question that goes on and on, past what a title has room f…");
    assert_eq!(
        export_markdown(&c),
        "# A question that goes on and on, past what a title has room f…\n\n## System\n\nBe brief.\n\n## User\n\n  \nA \
         question that goes on and on, past what a title has room for, and on\n\n## Assistant\n\ntwo\n"
    );
    let j = export_json(&c);
    assert_eq!((&j["head"], &j["model"]), (&json!(4), &json!("m")));
    let want = json!({"id": 5, "parent": 3, "role": "user", "content": "more", "state": "whole"});
    assert_eq!(j["turns"][4], want);
}

#[test]
fn a_file_mended_by_hand_is_read_and_nonsense_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.txt");
    let head = "% oxcart conversation 1\n% model m\n";
    // (text, contents of the turns, a note)
    let read = [
        ("% turn 1 user\nHi.\n% turn 2 assistant after 1\nHello.", vec!["Hi.", "Hello."], "turn 2 was cut off"),
        ("\r\n% turn 1 user\r\nHi.\r\n% end 1 whole\r\n", vec!["Hi.\r"], ""),
        ("% turn 1 user\n% a comment\n% end 1 whole\n", vec!["% a comment"], "line 4: no mark"),
        ("% turn 7 user after 3\nx\n% end 7 whole\n", vec!["x"], "line 3: turn 3 is not there"),
        ("% turn 1 user\nx\n% end 1 whole\nstray\n", vec!["x"], "line 6: belongs to no turn"),
        ("% head 5\n% end 5 whole\n", vec![], "line 3: there is no turn 5"),
        ("% turn 1 user\nx\n% end 1 whole\n% title new", vec!["x"], ""),
        ("% turn 1 user\nx\n% end 1 whole\n% turn 12 us", vec!["x"], "line 6: an unfinished mark"),
    ];
    let mut wrong = Vec::new();
    for (text, said, note) in &read {
        fs::write(&path, format!("{head}{text}")).unwrap();
        let c = Conversation::open(&path).unwrap();
        let got: Vec<&str> = c.turns().iter().map(|t| t.content.as_str()).collect();
        if got != *said || c.notes().is_empty() != note.is_empty() || !c.notes().concat().contains(note) {
            wrong.push(format!("{text:?}: {got:?} {:?}", c.notes()));
        }
    }
    fs::write(&path, [head.as_bytes(), b"% turn 1 user\nna\xefve\n% end 1 whole\n"].concat()).unwrap();
    assert_eq!(Conversation::read(&path).unwrap().turns()[0].content, "na\u{fffd}ve");
    let refused = [
        (format!("{head}% turn 1 user\nx\n% end 1 whole\n% turn 1 user\ny\n"), "c.txt: line 6: turn 1 again"),
        (format!("{head}% turn 1 user after 1\n"), "c.txt: line 3: turn 1 after itself"),
        ("% oxcart conversation 2\n".into(), "c.txt: line 1: version \"2\", expected 1"),
        ("Dear diary".into(), "c.txt: line 1: expected \"% oxcart conversation \""),
        ("Dear diary\n".into(), "c.txt: line 1: expected \"% oxcart conversation \""),
    ];
    for (text, says) in &refused {
        fs::write(&path, text).unwrap();
        match Conversation::open(&path).map(|c| c.turns().len()) {
            Err(e) if e.to_string().contains(says) && fs::read_to_string(&path).unwrap() == *text => {}
            other => wrong.push(format!("{text:?}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_large_file_of_nonsense_is_refused_or_told_of_briefly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.txt");
    fs::write(&path, format!("% oxcart conversation 1\n{}", "% head 7\n".repeat(100_000))).unwrap();
    assert_eq!(Conversation::read(&path).unwrap().notes().len(), 21);
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap(); // sparse
    let e = Conversation::open(&path).map(|c| c.turns().len()).unwrap_err().to_string();
    assert!(e.ends_with("c.txt: larger than 64 MiB, which no conversation may be"), "{e}");
    let mut c = Conversation::create(dir.path(), "m").unwrap();
    let e = c.add(None, "user", &"x".repeat(65 << 20)).unwrap_err().to_string();
    assert!(e.contains("larger than 64 MiB"), "{e}");
    c.add(None, "user", "still here").unwrap();
    let path = c.path().to_path_buf();
    drop(c);
    assert_eq!(Conversation::open(&path).unwrap().turns().len(), 1);
}

#[test]
fn one_program_at_a_time_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = Conversation::create(dir.path(), "m").unwrap();
    let q = c.add(None, "user", "mine").unwrap();
    let path = c.path().to_path_buf();
    assert!(matches!(Conversation::open(&path), Err(HistoryError::Busy(_))));
    assert!(matches!(delete(&path), Err(HistoryError::Busy(_))));
    let mut r = Conversation::read(&path).unwrap();
    assert_eq!(r.turns().len(), 1);
    assert!(r.add(None, "user", "x").unwrap_err().to_string().contains("open for reading only"));
    // An editor that saves under our hands is not overwritten.
    let text = fs::read_to_string(&path).unwrap();
    let saved = dir.path().join("saved");
    fs::write(&saved, text.replace("mine", "edited")).unwrap();
    fs::rename(&saved, &path).unwrap();
    assert!(matches!(c.add(Some(q), "assistant", "yes"), Err(HistoryError::Changed(_))));
    assert_eq!(c.turns().len(), 1);
    drop(c);
    assert_eq!(Conversation::open(&path).unwrap().turns()[0].content, "edited");
    assert!(Conversation::create(dir.path(), "m").unwrap().add(None, "two words", "x").is_err());
}

#[test]
fn conversations_are_listed_renamed_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    assert!(list(&dir.path().join("none")).is_empty());
    fs::write(dir.path().join("notes.txt"), "Dear diary\n").unwrap();
    let mut first = Conversation::create(dir.path(), "m1").unwrap();
    let mut second = Conversation::create(dir.path(), "m2").unwrap();
    assert_ne!(first.path(), second.path());
    second.add(None, "user", "Second?").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20)); // times of files have their grain
    first.add(None, "user", "First?").unwrap();
    first.rename("  The\nfirst ").unwrap();
    let got: Vec<_> = list(dir.path()).into_iter().map(|s| (s.title, s.model, s.turns)).collect();
    assert_eq!(got, [("The first".into(), "m1".into(), 1), ("Second?".into(), "m2".into(), 1)]);
    first.rename("").unwrap();
    assert_eq!(first.title(), "First?");
    // What an editor broke is not hidden.
    fs::write(dir.path().join("broken.txt"), "% oxcart conversation 1\n% turn 1 user after 1\n").unwrap();
    let broken = list(dir.path()).into_iter().find(|s| s.path.ends_with("broken.txt")).expect("it is listed");
    assert!(broken.title.contains("cannot be read: ") && broken.title.contains("line 2: turn 1 after itself"));
    fs::remove_file(broken.path).unwrap();
    assert!(delete(&dir.path().join("notes.txt")).unwrap_err().to_string().contains("not a conversation"));
    let path = first.path().to_path_buf();
    drop(first);
    delete(&path).unwrap();
    assert_eq!(list(dir.path()).len(), 1);
    assert!(dir.path().join("notes.txt").exists());
}

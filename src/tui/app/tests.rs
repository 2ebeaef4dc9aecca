//! Sequences of events, what they leave on the screen, and what they ask for.

use super::*;
use crate::generate::End;
use crate::tui::NoText;
use crate::tui::panel::Confirmed;
use crate::tui::store;
use crate::tui::worker::Event as W;
use crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

const NONE: KeyModifiers = KeyModifiers::NONE;
const CTRL: KeyModifiers = KeyModifiers::CONTROL;
const ALT: KeyModifiers = KeyModifiers::ALT;

fn app(size: (u16, u16)) -> App {
    let b = Beginning {
        model: None,
        scheme: Scheme::None,
        mouse: true,
        set_params: Box::new(|p| p),
        system: String::new(),
        prompt: None,
        limit: None,
    };
    let mut a = App::new(b, size, Instant::now());
    a.update(Msg::Tick);
    a.effects.clear();
    a
}

/// With the model loaded.
fn ready(size: (u16, u16)) -> App {
    let mut a = app(size);
    a.ready();
    a
}

fn loaded() -> Loaded {
    Loaded {
        name: "Model".into(),
        facts: "Model | llama Q4_1 0.09 GiB | avx2 | 2 threads | ctx 1000".into(),
        context: 1000,
        bytes_per_token: 100_000_000,
        cache_per_token: 1000,
        recommended: SampleParams::default(),
        notes: Vec::new(),
    }
}

impl App {
    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) -> Vec<Effect> {
        self.hear(Msg::Terminal(Event::Key(KeyEvent::new(code, modifiers))))
    }

    fn write(&mut self, text: &str) {
        for c in text.chars() {
            self.press(KeyCode::Char(c), NONE);
        }
    }

    fn hear(&mut self, msg: Msg) -> Vec<Effect> {
        self.update(msg);
        std::mem::take(&mut self.effects)
    }

    fn ready(&mut self) -> Vec<Effect> {
        let effects = self.hear(Msg::Worker(W::Loaded(Box::new(loaded()), None)));
        self.hear(Msg::Worker(W::Loading(1, 1)));
        effects
    }

    /// An answer up to its end, or to where it is.
    fn answer(&mut self, text: &str, end: Option<End>) -> Vec<Effect> {
        let (tokens, time, used) = (10, Duration::from_secs(2), 120);
        self.hear(Msg::Worker(W::Reading { done: 100, of: 100, reused: 0, time: Duration::from_secs(1) }));
        let mut effects = self.hear(Msg::Worker(W::Text { text: text.into(), tokens, passes: 9, time, used }));
        if let Some(end) = end {
            effects.extend(self.hear(Msg::Worker(W::Ended { end, tokens, time, used })));
        }
        effects
    }

    fn ask_for(&mut self, question: &str) -> Vec<Effect> {
        self.write(question);
        self.press(KeyCode::Enter, NONE)
    }

    fn screen(&self) -> String {
        let t = self.drawn_on(self.size);
        let buffer = t.backend().buffer();
        let row = |y| {
            let mut line = String::new();
            let mut x = 0;
            while x < self.size.0 {
                let symbol = buffer[(x, y)].symbol();
                line.push_str(symbol);
                x += crate::tui::wrap::width(symbol).max(1) as u16;
            }
            line.trim_end().to_string()
        };
        (0..self.size.1).map(row).collect::<Vec<_>>().join("\n")
    }

    /// On a terminal of a size that it may not know of yet.
    fn drawn_on(&self, (columns, rows): (u16, u16)) -> Terminal<TestBackend> {
        let mut t = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        t.draw(|f| view::draw(f, self)).unwrap();
        t
    }
}

fn asked(effects: &[Effect]) -> Option<&Ask> {
    effects.iter().find_map(|e| if let Effect::Ask(a) = e { Some(a) } else { None })
}

fn said(a: &Ask) -> Vec<&str> {
    a.turns.iter().map(|m| m.content.as_str()).collect()
}

#[test]
fn a_question_waits_for_the_model_but_is_written_at_once() {
    let mut a = app((80, 24));
    let effects = a.ask_for("hello");
    let add = Op::Add { parent: None, role: "user".into(), content: "hello".into() };
    assert_eq!(effects, [Effect::Store(add)]);
    assert_eq!(said(asked(&a.ready()).unwrap()), ["hello"]);
}

#[test]
fn what_is_heard_is_written_before_it_is_over() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    let effects = a.answer("part", None);
    let begin = Op::Begin { parent: Some(0), role: "assistant".into() };
    assert_eq!(effects, [Effect::Store(begin), Effect::Store(Op::Append(1, "part".into()))]);
    assert_eq!(a.state, State::Answering);
    assert_eq!(a.press(KeyCode::Esc, NONE), [Effect::Stop(1)]);
    assert_eq!(a.answer(" more", Some(End::Stopped)).last(), Some(&Effect::Store(Op::End(1, TurnState::Stopped))));
    assert_eq!((a.state.clone(), a.tree.nodes[1].content.as_str()), (State::Stopped, "part more"));
    // And it can be gone on with.
    let effects = a.press(KeyCode::Char('c'), ALT);
    let ask = asked(&effects).unwrap();
    assert!(ask.go_on && said(ask) == ["q", "part more"]);
    a.answer(", end", Some(End::Eog));
    assert_eq!((a.tree.nodes[1].content.as_str(), a.tree.nodes[1].state), ("part more, end", TurnState::Whole));
}

#[test]
fn branches_are_made_and_walked() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer("first", Some(End::Eog));
    assert_eq!(said(asked(&a.press(KeyCode::Char('r'), CTRL)).unwrap()), ["q"]);
    a.answer("second", Some(End::Eog));
    assert!(a.screen().contains("‹ 2 of 2 ›") && a.screen().contains("second") && !a.screen().contains("first"));
    assert_eq!(a.press(KeyCode::Left, ALT), [Effect::Store(Op::Head(1))]);
    assert!(a.screen().contains("‹ 1 of 2 ›") && a.screen().contains("first"));
    // A changed question is a branch of its own.
    a.press(KeyCode::Char('e'), ALT);
    assert_eq!(a.editor.text(), "q");
    let effects = a.ask_for("2");
    assert_eq!(said(asked(&effects).unwrap()), ["q2"]);
    a.answer("third", Some(End::Eog));
    assert!(!a.screen().contains("first") && a.screen().contains("third"));
    a.press(KeyCode::Left, ALT);
    assert!(a.screen().contains("second"), "the branch last begun below the first question:\n{}", a.screen());
}

#[test]
fn what_is_sent_meanwhile_waits() {
    let mut a = ready((80, 24));
    a.ask_for("one");
    a.answer("1", None);
    assert!(asked(&a.ask_for("two")).is_none());
    assert!(a.screen().contains("next: two"));
    assert_eq!(said(asked(&a.answer("", Some(End::Eog))).unwrap()), ["one", "1", "two"]);
    // Stopped, it comes back to be thought over.
    a.answer("2", None);
    a.ask_for("three");
    a.press(KeyCode::Esc, NONE);
    assert_eq!((a.editor.text(), a.queued.as_deref()), ("three", None));
}

#[test]
fn what_waits_for_an_answer_that_does_not_come_is_given_back() {
    let ends: [fn() -> W; 3] = [
        || W::Failed("chat template: no".into()),
        || W::LoadFailed { problem: "no such file".into(), kept: false },
        || W::Full(2),
    ];
    for end in ends {
        let mut a = app((80, 24));
        if !matches!(end(), W::LoadFailed { .. }) {
            a.ready();
        }
        a.ask_for("one");
        a.ask_for("two");
        a.write("three");
        a.hear(Msg::Worker(end()));
        assert_eq!((a.editor.text(), a.queued.as_deref()), ("two\nthree", None));
        assert!(!a.screen().contains("next:"));
    }
    // A long one is folded, also beside a draft.
    let mut a = ready((80, 24));
    a.ask_for("one");
    a.hear(Msg::Terminal(Event::Paste("word ".repeat(1000))));
    a.press(KeyCode::Enter, NONE);
    a.write("draft");
    a.press(KeyCode::Esc, NONE);
    assert!(a.editor.text().ends_with("\ndraft") && a.editor.expanded().starts_with("word word"));
    assert!(a.screen().contains("[pasted 5 kB]"), "{}", a.screen());
}

#[test]
fn the_oldest_turns_are_left_out_only_when_that_is_agreed_to() {
    let mut a = ready((80, 24));
    a.ask_for("one");
    a.answer("1", Some(End::Eog));
    a.ask_for("two");
    a.hear(Msg::Worker(W::Full(2)));
    assert!(a.screen().contains("no longer fits"));
    // Whoever was writing has not read it yet.
    assert!(asked(&a.press(KeyCode::Enter, NONE)).is_none());
    a.write("y");
    assert!(a.screen().contains("no longer fits") && a.editor.text() == "y");
    a.now += Duration::from_secs(1);
    let effects = a.press(KeyCode::Enter, NONE);
    assert!(asked(&effects).unwrap().may_leave_out);
    a.hear(Msg::Worker(W::LeftOut(2)));
    a.answer("2", Some(End::Eog));
    assert!(a.screen().contains("no longer reads what stands above"));
}

#[test]
fn however_a_full_context_is_answered_another_question_can_be_asked() {
    for (key, modifiers) in [(KeyCode::Esc, NONE), (KeyCode::Char('c'), CTRL)] {
        let mut a = ready((80, 24));
        a.ask_for("one");
        a.hear(Msg::Worker(W::Full(2)));
        // What was asked for before comes late, and does not push the question away.
        a.press(KeyCode::Char('x'), NONE);
        a.hear(Msg::Models(Vec::new()));
        a.listing = Some(Place::default());
        a.hear(Msg::Store(store::Event::Listed(Vec::new())));
        assert!(a.screen().contains("no longer fits"));
        a.press(key, modifiers);
        assert!(!a.screen().contains("no longer fits") && a.state == State::Ready);
        assert_eq!(said(asked(&a.ask_for("two")).unwrap()), ["one", "xtwo"]);
    }
}

#[test]
fn the_conversation_that_is_being_answered_is_not_deleted() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.hear(Msg::Store(store::Event::Created("q.txt".into())));
    a.answer("part", None);
    let delete = Effect::Store(Op::Delete("q.txt".into()));
    let agree = |a: &mut App| {
        a.panel = Some(Panel::Confirm("Delete?".into(), Confirmed::Delete("q.txt".into(), Place::default())));
        a.press(KeyCode::Enter, NONE)
    };
    assert!(!agree(&mut a).contains(&delete) && a.screen().contains("an answer is still coming"));
    a.answer("", Some(End::Eog));
    let effects = agree(&mut a);
    let place = |e: &Effect| effects.iter().position(|f| f == e);
    assert!(matches!(effects[0], Effect::Store(Op::New(_))));
    assert!(place(&delete).is_some() && place(&delete) < place(&Effect::Store(Op::List)), "{effects:?}");
}

/// Between the choice of another conversation and its arrival, a question waits for it.
#[test]
fn a_question_meant_for_another_conversation_is_not_asked_in_this_one() {
    let arrives = || store::Event::Opened {
        path: "other.txt".into(),
        title: "Other".into(),
        turns: vec![
            (None, "user".into(), "there".into(), TurnState::Whole),
            (Some(0), "assistant".into(), "then".into(), TurnState::Whole),
        ],
        head: Some(1),
        notes: Vec::new(),
    };
    for found in [true, false] {
        let mut a = ready((80, 24));
        a.ask_for("here");
        a.answer("now", Some(End::Eog));
        a.open("other.txt".into());
        assert!(asked(&a.ask_for("more?")).is_none() && a.queued.is_some());
        if found {
            let effects = a.hear(Msg::Store(arrives()));
            assert_eq!(said(asked(&effects).unwrap()), ["there", "then", "more?"]);
        } else {
            assert!(asked(&a.hear(Msg::Store(store::Event::Failed("gone".into())))).is_none());
            assert_eq!((a.editor.text(), a.queued.as_deref()), ("more?", None));
            assert_eq!(said(asked(&a.press(KeyCode::Enter, NONE)).unwrap()), ["here", "now", "more?"]);
        }
    }
}

fn summary(title: &str) -> Summary {
    Summary {
        path: format!("{title}.txt").into(),
        title: title.into(),
        model: String::new(),
        modified: std::time::SystemTime::now(),
        turns: 2,
    }
}

fn listed(titles: &[&str]) -> Msg {
    Msg::Store(store::Event::Listed(titles.iter().map(|t| summary(t)).collect()))
}

fn opened(path: &str, turns: &[(&str, &str)]) -> Msg {
    let turn = |i: usize| (i.checked_sub(1), turns[i].0.to_string(), turns[i].1.to_string(), TurnState::Whole);
    Msg::Store(store::Event::Opened {
        path: path.into(),
        title: path.into(),
        turns: (0..turns.len()).map(turn).collect(),
        head: turns.len().checked_sub(1),
        notes: Vec::new(),
    })
}

/// While another conversation is on its way, the store has it already, and the screen has not: nothing is done to either.
#[test]
fn nothing_is_done_to_a_conversation_that_is_being_left() {
    let mut a = ready((80, 24));
    a.ask_for("here");
    a.answer("now", Some(End::Eog));
    a.open("other.txt".into());
    a.effects.clear();
    for (key, with) in [('r', CTRL), ('e', ALT), ('c', ALT), ('n', CTRL)] {
        assert_eq!(a.press(KeyCode::Char(key), with), [], "{key}");
        assert!(a.screen().contains("still being opened"), "{key}: {}", a.screen());
    }
    a.write("/title New");
    assert_eq!(a.press(KeyCode::Enter, NONE), []);
    // The first question waits as well, whichever comes first, the model or the conversation.
    for model_first in [true, false] {
        let mut a = app((80, 24));
        a.first = Some("first".into());
        a.open("other.txt".into());
        let arrives = opened("other.txt", &[("user", "there"), ("assistant", "then")]);
        let effects = if model_first {
            assert!(asked(&a.ready()).is_none());
            a.hear(arrives)
        } else {
            assert!(asked(&a.hear(arrives)).is_none());
            a.ready()
        };
        assert_eq!(said(asked(&effects).unwrap()), ["there", "then", "first"]);
    }
}

#[test]
fn a_system_prompt_stays_in_its_conversation() {
    let mut a = ready((80, 24));
    a.write("/system Be brief.");
    a.press(KeyCode::Enter, NONE);
    a.open("french.txt".into());
    a.hear(opened("french.txt", &[("system", "French."), ("user", "q"), ("assistant", "r")]));
    assert_eq!(said(asked(&a.ask_for("s")).unwrap()), ["French.", "q", "r", "s"]);
    a.answer("t", Some(End::Eog));
    a.open("plain.txt".into());
    a.hear(opened("plain.txt", &[("user", "u"), ("assistant", "v")]));
    assert_eq!(said(asked(&a.ask_for("w")).unwrap()), ["u", "v", "w"]);
    a.answer("x", Some(End::Eog));
    // What the person set is of those that are begun.
    a.press(KeyCode::Char('n'), CTRL);
    assert_eq!(said(asked(&a.ask_for("y")).unwrap()), ["Be brief.", "y"]);
}

#[test]
fn a_name_is_given_to_the_conversation_that_was_chosen() {
    let mut a = ready((80, 24));
    a.press(KeyCode::Char('o'), CTRL);
    a.hear(listed(&["hello", "second"]));
    a.press(KeyCode::Down, NONE);
    a.press(KeyCode::F(2), NONE);
    a.press(KeyCode::Char('u'), CTRL);
    a.hear(Msg::Terminal(Event::Paste("hel".into())));
    a.write("p");
    let effects = a.press(KeyCode::Enter, NONE);
    assert_eq!(effects[0], Effect::Store(Op::RenameOther("second.txt".into(), "help".into())));
}

/// What is written in a panel can be read there, to its end, on a screen of any width.
#[test]
fn what_is_written_in_a_panel_is_seen() {
    for columns in [40, 80, 120, 200] {
        let mut a = ready((columns, 24));
        a.press(KeyCode::Char('p'), CTRL);
        a.press(KeyCode::Enter, NONE);
        a.write(&"word ".repeat(30));
        a.write("end");
        assert!(a.screen().contains("end"), "{}", a.screen());
        // Also after the window has become narrower or wider.
        a.hear(Msg::Terminal(Event::Resize(120 + 40 - columns.min(120), 24)));
        assert!(a.screen().contains("end"), "{}", a.screen());
        let mut a = app((columns, 24));
        a.press(KeyCode::Char('o'), CTRL);
        a.hear(listed(&["old name"]));
        a.press(KeyCode::F(2), NONE);
        a.press(KeyCode::Char('u'), CTRL);
        a.write(&"letter ".repeat(20));
        a.write("end");
        assert!(a.screen().contains("end"), "{}", a.screen());
    }
}

/// Whole, in one step, with line ends as everywhere.
#[test]
fn a_paste_into_a_panel_is_one_change() {
    let mut a = ready((80, 24));
    a.press(KeyCode::Char('p'), CTRL);
    a.press(KeyCode::Enter, NONE);
    a.write("x");
    a.hear(Msg::Terminal(Event::Paste("Be brief.\r\nBe kind.\rBe here.".into())));
    let Some(Panel::Settings(Settings { editor: Some(e), .. })) = &mut a.panel else { panic!("no editor") };
    assert_eq!(e.text(), "xBe brief.\nBe kind.\nBe here.");
    e.undo();
    assert_eq!(e.text(), "x");
    // A search goes to what it was given.
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer(&(0..60).map(|i| format!("line {i}\n\n")).collect::<String>(), Some(End::Eog));
    a.press(KeyCode::Char('f'), CTRL);
    a.hear(Msg::Terminal(Event::Paste("line 7\rline 8".into())));
    assert!(a.screen().contains("▶ line 7"), "{}", a.screen());
    // Of several lines a list takes the first.
    let mut a = app((80, 24));
    a.press(KeyCode::Char('o'), CTRL);
    a.hear(listed(&["hello", "second"]));
    a.hear(Msg::Terminal(Event::Paste("sec\r".into())));
    assert!(a.screen().contains("▸ second"), "{}", a.screen());
}

#[test]
fn what_is_being_written_is_not_lost_to_an_edited_question() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer("a", Some(End::Eog));
    a.write("a long draft");
    a.press(KeyCode::Char('e'), ALT);
    assert_eq!(a.editor.text(), "q");
    a.write("uestion");
    a.press(KeyCode::Esc, NONE);
    assert!(a.editor.is_empty());
    for want in ["question", "a long draft", "q"] {
        a.press(KeyCode::Up, NONE);
        assert_eq!(a.editor.text(), want);
    }
    // What comes from another editor is what is being written.
    a.hear(Msg::Written(Ok("elsewhere\n".into())));
    a.press(KeyCode::Up, NONE);
    a.press(KeyCode::Down, NONE);
    assert_eq!(a.editor.text(), "elsewhere");
}

/// What was folded went to the other editor as text, and comes back as much.
#[test]
fn a_long_text_from_another_editor_is_folded() {
    let mut a = ready((80, 24));
    let text = "a line\n".repeat(20_000);
    let effects = a.hear(Msg::Written(Ok(text.clone())));
    assert_eq!((a.editor.text().chars().count(), a.editor.expanded()), (1, text.trim_end().to_string()));
    assert!(matches!(effects[..], [Effect::Count(0, _)]));
}

/// The one that is renamed is the latest then, and comes first; of those that are deleted one after the other, the next one
/// is under the cursor.
#[test]
fn a_list_is_gone_on_with_where_it_was() {
    let mut a = ready((80, 24));
    a.press(KeyCode::Char('o'), CTRL);
    a.hear(listed(&["cart 1", "horse", "cart 2", "cart 3"]));
    a.write("cart");
    a.press(KeyCode::Down, NONE);
    a.press(KeyCode::F(2), NONE);
    a.press(KeyCode::Enter, NONE);
    a.hear(listed(&["cart 2", "cart 1", "horse", "cart 3"]));
    assert!(a.screen().contains("▸ cart 2") && !a.screen().contains("horse"), "{}", a.screen());
    // Thought better of.
    a.press(KeyCode::Delete, NONE);
    a.press(KeyCode::Esc, NONE);
    a.hear(listed(&["cart 2", "cart 1", "horse", "cart 3"]));
    assert!(a.screen().contains("▸ cart 2") && !a.screen().contains("horse"), "{}", a.screen());
    a.press(KeyCode::Delete, NONE);
    a.press(KeyCode::Enter, NONE);
    a.hear(listed(&["cart 1", "horse", "cart 3"]));
    assert!(a.screen().contains("▸ cart 1") && !a.screen().contains("horse"), "{}", a.screen());
    // Begun anew, it is whole.
    a.press(KeyCode::Esc, NONE);
    a.press(KeyCode::Esc, NONE);
    a.press(KeyCode::Char('o'), CTRL);
    a.hear(listed(&["cart 1", "horse", "cart 3"]));
    assert!(a.screen().contains("▸ cart 1") && a.screen().contains("horse"), "{}", a.screen());
}

#[test]
fn what_a_key_in_a_list_leads_to_is_seen() {
    for size in [(120, 40), (80, 24), (40, 12)] {
        let mut a = app(size);
        a.ready();
        a.ask_for("q");
        a.press(KeyCode::Char('o'), CTRL);
        let many = (0..40).map(|i| summary(&format!("talk {i}"))).collect();
        a.hear(Msg::Store(store::Event::Listed(many)));
        a.press(KeyCode::Enter, NONE);
        assert!(a.screen().contains("an answer is still coming"), "{}", a.screen());
        assert!(a.screen().contains("▸ talk 0"), "{}", a.screen());
        a.hear(Msg::Store(store::Event::Failed("talk-0.md: exists already".into())));
        assert!(a.screen().contains("talk-0.md: exists already"), "{}", a.screen());
    }
}

#[test]
fn a_long_question_is_changed_as_text() {
    let mut a = ready((80, 24));
    let question = (0..30).map(|i| format!("line {i}")).collect::<Vec<_>>().join("\n");
    a.hear(Msg::Terminal(Event::Paste(question.clone())));
    assert_eq!(a.editor.attachments().len(), 1);
    a.press(KeyCode::Enter, NONE);
    a.answer("a", Some(End::Eog));
    a.press(KeyCode::Char('e'), ALT);
    assert_eq!(a.editor.text(), question);
    a.editor.clear();
    a.press(KeyCode::Up, NONE);
    assert_eq!(a.editor.text(), question);
}

/// Several tokens of one pass read the weights once.
#[test]
fn bandwidth_counts_passes() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    let text = |passes| W::Text { text: "a".into(), tokens: 41, passes, time: Duration::from_secs(4), used: 0 };
    a.hear(Msg::Worker(text(40)));
    assert_eq!((a.rate(), a.bandwidth()), (Some(10.0), Some(1.0)));
    a.hear(Msg::Worker(text(10)));
    assert_eq!((a.rate(), a.bandwidth()), (Some(10.0), Some(0.25)));
}

/// A control token is one, but no word.
#[test]
fn tokens_without_text_are_counted_and_begin_no_answer() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    let stored = |effects: &[Effect]| effects.iter().any(|e| matches!(e, Effect::Store(_)));
    let text = |text: &str, tokens| W::Text {
        text: text.into(),
        tokens,
        passes: tokens,
        time: Duration::from_secs(2),
        used: 50 + tokens,
    };
    assert!(!stored(&a.hear(Msg::Worker(text("", 11)))));
    assert_eq!((a.rate(), a.used, a.tree.nodes.len()), (Some(5.0), 61, 1));
    assert!(stored(&a.hear(Msg::Worker(text("word", 12)))));
    assert!(!stored(&a.hear(Msg::Worker(text("", 13)))));
    assert_eq!((a.used, a.tree.nodes.len(), a.tree.nodes[1].content.as_str()), (63, 2, "word"));
}

#[test]
fn nearly_full_is_said_before_it_is_full() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    let (tokens, time) = (10, Duration::from_secs(1));
    a.hear(Msg::Worker(W::Text { text: "a".into(), tokens, passes: 9, time, used: 840 }));
    assert!(!a.screen().contains("% full"));
    // While it is said, and not only in the end.
    a.hear(Msg::Worker(W::Text { text: "a".into(), tokens, passes: 9, time, used: 900 }));
    assert!(a.screen().contains("90 % full"));
}

#[test]
fn the_end_is_followed_unless_somebody_looks_up() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer(&(0..60).map(|i| format!("line {i}\n\n")).collect::<String>(), None);
    assert!(a.screen().contains("line 59"));
    a.press(KeyCode::PageUp, NONE);
    let before = a.screen();
    assert!(!before.contains("line 59") && before.contains("Ctrl-End"));
    a.answer("line 60\n\nline 61", None);
    let transcript = |s: &str| s.lines().take(15).map(str::to_string).collect::<Vec<_>>();
    assert_eq!(transcript(&a.screen())[1..], transcript(&before)[1..], "what is looked at stays");
    a.press(KeyCode::End, CTRL);
    assert!(a.screen().contains("line 61"));
    // From turn to turn, and search.
    a.press(KeyCode::Up, ALT);
    a.press(KeyCode::Up, ALT);
    assert!(a.screen().contains("┃ q"), "{}", a.screen());
    a.press(KeyCode::Esc, NONE);
    a.press(KeyCode::Char('f'), CTRL);
    a.write("LINE 7");
    assert!(a.screen().contains("▶ line 7"), "{}", a.screen());
}

#[test]
fn commands_are_completed_and_done() {
    let mut a = ready((80, 24));
    a.write("/ex");
    assert!(a.screen().contains("/export") && a.screen().contains("/quit"));
    a.press(KeyCode::Esc, NONE);
    a.press(KeyCode::Char('u'), CTRL);
    a.write("/the");
    a.press(KeyCode::Enter, NONE);
    assert_eq!(a.editor.text(), "/theme ", "what takes more is only completed");
    a.write("light");
    a.press(KeyCode::Enter, NONE);
    assert_eq!(a.theme.scheme, Scheme::Light);
    a.write("/set temp 0.25");
    a.press(KeyCode::Enter, NONE);
    assert_eq!(a.params.temp, 0.25);
    a.write("/set parameter top_k 7");
    a.press(KeyCode::Enter, NONE);
    assert_eq!(a.params.top_k, 7);
    a.write("/nonsense");
    assert!(asked(&a.press(KeyCode::Enter, NONE)).is_none());
    assert!(a.screen().contains("no command /nonsense"));
    a.press(KeyCode::Char('u'), CTRL);
    a.write("/he");
    a.press(KeyCode::Enter, NONE);
    assert!(a.screen().contains("keys and commands"));
}

#[test]
fn completions_go_with_the_text_that_they_are_of() {
    let mut a = ready((80, 24));
    let offered = |a: &mut App| {
        a.write("hello @s");
        a.hear(Msg::Paths("s".into(), vec!["src/".into()]));
        assert!(a.screen().contains(" src/"));
    };
    offered(&mut a);
    a.hear(Msg::Written(Ok("牛牛牛牛".into())));
    assert_eq!(said(asked(&a.press(KeyCode::Enter, NONE)).unwrap()), ["牛牛牛牛"]);
    a.answer("a", Some(End::Eog));
    offered(&mut a);
    a.press(KeyCode::Char('e'), ALT);
    assert!(a.completion.choices.is_empty());
    a.write("!");
    assert_eq!(said(asked(&a.press(KeyCode::Enter, NONE)).unwrap()), ["牛牛牛牛!"]);
    a.answer("a", Some(End::Eog));
    // A command that is done is not offered again.
    a.write("/help");
    a.press(KeyCode::Enter, NONE);
    a.press(KeyCode::Esc, NONE);
    a.press(KeyCode::Enter, NONE);
    assert!(a.panel.is_none() && a.completion.choices.is_empty());
}

#[test]
fn earlier_questions_are_walked_past_commands_and_files() {
    let mut a = ready((80, 24));
    a.ask_for("first");
    a.answer("1", Some(End::Eog));
    a.write("/help");
    a.press(KeyCode::Enter, NONE);
    a.press(KeyCode::Esc, NONE);
    for want in ["/help", "first"] {
        a.press(KeyCode::Up, NONE);
        assert_eq!(a.editor.text(), want);
    }
    a.press(KeyCode::Down, NONE);
    assert_eq!((a.editor.text(), a.completion.choices.len()), ("/help", 0));
    // What is then written is completed as ever.
    a.press(KeyCode::Backspace, NONE);
    assert_eq!(a.completion.choices[0].text, "/help");
}

#[test]
fn paths_that_are_offered_can_be_told_apart() {
    let mut a = ready((40, 12));
    let folder = "a/very/deep/folder/of/a/project/with/long/names/";
    a.write(&format!("@{folder}"));
    let paths = ["first.rs", "second.rs", "third/"].map(|name| format!("{folder}{name}"));
    a.hear(Msg::Paths(folder.into(), paths.to_vec()));
    for name in ["first.rs", "second.rs", "third/"] {
        assert!(a.screen().contains(name), "{}", a.screen());
    }
    a.press(KeyCode::Down, NONE);
    assert_eq!(a.press(KeyCode::Tab, NONE), [Effect::Read(paths[1].clone())]);
}

#[test]
fn the_up_arrow_reaches_questions_of_earlier_conversations() {
    let mut a = ready((80, 24));
    a.hear(Msg::Store(store::Event::Questions(vec!["last week".into(), "yesterday".into()])));
    a.ask_for("now");
    a.answer("a", Some(End::Eog));
    for want in ["now", "yesterday", "last week", "last week"] {
        a.press(KeyCode::Up, NONE);
        assert_eq!(a.editor.text(), want);
    }
    // One that is gone on with has its own before all others.
    a.editor.clear();
    a.hear(opened("week.txt", &[("user", "last week"), ("assistant", "answer")]));
    for want in ["last week", "now", "yesterday", "yesterday"] {
        a.press(KeyCode::Up, NONE);
        assert_eq!(a.editor.text(), want);
    }
}

#[test]
fn files_come_in_before_they_are_sent() {
    let mut a = ready((80, 24));
    a.write("what says @notes.txt ?");
    let effects = a.press(KeyCode::Enter, NONE);
    assert_eq!(effects, [Effect::Read("notes.txt".into())]);
    let effects = a.hear(Msg::File("notes.txt".into(), Ok("some notes".into())));
    assert_eq!(effects, [Effect::Count(0, "some notes".into())]);
    a.hear(Msg::Counted(0, 3));
    assert!(a.screen().contains("[@notes.txt 10 B, 3 tokens]"));
    let effects = a.press(KeyCode::Enter, NONE);
    assert_eq!(said(asked(&effects).unwrap()), ["what says notes.txt:\n```txt\nsome notes\n```\n ?"]);
    a.answer("notes", Some(End::Eog));
    // A word with an @ that is no file is a word.
    a.write("hello @ada");
    assert_eq!(a.press(KeyCode::Enter, NONE), [Effect::Read("ada".into())]);
    let effects = a.hear(Msg::File("ada".into(), Err(NoText::Missing("ada: no such file".into()))));
    assert_eq!(asked(&effects).unwrap().turns.last().unwrap().content, "hello @ada");
}

/// Over a slow line, keys that were pressed one after the other come together.
#[test]
fn a_file_comes_in_once_and_only_where_it_is_named() {
    let mut a = ready((80, 24));
    a.write("what says @notes.txt ?");
    let read = [Effect::Read("notes.txt".into())];
    let comes = || Msg::File("notes.txt".into(), Ok("some notes".into()));
    assert!(a.press(KeyCode::Enter, NONE) == read && a.press(KeyCode::Enter, NONE) == read);
    a.hear(comes());
    a.hear(comes());
    assert_eq!(a.editor.expanded(), "what says notes.txt:\n```txt\nsome notes\n```\n ?");
    // One that is no longer wanted stays away.
    a.editor.clear();
    a.write("@notes.txt ");
    assert_eq!(a.press(KeyCode::Enter, NONE), read);
    a.editor.clear();
    a.hear(comes());
    assert!(a.editor.is_empty());
    // What a command names comes to the cursor.
    a.write("/file notes.txt");
    assert_eq!(a.press(KeyCode::Enter, NONE), read);
    a.hear(comes());
    assert!(a.screen().contains("[@notes.txt 10 B]"), "{}", a.screen());
    a.editor.clear();
    // A word that is none is sent once.
    a.write("hello @ada");
    a.press(KeyCode::Enter, NONE);
    a.press(KeyCode::Enter, NONE);
    let missing = || Msg::File("ada".into(), Err(NoText::Missing("ada: no such file".into())));
    assert!(asked(&a.hear(missing())).is_some());
    assert!(asked(&a.hear(missing())).is_none() && !a.screen().contains("no such file"));
}

#[test]
fn a_file_that_is_no_text_is_not_sent_unseen() {
    let unfit = |e: &str| NoText::Unfit(e.into());
    let cases = [
        ("ox.bin", unfit("ox.bin: not a text in UTF-8"), "not a text in UTF-8; Enter sends the word as it is"),
        ("big", unfit("big: 5000000 bytes, expected at most 4194304"), "expected at most 4194304"),
        ("gone.txt", NoText::Missing("gone.txt: no such file".into()), "gone.txt: no such file"),
    ];
    for (word, error, said) in cases {
        let mut a = ready((80, 24));
        a.write(&format!("read @{word}"));
        assert_eq!(a.press(KeyCode::Enter, NONE), [Effect::Read(word.into())]);
        assert!(asked(&a.hear(Msg::File(word.into(), Err(error)))).is_none(), "{word}");
        assert!(a.screen().contains(said), "{}", a.screen());
        let effects = a.press(KeyCode::Enter, NONE);
        assert_eq!(asked(&effects).unwrap().turns[0].content, format!("read @{word}"));
    }
    // What the context cannot hold is known before it is sent.
    let mut a = ready((80, 24));
    a.hear(Msg::Terminal(Event::Paste("word ".repeat(1000))));
    a.hear(Msg::Counted(0, 1000));
    assert!(a.press(KeyCode::Enter, NONE).is_empty());
    assert!(a.screen().contains("1000 tokens, the context 1000") && !a.editor.is_empty());
}

#[test]
fn a_model_that_cannot_be_had_leaves_the_one_before() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer("a", Some(End::Eog));
    a.write("/model gone.gguf");
    assert_eq!(a.press(KeyCode::Enter, NONE), [Effect::Choose("gone.gguf".into())]);
    // What would have to be fetched is asked for first.
    a.hear(Msg::Chosen(Some(Some(66_000_000_000)), "gone.gguf".into()));
    assert!(a.screen().contains("gone.gguf (66.0 GB) is not on this machine"), "{}", a.screen());
    assert_eq!(a.press(KeyCode::Enter, NONE), [Effect::Fetch("gone.gguf".into())]);
    assert_eq!((a.model_name.as_str(), a.model.is_some()), ("gone.gguf", false));
    a.hear(Msg::Worker(W::LoadFailed { problem: "gone.gguf: no such file".into(), kept: true }));
    assert!(a.screen().contains("gone.gguf: no such file; Model stays"), "{}", a.screen());
    assert!(asked(&a.ask_for("r")).is_some());
    // Without one before, there is none.
    let mut a = app((80, 24));
    a.hear(Msg::Worker(W::LoadFailed { problem: "no such file".into(), kept: false }));
    assert_eq!(a.state, State::NoModel);
}

#[test]
fn what_is_not_saved_is_shown_until_it_is() {
    let mut a = ready((80, 24));
    a.hear(Msg::Store(store::Event::Unsaved(Some("c.txt: No space left on device".into()))));
    assert!(a.screen().contains("No space left on device; it is tried again"));
    a.now += Duration::from_secs(60);
    a.hear(Msg::Tick);
    assert!(!a.screen().contains("No space left") && a.screen().contains(" not saved "));
    a.press(KeyCode::Char('d'), CTRL);
    assert!(!a.quit && a.screen().contains("Enter quits and loses it"));
    a.press(KeyCode::Esc, NONE);
    a.hear(Msg::Store(store::Event::Unsaved(None)));
    assert!(!a.screen().contains(" not saved "));
    a.press(KeyCode::Char('d'), CTRL);
    assert!(a.quit);
}

#[test]
fn what_is_not_saved_is_not_left_without_a_question() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.answer("a", Some(End::Eog));
    a.hear(Msg::Store(store::Event::Unsaved(Some("c.txt: No space left on device".into()))));
    // A new one.
    assert_eq!(a.press(KeyCode::Char('n'), CTRL), []);
    assert!(a.screen().contains("Enter leaves it and loses it"), "{}", a.screen());
    a.press(KeyCode::Esc, NONE);
    assert!(a.screen().contains(" not saved ") && a.tree.head.is_some());
    // Another one.
    let choose = |a: &mut App| {
        a.press(KeyCode::Char('o'), CTRL);
        a.hear(listed(&["other"]));
        a.press(KeyCode::Enter, NONE)
    };
    let open = Effect::Store(Op::Open("other.txt".into()));
    assert_eq!(choose(&mut a), []);
    assert_eq!(a.press(KeyCode::Enter, NONE), std::slice::from_ref(&open));
    // Its loss is not called a rescue.
    a.hear(Msg::Store(store::Event::Unsaved(None)));
    assert!(!a.screen().contains("saved again"), "{}", a.screen());
    a.hear(opened("other.txt", &[("user", "there")]));
    assert!(!a.screen().contains(" not saved "));
    assert_eq!(choose(&mut a), [open]);
}

/// What the key of `c` gives on a Russian, Ukrainian, Greek, Hebrew, Arabic and Persian keyboard, and so on.
#[test]
fn keys_are_where_they_are_on_any_keyboard() {
    let same: [(&str, char); 5] = [("сψבؤز", 'c'), ("уεקث", 'e'), ("кρרق", 'r'), ("вδגيی", 'd'), ("ьμצةپ", 'm')];
    for (letters, key) in same {
        for c in letters.chars() {
            for with in [CTRL, ALT] {
                let k = keys::latin(KeyEvent::new(KeyCode::Char(c), with));
                assert_eq!(k, KeyCode::Char(key), "{c}");
            }
        }
    }
    // As letters they are themselves.
    let mut a = ready((80, 24));
    a.write("سؤال");
    assert_eq!(a.editor.text(), "سؤال");
    a.press(KeyCode::Char('ع'), CTRL); // U
    assert!(a.editor.is_empty());
    a.press(KeyCode::Char('ؤ'), CTRL);
    a.press(KeyCode::Char('ؤ'), CTRL);
    assert!(a.quit);
}

#[test]
fn lines_go_on_after_a_backslash() {
    let mut a = ready((80, 24));
    for (line, sent) in [("one\\", false), ("two\\\\", true)] {
        a.write(line);
        assert_eq!(asked(&a.press(KeyCode::Enter, NONE)).is_some(), sent, "{line}");
    }
    assert_eq!(a.tree.nodes[0].content, "one\ntwo\\\\");
}

#[test]
fn a_system_prompt_goes_with_the_next_question() {
    let mut a = ready((80, 24));
    a.press(KeyCode::Char('p'), CTRL);
    a.press(KeyCode::Enter, NONE);
    a.write("Be brief.");
    a.press(KeyCode::Enter, NONE);
    a.press(KeyCode::Esc, NONE);
    assert_eq!(said(asked(&a.ask_for("q")).unwrap()), ["Be brief.", "q"]);
    a.answer("a", Some(End::Eog));
    a.write("/system Be long.");
    a.press(KeyCode::Enter, NONE);
    assert_eq!(said(asked(&a.ask_for("r")).unwrap()), ["Be brief.", "q", "a", "Be long.", "r"]);
}

#[test]
fn ctrl_c_stops_then_clears_then_ends() {
    let mut a = ready((80, 24));
    a.ask_for("q");
    a.write("draft");
    assert_eq!(a.press(KeyCode::Char('c'), CTRL), [Effect::Stop(1)]);
    a.answer("", Some(End::Stopped));
    a.press(KeyCode::Char('c'), CTRL);
    assert!(a.editor.is_empty() && !a.quit);
    a.press(KeyCode::Char('c'), CTRL);
    assert!(!a.quit);
    a.press(KeyCode::Char('c'), CTRL);
    assert!(a.quit);
}

const ANSWER: &str = "<think>\nThe person asks about oxen. Strength, patience.\n</think>\n\n## Oxen\n\nAn **ox** pulls \
    a cart; 牛很有耐心，力气也大。 مرحبا 👩‍🌾\n\n1. strong\n2. patient\n\n| animal | km/h |\n|---|--:|\n| ox | 3 |\n| horse | 6 |\n\n\
    ```rust\nfn speed(ox: &Ox) -> f32 {\n    3.0 // km/h\n}\n```\n\n> Slow is steady.\n";

/// The main screens, as a person meets them.
fn scenes(size: (u16, u16)) -> Vec<(&'static str, App)> {
    let mut answered = app(size);
    answered.ready();
    answered.ask_for("Tell me about oxen");
    answered.answer(ANSWER, Some(End::Eog));
    let mut answering = app(size);
    answering.ready();
    answering.ask_for("Why?");
    answering.answer("Because the **road** is long and", None);
    answering.write("and then");
    let mut reading = app(size);
    reading.ready();
    reading.hear(Msg::Terminal(Event::Paste("word ".repeat(20_000))));
    reading.press(KeyCode::Enter, NONE);
    reading.hear(Msg::Worker(W::Reading { done: 512, of: 2048, reused: 0, time: Duration::from_secs(4) }));
    let mut help = app(size);
    help.press(KeyCode::Char('?'), NONE);
    let mut settings = app(size);
    settings.ready();
    settings.press(KeyCode::Char('p'), CTRL);
    let mut list = app(size);
    list.press(KeyCode::Char('o'), CTRL);
    let summary = |title: &str, turns| Summary {
        path: format!("{turns}.txt").into(),
        title: title.into(),
        model: String::new(),
        modified: std::time::SystemTime::now(),
        turns,
    };
    list.hear(Msg::Store(store::Event::Listed(vec![summary("Oxen and carts", 12), summary("牛车的历史", 4)])));
    let mut commands = app(size);
    commands.write("/");
    vec![
        ("begin", app(size)),
        ("answered", answered),
        ("answering", answering),
        ("reading", reading),
        ("help", help),
        ("settings", settings),
        ("conversations", list),
        ("commands", commands),
    ]
}

/// What the main screens look like. `OXCART_BLESS=1` writes them anew.
#[test]
fn the_main_screens_look_as_they_did() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/screens");
    let bless = std::env::var_os("OXCART_BLESS").is_some();
    let mut wrong = Vec::new();
    for size in [(80, 24), (120, 40), (40, 10)] {
        for (name, a) in scenes(size) {
            let path = folder.join(format!("{name}-{}x{}.txt", size.0, size.1));
            let got = a.screen() + "\n";
            if bless {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &got).unwrap();
            }
            let want = std::fs::read_to_string(&path).unwrap_or_default();
            if got != want {
                wrong.push(format!("{}:\n{got}expected:\n{want}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_small_screen_still_says_what_is_wrong() {
    let mut a = ready((20, 5));
    a.say(Weight::Problem, "no such file");
    assert!(a.screen().contains("no such file"), "{}", a.screen());
}

#[test]
fn every_screen_can_be_of_any_size() {
    for (_, mut a) in scenes((80, 24)) {
        for size in (1..30).flat_map(|h| [1, 5, 10, 11, 17, 40, 81, 200].map(|w| (w, h))) {
            a.hear(Msg::Terminal(Event::Resize(size.0, size.1)));
            a.hear(Msg::Terminal(Event::Key(KeyEvent::new(KeyCode::PageUp, NONE))));
            a.screen();
        }
    }
}

/// The terminal has a new size before the message about it is read.
#[test]
fn a_screen_of_one_size_is_drawn_on_any_other() {
    let sizes: Vec<(u16, u16)> =
        [1, 2, 4, 5, 9, 15, 16, 17, 60].into_iter().flat_map(|h| [1, 10, 11, 40, 81, 200].map(|w| (w, h))).collect();
    for (_, mut a) in scenes((80, 24)) {
        for &size in &sizes {
            a.hear(Msg::Terminal(Event::Resize(size.0, size.1)));
            a.hear(Msg::Terminal(Event::Key(KeyEvent::new(KeyCode::PageUp, NONE))));
            sizes.iter().for_each(|&other| drop(a.drawn_on(other)));
        }
    }
}

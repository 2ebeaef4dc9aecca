//! The full screen in a real pseudo-terminal, with the real default model: what a person types, and what stands on the
//! screen then.

use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vt100::{Callbacks, MouseProtocolMode, Parser, Screen};

/// How long anything may take on a slow and busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_R: &str = "\x12";
const CTRL_U: &str = "\x15";
const ESC: &str = "\x1b";
const ALT_C: &str = "\x1bc";
const ALT_LEFT: &str = "\x1b[1;3D";

/// The program in a terminal.
struct Seat {
    master: Box<dyn MasterPty + Send>,
    keys: Box<dyn Write + Send>,
    child: Box<dyn Child + Send + Sync>,
    parser: Arc<Mutex<Parser<Clipboard>>>,
    modes: String,
}

/// What the terminal was told to copy, in base 64.
#[derive(Default)]
struct Clipboard(Vec<u8>);

impl Callbacks for Clipboard {
    fn copy_to_clipboard(&mut self, _: &mut Screen, _: &[u8], data: &[u8]) {
        self.0 = data.to_vec();
    }
}

impl Seat {
    /// `oxcart chat` on a screen of `columns` and `rows`; conversations and configuration are those of `home`.
    fn chat(home: &Path, columns: u16, rows: u16, args: &[&str]) -> Seat {
        Seat::with(home, columns, rows, args, &[])
    }

    /// The same in another environment.
    fn with(home: &Path, columns: u16, rows: u16, args: &[&str], environment: &[(&str, &str)]) -> Seat {
        oxcart::catalog::default_model().expect("the default model can be fetched");
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_oxcart"));
        command.args(["chat", "--temp", "0", "--top-k", "1"]);
        if !args.contains(&"-c") {
            command.args(["-c", "2048"]);
        }
        command.args(args);
        // Nobody's clipboard, and nobody's editor.
        for name in ["TMUX", "DISPLAY", "WAYLAND_DISPLAY", "VISUAL", "EDITOR"] {
            command.env_remove(name);
        }
        environment.iter().for_each(|(name, value)| command.env(name, value));
        command.env("XDG_DATA_HOME", home);
        command.env("XDG_CONFIG_HOME", home);
        command.env("TERM", "xterm-256color");
        command.env_remove("NO_COLOR");
        let pair =
            native_pty_system().openpty(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
        let modes = format!("{:?}", pair.master.get_termios());
        let child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let parser = Parser::new_with_callbacks(cells(rows), cells(columns), 0, Clipboard::default());
        let parser = Arc::new(Mutex::new(parser));
        let (mut out, seen) = (pair.master.try_clone_reader().unwrap(), parser.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(n) = out.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                seen.lock().unwrap().process(&buffer[..n]);
            }
        });
        let keys = pair.master.take_writer().unwrap();
        let seat = Seat { master: pair.master, keys, child, parser, modes };
        // What is typed before the terminal is taken over goes through its line discipline.
        seat.shows("›");
        seat
    }

    fn resize(&self, columns: u16, rows: u16) {
        self.parser.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        self.master.resize(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    /// Types a line and sends it.
    fn ask(&mut self, question: &str) {
        self.press(question);
        self.until(question, |s| s.contains(&question[..question.len().min(20)]));
        self.press("\r");
    }

    fn contents(&self) -> String {
        self.parser.lock().unwrap().screen().contents()
    }

    /// Waits until the screen is as it should be.
    fn until(&self, what: &str, ok: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        loop {
            let seen = self.contents();
            if ok(&seen) {
                return seen;
            }
            assert!(start.elapsed() < PATIENCE, "waited for {what}, and saw:\n{seen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn shows(&self, text: &str) -> String {
        self.until(text, |s| s.contains(text))
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.process_id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the end, and checks that the terminal is as it was.
    fn ended(mut self) -> u32 {
        let status = self.child.wait().unwrap();
        let start = Instant::now();
        // What was written last may still be on its way.
        while wrong(self.parser.lock().unwrap().screen()).is_some() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(wrong(self.parser.lock().unwrap().screen()), None);
        assert_eq!(format!("{:?}", self.master.get_termios()), self.modes);
        status.exit_code()
    }
}

/// What of a terminal is not as programs leave it.
fn wrong(s: &Screen) -> Option<&'static str> {
    [
        (s.alternate_screen(), "the alternate screen"),
        (s.bracketed_paste(), "bracketed paste"),
        (s.hide_cursor(), "no cursor"),
        (s.mouse_protocol_mode() != MouseProtocolMode::None, "the mouse"),
    ]
    .into_iter()
    .find_map(|(wrong, what)| wrong.then_some(what))
}

fn cells(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

fn home() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn asked_streamed_stopped_answered_again_and_branched() {
    let home = home();
    let mut s = Seat::chat(home.path(), 80, 24, &[]);
    // Typing works before the model is there.
    s.press("Write a long story about a road.");
    s.shows("a road.");
    s.press("\r");
    s.shows("t/s");
    s.press("typed meanwhile");
    s.shows("› typed meanwhile");
    s.press(ESC);
    s.shows("■ stopped");
    s.press(CTRL_U);
    s.press(CTRL_R);
    s.shows("‹ 2 of 2 ›");
    s.press(ESC);
    s.until("the second stop", |t| t.contains("● stopped"));
    s.press(ALT_LEFT);
    s.shows("‹ 1 of 2 ›");
    s.press(ALT_C);
    s.shows("answering");
    s.press(CTRL_C);
    s.shows("● stopped");
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

#[test]
fn every_size_while_it_answers() {
    let home = home();
    let mut s = Seat::chat(home.path(), 120, 40, &[]);
    s.ask("Write a long story about a cart.");
    s.shows("answering");
    for (columns, rows) in [(40, 10), (80, 24), (10, 3), (200, 50), (41, 11), (80, 24)] {
        s.resize(columns, rows);
        std::thread::sleep(Duration::from_millis(150));
    }
    s.shows("▌ Write a long story");
    s.press(ESC);
    s.shows("● stopped");
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

#[test]
fn a_template_that_cannot_be_read_is_named() {
    let home = home();
    let file = home.path().join("broken.jinja");
    std::fs::write(&file, "{% for m in messages %}").unwrap();
    let mut s = Seat::chat(home.path(), 200, 24, &["--chat-template-file", file.to_str().unwrap()]);
    s.until("what is wrong, and where", |t| t.contains("chat template: ") && t.contains("broken.jinja)"));
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

/// The first frame after another editor is drawn at once; that the window has shrunk meanwhile is heard of when the keys
/// are read again, which is later. So this meets each time what dragging a window meets now and then.
#[test]
fn a_window_that_shrinks_under_another_editor() {
    let home = home();
    let (script, size) = (home.path().join("edit.sh"), home.path().join("size"));
    std::fs::write(&script, "read columns rows < \"$SIZE\"\nstty cols $columns rows $rows\ncat \"$SIZE\" > \"$1\"\n")
        .unwrap();
    let editor = format!("sh '{}'", script.display());
    let environment = [("VISUAL", &*editor), ("SIZE", size.to_str().unwrap())];
    let mut s = Seat::with(home.path(), 120, 40, &[], &environment);
    for (columns, rows) in [(40, 10), (120, 40), (80, 12), (79, 11), (20, 5), (120, 40), (119, 6), (80, 24)] {
        std::fs::write(&size, format!("{columns} {rows}\n")).unwrap();
        s.parser.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        s.press("\x07"); // Ctrl-G
        s.shows(&format!("› {columns} {rows}"));
    }
    s.press(CTRL_U);
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

/// An editor that leaves the key to the terminal, as ed does, has the signal sent to this program, too.
#[test]
fn ctrl_c_in_another_editor_is_of_that_editor() {
    let home = home();
    let (script, pid) = (home.path().join("edit.sh"), home.path().join("pid"));
    std::fs::write(
        &script,
        "kill -INT \"$(cat \"$PID\")\"\nsleep 1.5\nkill -INT \"$(cat \"$PID\")\"\necho written > \"$1\"\n",
    )
    .unwrap();
    let editor = format!("sh '{}'", script.display());
    let mut s = Seat::with(home.path(), 80, 24, &[], &[("VISUAL", &editor), ("PID", pid.to_str().unwrap())]);
    std::fs::write(&pid, s.child.process_id().unwrap().to_string()).unwrap();
    s.press("\x07"); // Ctrl-G
    s.shows("› written");
    s.press("!");
    s.shows("› written!");
    s.press(CTRL_U);
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

#[test]
fn a_long_paste_is_folded_and_scripts_of_all_directions_stay() {
    let home = home();
    let mut s = Seat::chat(home.path(), 80, 24, &["-n", "4"]);
    s.press(&format!("\x1b[200~{}\x1b[201~", "a line of a long paste\n".repeat(4_400)));
    s.shows("[pasted 101 kB");
    s.press("?");
    s.shows("]?");
    s.until("its tokens", |t| t.contains("tokens]?"));
    s.press(CTRL_U);
    s.until("an empty line", |t| !t.contains("[pasted"));
    s.press("你好，世界 مرحبا 👩\u{200d}🌾 e\u{301}");
    s.shows("你好，世界 مرحبا");
    s.press("\r");
    s.shows("▌ 你好，世界 مرحبا");
    s.shows("● ready");
    s.press("\x1b[200~two\nlines\x1b[201~");
    s.shows("lines");
    s.press(CTRL_C);
    s.press(CTRL_C);
    s.press(CTRL_C);
    assert_eq!(s.ended(), 0);
}

#[test]
fn killed_in_the_middle_of_an_answer_and_gone_on_with() {
    let home = home();
    let mut s = Seat::chat(home.path(), 80, 24, &[]);
    s.ask("Write a long story about a river.");
    let begun = |t: &str| {
        let answer = t
            .lines()
            .skip_while(|l| !l.starts_with('▌'))
            .find(|l| l.starts_with("  ") && l.trim().chars().count() > 30)?;
        Some(answer.trim().chars().take(20).collect::<String>())
    };
    let first = begun(&s.until("some of the answer", |t| t.contains("t/s") && begun(t).is_some())).unwrap();
    s.signal(rustix::process::Signal::KILL);
    s.child.wait().unwrap();
    let mut s = Seat::chat(home.path(), 80, 24, &["--continue"]);
    s.shows("Write a long story about a river.");
    s.shows("cut off · Alt-C goes on");
    s.press("\x1b[1;5H"); // to the beginning
    s.shows(&first);
    s.press(ALT_C);
    s.shows("answering");
    s.press(ESC);
    s.shows("● stopped");
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let home = home();
    let mut s = Seat::chat(home.path(), 80, 24, &[]);
    s.ask("Write a long story about a hill.");
    s.shows("answering");
    s.signal(rustix::process::Signal::TERM);
    assert_eq!(s.ended(), 0);
    let text = kept(home.path());
    assert!(text.contains("Write a long story about a hill.") && text.contains("stopped"), "{text}");
}

#[test]
fn another_editor_another_model_and_a_terminal_that_is_closed() {
    let home = home();
    let (script, fails) = (home.path().join("edit.sh"), home.path().join("fails"));
    // It leaves a copy, as some do.
    let does = "test -e \"$FAILS\" && exit 3\ncp \"$1\" \"$1~\"\nprintf ' by hand \\344\\n' >> \"$1\"\n";
    std::fs::write(&script, does).unwrap();
    let editor = format!("sh '{}'", script.display());
    let temporary = home.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let environment = [
        ("VISUAL", &*editor),
        ("EDITOR", "false"),
        ("FAILS", fails.to_str().unwrap()),
        ("TMPDIR", temporary.to_str().unwrap()),
    ];
    let mut s = Seat::with(home.path(), 80, 24, &[], &environment);
    s.press("Write a long story");
    s.shows("a long story");
    s.press("\x07"); // Ctrl-G
    // A byte that is no UTF-8 does not cost the rest. (What stands for it is not seen: this terminal leaves it out.)
    s.shows("› Write a long story by hand");
    std::fs::write(&fails, "").unwrap();
    s.press("\x07");
    s.shows("exit status: 3; the question is as before");
    assert_eq!(walk(&temporary), [] as [std::path::PathBuf; 0], "nothing that was written stays there");
    s.press(CTRL_U);
    s.until("an empty line", |t| !t.contains("by hand"));
    // A model that is not there leaves the one that is.
    s.until("the model", |t| t.contains("● ready"));
    s.press("/model /no/such.gguf\r");
    s.shows("stays");
    // What is no text is not sent.
    // The space closes the list of paths, which Enter would choose from if it came in time.
    s.press("what is @/dev/null \r");
    s.shows("/dev/null: not a file; Enter sends the word as it is");
    s.press(CTRL_U);
    s.ask("Write a long story.");
    s.shows("answering");
    s.until("some of it", |t| t.contains(" t/s"));
    let Seat { master, keys, mut child, .. } = s;
    // The reader's copy of the terminal would keep it open.
    drop((master, keys));
    let pid = rustix::process::Pid::from_raw(child.process_id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    child.wait().unwrap();
    assert!(kept(home.path()).contains("% end 2 stopped"), "{}", kept(home.path()));
}

#[test]
fn a_context_that_fills_up() {
    let home = home();
    let mut s = Seat::chat(home.path(), 80, 12, &["-c", "192"]);
    s.ask("Write a long story about a sea.");
    s.until("a warning while it answers", |t| t.contains("answering") && t.contains("% full: when it is"));
    s.shows("the context is full: Alt-C goes on");
    // The wheel looks up, and the end stays where it is.
    s.press("\x1b[<64;10;10M");
    s.shows("Ctrl-End");
    s.press(ALT_C);
    s.shows("the model reads the question and the end of its answer");
    s.shows("answering");
    s.press(ESC);
    s.shows("● stopped");
    s.press("\x19"); // Ctrl-Y
    s.shows("the answer is copied");
    let copied = s.parser.lock().unwrap().callbacks().0.len();
    assert!(copied > 400, "{copied} letters of base 64");
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

#[test]
fn weights_from_the_disk_are_read_under_the_eyes_and_stopped() {
    let home = home();
    let mut s = Seat::chat(home.path(), 120, 24, &["--resident-memory", "30M"]);
    s.ask("Write a long story about a wheel.");
    s.shows("answering");
    s.press(ESC);
    s.shows("■ stopped");
    s.press(CTRL_D);
    assert_eq!(s.ended(), 0);
}

/// The conversation in `home`, as it stands in its file.
fn kept(home: &Path) -> String {
    let file = walk(home).into_iter().find(|p| p.extension().is_some_and(|e| e == "txt")).expect("a conversation");
    std::fs::read_to_string(file).unwrap()
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|p| if p.is_dir() { walk(&p) } else { vec![p] }).collect()
}

/// Draws the screen of a real conversation as SVG, for the README: `cargo test --release --test tui -- --ignored picture`.
#[test]
#[ignore = "makes a picture; nothing to check"]
fn picture() {
    let home = home();
    let mut s = Seat::chat(home.path(), 92, 30, &["-n", "160"]);
    s.ask("Write a Python function that reverses a list, and explain it briefly.");
    s.until("an answer", |t| t.contains("● ready") && t.contains("t/s"));
    std::thread::sleep(Duration::from_millis(300));
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chat.svg");
    std::fs::write(&path, svg(s.parser.lock().unwrap().screen())).unwrap();
    println!("{}", path.display());
    s.press(CTRL_D);
    s.ended();
}

/// A screen as an SVG: a rectangle for each ground, a text for each run of equal letters.
fn svg(s: &Screen) -> String {
    const CELL: (f32, f32) = (8.4, 18.0);
    let (rows, columns) = (s.size().0.get(), s.size().1.get());
    let (w, h) = (columns as f32 * CELL.0 + 24.0, rows as f32 * CELL.1 + 24.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" font-family=\"ui-monospace,Menlo,Consolas,\
         'DejaVu Sans Mono',monospace\" font-size=\"14\">\n<rect width=\"{w}\" height=\"{h}\" rx=\"8\" fill=\"#16181d\"/>\n"
    );
    for y in 0..rows {
        let mut x = 0;
        while x < columns {
            let Some(cell) = s.cell(y, x) else { break };
            let look = |c: &vt100::Cell| (c.fgcolor(), c.bgcolor(), c.bold(), c.italic(), c.underline(), c.dim());
            let (start, mut text) = (x, String::new());
            while let Some(c) = s.cell(y, x).filter(|c| look(c) == look(cell)) {
                text.push_str(if c.has_contents() {
                    c.contents()
                } else if c.is_wide_continuation() {
                    ""
                } else {
                    " "
                });
                x += 1;
            }
            let (left, top) = (12.0 + start as f32 * CELL.0, 12.0 + y as f32 * CELL.1);
            let width = (x - start) as f32 * CELL.0;
            if let Some(ground) = rgb(cell.bgcolor()) {
                out += &format!(
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{}\" fill=\"{ground}\"/>\n",
                    CELL.1
                );
            }
            if text.trim().is_empty() {
                continue;
            }
            let mut style = format!(" fill=\"{}\"", rgb(cell.fgcolor()).unwrap_or("#d4d7dd".into()));
            for (set, what) in [
                (cell.bold(), " font-weight=\"bold\""),
                (cell.italic(), " font-style=\"italic\""),
                (cell.underline(), " text-decoration=\"underline\""),
                (cell.dim(), " opacity=\"0.6\""),
            ] {
                style += if set { what } else { "" };
            }
            let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            out += &format!(
                "<text x=\"{left}\" y=\"{}\" xml:space=\"preserve\" textLength=\"{width}\"{style}>{text}</text>\n",
                top + 13.5
            );
        }
    }
    out + "</svg>\n"
}

/// The colour of xterm's palette.
fn rgb(c: vt100::Color) -> Option<String> {
    const BASE: [&str; 16] = [
        "#000000", "#cd3131", "#0dbc79", "#e5e510", "#2472c8", "#bc3fbc", "#11a8cd", "#e5e5e5", "#666666", "#f14c4c",
        "#23d18b", "#f5f543", "#3b8eea", "#d670d6", "#29b8db", "#ffffff",
    ];
    match c {
        vt100::Color::Default => None,
        vt100::Color::Rgb(r, g, b) => Some(format!("#{r:02x}{g:02x}{b:02x}")),
        vt100::Color::Idx(i @ 0..16) => Some(BASE[i as usize].into()),
        vt100::Color::Idx(i @ 16..232) => {
            let level = |n: u8| if n == 0 { 0 } else { 55 + 40 * n };
            let i = i - 16;
            Some(format!("#{:02x}{:02x}{:02x}", level(i / 36), level(i / 6 % 6), level(i % 6)))
        }
        vt100::Color::Idx(i) => Some(format!("#{0:02x}{0:02x}{0:02x}", 8 + 10 * (i - 232))),
    }
}

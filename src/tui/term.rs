//! The terminal: taken over and given back.
//!
//! It is given back whatever happens: when [`Screen`] is dropped, before a panic is reported, and before the program is
//! suspended or another program gets the terminal.

use super::wrap::width;
use crossterm::event::{
    DisableBracketedPaste, DisableMouseCapture, EnableBracketedPaste, EnableMouseCapture, KeyboardEnhancementFlags,
    PopKeyboardEnhancementFlags, PushKeyboardEnhancementFlags,
};
use crossterm::terminal::{
    BeginSynchronizedUpdate, Clear, ClearType, DisableLineWrap, EnableLineWrap, EndSynchronizedUpdate,
    EnterAlternateScreen, LeaveAlternateScreen, SetTitle, disable_raw_mode, enable_raw_mode,
};
use crossterm::{cursor, execute, queue};
use ratatui::Terminal;
use ratatui::backend::{Backend, CrosstermBackend};
use ratatui::buffer::{Buffer, Cell};
use std::collections::HashMap;
use std::io::{self, BufWriter, Stdout, Write};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal while it is ours.
pub struct Screen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
    unsure: HashMap<u16, Vec<Cell>>, // rows as drawn last, of those with letters whose width terminals do not agree on
    mouse: bool,
}

impl Screen {
    /// Takes the terminal over.
    pub fn take(mouse: bool) -> io::Result<Screen> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |p| {
                give_back();
                report(p);
            }));
        });
        enter(mouse)?;
        Ok(Screen { terminal: terminal()?, unsure: HashMap::new(), mouse })
    }

    /// Columns and rows.
    pub fn size(&self) -> io::Result<(u16, u16)> {
        let s = self.terminal.size()?;
        Ok((s.width, s.height))
    }

    /// Draws a frame.
    pub fn draw(&mut self, f: impl FnOnce(&mut ratatui::Frame)) -> io::Result<()> {
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        let done = self.terminal.draw(|frame| {
            f(frame);
            frame.buffer_mut().content.iter_mut().for_each(join_nothing);
        })?;
        let now = unsure_rows(done.buffer);
        let before = std::mem::take(&mut self.unsure);
        let changed = |y: &u16| before.get(y) != now.get(y);
        let anew: Vec<(u16, Vec<Cell>)> = (0..done.area.height)
            .filter(changed)
            .map(|y| (y, now.get(&y).cloned().unwrap_or_else(|| row(done.buffer, y).to_vec())))
            .collect();
        self.unsure = now;
        self.draw_anew(&anew)?;
        queue!(self.terminal.backend_mut(), EndSynchronizedUpdate)?;
        Write::flush(self.terminal.backend_mut())
    }

    /// Draws whole rows, and says where each letter stands that comes after one whose width is unsure. What the terminal
    /// takes for wider or narrower than it is counted here then upsets no letter beside it, and leaves nothing behind.
    fn draw_anew(&mut self, rows: &[(u16, Vec<Cell>)]) -> io::Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let backend = self.terminal.backend_mut();
        queue!(backend, cursor::SavePosition)?;
        for (y, cells) in rows {
            queue!(backend, cursor::MoveTo(0, *y), Clear(ClearType::CurrentLine))?;
            let (mut x, mut part) = (0, Vec::new());
            while let Some(cell) = cells.get(x) {
                part.push((x as u16, *y, cell));
                x += width(cell.symbol()).max(1);
                if unsure(cell.symbol()) {
                    backend.draw(std::mem::take(&mut part).into_iter())?;
                }
            }
            backend.draw(part.into_iter())?;
        }
        queue!(backend, cursor::RestorePosition)
    }

    /// The next frame is drawn in full.
    pub fn redraw(&mut self) -> io::Result<()> {
        self.unsure.clear();
        // The library's own way asks where the cursor is, and fails where a terminal does not answer.
        execute!(self.terminal.backend_mut(), Clear(ClearType::All))?;
        self.terminal = terminal()?;
        Ok(())
    }

    /// Whether the mouse is ours.
    pub fn set_mouse(&mut self, mouse: bool) -> io::Result<()> {
        self.mouse = mouse;
        match mouse {
            true => execute!(self.terminal.backend_mut(), EnableMouseCapture),
            false => execute!(self.terminal.backend_mut(), DisableMouseCapture),
        }
    }

    /// Sends something that is no drawing.
    pub fn send(&mut self, command: impl crossterm::Command) -> io::Result<()> {
        execute!(self.terminal.backend_mut(), command)
    }

    /// Gives the terminal back while `f` runs.
    pub fn without<T>(&mut self, f: impl FnOnce() -> T) -> io::Result<T> {
        give_back();
        let out = f();
        enter(self.mouse)?;
        self.redraw()?;
        Ok(out)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// Whether terminals differ in how wide they draw a letter: one of several characters (marks, joined emoji, flags), and
/// those above the planes of writing, of which every version of Unicode adds some.
fn unsure(symbol: &str) -> bool {
    let mut chars = symbol.chars();
    chars.next().is_some_and(|c| c >= '\u{1f000}') || chars.next().is_some()
}

/// The rows with such letters.
fn unsure_rows(b: &Buffer) -> HashMap<u16, Vec<Cell>> {
    let rows = (0..b.area.height).map(|y| (y, row(b, y)));
    rows.filter(|(_, cells)| cells.iter().any(|c| unsure(c.symbol()))).map(|(y, cells)| (y, cells.to_vec())).collect()
}

fn row(b: &Buffer, y: u16) -> &[Cell] {
    let columns = b.area.width as usize;
    &b.content[y as usize * columns..][..columns]
}

/// Takes a joiner away that joins nothing, as a growing answer has it: some terminals would join the next thing that is
/// drawn, wherever that is.
fn join_nothing(c: &mut Cell) {
    if let Some(s) = c.symbol().strip_suffix('\u{200d}').map(str::to_string) {
        c.set_symbol(if s.is_empty() { " " } else { &s });
    }
}

/// A terminal of which nothing is drawn yet.
fn terminal() -> io::Result<Terminal<CrosstermBackend<BufWriter<Stdout>>>> {
    // A frame goes out in one piece.
    Terminal::new(CrosstermBackend::new(BufWriter::with_capacity(64 << 10, io::stdout())))
}

fn enter(mouse: bool) -> io::Result<()> {
    enable_raw_mode()?;
    TAKEN.store(true, Ordering::SeqCst);
    let mut out = io::stdout();
    // Terminals that do not know the keyboard protocol pass over it; with it, Shift-Enter and Ctrl-/ are told.
    let keys = PushKeyboardEnhancementFlags(KeyboardEnhancementFlags::DISAMBIGUATE_ESCAPE_CODES);
    // A row whose letters are wider than they are counted ends at the edge, and not in the next row.
    execute!(out, EnterAlternateScreen, DisableLineWrap, EnableBracketedPaste, keys, SetTitle("oxcart"))?;
    if mouse {
        execute!(out, EnableMouseCapture)?;
    }
    Ok(())
}

/// Gives the terminal back, if it is ours. Errors have nowhere to go: it may be gone.
pub fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let mut out = io::stdout();
        let _ = execute!(
            out,
            EndSynchronizedUpdate,
            PopKeyboardEnhancementFlags,
            DisableMouseCapture,
            DisableBracketedPaste,
            EnableLineWrap,
            LeaveAlternateScreen,
            cursor::Show
        );
        let _ = disable_raw_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portable_pty::{CommandBuilder, PtySize, native_pty_system};
    use std::io::Read;

    /// Run by the other test, on a terminal of its own.
    #[test]
    #[ignore = "panics on purpose"]
    fn panic_on_the_screen() {
        let mut screen = Screen::take(true).unwrap();
        screen.draw(|f| f.buffer_mut().set_string(0, 0, "drawn", ratatui::style::Style::new())).unwrap();
        panic!("of all things");
    }

    #[test]
    fn a_panic_gives_the_terminal_back_and_is_read() {
        let pair = native_pty_system().openpty(PtySize { rows: 24, cols: 80, ..PtySize::default() }).unwrap();
        let modes = format!("{:?}", pair.master.get_termios());
        let mut command = CommandBuilder::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "tui::term::tests::panic_on_the_screen", "--nocapture"]);
        command.env_remove("RUST_BACKTRACE");
        let mut child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let mut reader = pair.master.try_clone_reader().unwrap();
        let mut out = Vec::new();
        // A pseudo-terminal whose other side is closed gives an error, after everything else.
        let _ = reader.read_to_end(&mut out);
        assert!(!child.wait().unwrap().success());
        let size = |n| std::num::NonZeroU16::new(n).unwrap();
        let mut parser = vt100::Parser::new(size(24), size(80), 0);
        let text = String::from_utf8_lossy(&out);
        assert!(text.contains("drawn") && text.contains("\u{1b}[?1049h"), "{text}");
        parser.process(&out);
        let s = parser.screen();
        assert!(!s.alternate_screen() && !s.bracketed_paste() && !s.hide_cursor());
        assert_eq!(s.mouse_protocol_mode(), vt100::MouseProtocolMode::None);
        assert!(s.contents().contains("of all things") && !s.contents().contains("drawn"), "{}", s.contents());
        assert_eq!(format!("{:?}", pair.master.get_termios()), modes);
    }
}

//! The terminal: taken over and given back.
//!
//! It is given back whatever happens: when [`Screen`] is dropped, before a panic is reported, and before the program is
//! suspended or another program gets the terminal.

use crossterm::event::{
    DisableBracketedPaste, DisableMouseCapture, EnableBracketedPaste, EnableMouseCapture, KeyboardEnhancementFlags,
    PopKeyboardEnhancementFlags, PushKeyboardEnhancementFlags,
};
use crossterm::terminal::{
    BeginSynchronizedUpdate, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, SetTitle,
    disable_raw_mode, enable_raw_mode,
};
use crossterm::{cursor, execute, queue};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::layout::Rect;
use std::io::{self, BufWriter, Stdout, Write};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal while it is ours.
pub struct Screen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
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
        // A frame goes out in one piece.
        let backend = CrosstermBackend::new(BufWriter::with_capacity(64 << 10, io::stdout()));
        Ok(Screen { terminal: Terminal::new(backend)?, mouse })
    }

    /// Columns and rows.
    pub fn size(&self) -> io::Result<(u16, u16)> {
        let s = self.terminal.size()?;
        Ok((s.width, s.height))
    }

    /// Draws a frame.
    pub fn draw(&mut self, f: impl FnOnce(&mut ratatui::Frame)) -> io::Result<()> {
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate)?;
        self.terminal.draw(f)?;
        queue!(self.terminal.backend_mut(), EndSynchronizedUpdate)?;
        Write::flush(self.terminal.backend_mut())
    }

    /// The next frame is drawn in full.
    pub fn redraw(&mut self) -> io::Result<()> {
        let (width, height) = self.size()?;
        self.terminal.resize(Rect::new(0, 0, width, height))?;
        self.terminal.clear()
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

fn enter(mouse: bool) -> io::Result<()> {
    enable_raw_mode()?;
    TAKEN.store(true, Ordering::SeqCst);
    let mut out = io::stdout();
    // Terminals that do not know the keyboard protocol pass over it; with it, Shift-Enter and Ctrl-/ are told.
    let keys = PushKeyboardEnhancementFlags(KeyboardEnhancementFlags::DISAMBIGUATE_ESCAPE_CODES);
    execute!(out, EnterAlternateScreen, EnableBracketedPaste, keys, SetTitle("oxcart"))?;
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

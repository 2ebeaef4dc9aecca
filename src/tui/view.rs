//! What is drawn, from what [`App`] says. Nothing is changed here.

use super::app::{App, Choice, Scroll, State, Weight};
use super::command::{COMMANDS, KEYS};
use super::editor::Editor;
use super::panel::{Items, List, Panel, Settings};
use super::theme::Theme;
use super::wrap::{clean, ellipsis, width, wrap};
use crate::chat::history::Summary;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use std::time::{Duration, SystemTime};
use unicode_segmentation::UnicodeSegmentation;

/// The widest column of text that is pleasant to read.
const MOST_CELLS: usize = 100;
/// Columns before the text.
const GUTTER: u16 = 2;
/// From so many rows on there is a line at the top.
const HEADER_FROM: u16 = 16;
/// Columns of the boxes of settings and of lists, at most.
const SETTINGS: u16 = 84;
const LIST: u16 = 90;
/// Rows of the smallest box of a list in which something can be chosen.
const LIST_ROWS: u16 = 4;
const SPINNER: [&str; 10] = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"];

/// Columns of the conversation's text, on a screen of so many.
pub fn reading_cells(columns: u16) -> usize {
    (columns.saturating_sub(GUTTER + 1) as usize).clamp(8, MOST_CELLS)
}

/// Columns of the editor's text, on a screen of so many.
pub fn editor_cells(columns: u16) -> usize {
    (columns.saturating_sub(GUTTER + 1) as usize).max(4)
}

/// Columns of a setting's value that is being changed, on a screen of so many.
pub fn setting_cells(columns: u16) -> usize {
    let inside = columns.min(SETTINGS).saturating_sub(4);
    (inside.saturating_sub(setting_names(inside) + 2) as usize).max(4)
}

/// Columns of settings' names, in a box that has so many inside.
fn setting_names(inside: u16) -> u16 {
    if inside < 50 { 10 } else { 18 }
}

/// Columns of a name that is being written in a list, on a screen of so many.
pub fn naming_cells(columns: u16) -> usize {
    (columns.min(LIST).saturating_sub(4 + GUTTER + 1) as usize).max(4)
}

/// Where things are.
pub struct Areas {
    /// Model and title; none on a small screen.
    pub header: Option<Rect>,
    /// The conversation.
    pub transcript: Rect,
    /// Notices, what waits, the search.
    pub talk: Rect,
    /// The line above the editor.
    pub rule: Rect,
    /// The editor.
    pub editor: Rect,
    /// The line at the bottom.
    pub status: Rect,
}

/// Divides a screen of that size.
pub fn areas(app: &App, (columns, rows): (u16, u16)) -> Areas {
    let header = u16::from(rows >= HEADER_FROM);
    let room = rows.saturating_sub(header + 2);
    let editor = (app.editor.rows().len() as u16).clamp(1, (room / 3).max(1)).min(room);
    // Beside one row of the conversation there is one for what must be said, however small the screen is.
    let rest = room.saturating_sub(editor);
    let talk = (talk(app, columns).len() as u16).min((rest.saturating_sub(1) / 2).max(u16::from(rest > 1)));
    let transcript = rest - talk;
    let mut y = 0;
    let mut next = |height: u16| {
        y += height;
        Rect::new(0, y - height, columns, height)
    };
    let top = next(header);
    let transcript = next(transcript);
    let (talk, rule) = (next(talk), next(u16::from(rows > 2)));
    Areas {
        header: (header > 0).then_some(top),
        transcript,
        talk,
        rule,
        editor: next(editor),
        status: next(1.min(rows)),
    }
}

/// Draws everything.
///
/// By the size that the frame has: while a window is dragged, the terminal is smaller than the last message about it says.
pub fn draw(f: &mut Frame, app: &App) {
    let screen = f.area();
    if screen.width < 10 || screen.height < 4 {
        f.buffer_mut().set_string(0, 0, "too small", app.theme.warn);
        return;
    }
    let a = areas(app, (screen.width, screen.height));
    let t = &app.theme;
    let buf = f.buffer_mut();
    if let Some(r) = a.header {
        header(buf, r, app);
    }
    match app.tree.head {
        None => welcome(buf, a.transcript, app),
        Some(_) => transcript(buf, a.transcript, app),
    }
    for (i, line) in talk(app, screen.width).iter().take(a.talk.height as usize).enumerate() {
        buf.set_line(GUTTER, a.talk.y + i as u16, line, a.talk.width.saturating_sub(GUTTER));
    }
    rule(buf, a.rule, a.transcript.height as usize, app);
    let mut cursor = editor(buf, a.editor, &app.editor, "› ", t.accent, t);
    completions(buf, a.rule.y, app);
    status(buf, a.status, app);
    match &app.panel {
        Some(Panel::Help(from)) => {
            help(buf, screen, *from, t);
            cursor = None;
        }
        Some(Panel::Settings(s)) => cursor = settings(buf, screen, s, t),
        Some(Panel::List(l)) => {
            // What comes of its keys is said below it.
            let above = Rect { height: a.talk.y, ..screen };
            let said = app.notice.is_some() && above.height >= LIST_ROWS;
            cursor = list(buf, if said { above } else { screen }, l, t);
        }
        Some(Panel::Confirm(text, _)) => {
            confirm(buf, screen, text, t);
            cursor = None;
        }
        Some(Panel::Find(find)) => {
            let x = GUTTER + 6 + width(&find.query) as u16;
            cursor = Some(Position::new(x.min(screen.width - 1), a.talk.y));
        }
        None => {}
    }
    if let Some(p) = cursor {
        f.set_cursor_position(p);
    }
}

fn header(buf: &mut Buffer, r: Rect, app: &App) {
    let t = &app.theme;
    let room = r.width as usize - 2;
    let name = ellipsis(&app.model_name, room);
    let title = ellipsis(&app.title, room.saturating_sub(width(&name) + 3));
    buf.set_string(1, r.y, &name, t.dim);
    let x = (r.width as usize).saturating_sub(width(&title) + 1) as u16;
    buf.set_string(x, r.y, &title, t.text);
}

fn ago(s: &Summary) -> String {
    let seconds = SystemTime::now().duration_since(s.modified).unwrap_or_default().as_secs();
    match seconds {
        0..60 => "now".into(),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

fn welcome(buf: &mut Buffer, r: Rect, app: &App) {
    let t = &app.theme;
    let mut lines =
        vec![Line::from(vec![Span::styled("oxcart ", t.accent), Span::styled(app.model_name.clone(), t.text)])];
    let facts = app.model.as_ref().map(|m| m.facts.clone());
    let facts = facts.unwrap_or_else(|| "the model is being loaded; you can write already".into());
    wrap(&[Span::styled(clean(&facts).into_owned(), t.dim)], editor_cells(r.width), &[], &[], &mut lines);
    lines.push(Line::default());
    for (key, what) in
        [("?", "all keys"), ("/", "commands"), ("@", "attach a file"), ("Ctrl-O", "earlier conversations")]
    {
        lines.push(Line::from(vec![Span::styled(format!("{key:<8}"), t.accent), Span::styled(what, t.text)]));
    }
    if !app.recent.is_empty() {
        lines.push(Line::default());
        for s in app.recent.iter().take(5) {
            let age = ago(s);
            let title = ellipsis(&s.title, (r.width as usize).saturating_sub(18));
            lines.push(Line::from(vec![Span::styled(format!("{age:>7} "), t.dim), Span::styled(title, t.text)]));
        }
    }
    let room = r.height as usize;
    let y = r.y + (room.saturating_sub(lines.len()) / 3) as u16;
    for (i, line) in lines.iter().take(room).enumerate() {
        buf.set_line(GUTTER, y + i as u16, line, r.width.saturating_sub(GUTTER));
    }
}

fn transcript(buf: &mut Buffer, r: Rect, app: &App) {
    let t = &app.theme;
    let page = r.height as usize;
    let top = app.top(page);
    let cells = reading_cells(r.width);
    let query = match &app.panel {
        Some(Panel::Find(f)) if !f.query.trim().is_empty() => f.query.trim().to_lowercase(),
        _ => String::new(),
    };
    let current = match &app.panel {
        Some(Panel::Find(f)) => f.rows.get(f.at).copied(),
        _ => None,
    };
    let selected = app.selected.and_then(|s| app.transcript.places().get(s)).map(|p| p.node);
    for y in 0..page.min(app.transcript.height.saturating_sub(top)) {
        let (node, line) = app.transcript.row(top + y);
        let (Some(node), Some(line)) = (node, line) else { continue };
        let at = r.y + y as u16;
        let user = app.tree.nodes[node].role == "user";
        let (mark, style) = match (selected == Some(node), current == Some(top + y)) {
            (_, true) => ("▶", t.accent),
            (true, _) => ("┃", t.accent),
            (false, _) if user => ("▌", t.accent),
            _ => (" ", t.text),
        };
        buf.set_string(0, at, mark, style);
        buf.set_line(GUTTER, at, line, cells as u16);
        if !query.is_empty() {
            mark_found(buf, GUTTER, at, line, &query, t.found);
        }
    }
    // A thin bar says where in the conversation this is.
    let height = app.transcript.height;
    if height > page && page > 2 {
        let long = (page * page / height).max(1);
        let from = (top * (page - long)) / (height - page).max(1);
        for y in 0..page {
            let style = if (from..from + long).contains(&y) { t.dim } else { t.rule };
            let mark = if (from..from + long).contains(&y) { "┃" } else { " " };
            buf.set_string(r.right() - 1, r.y + y as u16, mark, style);
        }
    }
}

fn mark_found(buf: &mut Buffer, x: u16, y: u16, line: &Line, query: &str, style: Style) {
    let text = line.to_string();
    let lower = text.to_lowercase();
    // Where lower case has other lengths, positions would be wrong.
    if lower.len() != text.len() {
        return;
    }
    for (at, found) in lower.match_indices(query) {
        if let (Some(before), Some(found)) = (text.get(..at), text.get(at..at + found.len())) {
            let (from, to) = (width(before), width(before) + width(found));
            for column in from..to {
                if let Some(cell) = buf.cell_mut((x + column as u16, y)) {
                    cell.set_style(style);
                }
            }
        }
    }
}

/// What is said between the conversation and the editor.
fn talk(app: &App, columns: u16) -> Vec<Line<'static>> {
    let t = &app.theme;
    let cells = editor_cells(columns);
    let mut lines = Vec::new();
    if let Some(Panel::Find(f)) = &app.panel {
        let place = match f.rows.len() {
            0 if f.query.is_empty() => String::new(),
            0 => "  nothing found".into(),
            n => format!("  {} of {n}", f.at + 1),
        };
        let hint = "  ↑ ↓ go through, Esc leaves";
        lines.push(Line::from(vec![
            Span::styled("find: ", t.accent),
            Span::styled(clean(&f.query).into_owned(), t.text),
            Span::styled(place, t.warn),
            Span::styled(hint, t.dim),
        ]));
    }
    if let Some(n) = &app.notice {
        let style = match n.weight {
            Weight::Note => t.dim,
            Weight::Warning => t.warn,
            Weight::Problem => t.bad,
        };
        let text = Span::styled(clean(&n.text.replace('\n', " ")).into_owned(), style);
        let mut rows = Vec::new();
        wrap(&[text], cells, &[], &[], &mut rows);
        rows.truncate(4);
        lines.extend(rows);
    }
    if let Some(q) = &app.queued {
        let text = ellipsis(&format!("next: {}", q.replace('\n', " ")), cells);
        lines.push(Line::styled(text, t.quote));
    }
    lines
}

/// `page` rows of the conversation are shown above it.
fn rule(buf: &mut Buffer, r: Rect, page: usize, app: &App) {
    let t = &app.theme;
    if r.height == 0 {
        return;
    }
    buf.set_string(r.x, r.y, "─".repeat(r.width as usize), t.rule);
    let mut x = 2;
    if let Some(i) = app.editing {
        let n = app.tree.path_to(Some(i)).iter().filter(|&&n| app.tree.nodes[n].role == "user").count();
        let text = format!(" editing question {n} begins a branch · Esc cancels ");
        x = buf.set_stringn(x, r.y, text, r.width as usize - 4, t.warn).0;
    }
    if app.unsaved.is_some() {
        x = buf.set_stringn(x, r.y, " not saved ", r.width as usize - 4, t.bad).0 + 1;
    }
    if app.scroll != Scroll::End {
        let below = app.transcript.height.saturating_sub(app.top(page) + page);
        let text = format!(" ↓ {below} rows · Ctrl-End ");
        let at = r.width.saturating_sub(width(&text) as u16 + 2);
        if at > x {
            buf.set_string(at, r.y, text, t.accent);
        }
    }
}

/// Draws an editor and says where its cursor is.
fn editor(buf: &mut Buffer, r: Rect, e: &Editor, prompt: &str, style: Style, t: &Theme) -> Option<Position> {
    let (row, column) = e.place();
    let page = r.height as usize;
    let top = (row + 1).saturating_sub(page);
    buf.set_string(r.x, r.y, prompt, style);
    let left = r.x + width(prompt) as u16;
    for (y, range) in e.rows().iter().skip(top).take(page).enumerate() {
        let mut x = left;
        let room = |x: u16| r.right().saturating_sub(x) as usize;
        for g in e.text()[range.clone()].graphemes(true) {
            let (text, style) = match e.attachment(g) {
                Some(a) => (clean(&a.label()).into_owned(), t.code),
                None => (clean(g).into_owned(), t.text),
            };
            x = buf.set_stringn(x, r.y + y as u16, text, room(x), style).0;
        }
    }
    let x = (left as usize + column).min(r.right().saturating_sub(1) as usize) as u16;
    Some(Position::new(x, r.y + (row - top) as u16))
}

fn completions(buf: &mut Buffer, bottom: u16, app: &App) {
    let t = &app.theme;
    let c = &app.completion;
    let most = (bottom as usize).min(10);
    if c.choices.is_empty() || most == 0 || app.panel.is_some() {
        return;
    }
    let room = buf.area.width as usize;
    let wide = if c.choices.iter().all(|c| c.what.is_empty()) { room.saturating_sub(2) } else { 40 };
    let names = c.choices.iter().map(|c| width(shown(c))).max().unwrap_or(0).min(wide);
    let from = (c.at + 1).saturating_sub(most);
    let rows: Vec<_> = c.choices.iter().enumerate().skip(from).take(most).collect();
    let y = bottom - rows.len() as u16;
    for (row, (i, choice)) in rows.into_iter().enumerate() {
        let at = y + row as u16;
        let style = if i == c.at { t.selected } else { Style::new() };
        let text = format!(" {}  {}", pad(shown(choice), names), choice.what);
        clear(buf, Rect::new(0, at, buf.area.width, 1));
        buf.set_string(0, at, pad(&ellipsis(&text, room), room), t.dim.patch(style));
        buf.set_string(1, at, ellipsis(shown(choice), names), t.accent.patch(style));
    }
}

/// Of a path, its own name: the folder is what all have in common, and stands in the editor.
fn shown(c: &Choice) -> &str {
    let folder = c.text.trim_end_matches(['/', '"']).rfind('/').filter(|_| c.what.is_empty());
    &c.text[folder.map_or(0, |i| i + 1)..]
}

fn pad(s: &str, cells: usize) -> String {
    format!("{s}{}", " ".repeat(cells.saturating_sub(width(s))))
}

/// A number of tokens, short.
fn count(n: usize) -> String {
    if n < 10_000 { n.to_string() } else { format!("{:.1}k", n as f64 / 1e3) }
}

/// A time, short.
fn duration(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{}:{:02} min", s / 60, s % 60),
        s => format!("{}:{:02} h", s / 3600, s / 60 % 60),
    }
}

fn bytes(n: u64) -> String {
    match n {
        0..1_000_000_000 => format!("{:.0} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

fn bar(part: f64, cells: usize) -> String {
    let full = (part.clamp(0.0, 1.0) * cells as f64).round() as usize;
    "▰".repeat(full) + &"▱".repeat(cells - full)
}

fn status(buf: &mut Buffer, r: Rect, app: &App) {
    let t = &app.theme;
    let (text, style) = match &app.state {
        State::Loading(_, 0) => ("loading".to_string(), t.warn),
        State::Loading(done, of) => (format!("loading {:.0} %", *done as f64 / *of as f64 * 100.0), t.warn),
        State::Ready => ("ready".into(), t.good),
        State::Asked => ("reading".into(), t.warn),
        State::Reading { done, of, .. } => {
            let left = app.time_left().map_or(String::new(), |d| format!(" · {} left", duration(d)));
            (format!("reading {}/{}{left}", count(*done), count(*of)), t.warn)
        }
        State::Thinking => ("thinking".into(), t.good),
        State::Answering => ("answering".into(), t.good),
        State::Stopped => ("stopped".into(), t.warn),
        State::NoModel => ("no model".into(), t.bad),
    };
    let mark = match app.busy() {
        true => SPINNER[(app.ticks() % SPINNER.len() as u128) as usize],
        false => "●",
    };
    let state = format!(" {mark} {text}");
    // In the order in which they are left out where the screen is narrow, the last first.
    let mut parts: Vec<(usize, String, Style)> = Vec::new();
    let fill = app.fill();
    let style_of_fill = match fill {
        f if f >= 0.95 => t.bad,
        f if f >= 0.85 => t.warn,
        _ => t.dim,
    };
    if let Some(m) = &app.model {
        parts.push((
            3,
            format!("ctx {} {:.0} %", bar(fill, if r.width < 60 { 5 } else { 10 }), fill * 100.0),
            style_of_fill,
        ));
        if let Some(rate) = app.rate() {
            parts.push((0, format!("{rate:.1} t/s"), t.text));
        }
        if let Some(b) = app.bandwidth() {
            parts.push((1, format!("{b:.1} GB/s"), t.dim));
        }
        parts.push((4, format!("{}/{}", count(app.used), count(m.context)), t.dim));
    }
    if let Some(b) = app.memory {
        parts.push((5, format!("mem {}", bytes(b)), t.dim));
    }
    if app.model.is_some() && app.pace.0 > 0 && app.busy() {
        parts.push((2, format!("{} tokens", app.pace.0), t.dim));
    }
    let mut room = (r.width as usize).saturating_sub(width(&state) + 1);
    parts.retain(|p| {
        let fits = width(&p.1) + 2 <= room;
        room -= if fits { width(&p.1) + 2 } else { 0 };
        fits
    });
    parts.sort_by_key(|p| p.0);
    buf.set_stringn(r.x, r.y, &state, r.width as usize, style);
    let mut x = r.x + width(&state) as u16;
    for (_, text, style) in parts.iter().filter(|p| p.0 < 3) {
        x = buf.set_stringn(x + 2, r.y, text, r.width as usize, *style).0;
    }
    let mut x = r.right().saturating_sub(1);
    for (_, text, style) in parts.iter().filter(|p| p.0 >= 3).rev() {
        x = x.saturating_sub(width(text) as u16);
        buf.set_string(x, r.y, text, *style);
        x = x.saturating_sub(2);
    }
}

fn clear(buf: &mut Buffer, r: Rect) {
    for y in r.top()..r.bottom() {
        for x in r.left()..r.right() {
            if let Some(c) = buf.cell_mut((x, y)) {
                c.reset();
            }
        }
    }
}

/// An empty frame in the middle of the screen, all of it where that is small; its inside.
fn frame(buf: &mut Buffer, screen: Rect, (columns, rows): (u16, u16), title: &str, hint: &str, t: &Theme) -> Rect {
    let (w, h) = (columns.min(screen.width), rows.min(screen.height));
    let r = Rect::new((screen.width - w) / 2, (screen.height - h) / 2, w, h);
    clear(buf, r);
    let line = "─".repeat(w.saturating_sub(2) as usize);
    buf.set_string(r.x, r.y, format!("╭{line}╮"), t.rule);
    for y in r.y + 1..r.bottom() - 1 {
        buf.set_string(r.x, y, "│", t.rule);
        buf.set_string(r.right() - 1, y, "│", t.rule);
    }
    buf.set_string(r.x, r.bottom() - 1, format!("╰{line}╯"), t.rule);
    let room = w.saturating_sub(6) as usize;
    buf.set_string(r.x + 2, r.y, format!(" {} ", ellipsis(title, room)), t.accent);
    if !hint.is_empty() {
        buf.set_string(r.x + 2, r.bottom() - 1, format!(" {} ", ellipsis(hint, room)), t.dim);
    }
    Rect::new(r.x + 2, r.y + 1, w.saturating_sub(4), h.saturating_sub(2))
}

/// Keys and commands, one after the other, for a box of so many columns.
fn help_lines(columns: u16, t: &Theme) -> Vec<Line<'static>> {
    let room = columns.saturating_sub(4) as usize;
    let key = if room < 50 { 11 } else { 19 };
    let mut lines = Vec::new();
    let mut row = |k: &str, what: &str| {
        let first = [Span::styled(pad(&ellipsis(k, key), key + 1), t.accent)];
        let rest = [Span::raw(" ".repeat(key + 1))];
        wrap(&[Span::styled(what.to_string(), t.text)], room, &first, &rest, &mut lines);
    };
    for (k, what) in KEYS {
        row(k, what);
    }
    for c in COMMANDS {
        let name = format!("/{} {}", c.names[0], c.argument);
        let what = if c.key.is_empty() { c.what.to_string() } else { format!("{} ({})", c.what, c.key) };
        row(name.trim(), &what);
    }
    lines
}

/// Columns of the box that help stands in.
fn help_columns(columns: u16) -> u16 {
    columns.min(86)
}

/// How far help can be scrolled on a screen of so many columns and rows.
pub fn help_scroll((columns, rows): (u16, u16), t: &Theme) -> usize {
    help_lines(help_columns(columns), t).len().saturating_sub(rows.saturating_sub(2) as usize)
}

fn help(buf: &mut Buffer, screen: Rect, from: usize, t: &Theme) {
    let columns = help_columns(screen.width);
    let lines = help_lines(columns, t);
    let rows = screen.height.min(lines.len() as u16 + 2);
    let inside = frame(buf, screen, (columns, rows), "keys and commands", "↑ ↓ PgDn scroll · Esc", t);
    let page = inside.height as usize;
    // The screen may have grown since.
    let from = from.min(lines.len().saturating_sub(page));
    for (y, line) in lines.iter().skip(from).take(page).enumerate() {
        buf.set_line(inside.x, inside.y + y as u16, line, inside.width);
    }
}

fn settings(buf: &mut Buffer, screen: Rect, s: &Settings, t: &Theme) -> Option<Position> {
    let system_rows = match (&s.editor, s.at) {
        (Some(e), 0) => (e.rows().len() as u16).clamp(1, (screen.height / 2).max(1)),
        _ => 1,
    };
    let size = (screen.width.min(SETTINGS), s.rows.len() as u16 + 3 + system_rows);
    let hint = if s.editor.is_some() {
        "Enter sets · Alt-Enter new line · Esc"
    } else {
        "↑ ↓ · Enter changes · Esc leaves"
    };
    let inside = frame(buf, screen, size, "system prompt and sampling", hint, t);
    let names = setting_names(inside.width);
    let (mut y, mut cursor) = (inside.y, None);
    let from = (s.at + 2).saturating_sub(inside.height as usize);
    for (i, (name, value, what)) in s.rows.iter().enumerate().skip(from) {
        if y >= inside.bottom() {
            break;
        }
        let chosen = i == s.at;
        let rows = if i == 0 { system_rows } else { 1 };
        buf.set_string(inside.x, y, ellipsis(name, names as usize), if chosen { t.accent } else { t.text });
        let x = inside.x + names + 1;
        let room = inside.right().saturating_sub(x);
        match &s.editor {
            Some(e) if chosen => cursor = editor(buf, Rect::new(x, y, room, rows), e, "", t.text, t),
            _ => {
                let shown = if i == 0 && value.is_empty() { "none" } else { value };
                let line = ellipsis(&shown.replace('\n', " "), if i == 0 { room as usize } else { 10 });
                buf.set_stringn(x, y, &line, room as usize, t.code);
                if i > 0 || value.is_empty() {
                    buf.set_stringn(x + 12, y, what, (room as usize).saturating_sub(12), t.dim);
                }
            }
        }
        y += rows;
    }
    if let Some(p) = &s.problem {
        buf.set_stringn(inside.x, inside.bottom() - 1, p, inside.width as usize, t.bad);
    }
    cursor
}

fn list(buf: &mut Buffer, screen: Rect, l: &List, t: &Theme) -> Option<Position> {
    let shown = l.shown();
    let (title, hint, empty) = match &l.items {
        Items::Conversations(_) => {
            ("conversations", "Enter opens · F2 names · Ctrl-E exports · Del deletes · Esc", "none yet")
        }
        Items::Models(_) => ("models", "Enter loads · Esc", "none"),
    };
    let size = (screen.width.min(LIST), (shown.len() as u16).clamp(3, 20) + 4);
    let inside = frame(buf, screen, size, title, hint, t);
    let room = inside.width as usize;
    let page = inside.height.saturating_sub(1) as usize;
    let filter = ellipsis(&l.filter, room.saturating_sub(3));
    buf.set_string(inside.x, inside.y, "› ", t.accent);
    buf.set_string(inside.x + 2, inside.y, &filter, t.text);
    let mut cursor = Some(Position::new(inside.x + 2 + width(&filter) as u16, inside.y));
    if shown.is_empty() {
        buf.set_string(inside.x + 2, inside.y + 1, if l.filter.is_empty() { empty } else { "nothing fits" }, t.dim);
    }
    let from = (l.at + 1).saturating_sub(page);
    for (row, &i) in shown.iter().skip(from).take(page).enumerate() {
        let y = inside.y + 1 + row as u16;
        let chosen = from + row == l.at;
        let style = if chosen { t.selected } else { Style::new() };
        let (name, what) = match &l.items {
            Items::Conversations(c) => {
                let title = if c[i].title.is_empty() { "without a name" } else { &c[i].title };
                (title.to_string(), format!("{} turns · {:>6}", c[i].turns, ago(&c[i])))
            }
            Items::Models(m) => {
                let size = m[i].bytes.map_or(String::new(), bytes);
                (m[i].name.clone(), format!("{size} · {}", if m[i].here { "here" } else { "to be fetched" }))
            }
        };
        let what = if room < 40 { String::new() } else { what };
        if let (Some((_, e)), true) = (&l.naming, chosen) {
            cursor = editor(buf, Rect::new(inside.x, y, inside.width, 1), e, "› ", t.accent, t);
            continue;
        }
        let name = ellipsis(&name, room.saturating_sub(width(&what) + 3));
        buf.set_string(inside.x, y, pad("", room), style);
        buf.set_string(inside.x, y, if chosen { "▸" } else { " " }, t.accent.patch(style));
        buf.set_string(inside.x + 2, y, name, t.text.patch(style));
        buf.set_string(inside.right().saturating_sub(width(&what) as u16), y, what, t.dim.patch(style));
    }
    cursor
}

fn confirm(buf: &mut Buffer, screen: Rect, text: &str, t: &Theme) {
    let columns = screen.width.min(64);
    let mut lines = Vec::new();
    wrap(&[Span::styled(clean(text).into_owned(), t.text)], columns.saturating_sub(4) as usize, &[], &[], &mut lines);
    let inside = frame(buf, screen, (columns, lines.len() as u16 + 2), "?", "Enter yes · Esc no", t);
    for (y, line) in lines.iter().take(inside.height as usize).enumerate() {
        buf.set_line(inside.x, inside.y + y as u16, line, inside.width);
    }
}

//! What can be asked for: `/commands`, and the keys, as data, so that help and completion say what is true.

/// What the person wants done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Show keys and commands.
    Help,
    /// Begin a new conversation.
    New,
    /// List conversations.
    Conversations,
    /// Name this conversation.
    Rename,
    /// Write this conversation to a file.
    Export,
    /// Answer the last question again.
    Regenerate,
    /// Change an earlier question.
    Edit,
    /// Go on with an answer that was cut.
    Continue,
    /// The branch before.
    PreviousBranch,
    /// The branch after.
    NextBranch,
    /// Copy the last answer, or a code block of it.
    Copy,
    /// Set the system prompt.
    System,
    /// The panel of system prompt and sampling, or one value of it.
    Settings,
    /// Another model.
    Model,
    /// What is known of the model and of the conversation.
    Info,
    /// Search.
    Find,
    /// Attach a file.
    File,
    /// Fold or unfold thoughts and long texts.
    Fold,
    /// Other colours.
    Theme,
    /// Whether the mouse scrolls here, or selects as the terminal does.
    Mouse,
    /// Stop.
    Stop,
    /// End the program.
    Quit,
}

/// A command.
pub struct Command {
    /// Its names, without the slash; the first is the one shown.
    pub names: &'static [&'static str],
    /// What may follow.
    pub argument: &'static str,
    /// What it does.
    pub what: &'static str,
    /// The key that does the same.
    pub key: &'static str,
    /// The same, for the program.
    pub action: Action,
}

const fn command(
    names: &'static [&'static str],
    argument: &'static str,
    key: &'static str,
    what: &'static str,
    action: Action,
) -> Command {
    Command { names, argument, what, key, action }
}

/// All commands.
pub const COMMANDS: &[Command] = &[
    command(&["help", "?"], "", "F1", "all keys and commands", Action::Help),
    command(&["regen", "retry"], "", "Ctrl-R", "answer the last question again, as a new branch", Action::Regenerate),
    command(&["edit"], "", "Alt-E", "change a question and branch off there", Action::Edit),
    command(&["continue"], "", "Alt-C", "go on with an answer that was cut", Action::Continue),
    command(&["prev"], "", "Alt-←", "the branch before this one", Action::PreviousBranch),
    command(&["next"], "", "Alt-→", "the branch after this one", Action::NextBranch),
    command(&["copy"], "[N]", "Ctrl-Y", "copy the last answer, or code block N of it", Action::Copy),
    command(&["find", "search"], "TEXT", "Ctrl-F", "search this conversation", Action::Find),
    command(&["fold"], "", "Ctrl-T", "unfold or fold thoughts and long texts", Action::Fold),
    command(&["file", "read"], "PATH", "@", "attach a text file", Action::File),
    command(&["new", "clear"], "", "Ctrl-N", "begin a new conversation", Action::New),
    command(
        &["open", "sessions", "resume"],
        "",
        "Ctrl-O",
        "conversations: go on, rename, export, delete",
        Action::Conversations,
    ),
    command(&["rename", "title"], "TITLE", "", "name this conversation", Action::Rename),
    command(&["export", "save"], "FILE", "", "write this conversation as Markdown, or .json", Action::Export),
    command(&["set"], "[NAME VALUE]", "Ctrl-P", "system prompt and sampling", Action::Settings),
    command(&["system"], "TEXT", "", "set the system prompt", Action::System),
    command(&["model", "load"], "[NAME]", "Alt-M", "another model", Action::Model),
    command(&["info", "show"], "", "", "the model, and the file of this conversation", Action::Info),
    command(&["theme"], "[dark|light|none]", "", "other colours", Action::Theme),
    command(&["mouse"], "", "", "let the terminal select with the mouse, or scroll with it", Action::Mouse),
    command(&["stop"], "", "Esc", "stop the answer", Action::Stop),
    command(&["quit", "exit", "bye"], "", "Ctrl-D", "end", Action::Quit),
];

/// Keys that are no commands, and what they do.
pub const KEYS: &[(&str, &str)] = &[
    ("Enter", "send"),
    ("Alt-Enter, Ctrl-J", "a new line; also \\ and Enter, and Shift-Enter where the terminal tells"),
    ("↑ ↓", "lines, then earlier questions"),
    ("Ctrl-← →, Alt-B F", "a word; Ctrl-A E the line"),
    ("Ctrl-W, Alt-D", "delete a word; Ctrl-U K the line"),
    ("Ctrl-_, Alt-_", "undo, redo"),
    ("Ctrl-V", "put back what was deleted"),
    ("Tab", "complete /commands and @files"),
    ("Ctrl-G", "write in $VISUAL or $EDITOR"),
    ("Esc, Ctrl-C", "stop the answer; leave what is open; Ctrl-C twice ends"),
    ("PgUp PgDn, wheel", "scroll; Shift-↑ ↓ by lines"),
    ("Ctrl-Home End", "to the beginning, to the end"),
    ("Alt-↑ ↓", "from turn to turn"),
    ("Alt-Y", "copy the last code block"),
    ("Ctrl-Z", "to the shell; fg comes back"),
    ("Ctrl-L", "draw the screen anew"),
];

/// The command that a line names, and what follows its name.
pub fn parse(line: &str) -> Option<(&'static Command, &str)> {
    let line = line.trim().strip_prefix('/')?;
    let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let name = name.to_ascii_lowercase();
    let command = COMMANDS.iter().find(|c| c.names.contains(&name.as_str()))?;
    Some((command, argument.trim()))
}

/// The commands that begin so.
pub fn matching(line: &str) -> Vec<&'static Command> {
    let Some(begun) = line.strip_prefix('/').filter(|b| !b.contains(char::is_whitespace)) else { return Vec::new() };
    let begun = begun.to_ascii_lowercase();
    COMMANDS.iter().filter(|c| c.names.iter().any(|n| n.starts_with(&begun))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_keys_mean_one_thing() {
        let names: Vec<_> = COMMANDS.iter().flat_map(|c| c.names).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        let keys: Vec<_> = COMMANDS.iter().map(|c| c.key).filter(|k| !k.is_empty()).collect();
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
    }

    #[test]
    fn lines_become_commands() {
        let cases = [
            ("/copy 2", Some((Action::Copy, "2"))),
            ("/BYE", Some((Action::Quit, ""))),
            ("/load x.gguf", Some((Action::Model, "x.gguf"))),
            ("/nothing", None),
            ("hi", None),
        ];
        for (line, want) in cases {
            assert_eq!(parse(line).map(|(c, a)| (c.action, a)), want, "{line}");
        }
        assert_eq!(matching("/re").iter().map(|c| c.names[0]).collect::<Vec<_>>(), ["regen", "file", "open", "rename"]);
        assert!(matching("/copy 2").is_empty() && matching("copy").is_empty());
    }
}

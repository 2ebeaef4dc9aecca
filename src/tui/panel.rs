//! What lies over the conversation for a while: help, settings, lists, search, a question.

use super::editor::Editor;
use crate::chat::history::Summary;
use crate::sample::SampleParams;
use crate::sample::parse::{last_n, number, penalty, seed, top_k};
use std::path::PathBuf;

/// One of them.
pub enum Panel {
    /// Keys and commands, from a line on.
    Help(usize),
    /// System prompt and sampling.
    Settings(Settings),
    /// Conversations or models.
    List(List),
    /// A search in the conversation.
    Find(Find),
    /// A question, and what to do when Enter answers it.
    Confirm(String, Confirmed),
}

/// What a yes means.
#[derive(Clone, PartialEq, Debug)]
pub enum Confirmed {
    /// Ask for an answer to this turn again, or for more of it, the oldest turns left out.
    LeaveOut {
        /// The turn.
        leaf: Option<usize>,
        /// Whether it is gone on with.
        go_on: bool,
    },
    /// Delete a conversation, and go back to the list.
    Delete(PathBuf, Place),
    /// Fetch a model over the network.
    Fetch(String),
    /// Begin a new conversation, what is not saved of this one being lost.
    New,
    /// Go on with another one, likewise.
    Open(PathBuf),
    /// End the program, likewise.
    Quit,
}

/// A search.
#[derive(Default)]
pub struct Find {
    /// What is sought.
    pub query: String,
    /// The rows where it stands.
    pub rows: Vec<usize>,
    /// Which of them is shown.
    pub at: usize,
}

/// The panel of settings.
pub struct Settings {
    /// Name, value, what it is.
    pub rows: Vec<(&'static str, String, &'static str)>,
    /// The row under the cursor.
    pub at: usize,
    /// A value that is being changed.
    pub editor: Option<Editor>,
    /// Why the last one could not be set.
    pub problem: Option<String>,
}

impl Settings {
    /// With the values as they are.
    pub fn new(system: &str, p: &SampleParams) -> Settings {
        let mut rows = vec![("system", system.to_string(), "what the model is told before all else")];
        rows.extend(SAMPLING.iter().map(|s| (s.name, (s.get)(p), s.what)));
        Settings { rows, at: 0, editor: None, problem: None }
    }
}

/// A parameter of sampling by its name.
struct Parameter {
    name: &'static str,
    what: &'static str,
    get: fn(&SampleParams) -> String,
    set: fn(&mut SampleParams, &str) -> Result<(), String>,
}

const SAMPLING: &[Parameter] = &[
    Parameter {
        name: "temp",
        what: "temperature; 0 always takes the most likely token",
        get: |p| p.temp.to_string(),
        set: |p, s| number::<-100, 100>(s).map(|x| p.temp = x),
    },
    Parameter {
        name: "top-k",
        what: "keep the K most likely tokens; 0 for all",
        get: |p| p.top_k.to_string(),
        set: |p, s| top_k(s).map(|k| p.top_k = k),
    },
    Parameter {
        name: "top-p",
        what: "keep the most likely tokens up to a sum of P",
        get: |p| p.top_p.to_string(),
        set: |p, s| number::<0, 1>(s).map(|x| p.top_p = x),
    },
    Parameter {
        name: "min-p",
        what: "keep tokens at least P times as likely as the first",
        get: |p| p.min_p.to_string(),
        set: |p, s| number::<0, 1>(s).map(|x| p.min_p = x),
    },
    Parameter {
        name: "typical",
        what: "locally typical sampling up to a sum of P",
        get: |p| p.typical_p.to_string(),
        set: |p, s| number::<0, 1>(s).map(|x| p.typical_p = x),
    },
    Parameter {
        name: "repeat-penalty",
        what: "penalty for recent tokens; 1 for none",
        get: |p| p.repeat_penalty.to_string(),
        set: |p, s| penalty(s).map(|x| p.repeat_penalty = x),
    },
    Parameter {
        name: "repeat-last-n",
        what: "how many tokens are recent; -1 for all",
        get: |p| if p.repeat_last_n == usize::MAX { "-1".into() } else { p.repeat_last_n.to_string() },
        set: |p, s| last_n(s).map(|n| p.repeat_last_n = n),
    },
    Parameter {
        name: "presence-penalty",
        what: "subtracted from the logits of recent tokens",
        get: |p| p.presence_penalty.to_string(),
        set: |p, s| number::<-100, 100>(s).map(|x| p.presence_penalty = x),
    },
    Parameter {
        name: "frequency-penalty",
        what: "subtracted for each recent occurrence",
        get: |p| p.frequency_penalty.to_string(),
        set: |p, s| number::<-100, 100>(s).map(|x| p.frequency_penalty = x),
    },
    Parameter {
        name: "seed",
        what: "seed of the random numbers; -1 for a random one",
        get: |p| p.seed.map_or("-1".into(), |s| s.to_string()),
        set: |p, s| seed(s).map(|s| p.seed = s.0),
    },
];

/// Sets a parameter by its name, also as other programs have it.
pub fn set(p: &mut SampleParams, name: &str, value: &str) -> Result<(), String> {
    let name = &*match name {
        "temperature" => "temp".to_string(),
        other => other.replace('_', "-"),
    };
    let Some(s) = SAMPLING.iter().find(|s| s.name == name) else {
        let names: Vec<_> = SAMPLING.iter().map(|s| s.name).collect();
        return Err(format!("no setting {name}; there are system, {}", names.join(", ")));
    };
    (s.set)(p, value.trim()).map_err(|e| format!("{name} {value}: {e}"))
}

/// A model that can be switched to.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelItem {
    /// `NAME:QUANT`, or a path.
    pub name: String,
    /// Bytes, where they are known.
    pub bytes: Option<u64>,
    /// Whether it is on this machine.
    pub here: bool,
}

/// What a list holds.
pub enum Items {
    /// Conversations.
    Conversations(Vec<Summary>),
    /// Models.
    Models(Vec<ModelItem>),
}

/// Where a list was left.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Place {
    filter: String,
    at: usize,
    path: Option<PathBuf>, // of the conversation under the cursor
}

/// A list to choose from.
pub struct List {
    /// Of what.
    pub items: Items,
    /// What their names must contain.
    pub filter: String,
    /// The row under the cursor, of those that are shown.
    pub at: usize,
    /// A new name that is being written, and whose.
    pub naming: Option<(PathBuf, Editor)>,
}

impl List {
    /// A list from its beginning.
    pub fn new(items: Items) -> List {
        List { items, filter: String::new(), at: 0, naming: None }
    }

    /// A list of conversations, from where it was left: from the one that was under the cursor, or what took its place.
    pub fn conversations(found: Vec<Summary>, from: Place) -> List {
        let place = found.iter().position(|c| Some(&c.path) == from.path.as_ref());
        let mut l = List { filter: from.filter, ..List::new(Items::Conversations(found)) };
        let shown = l.shown();
        let same = shown.iter().position(|&i| Some(i) == place);
        l.at = same.unwrap_or(from.at.min(shown.len().saturating_sub(1)));
        l
    }

    /// Where it is left.
    pub fn place(&self) -> Place {
        Place { filter: self.filter.clone(), at: self.at, path: self.conversation().map(|c| c.path.clone()) }
    }

    /// The places in the list of those that are shown.
    pub fn shown(&self) -> Vec<usize> {
        let filter = self.filter.to_lowercase();
        let fits = |s: &str| s.to_lowercase().contains(&filter);
        match &self.items {
            Items::Conversations(c) => (0..c.len()).filter(|&i| fits(&c[i].title)).collect(),
            Items::Models(m) => (0..m.len()).filter(|&i| fits(&m[i].name)).collect(),
        }
    }

    /// The conversation under the cursor.
    pub fn conversation(&self) -> Option<&Summary> {
        let Items::Conversations(c) = &self.items else { return None };
        self.shown().get(self.at).map(|&i| &c[i])
    }

    /// The model under the cursor.
    pub fn model(&self) -> Option<&ModelItem> {
        let Items::Models(m) = &self.items else { return None };
        self.shown().get(self.at).map(|&i| &m[i])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_by_name_or_refused() {
        let mut p = SampleParams::default();
        for (name, value) in [("temp", "0.5"), ("top-k", "0"), ("seed", "7"), ("repeat-penalty", " 1.1 ")] {
            assert_eq!(set(&mut p, name, value), Ok(()), "{name}");
        }
        let want = SampleParams { temp: 0.5, top_k: 0, seed: Some(7), repeat_penalty: 1.1, ..SampleParams::default() };
        assert_eq!(p, want);
        for name in ["seed", "top-k", "repeat-last-n"] {
            set(&mut p, name, "-1").unwrap();
        }
        assert_eq!((p.seed, p.top_k, p.repeat_last_n), (None, 0, usize::MAX));
        for (name, value) in [
            ("temp", "x"),
            ("temp", "NaN"),
            ("top-p", "2"),
            ("top-k", "1.5"),
            ("nothing", "1"),
            ("repeat-penalty", "0"),
        ] {
            assert!(set(&mut p, name, value).is_err(), "{name} {value}");
        }
        // What is shown can be typed.
        for (name, value, _) in Settings::new("", &p).rows.into_iter().skip(1) {
            assert_eq!(set(&mut p.clone(), name, &value), Ok(()), "{name}");
        }
    }
}

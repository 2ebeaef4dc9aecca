//! Conversations for other programs.

use super::Conversation;
use serde_json::{Value, json};

/// The branch at which the conversation stands, as Markdown: the title, and a heading for each turn.
pub fn export_markdown(c: &Conversation) -> String {
    let mut out = format!("# {}\n", c.title());
    for t in c.head().map(|h| c.path_to(h)).unwrap_or_default() {
        let who = match t.role.as_str() {
            "user" => "User",
            "assistant" => "Assistant",
            "system" => "System",
            other => other,
        };
        let cut = match t.state {
            super::TurnState::Whole => "",
            super::TurnState::Partial => " (cut off)",
            super::TurnState::Stopped => " (stopped)",
        };
        out.push_str(&format!("\n## {who}{cut}\n\n{}\n", t.content.trim_end_matches('\n')));
    }
    out
}

/// All turns of all branches: `{title, model, head, turns: [{id, parent, role, content, state}]}`.
pub fn export_json(c: &Conversation) -> Value {
    let turns: Vec<Value> = c
        .turns()
        .iter()
        .map(|t| {
            json!({
                "id": t.id.number(),
                "parent": t.parent.map(|p| p.number()),
                "role": t.role,
                "content": t.content,
                "state": t.state.name(),
            })
        })
        .collect();
    json!({"title": c.title(), "model": c.model(), "head": c.head().map(|h| h.number()), "turns": turns})
}
